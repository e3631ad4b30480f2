"""Fix a LoRA file that somebody else made, and change its format: read, say what was found, write, check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from lcm_kit.errors import UserError
from lcm_kit.lora import delivery, reading, verify
from lcm_kit.lora.base_weights import BaseWeights
from lcm_kit.lora.kinds import Rebased
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.plain import Plain, plain
from lcm_kit.lora.provenance_rules import converted
from lcm_kit.lora.reading import Reading
from lcm_kit.lora.reading_words import kinds
from lcm_kit.lora.write import DTYPES

# What keys hold that diffusers' loader refuses or drops
_NOT_IN_DIFFUSERS = ("hada_", "lokr_", ".diff", "_norm", ".dora_scale", ".scale")


@dataclass(frozen=True)
class Converted:
    """What was found in a file, what was made of it, and the checks of what was written."""

    read: Reading
    plain: Plain
    dtype: str
    reports: dict[Path, verify.Report]


def convert(
    file: Path,
    output: Path,
    *,
    style: str = "both",
    against: verify.Against | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    leave_out: Collection[str] = (),
    drop_unknown: bool = False,
) -> Converted:
    """Write `file` as `output/<name>_<style>.safetensors` for each style; `file` itself is left as it is.

    `alpha` is for a file that does not say its own; `dtype` is the file's by default. Other kinds than plain
    LoRA become layers (`plain`), all of at most `rank` where it is given; `leave_out` names what no LoRA
    holds (`plain.LEAVE_OUT`) and may be lost. `drop_unknown` leaves out keys of no module of the base that
    change nothing, instead of refusing. Raises `UserError`, writing nothing, if the file cannot be
    repaired or the result would not load everywhere.
    """
    read = read_complete(file, against, alpha=alpha, drop_unknown=drop_unknown)
    if read.lacks_alpha:
        ranks = Counter(layer.rank for layer in read.lora.layers.values())
        common = f" (their rank is {ranks.most_common(1)[0][0]})" if ranks else ""
        raise UserError(
            f"{file} does not say the alpha of {read.lacks_alpha} layers{common}; give what it was trained "
            "with as --alpha (without one the apps take the rank)"
        )
    made = plain(read, weights_of(against), rank=rank, reduce_all=rank is not None, leave_out=leave_out)
    place = against or verify.Against(read.structure)
    names = {style: f"{file.stem}_{style}.safetensors" for style in delivery.styles_of(style)}
    told = provenance_from_header(read.lora.metadata, file.stem)
    label = against.structure.label if against else None
    facts = converted(told, file.name, label, changed=rank is not None or bool(leave_out))
    dtype = dtype or own_dtype(read)
    try:
        reports = delivery.deliver(made.lora, place, output, names, dtype, facts)
    except UserError as error:
        if read.structure.projections.keys() & made.lora.layers.keys():
            raise UserError(f"{error}; --leave-out projections leaves text_projection out") from error
        raise
    return Converted(read, made, dtype, {output / name: reports[style] for style, name in names.items()})


def weights_of(against: verify.Against | None) -> BaseWeights | None:
    """The base's weights, where its folder is at hand."""
    if against is None or against.folder is None:
        return None
    return BaseWeights(against.folder, against.variant)


def read_complete(
    file: Path, against: verify.Against | None, *, alpha: float | None = None, drop_unknown: bool = False
) -> Reading:
    """Read `file`; raises `UserError` if anything of it would be lost."""
    read = reading.read(file, against.structure if against else None, alpha=alpha)
    unknown = reading.unknown_problem(read)
    weightless = set(read.unknown) == set(read.weightless)
    problems = [p for p in read.problems if not (drop_unknown and weightless and p == unknown)]
    if problems:
        hint = ""
        if problems[0] == unknown and weightless:
            hint = ", and change nothing; `lcm-kit convert --drop-unknown` leaves them out"
        raise UserError(f"{file} is not whole: {problems[0]}{hint}")
    return read


def require_diffusers(file: Path, against: verify.Against) -> None:
    """Raise `UserError` for a file that is not whole, or not for this base, or not for diffusers."""
    read = read_complete(file, against)
    held = [*kinds(read.lora), *(["embeddings"] if read.embeddings else [])]
    taken_out = any(isinstance(update, Rebased) for update in read.others.values())
    if read.embeddings or taken_out or any(mark in key for key in read.tensors for mark in _NOT_IN_DIFFUSERS):
        what = ", ".join(held) or "strengths or biases"
        raise UserError(
            f"{file} holds {what} in a form that diffusers does not load; make a LoRA of it with "
            "`lcm-kit convert`"
        )


def own_dtype(read: Reading) -> str:
    """The dtype that most of the file's weights have, if this kit writes it; float32 otherwise."""
    counts = Counter(tensor.dtype for tensor in read.tensors.values() if tensor.numel() > 1)
    names: dict[torch.dtype, str] = {kind: name for name, kind in DTYPES.items()}
    return names.get(counts.most_common(1)[0][0], "float32") if counts else "float32"
