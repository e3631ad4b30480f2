"""Several LoRA files into one, or into a base: the files around the arithmetic of `lcm_kit.export.merge`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from lcm_kit import __version__
from lcm_kit.errors import UserError
from lcm_kit.export import delivery, verify
from lcm_kit.export.convert import weights_of, whole
from lcm_kit.export.facts import Facts, facts_from
from lcm_kit.export.fuse import fuse_into
from lcm_kit.export.lora import Lora
from lcm_kit.export.merge import Interference, concatenate, interference, truncate
from lcm_kit.export.older_transformers import make_readable
from lcm_kit.export.plain import plain
from lcm_kit.export.reading import Reading
from lcm_kit.export.reading_words import bundled
from lcm_kit.files import atomic_write
from lcm_kit.locks import sweep
from lcm_kit.lora_file import adapter_file

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
    checked = delivery.deliver(lora, place, output.parent, names, dtype, _facts(parts, reads, output.name))
    reports = {output.parent / name: checked[style] for style, name in names.items()}
    lines = (delivery.summary(str(path), dtype, report) for path, report in reports.items())
    told = [
        f"{read.path.name}: {line}" for read, each in zip(reads, made, strict=True) for line in each.lines()
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
    file that bundles some is refused unless `leave_out` names them. `fused.json` in it says what was fused;
    the other texts are the base's own.
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
    made = {"base": base, "loras": {str(path): weight for path, weight in parts}, "kit_version": __version__}

    def finish(folder: Path) -> None:
        make_readable(folder)
        atomic_write(folder / "fused.json", json.dumps(made, indent=2) + "\n")

    sweep(output.parent, deep=False)
    loras = [read.lora for read in reads]
    fuse_into(loras, weights, against.folder, output, variant=variant, finish=finish)


def _read(parts: Sequence[Part], against: verify.Against | None) -> list[Reading]:
    reads = [whole(adapter_file(path), against) for path, _ in parts]
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


def _facts(parts: Sequence[Part], reads: Sequence[Reading], title: str) -> Facts:
    """The merged file draws in few steps if one of its parts makes it: that one's settings are its own.

    Its trigger is that of all of them.
    """
    told = [facts_from(read.lora.metadata, title) for read in reads]
    k = next((k for k, facts in enumerate(told) if facts.method is not None), 0)
    speed, known = told[k], told[k].recommended
    if known:  # the merged file was not measured, and holds the weight already
        weight = None if known.steps is None else 1.0
        known = replace(known, lora_weight=weight, part=known.part or parts[k][0].name)
    triggers = dict.fromkeys(facts.trigger for facts in told if facts.trigger)
    return replace(
        speed, parents=tuple(f"{path.name}:{weight:g}" for path, weight in parts), recommended=known,
        trigger=", ".join(triggers) or None,
    )  # fmt: skip
