"""Texts of rows, read when they are asked for: a list of all may be larger than what is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload


class Told(Sequence[str]):
    """A text of each row, asked for row by row: a list of all would be larger than what is trained on."""

    def __init__(self, of: Callable[[int], str], length: int) -> None:
        """`of` gives the text of a row below `length`."""
        self._of, self._length = of, length

    def __len__(self) -> int:
        """Rows."""
        return self._length

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Told: ...
    def __getitem__(self, row: int | slice) -> str | Told:
        """The text of a row, or those of some, which are not asked for yet."""
        if isinstance(row, slice):
            rows = range(*row.indices(self._length))
            return Told(lambda place: self._of(rows[place]), len(rows))
        if not -self._length <= row < self._length:
            raise IndexError(row)
        return self._of(row % self._length)


def picked(names: Sequence[str], rows: Sequence[int]) -> Sequence[str]:
    """The names of some rows: a list where all are one, else read when somebody asks (hardly ever a step)."""
    if isinstance(names, list):
        return [names[row] for row in rows]
    return Told(lambda place: names[rows[place]], len(rows))
