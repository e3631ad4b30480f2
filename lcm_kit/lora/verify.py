"""Would the apps load this file whole and at the right strength? A table of answers, none of them a guess.

For every app but diffusers the answer follows from its own rules for names and kinds (`lcm_kit.lora.apps`);
diffusers itself is run, with AnimateDiff's pipeline too (`lcm_kit.lora.in_diffusers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lcm_kit.bases.locate import locate
from lcm_kit.errors import UserError
from lcm_kit.lora import in_diffusers, reading, structure
from lcm_kit.lora.apps import APPS, NOT_JUDGED, able
from lcm_kit.lora.in_diffusers import DIFFUSERS
from lcm_kit.lora.kinds import Rebased
from lcm_kit.lora.layers import Lora
from lcm_kit.lora.rows import ANIMATEDIFF, Row, row_of
from lcm_kit.lora.spelling import other_kind
from lcm_kit.lora.structure import Structure

ALL = (DIFFUSERS, ANIMATEDIFF, *APPS)
_UNJUDGED = ("OFT", "BOFT", "GLoRA", "IA3")  # kinds that the apps' rules do not cover
# Largest relative error of a model's output, by the dtype of the file's weights, against the LoRA before it
# was rounded. The halves round each weight (2^-11, 2^-8 relative); the errors of a few hundred layers add up.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


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

    Apps other than diffusers have rules for the blocks of the published bases alone (`apps.able`), and motion
    adapters fit some of them (`animatediff.fits`): a LoRA of a base with other blocks gets no row of theirs.
    Without `against` the base is told from the file, and diffusers' loader runs without a base's weights.
    `reference` is the LoRA that the file should give, before it was rounded: outputs may differ from its by
    `tolerance`, relative. Without one it is what the file itself says. Raises `UserError` if the file is not
    a LoRA at all.
    """
    if odd := sorted(set(apps) - {*ALL, *APPS}):
        raise UserError(f"app {odd[0]!r} is unknown; choose among {', '.join([*ALL[:2], *APPS])}")
    read = reading.read(file, against.structure if against else None, alpha=alpha)
    place = against or Against(read.structure)
    wanted = reference or read.lora
    rows = []
    if DIFFUSERS in apps:
        own = place.folder, place.variant
        rows.append(in_diffusers.plain(read, place.structure, own, wanted, tolerance))
    if ANIMATEDIFF in apps and (row := in_diffusers.animated(read, place.structure, wanted, tolerance)):
        rows.append(row)
    rows += [_app_row(app, read) for app in able(read.structure) if app in apps]
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
    row = row_of(app, loaded._replace(remarks={**loaded.remarks, **plain}), read.lora)
    if odd := next((key for key in read.tensors if other_kind(key) in _UNJUDGED), None):
        return replace(row, verdict=f"{NOT_JUDGED}: what it makes of {other_kind(odd)}, such as {odd}")
    return row
