"""The weights of a base's parts: which files hold them, whether they are the model's, and the model itself.

A library that does not find a tensor in a file makes one up. So every model of a base comes through
`load_model`: names and shapes in the files' headers are those of the model that the configuration describes,
or it is an error. diffusers and transformers are imported on use: it takes seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lcm_kit.bases.headers import Entry, read_header
from lcm_kit.bases.source import STEMS, read_json
from lcm_kit.errors import UserError, first_line
from lcm_kit.families import PARTS

Shapes = dict[str, tuple[int, ...]]
# Names of the attention in the middle of a VAE that diffusers before 0.18 wrote, and loads to this day
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What a file of a text encoder may hold besides: the rest of the CLIP model that it was taken from
_OF_CLIP = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


class Place(NamedTuple):
    """Where the parts of a base lie."""

    path: str  # the base as a user calls it
    folder: Path
    variant: str | None = None


# -- Files ---------------------------------------------------------------------------------------------------


def weight_files(place: Place, part: str) -> list[Path]:
    """The safetensors files of a part: those of the variant, or of none where only other parts have it.

    The same choice as diffusers' pipelines make. Raises `UserError` if there is none, or if a piece of
    several is not there.
    """
    if (found := _files(place, part, part_variant(place, part))) is not None:
        return found
    wanted = f" of variant {place.variant!r}" if place.variant else ""
    raise UserError(
        f"base {place.path!r} has no safetensors weights{wanted} in {part}/; choose another base.variant, "
        "or save the base again with diffusers' save_pretrained"
    )


def part_variant(place: Place, part: str) -> str | None:
    """The variant that a part is loaded in: the place's, or None for a part that has no such file."""
    if place.variant is None or _files(place, part, place.variant) is not None:
        return place.variant
    others = [other for other in STEMS if (place.folder / other).is_dir() and other != part]
    return None if any(_files(place, other, place.variant) is not None for other in others) else place.variant


def index_file(place: Place, part: str) -> Path | None:
    """The file that names the pieces of a part's weights; None where they are one file."""
    return _one_or_index(place, part, part_variant(place, part))[1]


def _files(place: Place, part: str, variant: str | None) -> list[Path] | None:
    """One file or the pieces that an index names, whichever the part's library looks for first."""
    single, index = _one_or_index(place, part, variant)
    if single is not None:
        return [single]
    return None if index is None else _pieces(place, index)


def _one_or_index(place: Place, part: str, variant: str | None) -> tuple[Path | None, Path | None]:
    folder, stem, mark = place.folder / part, STEMS[part], f".{variant}" if variant else ""
    single = folder / f"{stem}{mark}.safetensors"
    # the second name is that of older diffusers
    names = (f"{stem}.safetensors.index{mark}.json", f"{stem}.safetensors{mark}.index.json")
    index = next((folder / name for name in names if (folder / name).is_file()), None)
    if single.is_file() and (index is None or stem == "model"):
        return single, None
    return None, index


def _pieces(place: Place, index: Path) -> list[Path]:
    held = read_json(index, place.path).get("weight_map")
    names = sorted(set(map(str, held.values()))) if isinstance(held, Mapping) else []
    name = f"base {place.path!r}: {index.parent.name}/{index.name}"
    # a name that leads out of the folder would be read elsewhere
    if not names or any(Path(piece).name != piece for piece in names):
        raise UserError(f"{name} does not say which files hold the weights; download or save the base again")
    if missing := [piece for piece in names if not (index.parent / piece).is_file()]:
        raise UserError(
            f"{name} names {missing[0]}, which is not there; download it, or the whole base again"
        )
    return [index.parent / piece for piece in names]


def entries(place: Place, part: str) -> dict[str, Entry]:
    """The tensors of a part, from its files' headers. Raises `UserError` for a file that is cut short."""
    found: dict[str, Entry] = {}
    for file in weight_files(place, part):
        found |= read_header(file, f"base {place.path!r}: {part}/{file.name}").entries
    return found


# -- Do they fit? --------------------------------------------------------------------------------------------


def require_fit(place: Place, part: str) -> None:
    """Raise `UserError` unless the files of a part hold each tensor of its model, in its shape, and no other.

    No tensor is read; the model is built on torch's meta device (about 2 s for SDXL's UNet).
    """
    held, expected = _held(part, entries(place, part)), _expected(place, part)
    name = f"base {place.path!r}: {part}"
    again = (
        f"; download the base again, or put the {part}/config.json of the model that it was made from there"
    )
    if missing := [key for key in expected if key not in held]:
        raise UserError(f"{name} lacks {_few(missing)}{again}")
    if odd := [key for key in held if key not in expected]:
        raise UserError(f"{name} holds {_few(odd)}, for which its configuration has no place{again}")
    for key, shape in expected.items():
        if held[key].shape != shape:
            raise UserError(f"{name} has {key} in shape {list(held[key].shape)}, not {list(shape)}{again}")
        if not held[key].dtype.startswith(("F", "BF")):
            raise UserError(
                f"{name} holds {key} as {held[key].dtype}: it is quantised; take the original base"
            )


def _few(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _held(part: str, found: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a file by today's names, without those that are there for no use."""
    if not part.startswith("text_encoder"):
        return {_renamed(key): entry for key, entry in found.items()}
    of_clip = _OF_CLIP if part == "text_encoder" else tuple(end for end in _OF_CLIP if "text" not in end)
    return {
        _plain(key): entry
        for key, entry in found.items()
        if not key.endswith("position_ids") and not key.startswith(of_clip)
    }


def _renamed(key: str) -> str:
    if ".attentions." not in key:
        return key
    return ".".join(_OLD_ATTENTION.get(piece, piece) for piece in key.split("."))


def _plain(key: str) -> str:
    """transformers 5 names the tensors of a CLIPTextModel without `text_model.` in front, 4 with it."""
    return key.removeprefix("text_model.")


def _expected(place: Place, part: str) -> Shapes:
    model = empty_model(place, part)
    state = model.state_dict()
    return {_plain(key) if "text" in part else key: tuple(tensor.shape) for key, tensor in state.items()}


def empty_model(place: Place, part: str) -> Any:
    """The model that a part's configuration describes, on torch's meta device: no weights, no memory.

    Raises `UserError` if the library cannot build one.
    """
    kind, config = PARTS[part].kind(), read_json(place.folder / part / "config.json", place.path)
    with building(place.path, part), torch.device("meta"), hushed():
        if part.startswith("text_encoder"):
            return kind(kind.config_class.from_dict(config))
        return kind.from_config(config)


@contextlib.contextmanager
def building(path: str, part: str) -> Iterator[None]:
    """Turn whatever a library raises while it builds a part of the base called `path` into a `UserError`."""
    try:
        yield
    except Exception as error:  # a stranger's numbers make the libraries raise all kinds, none is our bug
        reason = first_line(error)
        raise UserError(
            f"base {path!r}: no model can be built from {part}/config.json ({reason}); download or "
            "save the base again"
        ) from error


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without diffusers' warnings, where they are about what is checked here."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# -- Loading -------------------------------------------------------------------------------------------------


def load_model(place: Place, part: str, dtype: torch.dtype) -> Any:
    """The model of a part in `dtype`, frozen, in eval mode.

    Raises `UserError` as `require_fit`, and if the library loads less than the files hold.
    """
    require_fit(place, part)
    try:
        model, report = PARTS[part].kind().from_pretrained(
            place.folder / part, variant=part_variant(place, part), dtype=dtype, use_safetensors=True,
            local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise UserError(
            f"base {place.path!r}: {part} cannot be loaded ({reason}); download or save the base again"
        ) from error
    if made_up := sorted(map(str, (*report["missing_keys"], *report.get("mismatched_keys", ())))):
        raise UserError(
            f"base {place.path!r}: {part} was loaded without {_few(made_up)}; save the base again with the "
            "newest diffusers and transformers"
        )
    return model.eval().requires_grad_(False)
