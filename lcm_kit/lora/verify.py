"""Would the apps load this file whole and at the right strength? A table of answers, none of them a guess.

For every app but diffusers the answer follows from its own rules for names and kinds (`lcm_kit.lora.apps`);
diffusers itself is run (`lcm_kit.lora.loading`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lcm_kit.bases.locate import locate
from lcm_kit.errors import UserError
from lcm_kit.lora import loading, peft_header, reading, structure
from lcm_kit.lora.apps import APPS, NOT_JUDGED, TITLES, Loaded, able
from lcm_kit.lora.kinds import Dora, Rebased
from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.spelling import other_kind
from lcm_kit.lora.structure import Structure

ALL = ("diffusers", *APPS)
_UNJUDGED = ("OFT", "BOFT", "GLoRA", "IA3")  # kinds that the apps' rules do not cover
# Largest relative error of a model's output, by the dtype of the file's weights, against the LoRA before it
# was rounded. The halves round each weight (2^-11, 2^-8 relative); the errors of a few hundred layers add up.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Row:
    """What one app makes of a file."""

    app: str
    loaded: int  # modules of the LoRA that it changes, at whatever strength
    right: int  # of those, at the right strength
    of: int  # modules of the LoRA
    verdict: str  # "ok", "not judged: ..." where neither code nor trial tells, or what goes wrong, in words
    error: float | None = None  # diffusers: relative error of the output, where it was measured

    @property
    def ok(self) -> bool:
        """Whole and at the right strength."""
        return self.verdict == "ok"

    @property
    def wrong(self) -> bool:
        """Something is dropped or changed; not to be judged is neither this nor `ok`."""
        return not self.ok and not self.verdict.startswith(NOT_JUDGED)

    @property
    def title(self) -> str:
        """The app's name."""
        return TITLES.get(self.app, self.app)


@dataclass(frozen=True)
class Report:
    """A row an app, and what the file itself is like."""

    file: reading.Reading
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """No app loads it wrongly and nothing is wrong with the file."""
        return not self.file.problems and not any(row.wrong for row in self.rows)


@dataclass(frozen=True)
class Against:
    """The base that a file is checked on: its structure, and its folder where its weights are at hand."""

    structure: Structure
    folder: Path | None = None
    variant: str | None = None


def base_of(path: str, revision: str | None = None, variant: str | None = None) -> Against:
    """A base by its folder, hub id or `asset:NAME`. Raises `UserError` if there is none."""
    folder = locate(path, revision, variant)
    return Against(structure.of_folder(folder, path), folder, variant)


def verify(
    file: Path,
    against: Against | None = None,
    *,
    apps: Sequence[str] = ALL,
    reference: Lora | None = None,
    tolerance: float = TOLERANCE["float32"],
    alpha: float | None = None,
) -> Report:
    """Check `file` for each of `apps`.

    Apps other than diffusers have rules for the blocks of the published bases alone (`apps.able`): a LoRA of
    a base with other blocks gets no row of theirs. Without `against` the base is told from the file, and
    diffusers' loader runs without a base's weights.
    `reference` is the LoRA that the file should give, before it was rounded: outputs may differ from its by
    `tolerance`, relative. Without one it is what the file itself says. Raises `UserError` if the file is not
    a LoRA at all.
    """
    if odd := sorted(set(apps) - {"diffusers", *APPS}):
        raise UserError(f"app {odd[0]!r} is unknown; choose among diffusers, {', '.join(APPS)}")
    read = reading.read(file, against.structure if against else None, alpha=alpha)
    place = against or Against(read.structure)
    rows = [
        _diffusers_row(read, place, reference or read.lora, tolerance)
        if app == "diffusers"
        else _app_row(app, read)
        for app in ("diffusers", *able(read.structure))
        if app in apps
    ]
    return Report(read, tuple(rows))


def _app_row(app: str, read: reading.Reading) -> Row:
    """What the app's own rules say; of a file with a kind that they do not cover, that it is not judged."""
    loaded = APPS[app](read.tensors, read.structure)
    # what no app knows: that the file is a difference to another base than the plain one
    plain = {
        name: f"takes {update.kind} for a plain LoRA"
        for name, update in read.lora.others.items()
        if isinstance(update, Rebased) and name in loaded.modules
    }
    row = _row(app, loaded._replace(remarks={**loaded.remarks, **plain}), read.lora)
    if odd := next((key for key in read.tensors if other_kind(key) in _UNJUDGED), None):
        return replace(row, verdict=f"{NOT_JUDGED}: what it makes of {other_kind(odd)}, such as {odd}")
    return row


def _row(app: str, loaded: Loaded, lora: Lora) -> Row:
    """Compare what an app would load with what the file holds."""
    wanted = {name: update.scale for name, update in lora.updates.items()}
    wanted |= {name: 1.0 for name in lora.biases if name not in wanted}
    held = wanted.keys() & loaded.modules.keys()
    right = [
        name
        for name in held
        if math.isclose(loaded.modules[name], wanted[name], rel_tol=1e-6) and name not in loaded.remarks
    ]
    return Row(app, len(held), len(right), len(wanted), _verdict(loaded, wanted))


def _verdict(loaded: Loaded, wanted: Mapping[str, float]) -> str:
    if loaded.refused:
        return f"refuses the file: {loaded.refused}"
    missing = [name for name in wanted if name not in loaded.modules]
    wrong = [
        name
        for name, scale in wanted.items()
        if name in loaded.modules and not math.isclose(loaded.modules[name], scale, rel_tol=1e-6)
    ]
    elsewhere = sorted(loaded.modules.keys() - wanted.keys())
    found = []
    if missing:
        found.append(f"drops {len(missing)} modules, such as {missing[0]}")
    if elsewhere:
        found.append(f"changes {len(elsewhere)} other modules, such as {elsewhere[0]}")
    if wrong:
        name = wrong[0]
        found.append(
            f"{len(wrong)} modules at strength {loaded.modules[name]:g} instead of {wanted[name]:g}, "
            f"such as {name}"
        )
    if loaded.unmatched and not missing:
        found.append(f"ignores {len(loaded.unmatched)} keys, such as {loaded.unmatched[0]}")
    for words in dict.fromkeys(loaded.remarks.values()):  # each once, what is not judged last
        names = [name for name, each in loaded.remarks.items() if each == words]
        found.append(f"{words}: {len(names)} modules, such as {names[0]}")
    return "; ".join(sorted(found, key=lambda each: each.startswith(NOT_JUDGED))) or "ok"


def _diffusers_row(read: reading.Reading, place: Against, wanted: Lora, tolerance: float) -> Row:
    count = len({**read.lora.updates, **read.lora.biases})
    if unfit := peft_header.read(read.path, read.lora.metadata)[1]:
        return Row("diffusers", 0, 0, count, f"is not asked to load it: {unfit[0]}")
    try:
        parts = loading.models(read.lora, place.structure, place.folder, place.variant)
        pipe = loading.pipeline(place.structure, parts)
        said = loading.load(pipe, read.path)
    except UserError as refused:
        return Row("diffusers", 0, 0, count, f"refuses the file: {refused}")
    found = loading.layers(parts)
    loaded = {name: layer.scale for name, layer in found.items() if _same_weights(layer, read.lora, name)}
    row = _row("diffusers", Loaded(loaded, []), read.lora)
    lost = _lost(found, read.lora)
    error: float | None = None
    if place.folder is not None:
        outputs = loading.probe(parts)
        pipe.unload_lora_weights()
        loading.fuse(parts, wanted)
        exact = loading.probe(parts)
        error = max(loading.relative_error(outputs[part], exact[part]) for part in parts)
    verdict = row.verdict
    if lost:
        name, what = next(iter(lost.items()))
        words = f"{len(lost)} modules without their {what}, such as {name}"
        verdict = words if verdict == "ok" else f"{verdict}; {words}"
    if verdict == "ok" and said:
        verdict = f"warns: {said[0].splitlines()[0][:200]}"
    if verdict == "ok" and error is not None and not error <= tolerance:
        verdict = f"its output is off by {error:.1e} relative, above {tolerance:.0e}"
    return Row("diffusers", row.loaded, row.right - len(lost), row.of, verdict, error)


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
