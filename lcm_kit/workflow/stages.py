"""The stages of a story. Each does nothing, or continues, where it is done already or was stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lcm_kit import console
from lcm_kit.config import shipped
from lcm_kit.config.load import Config
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write
from lcm_kit.lora import verified
from lcm_kit.workflow.configs import CAPTIONS, PROMPTS, Story

Stage = tuple[str, Callable[[], Any]]


def stages_of(story: Story) -> Iterator[Stage]:
    """All stages after the check of the folder, by title; each imports what it needs when it runs."""
    yield "encode: pictures and captions become latents and embeddings", lambda: encode(story)
    yield "style: a LoRA that draws your style, at the base's pace", lambda: style(story)
    yield "distil: one LoRA that draws as base and style do, in few steps", lambda: distil(story)
    yield "export: the files that apps load, each checked in each app", lambda: export(story.run)
    yield "evaluate: base, styled base and adapter from the same noise", lambda: evaluate(story)
    yield "report: one page that shows it", lambda: report(story.run)


def require_folder(story: Story) -> None:
    """Raise `UserError` if the run's folder holds an adapter that no story made: it cannot be continued."""
    if (story.run / "adapter").is_dir() and not Path(story.style.output).is_dir():
        raise UserError(
            f"{story.run} holds a run without a style, which this would not continue; give another "
            "--output, or remove it"
        )


def encode(story: Story) -> None:
    """The pictures, and the base's own pictures if `style.prior` asks for them."""
    from lcm_kit.data import sources

    sources.encode(story.style)
    if story.own_prompts:
        _write_captions(story)


def _write_captions(story: Story) -> None:
    """Prompts to draw while it trains: the captions of held-out pictures. And the others, to sample from."""
    from lcm_kit import bases
    from lcm_kit.data.cache import Cache
    from lcm_kit.data.split import split

    config = story.style
    base = bases.inspect_base(config.base.path, revision=config.base.revision, variant=config.base.variant)
    cache = Cache.open(config.data.cache, base=base, data=config.data)
    seen, kept = split(cache, config.validation.held_out, config.seed)
    for name, rows in ((CAPTIONS, seen), (PROMPTS, kept if len(kept) else seen)):
        captions = dict.fromkeys(" ".join(cache.captions[row].split()) for row in rows.rows)
        atomic_write(story.run / name, "".join(f"{caption}\n" for caption in captions))


def style(story: Story) -> None:
    """Train the style LoRA, and export it: the teacher's adapter is a file as anybody would load it."""
    _recipe(story.style)
    export(Path(story.style.output))


def distil(story: Story) -> None:
    """Distil base and style. Raises `UserError` if the run was distilled from another style than there is."""
    from lcm_kit.data import sources

    _require_its_style(story)
    sources.encode(story.distill)
    _recipe(story.distill)


def _require_its_style(story: Story) -> None:
    from lcm_kit.adapter import folder as adapter
    from lcm_kit.adapter import styles

    if not (story.run / "adapter" / adapter.FACTS).is_file():
        return
    known = adapter.read_provenance(story.run / "adapter").teachers
    now = styles.teacher_loras(story.distill.teacher)
    if [each.sha256 for each in known] != [each.sha256 for each in now]:
        raise UserError(
            f"{story.run} was distilled from another style than {story.style.output} holds now; give another "
            "--output, and the new style is distilled there"
        )


def export(run: Path) -> None:
    """Export a run, unless its files are there and are of its weights."""
    from lcm_kit.export.run import export_run

    if exported(run):
        console.say(f"{run / 'export'}: exported and checked already; nothing to do")
    else:
        export_run(run)


def exported(run: Path) -> bool:
    """Whether the files of `run`'s export are whole, and of its weights."""
    from lcm_kit.adapter import folder as adapter
    from lcm_kit.lora.delivery import styles_of
    from lcm_kit.lora.write import file_name

    names = [file_name(each, run.resolve().name) for each in styles_of("both")]
    return all(
        verified.is_checked(run / "export" / name, run / "adapter" / adapter.WEIGHTS) for name in names
    )


def evaluate(story: Story) -> None:
    """Run the evaluations, which keep what they drew."""
    for config in story.evaluations:
        _recipe(config)


def report(run: Path) -> None:
    """The cards again, now that there are numbers and pictures, and the pages of the run and of its style."""
    from lcm_kit.export.run import write_card
    from lcm_kit.report.build import write_report

    for each in (run, run / "style"):
        write_card(each)
        write_report(each)


def _recipe(config: Config) -> None:
    shipped.load_recipe(config.recipe).main(config)
