"""From brand pictures to one adapter that draws their style in 4 steps: the stages in one go.

`finetune` is the story for a studio's folder and base, `quickstart` the same on what the kit ships.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lcm_kit import assets, console, sample
from lcm_kit.bases.out_of_memory import free
from lcm_kit.config.schema import Base
from lcm_kit.data import reconstruction
from lcm_kit.data.encoder import usable_base
from lcm_kit.data.reconstruction import Reconstructions
from lcm_kit.data.records import list_source
from lcm_kit.errors import UserError
from lcm_kit.io.files import require_writable
from lcm_kit.share import started_together
from lcm_kit.workflow import configs, needs, show
from lcm_kit.workflow.configs import Story
from lcm_kit.workflow.stages import require_folder, stages_of

_STAGES = 7


def quickstart(output: Path, overrides: Sequence[str] = ()) -> Path:
    """The story on the embedded base and brand set into `output`; returns the path of its report.html.

    `overrides` are keys of `configs/quickstart.yaml`; with `style.`, `brand.` or `quality.` before them,
    of `configs/finetune/tiny_brand.yaml` and of `configs/evaluation/` `brand.yaml` or `quality.yaml`. A stage
    that is done already does nothing or continues. Raises `UserError` as the stages do.
    """
    _alone()
    story = configs.quickstart(output, overrides)
    require_folder(story)
    require_writable(story.run)
    checked = _check(story)
    show.plan(story, checked.pictures)
    return _tell(story, checked)


def finetune(
    folder: str,
    base: Base,
    output: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    prompts: str | None = None,
    trigger: str | None = None,
    speed: str | None = None,
    dry_run: bool = False,
) -> Path:
    """The story for the pictures in `folder` (or asset:NAME); returns the path of report.html.

    `output`: the run's folder, `runs/<name of the folder>` unless given. `prompts`: a file of prompts to draw
    while it trains and to judge by; None: `prompts.txt` in the folder if there is one, else the captions of
    the pictures that are held out. `trigger`: the word of the captions that stands for the style
    (`data.trigger`). `speed`: an LCM-LoRA for the base (as `lora_file.adapter_file` takes it), which the
    distillation then starts from beside the style. `overrides`: `style.KEY=VALUE`, `distill.KEY=VALUE` and
    `brand.KEY=VALUE`, of `evaluation/brand`. `dry_run`: check, print the plan and what memory each stage
    needs, and make nothing. A stage that is done already does nothing or continues. Raises `UserError` for a
    folder that cannot be learned from, and as the stages do.
    """
    _alone()
    place = assets.place(folder)
    if not place.is_dir():
        raise UserError(f"folder {folder!r}: there is no such folder; give the one with your pictures")
    run = output or Path("runs") / place.resolve().name
    story = _of_studio(folder, base, run, prompts, trigger, speed, overrides)
    require_folder(story)
    if not dry_run:
        require_writable(story.run)
    checked = _check(story)
    show.plan(story, checked.pictures)
    if dry_run:
        needs.tell(story)
        return story.run / "report.html"
    report = _tell(story, checked)
    show.other_way(story, speed)
    return report


def _of_studio(
    folder: str, base: Base, output: Path, prompts: str | None, trigger: str | None, speed: str | None,
    overrides: Sequence[str],
) -> Story:  # fmt: skip
    from lcm_kit.adapter import styles
    from lcm_kit.bases import inspect_base, require_fit

    found = inspect_base(base.path, revision=base.revision, variant=base.variant)
    require_fit(found)
    wanted = prompts or configs.prompts_in(folder)
    if wanted:
        assets.prompts(wanted)  # are there any?
    place = {"path": base.path, "revision": base.revision, "variant": base.variant}
    size, family = found.sample_size * found.factor, configs.configs_for(found.width)
    story = configs.finetune(folder, place, family, output, size, wanted, overrides, trigger)
    if speed is None:
        return story
    return configs.from_speed_too(story, speed, styles.largest_rank("--speed", speed, found))


class Checked(NamedTuple):
    """What the check of the pictures found."""

    pictures: int
    drawn: Reconstructions


def _check(story: Story) -> Checked:
    """Print what is to be said of the pictures; raises for what is wrong."""
    from lcm_kit.data.folder import check_data

    data = story.distill.data
    _heading(1, "check: are these pictures to learn from, and can the base draw them?")
    found = check_data(data)
    _say(found.notes, found.warnings)
    if len(found.errors) == 1:
        raise UserError(found.errors[0])
    if found.errors:
        listed = "".join(f"\n  - {sentence}" for sentence in found.errors)
        raise UserError(f"{data.path}: {len(found.errors)} things are wrong{listed}")
    own = list_source(data).good  # without those of data.regularization, which may not be drawn yet
    device = sample.placement()["device"]
    drawn = reconstruction.measure(usable_base(story.distill), own, data.resolution, device)
    told: dict[str, list[str]] = {"note": [], "warning": []}
    for each in drawn.findings():
        told[each.weight].append(each.sentence)
    _say(told["note"], told["warning"])
    if not found.warnings and not told["warning"]:
        console.say(f"{found.count:,} pictures with captions; nothing to warn of", err=True)
    return Checked(found.count, drawn)


def _say(notes: Sequence[str], warnings: Sequence[str]) -> None:
    for sentence in notes:
        console.say(sentence, err=True)
    for sentence in warnings:
        console.say(f"warning: {sentence}", err=True, style="yellow")


def _tell(story: Story, checked: Checked) -> Path:
    """Run the stages after the check, each under its heading and with its time."""
    reconstruction.write(checked.drawn, story.run)
    began = time.perf_counter()
    for number, (title, run) in enumerate(stages_of(story), start=2):
        _heading(number, title)
        started = time.perf_counter()
        run()
        free()  # what one stage held is not beside what the next one loads
        console.say(show.duration(time.perf_counter() - started), err=True, style="dim")
    show.summary(story)
    console.say(f"\nDone in {show.duration(time.perf_counter() - began)}.")
    return story.run / "report.html"


def _heading(number: int, title: str) -> None:
    console.rule(f"{number}/{_STAGES}", title)


def _alone() -> None:
    """Raise `UserError` under `accelerate launch`: the stages share work each in its own way."""
    if started_together() > 1:
        raise UserError(
            "this runs all stages in one process; with several, run `lcm-kit encode`, `train`, `export` and "
            "`evaluate` one by one (docs/finetuning.md)"
        )
