"""From a trained run to files that other programs load, and the card beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lcm_kit import bases, console
from lcm_kit.adapter import folder as adapter
from lcm_kit.errors import UserError
from lcm_kit.evaluation import recommended, results
from lcm_kit.evaluation.result_shapes import Results
from lcm_kit.export import card, trained
from lcm_kit.io import own_files, own_shapes
from lcm_kit.lora import delivery, inherited, verified, verify
from lcm_kit.lora.apps import VERSIONS
from lcm_kit.lora.provenance import Provenance, Trained
from lcm_kit.lora.rows import title_of
from lcm_kit.lora.write import file_name


def export_run(
    run: Path,
    style: str = "both",
    dtype: str = "float16",
    output: Path | None = None,
    *,
    with_evaluation: bool = False,
) -> dict[str, Path]:
    """Write the adapter of `run` for diffusers and for the apps, with a model card; returns path by style.

    `style` is diffusers, kohya or both; `dtype` float16, bfloat16 or float32; `output` the folder (default
    `run/export`). Each file is first loaded by plain diffusers onto the run's base and held against the
    naming rules of each app; `lcm_kit.lora.verify` says what must agree. `with_evaluation` writes what the
    guidance sweep in `run/sweep` recommends for these weights into the files. Prints what was measured.
    Raises `UserError`, and leaves no new file behind, if there is no finished adapter, no such sweep, or
    anything disagrees.
    """
    styles = delivery.styles_of(style)
    folder = output or run / "export"
    facts, against = _base(run)
    lora = trained.read(run / "adapter", against.structure)
    title = run.resolve().name
    names = {style: file_name(style, title) for style in styles}
    about = _about(run, facts)
    if with_evaluation:
        swept = recommended.require(run, run / "export" / file_name("diffusers", title))
        about = replace(about, recommended=swept)
    weights = own_files.hash_of(run / "adapter" / adapter.WEIGHTS)
    reports = delivery.deliver(lora, against, folder, names, dtype, about, weights)
    for style, report in reports.items():
        console.say(f"exported {delivery.summary(str(folder / names[style]), dtype, report)}")
    write_card(run, folder)
    for warning in inherited.warnings(about):
        console.say(f"warning: {warning}", err=True)
    return {style: folder / name for style, name in names.items()}


def _base(run: Path) -> tuple[Trained, verify.Against]:
    """What the run's adapter says of itself, and its base, which must be the one that it was trained on."""
    facts = adapter.read_provenance(run / "adapter")
    base = adapter.base_of(facts)
    if bases.inspect_base(**base).base_hash != facts.base.hash:
        raise UserError(f"base {facts.base.path!r} has changed since {run} was trained on it; put it back")
    return facts, verify.base_of(**base)


def _about(run: Path, facts: Trained) -> Provenance:
    """What a file of a run says, dated by its weights."""
    trained_at = datetime.fromtimestamp((run / "adapter" / adapter.WEIGHTS).stat().st_mtime, UTC)
    return facts.of_file(run.resolve().name, trained_at.isoformat(timespec="seconds"))


def write_card(run: Path, folder: Path | None = None) -> Path | None:
    """Write the model card beside the exported files of `run`, with the numbers of its evaluation if any.

    Returns None if nothing was exported yet.
    """
    folder = folder or run / "export"
    files = verified.read(folder)["files"]
    if not files:
        return None
    facts, against = _base(run)
    title = run.resolve().name
    mine = {info["format"]: Path(name) for name, info in files.items() if name in _names(title)}
    checks = [
        (_title(app), files[path.name]["format"], _words(row))
        for path in mine.values()
        for app, row in files[path.name]["apps"].items()
    ]
    swept = next((found for name in mine.values() if (found := recommended.of_run(run, folder / name))), None)
    about = replace(_about(run, facts), recommended=swept)
    lora = trained.read(run / "adapter", against.structure)
    return card.write(
        folder, title=title, files=mine, structure=against.structure, facts=about, lora=lora, checks=checks,
        results=_measured(run, results.FILE, results.of_run),
        brand=_measured(run, results.BRAND_FILE, results.of_brand),
        pictures_from=run,
    )  # fmt: skip


def _measured(run: Path, name: str, read: Callable[[Path], Results | None]) -> Results | None:
    """What an evaluation says of these weights; one that cannot be read is named."""
    if not adapter.is_of_these_weights(run, name):
        return None
    try:
        found = read(run)
        if found and (told := results.decoded(found)):
            console.say(f"the card has no figures of {run / name}: they are of {told}", err=True)
            return None
        return found
    except UserError as error:
        console.say(f"warning: the card has no figures of it: {error}", err=True)
        return None


def _names(title: str) -> set[str]:
    return {file_name(style, title) for style in delivery.styles_of("both")}


def _words(row: own_shapes.Row) -> str:
    error = "" if row["output_error"] is None else f", output within {row['output_error']:.1e}"
    return f"{row['loaded']} of {row['modules']} modules{error}"


def _title(app: str) -> str:
    """The app's name, and the version whose rules were read."""
    return " ".join(filter(None, (title_of(app), VERSIONS.get(app))))
