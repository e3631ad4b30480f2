"""Mend a LoRA file that somebody else made, and change its style: read, say what was found, write, check."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from lcm_kit.errors import UserError
from lcm_kit.export import delivery, reading, verify
from lcm_kit.export.facts import facts_from
from lcm_kit.export.reading import Reading
from lcm_kit.export.write import DTYPES


def convert(
    file: Path,
    output: Path,
    *,
    style: str = "both",
    against: verify.Against | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
    drop_unknown: bool = False,
) -> tuple[Reading, dict[Path, verify.Report]]:
    """Write `file` as `output/<name>_<style>.safetensors` for each style; `file` itself is left as it is.

    Returns what was found, and the checks of what was written. `alpha` is for a file that does not say its
    own; `dtype` is the file's by default; `drop_unknown` leaves out keys that belong to no module of the base
    instead of refusing. Raises `UserError`, writing nothing, if the file cannot be mended or the result would
    not load everywhere.
    """
    read = whole(file, against, alpha=alpha, drop_unknown=drop_unknown)
    if read.lacks_alpha:
        ranks = Counter(layer.rank for layer in read.lora.layers.values())
        raise UserError(
            f"{file} does not say the alpha of {read.lacks_alpha} layers (their rank is "
            f"{ranks.most_common(1)[0][0]}); give what it was trained with as --alpha (without one the apps "
            "take the rank)"
        )
    place = against or verify.Against(read.structure)
    names = {style: f"{file.stem}_{style}.safetensors" for style in delivery.styles_of(style)}
    told = facts_from(read.lora.metadata, file.stem)
    base = told.base or (against.structure.label if against else None)
    facts = replace(told, base=base, parents=(*told.parents, file.name))
    reports = delivery.deliver(read.lora, place, output, names, dtype or own_dtype(read), facts)
    return read, {output / name: reports[style] for style, name in names.items()}


def whole(
    file: Path, against: verify.Against | None, *, alpha: float | None = None, drop_unknown: bool = False
) -> Reading:
    """Read `file`; raises `UserError` if anything of it would be lost."""
    read = reading.read(file, against.structure if against else None, alpha=alpha)
    problems = [p for p in read.problems if not (drop_unknown and p == reading.unknown_problem(read))]
    if problems:
        hint = "; --drop-unknown leaves such keys out" if reading.unknown_problem(read) in problems else ""
        raise UserError(f"{file} is not whole: {problems[0]}{hint}")
    return read


def own_dtype(read: Reading) -> str:
    """The dtype that most of the file's weights have, if this kit writes it; float32 otherwise."""
    counts = Counter(layer.down.dtype for layer in read.lora.layers.values())
    names: dict[torch.dtype, str] = {kind: name for name, kind in DTYPES.items()}
    return names.get(counts.most_common(1)[0][0], "float32")
