"""The weights of a base by our names of its modules, read from its folder one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcm_kit.bases.weights import Place, index_file, weight_files
from lcm_kit.errors import UserError
from lcm_kit.lora import untrusted


class Home(NamedTuple):
    """Where a base keeps a tensor."""

    file: Path  # relative to the base
    key: str
    dtype: str
    shape: tuple[int, ...]


class BaseWeights:
    """Looks tensors of a base up; reads headers when a part is first asked for, and tensors one by one."""

    def __init__(self, base: Path, variant: str | None = None) -> None:
        """Read nothing yet."""
        self._base, self._variant = base, variant
        self._homes: dict[str, dict[str, Home]] = {}

    def home(self, name: str, end: str = "weight") -> Home:
        """Where the `end` ("weight" or "bias") of the module `name` stands.

        Raises `UserError` if the base lacks the part or the module.
        """
        part, _, module = name.partition(".")
        if not (self._base / part).is_dir():
            raise UserError(
                f"{name}: base {str(self._base)!r} has no {part}; take the base that the LoRA is for"
            )
        homes = self._part(part)
        # transformers 5 saves CLIPTextModel without `text_model.` in front
        for form in (module, module.removeprefix("text_model.")):
            if (home := homes.get(f"{form}.{end}")) is not None:
                return home
        what = "such module" if end == "weight" else f"{end} of this module"
        raise UserError(f"{name}: base {str(self._base)!r} has no {what}; take the base that the LoRA is for")

    def weight(self, name: str, shape: Sequence[int]) -> Tensor:
        """The weight of the module `name`, float32, in `shape`. Raises `UserError` if it is none of that."""
        home = self.home(name)
        check_weight(name, shape, home)
        try:
            with safe_open(self._base / home.file, framework="pt") as file:
                return file.get_tensor(home.key).float().reshape(tuple(shape))
        except SafetensorError as error:
            raise UserError(
                f"{self._base / home.file} cannot be read ({error}); save the base again"
            ) from error

    def files(self, part: str) -> list[Path]:
        """The files of a part's weights, relative to the base, and the index that names them if there is one.

        Raises `UserError` as `families.weights.weight_files`.
        """
        place = Place(str(self._base), self._base, self._variant)
        index = index_file(place, part)
        found = [*([] if index is None else [index]), *weight_files(place, part)]
        return [file.relative_to(self._base) for file in found]

    def _part(self, part: str) -> dict[str, Home]:
        if part not in self._homes:
            files = [file for file in self.files(part) if file.suffix != ".json"]
            held = {file: untrusted.inspect(self._base / file).entries for file in files}
            self._homes[part] = {
                key: Home(file, key, dtype, shape)
                for file, entries in held.items()
                for key, (dtype, shape) in entries.items()
            }
        return self._homes[part]


def check_weight(name: str, shape: Sequence[int], home: Home) -> None:
    """Raise `UserError` unless the base's tensor has the shape that a LoRA changes, in plain numbers."""
    if plain_shape(shape) != plain_shape(home.shape):
        raise UserError(
            f"{name}: the LoRA changes a weight of shape {list(shape)}, the base's is {list(home.shape)}; "
            "take the base that the LoRA is for"
        )
    if not home.dtype.startswith(("F", "BF")):
        raise UserError(
            f"{name}: the base holds {home.dtype} numbers, so it is quantised; take the original base"
        )


def plain_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Without the kernel of a 1x1 convolution, which is a linear layer written differently."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
