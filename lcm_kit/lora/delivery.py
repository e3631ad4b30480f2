"""A LoRA into its folder: written, checked in every app that the style is for, and only then put in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lcm_kit import __version__, console
from lcm_kit.errors import UserError
from lcm_kit.io import own_files
from lcm_kit.io.files import atomic_file, scratch, sha256_file
from lcm_kit.io.locks import alone
from lcm_kit.lora import verified, verify
from lcm_kit.lora.apps import WHOLE
from lcm_kit.lora.in_diffusers import DIFFUSERS
from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.provenance import Provenance
from lcm_kit.lora.rows import ANIMATEDIFF
from lcm_kit.lora.write import FORMATS, write

# The kohya style is checked in every app, the diffusers style is for diffusers alone
APPS_OF = {"diffusers": (DIFFUSERS, ANIMATEDIFF), "kohya": verify.ALL}
MUST = (DIFFUSERS, *WHOLE)  # in which a file that is kept loads whole


def styles_of(wanted: str) -> tuple[str, ...]:
    """The styles that `wanted` means: "diffusers", "kohya" or "both"."""
    if wanted == "both":
        return tuple(FORMATS)
    if wanted not in FORMATS:
        raise UserError(f"format {wanted!r} is unknown; choose diffusers, kohya or both")
    return (wanted,)


@alone("export", lambda lora, against, folder, *_: folder)
def deliver(
    lora: Lora,
    against: verify.Against,
    folder: Path,
    names: Mapping[str, str],
    dtype: str,
    facts: Provenance,
    weights: str | None = None,
) -> dict[str, verify.Report]:
    """Write `lora` as `folder/names[style]` for each style, and `folder/verified.json`; returns the checks.

    `weights`: the hash of the run's (`own_files.hash_of`), if it is made from a run.
    Raises `UserError`, and puts no file in place, if one of `MUST` would not load all of any file, or
    diffusers gives another output with it than the arithmetic does. What other apps lack is in the checks.
    """
    if dtype not in verify.TOLERANCE:
        raise UserError(f"dtype {dtype!r} cannot be written; choose one of {', '.join(verify.TOLERANCE)}")
    reports: dict[str, verify.Report] = {}
    with scratch(folder) as temporary:
        for style, name in names.items():
            file = temporary / name
            written = write(file, lora, against.structure, style, dtype, facts)
            reports[style] = verify.verify(
                file, against, apps=APPS_OF[style], reference=lora, tolerance=verify.TOLERANCE[dtype]
            )
            _insist(reports[style], written, folder / name)
        for name in names.values():
            with atomic_file(folder / name) as place:
                (temporary / name).replace(place)
    _record(folder, names, reports, against, dtype, weights)
    return reports


def _insist(report: verify.Report, written: Lora, place: Path) -> None:
    """Raise unless the file gives back what was written and every app loads it."""
    problem = None
    if report.file.lora.layers.keys() != written.layers.keys():
        odd = sorted(report.file.lora.layers.keys() ^ written.layers.keys())
        problem = f"{len(odd)} modules do not come back, such as {odd[0]}"
    elif odd := [
        name for name, layer in written.layers.items() if not _equal(report.file.lora.layers[name], layer)
    ]:
        problem = f"{len(odd)} modules come back with other weights, such as {odd[0]}"
    elif report.file.problems:
        problem = report.file.problems[0]
    elif bad := [row for row in report.rows if row.app in MUST and not row.ok]:
        problem = f"{bad[0].title}: {bad[0].verdict}"
    if problem:
        raise UserError(f"{place} failed its check ({problem}); nothing was written")


def _equal(a: Layer, b: Layer) -> bool:
    return a.alpha == b.alpha and torch.equal(a.down, b.down) and torch.equal(a.up, b.up)


def _record(
    folder: Path,
    names: Mapping[str, str],
    reports: Mapping[str, verify.Report],
    against: verify.Against,
    dtype: str,
    weights: str | None,
) -> None:
    """Keep the proof beside the files; what it says of other files that are still there stays."""
    try:
        files: dict[str, Any] = dict(verified.read(folder)["files"])
    except own_files.Damaged as damaged:
        console.say(f"warning: {damaged}; it is written anew, of these files alone")
        files = {}
    for style, name in names.items():
        files[name] = {
            "format": style,
            "dtype": dtype,
            "sha256": sha256_file(folder / name),
            "base": against.structure.label,
            "kit_version": __version__,
            **({"weights": weights} if weights else {}),
            "apps": {row.app: _row(row) for row in reports[style].rows},
        }
    kept = {name: files[name] for name in sorted(files) if (folder / name).is_file()}
    own_files.write_json(folder / verified.RECORD, {"files": kept})


def _row(row: verify.Row) -> dict[str, Any]:
    return {"modules": row.of, "loaded": row.loaded, "verdict": row.verdict, "output_error": row.error}


def summary(name: str, dtype: str, report: verify.Report) -> str:
    """One line about a file that was delivered, and one for each app that has a gap of its own."""
    error = next((row.error for row in report.rows if row.error is not None), None)
    measured = "" if error is None else f"; diffusers' output is within {error:.1e} of the exact one"
    count = len(report.file.lora.layers)
    titles = [row.title for row in report.rows if row.ok]
    gaps = [f"\n  {row.title}: {row.verdict}" for row in report.rows if not row.ok]
    return f"{name} ({dtype}): all {count} modules load in {_listed(titles)}{measured}{''.join(gaps)}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
