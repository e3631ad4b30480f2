"""Numbers from the command line and from Python, each within its range: a NaN passes every other check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from lcm_kit.errors import UserError

SEED = 2**63 - 1  # the largest; as in configs
WEIGHT = 1000.0  # of a LoRA, up or down; as in configs


class Range(NamedTuple):
    """From the lowest number, or above it, to the highest."""

    low: float
    high: float
    above: bool = False


RANGES = {
    "steps": Range(1, 1000), "guidance_scale": Range(1, 1000), "weight": Range(-WEIGHT, WEIGHT),
    "seed": Range(-SEED - 1, SEED), "count": Range(1, 1000), "batch_size": Range(1, 1000),
    "width": Range(8, 8192), "height": Range(8, 8192), "alpha": Range(0, 1e9, above=True),
    "rank": Range(1, 65_536),
    "strength": Range(0, 1, above=True), "feather": Range(0, 512), "scale": Range(2, 8),
    "frames": Range(2, 1000), "fps": Range(0.1, 60),
}  # fmt: skip


def in_range(number: str, name: str | None = None) -> Callable[[float | None], Any]:
    """As `within` of that number of `RANGES`; `name`: what the user calls it, where that is another."""
    low, high, above = RANGES[number]
    return within(name or number, low, high, above=above)


def require_in_range(**numbers: float | None) -> None:
    """Raise `UserError` for the first of the numbers, by name, that is out of its range."""
    for number, value in numbers.items():
        in_range(number)(value)


def require_batch_size(given: int | str, name: str = "batch_size") -> int | Literal["auto"]:
    """A number of pictures at once, or "auto". Raises `UserError` for what is neither."""
    if given == "auto":
        return "auto"
    try:
        number = int(given)
    except ValueError:
        raise UserError(f"{name} {given!r} is no number; give one, or auto") from None
    return int(in_range("batch_size", name)(number))


def within(name: str, low: float, high: float, *, above: bool = False) -> Callable[[float | None], Any]:
    """A callback for the option `name`: its value if that is from `low` (or `above` it) to `high`.

    None, which is no value, passes; NaN and the infinities do not. The callback raises `UserError`.
    """

    def check(value: float | None) -> Any:
        inside = value is None or (low <= value <= high and not (above and value == low))
        if not inside:
            span = f"above {low:g} and at most" if above else f"from {_digits(low)} to"
            raise UserError(f"{name} {value} is out of range; give a number {span} {_digits(high)}")
        return value

    return check


def _digits(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
