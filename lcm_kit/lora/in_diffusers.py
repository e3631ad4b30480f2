"""Files as diffusers takes them, by running it: into a base's own models, and into AnimateDiff's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lcm_kit.errors import UserError
from lcm_kit.lora import animatediff, loading, peft_header
from lcm_kit.lora.apps import NOT_JUDGED, Loaded
from lcm_kit.lora.kinds import Dora, Rebased
from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.reading import Reading
from lcm_kit.lora.rows import ANIMATEDIFF, Row, row_of
from lcm_kit.lora.structure import Structure

DIFFUSERS = "diffusers"
# What peft says where a header names targets by their endings, which AnimateDiff's own layers have as well.
# It then makes layers of what the file holds alone, which is right.
_HARMLESS, _HARMFUL = ".motion_modules.", "The state_dict contained these additional target modules"


def plain(
    read: Reading, structure: Structure, place: tuple[Path | None, str | None], wanted: Lora, tolerance: float
) -> Row:
    """In the models of a base: with its folder, of `place`, their outputs are compared with `wanted`'s."""
    if row := _not_asked(DIFFUSERS, read):
        return row
    try:
        parts = loading.models(read.lora, structure, *place)
        pipe = loading.pipeline(structure, parts)
        said = loading.load(pipe, read.path)
    except UserError as refused:
        return _refused(DIFFUSERS, read, refused)
    row = _loaded(DIFFUSERS, read, parts, said)
    if place[0] is None:
        return row
    outputs = loading.probe(parts)
    pipe.unload_lora_weights()
    loading.fuse(parts, wanted)
    exact = loading.probe(parts)
    return _measured(
        row, max(loading.relative_error(outputs[part], exact[part]) for part in parts), tolerance
    )


def animated(read: Reading, structure: Structure, wanted: Lora, tolerance: float) -> Row | None:
    """In AnimateDiff's pipeline on random weights, whose frames are compared; None: no motion adapter fits.

    Frames are drawn twice, with the file loaded and with `wanted` added by plain arithmetic.
    """
    if not animatediff.fits(structure):
        return None
    if row := _not_asked(ANIMATEDIFF, read):
        return row
    if odd := next((update for update in wanted.others.values() if isinstance(update, Rebased)), None):
        words = f"{NOT_JUDGED}: {odd.kind} follows from the base's own weights, and these are random"
        return Row(ANIMATEDIFF, 0, 0, _count(read), words)
    parts = animatediff.models(read.lora, structure)
    pipe = animatediff.pipeline(structure, parts)
    try:
        said = loading.load(pipe, read.path)
    except UserError as refused:
        return _refused(ANIMATEDIFF, read, refused)
    said = [words for words in said if _HARMLESS not in words or _HARMFUL in words]
    row = _loaded(ANIMATEDIFF, read, parts, said)
    drawn = animatediff.frames(pipe, structure)
    pipe.unload_lora_weights()
    with animatediff.added(parts["unet"], wanted):
        exact = animatediff.frames(pipe, structure)
    return _measured(row, loading.relative_error(drawn, exact), tolerance)


def _count(read: Reading) -> int:
    return len({**read.lora.updates, **read.lora.biases})


def _not_asked(app: str, read: Reading) -> Row | None:
    unfit = peft_header.read(read.path, read.lora.metadata)[1]
    return Row(app, 0, 0, _count(read), f"is not asked to load it: {unfit[0]}") if unfit else None


def _refused(app: str, read: Reading, refused: UserError) -> Row:
    return Row(app, 0, 0, _count(read), f"refuses the file: {refused}")


def _loaded(app: str, read: Reading, parts: Mapping[str, Any], said: list[str]) -> Row:
    """Modules, strengths and weights as peft holds them, and what the libraries said."""
    found = loading.layers(parts)
    held = {name: layer.scale for name, layer in found.items() if _same_weights(layer, read.lora, name)}
    row = row_of(app, Loaded(held, []), read.lora)
    lost, verdict = _lost(found, read.lora), row.verdict
    if lost:
        name, what = next(iter(lost.items()))
        words = f"{len(lost)} modules without their {what}, such as {name}"
        verdict = words if verdict == "ok" else f"{verdict}; {words}"
    if verdict == "ok" and said:
        verdict = f"warns: {said[0].splitlines()[0][:200]}"
    return Row(app, row.loaded, row.right - len(lost), row.of, verdict)


def _measured(row: Row, error: float, tolerance: float) -> Row:
    verdict = row.verdict
    if verdict == "ok" and not error <= tolerance:
        verdict = f"its output is off by {error:.1e} relative, above {tolerance:.0e}"
    return Row(row.app, row.loaded, row.right, row.of, verdict, error)


def _lost(found: Mapping[str, loading.LoadedLayer], lora: Lora) -> dict[str, str]:
    """What of a module is lost that peft holds at the right strength: a DoRA's magnitude, or a bias."""
    lost = {}
    for name in found.keys() & lora.updates.keys():
        update, layer = lora.updates[name], found[name]
        if isinstance(update, Dora) and not (
            layer.magnitude is not None
            and torch.equal(layer.magnitude.flatten().float(), update.magnitude.flatten().float())
        ):
            lost[name] = "DoRA magnitude"
        elif name in lora.biases and layer.bias is None:
            lost[name] = "change of the bias"
    return lost


def _same_weights(layer: loading.LoadedLayer, lora: Lora, name: str) -> bool:
    """Whether peft holds the file's own weights for the module; one that was left at its start does not."""
    mine = lora.updates.get(name)
    if mine is None:
        return True  # reported as a module that should not change
    if isinstance(mine, Dora | Rebased):
        mine = mine.inner
    return isinstance(mine, Layer) and (
        layer.down.shape == mine.down.shape
        and torch.equal(layer.down.float(), mine.down.float())
        and torch.equal(layer.up.float(), mine.up.float())
    )
