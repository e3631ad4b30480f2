"""LoRA files: export a run's, verify and convert anybody's, merge several, fuse them into a base."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lcm_kit import console
from lcm_kit.api.calls import call
from lcm_kit.api.stages import Place
from lcm_kit.config.numbers import in_range, require_in_range
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from lcm_kit.lora.convert import Converted
    from lcm_kit.lora.merge_files import Merged
    from lcm_kit.lora.metadata_reading import Recommended
    from lcm_kit.lora.verify import Report as Verification

Format = Literal["diffusers", "kohya", "both"]  # kohya is what every app reads
Dtype = Literal["float32", "float16", "bfloat16"]
Weighted = Mapping[str, float] | Mapping[Path, float] | Sequence[tuple[Place, float]]  # LoRAs, runs


def export_run(
    run: Place,
    *,
    format: Format = "both",
    dtype: Dtype = "float16",
    output: Place | None = None,
    with_evaluation: bool = False,
    list_sources: bool = False,
    verbose: bool = False,
) -> dict[str, Path]:
    """Write a run's LoRA for every app, each file checked in each, and a model card beside them.

    Returns the path of each file by its format. `output`: `export` within the run by default.
    `with_evaluation`: write what its guidance sweep recommends into them; `list_sources`: write sources.csv
    too, with licence, source, author and consent of each picture. Raises `UserError`, and leaves no
    new file, if the run has no finished adapter, or a file would not load whole.

        files = lcm_kit.export_run("runs/quickstart")
        print(files["kohya"], files["diffusers"])
    """
    from lcm_kit.export import run as exporting
    from lcm_kit.export import sources

    with call(verbose), console.working(f"exporting {run}"):
        folder = None if output is None else Path(output)
        files = exporting.export_run(Path(run), format, dtype, folder, with_evaluation=with_evaluation)
        if list_sources:
            written = sources.write_sources(Path(run), folder or Path(run) / "export")
            console.say(f"written {written}")
        return files


def verify(
    file: Place,
    *,
    base: str | None = None,
    variant: str | None = None,
    apps: Sequence[str] | None = None,
    alpha: float | None = None,
    verbose: bool = False,
) -> Verification:
    """How much of a LoRA file each app would load, and at what strength.

    `base`: a diffusers folder, a hub id or asset:NAME; by default SD1.x, SD2.x or SDXL, as the file fits.
    `apps`: all by default. `alpha`: what it was trained with, for a file that does not say it. The answer is
    `ok` if no app drops or changes anything; `rows` has one for each app (`title`, `loaded`, `right` and `of`
    modules, `verdict`), `file.problems` what is wrong with the file. Raises `UserError` for a file that is
    no LoRA.

        checked = lcm_kit.verify("lumo.safetensors")
        for row in checked.rows:
            print(row.title, row.loaded, "of", row.of, row.verdict)
    """
    from lcm_kit.lora import verify as checks

    require_in_range(alpha=alpha)
    with call(verbose), console.working(f"checking {file}"):
        against = checks.base_of(base, variant=variant) if base else None
        return checks.verify(Path(file), against, apps=apps or checks.ALL, alpha=alpha)


def convert(
    file: Place,
    *,
    format: Format = "both",
    output: Place | None = None,
    base: str | None = None,
    variant: str | None = None,
    alpha: float | None = None,
    dtype: Dtype | None = None,
    rank: int | None = None,
    leave_out: Collection[str] = (),
    drop_unknown: bool = False,
    verbose: bool = False,
) -> Converted:
    """Correct a LoRA file and write it as apps load it; the file itself is left as it is.

    `output`: the folder, that of the file by default. `rank`: reduce to it by SVD; without one the result is
    exact. `leave_out`: what may be lost since no LoRA holds it (norms, biases, projections, embeddings).
    `drop_unknown`: leave out keys of no module that change nothing. The answer's `reports` has the check of
    each file that was written, by its path; `read.findings` says what was found. Raises `UserError`, writing
    nothing, if the file cannot be corrected or the result would not load everywhere.

        done = lcm_kit.convert("lumo.safetensors", output="fixed")
        print(*done.reports)
    """
    from lcm_kit.lora import convert as converting
    from lcm_kit.lora import verify as checks

    require_in_range(alpha=alpha, rank=rank)
    source = Path(file)
    with call(verbose), console.working(f"converting {file}"):
        against = checks.base_of(base, variant=variant) if base else None
        return converting.convert(
            source, source.parent if output is None else Path(output), style=format, against=against,
            alpha=alpha, dtype=dtype, rank=rank, leave_out=leave_out, drop_unknown=drop_unknown,
        )  # fmt: skip


def merge(
    loras: Weighted,
    output: Place = "merged",
    *,
    format: Format = "both",
    rank: int | None = None,
    base: str | None = None,
    variant: str | None = None,
    dtype: Dtype = "float16",
    leave_out: Collection[str] = (),
    verbose: bool = False,
) -> Merged:
    """Write the weighted sum of LoRA files or runs as `<output>_<format>.safetensors`.

    It is exact, the ranks add up, unless `rank` is given. The answer's `reports` has the check of each file
    by its path, `interference` where two of them pull at the same weights. Raises `UserError`, writing
    nothing, if a file is not whole, they are for different bases, or the result would not load everywhere.

        done = lcm_kit.merge({"style.safetensors": 0.8, "speed.safetensors": 1.0}, "both")
        print(*done.reports)
    """
    from lcm_kit.lora import merge_files

    require_in_range(rank=rank)
    parts = _parts(loras)
    with call(verbose), console.working(f"merging {len(parts)} LoRAs"):
        return merge_files.merge(
            parts, Path(output), style=format, rank=rank, base=base, variant=variant, dtype=dtype,
            leave_out=leave_out,
        )  # fmt: skip


def fuse(
    loras: Weighted,
    base: str,
    output: Place,
    *,
    variant: str | None = None,
    leave_out: Collection[str] = (),
    verbose: bool = False,
) -> Path:
    """Write `base`, as a diffusers folder, with the weighted sum of LoRAs in its weights; returns the folder.

    Raises `UserError` as `merge`, and if the folder is there already.

        folder = lcm_kit.fuse({"lumo.safetensors": 1.0}, "asset:tiny-sd", "tiny-lumo")
    """
    from lcm_kit.lora import merge_files

    parts, folder = _parts(loras), Path(output)
    with call(verbose), console.working(f"fusing {len(parts)} into {base}"):
        merge_files.fuse(parts, base, folder, variant=variant, leave_out=leave_out)
    return folder


def recommended_for(adapter: Place, *, verbose: bool = False) -> Recommended | None:
    """What was measured to serve a LoRA best: of a run by its guidance sweep, of a file by its header.

    None if nothing was measured. `sampler`, `steps`, `guidance_scale` (diffusers', 1 is none) and
    `lora_weight` are None where nothing can be recommended, which `sentence` and `reasons` then explain.
    Raises `UserError` if there is no such LoRA.

        use = lcm_kit.recommended_for("lumo.safetensors")
        if use and use.steps:
            print(use.sentence, use.sampler, use.steps, use.lora_weight)
    """
    from lcm_kit.evaluation.recommended import of_adapter
    from lcm_kit.lora.locate import adapter_file

    with call(verbose, models=False):
        return of_adapter(Path(adapter), adapter_file(os.fspath(adapter)))


def _parts(loras: Weighted) -> list[tuple[Path, float]]:
    pairs: list[Any] = list(loras.items() if isinstance(loras, Mapping) else loras)
    if odd := [pair for pair in pairs if not isinstance(pair, tuple | list) or len(pair) != 2]:
        raise UserError(f"LoRAs are given as {{file: weight}} or as pairs (file, weight), not as {odd[0]!r}")
    return [
        (Path(place), in_range("weight", f"{os.fspath(place)}: weight")(weight)) for place, weight in pairs
    ]
