"""Several LoRA files into one, or into a base: the files around the arithmetic of `lcm_kit.lora.merge`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from lcm_kit import __version__
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write
from lcm_kit.io.locks import sweep
from lcm_kit.lora import delivery, provenance, verify
from lcm_kit.lora.convert import read_complete, weights_of
from lcm_kit.lora.fuse import fuse_into
from lcm_kit.lora.layers import Lora
from lcm_kit.lora.locate import adapter_file
from lcm_kit.lora.merge import Interference, concatenate, interference, truncate
from lcm_kit.lora.metadata_reading import not_read, provenance_from_header
from lcm_kit.lora.older_transformers import make_readable
from lcm_kit.lora.plain import plain
from lcm_kit.lora.provenance import Provenance
from lcm_kit.lora.provenance_rules import merged, part_of
from lcm_kit.lora.reading import Reading
from lcm_kit.lora.reading_words import bundled

Part = tuple[Path, float]  # a LoRA file or a run's folder, and its weight


@dataclass(frozen=True)
class Merged:
    """What was written and what was measured on the way."""

    written: tuple[str, ...]  # a line a file
    interference: dict[str, list[Interference]]  # by pair
    errors: dict[str, float] | None  # of the reduction to a rank, by block
    reports: dict[Path, verify.Report]  # the checks of each file
    told: tuple[str, ...] = ()  # what was made of a part that is no plain LoRA, and what was left out


def merge(
    parts: Sequence[Part],
    output: Path,
    *,
    style: str = "both",
    rank: int | None = None,
    base: str | None = None,
    variant: str | None = None,
    dtype: str = "float16",
    leave_out: Collection[str] = (),
) -> Merged:
    """Write the weighted sum of `parts` as `<output>_<style>.safetensors`; exact unless `rank` is given.

    Parts of other kinds than plain LoRA become layers first, and `leave_out` names what no LoRA holds
    (`plain`). Raises `UserError`, writing nothing, if a file is not whole, they are for different bases, or
    the result would not load everywhere.
    """
    if len(parts) < 2:
        raise UserError(
            "there is nothing to merge; give two LoRAs or more, as style.safetensors:0.8 speed.safetensors"
        )
    against = verify.base_of(base, variant=variant) if base else None
    reads = _read(parts, against)
    place = against or verify.Against(reads[0].structure)
    weights = [weight for _, weight in parts]
    made = [plain(read, weights_of(against), rank=rank, leave_out=leave_out) for read in reads]
    loras = [each.lora for each in made]
    lora, errors = concatenate(loras, weights), None
    if rank is not None:
        lora, errors = truncate(lora, rank)
    names = {s: f"{output.name}_{s}.safetensors" for s in delivery.styles_of(style)}
    facts = merged(_made_of(parts, reads), output.name)
    checked = delivery.deliver(lora, place, output.parent, names, dtype, facts)
    reports = {output.parent / name: checked[style] for style, name in names.items()}
    lines = (delivery.summary(str(path), dtype, report) for path, report in reports.items())
    told = [
        f"{read.path.name}: {line}"
        for read, each in zip(reads, made, strict=True)
        for line in (*each.lines(), *filter(None, [not_read(read.lora.metadata)]))
    ]
    return Merged(tuple(lines), _pairs(parts, loras), errors, reports, tuple(told))


def fuse(
    parts: Sequence[Part],
    base: str,
    output: Path,
    *,
    variant: str | None = None,
    leave_out: Collection[str] = (),
) -> None:
    """Write the pipeline folder `output`: `base` with the weighted sum of `parts` in its weights.

    transformers 4 reads it as well as 5, whichever wrote the base.
    Whatever they change in a weight or a bias is added exactly; embeddings are no weights of a base, so a
    file that bundles some is refused unless `leave_out` names them. `fused.json` in it says what was fused,
    and how each of `parts` was made; the other texts are the base's own.
    """
    against = verify.base_of(base, variant=variant)
    assert against.folder is not None
    reads = _read(parts, against)
    odd = next((read for read in reads if read.embeddings), None)
    if odd is not None and "embeddings" not in leave_out:
        raise UserError(
            f"{odd.path} bundles the embeddings {bundled(odd.embeddings)}, which are no weights of a base; "
            "--leave-out embeddings leaves them out"
        )
    weights = [weight for _, weight in parts]
    made = {
        "base": base, "loras": {str(path): weight for path, weight in parts}, "kit_version": __version__,
        "parts": Provenance(parts=tuple(_made_of(parts, reads))).to_json()["parts"],
    }  # fmt: skip

    def finish(folder: Path) -> None:
        make_readable(folder)
        atomic_write(folder / "fused.json", json.dumps(made, indent=2) + "\n")

    sweep(output.parent, deep=False)
    loras = [read.lora for read in reads]
    fuse_into(loras, weights, against.folder, output, variant=variant, finish=finish)


def _read(parts: Sequence[Part], against: verify.Against | None) -> list[Reading]:
    reads = [read_complete(adapter_file(path), against) for path, _ in parts]
    labels = {read.structure.label for read in reads}
    if len(labels) > 1:
        told = ", ".join(f"{read.path} for {read.structure.label}" for read in reads)
        raise UserError(f"these LoRAs are for different bases ({told}); merge those of one base")
    return reads


def _pairs(parts: Sequence[Part], loras: Sequence[Lora]) -> dict[str, list[Interference]]:
    rows = [(path.stem, weight, lora) for (path, weight), lora in zip(parts, loras, strict=True)]
    return {
        f"{a} and {b}": interference(one, other, (v, w))
        for (a, v, one), (b, w, other) in combinations(rows, 2)
    }


def _made_of(parts: Sequence[Part], reads: Sequence[Reading]) -> list[provenance.Part]:
    """What the headers of the files say of them."""
    return [
        part_of(path.name, weight, provenance_from_header(read.lora.metadata, path.stem))
        for (path, weight), read in zip(parts, reads, strict=True)
    ]
