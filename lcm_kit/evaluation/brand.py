"""What `evaluation/brand` draws, and for which prompts.

A trigger is taken out of the very prompts of the style, not left to the control prompts: what leaks shows
best where all else is as the style's pictures are, from the same noise. The control prompts are of other
things, and say what was unlearned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lcm_kit import assets, console, sample
from lcm_kit.adapter.folder import read_provenance
from lcm_kit.config.brand import Brand
from lcm_kit.config.data import Captions
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.load import load
from lcm_kit.config.resolution import Resolution
from lcm_kit.config.schema import Data
from lcm_kit.core.methods import MethodInfo
from lcm_kit.data import records, split, trigger
from lcm_kit.errors import UserError
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.draw import Samples, repeated
from lcm_kit.evaluation.metrics import similarity
from lcm_kit.evaluation.results import BARE, CONTROL, MAIN
from lcm_kit.io.files import sha256_bytes
from lcm_kit.lora import untrusted
from lcm_kit.lora.metadata_reading import provenance_from_header

STYLE, ADAPTER = "style", "adapter"
# Of what is drawn for each list of prompts; the names of its pictures begin so
FOLDERS = {MAIN: "brand", CONTROL: "control", BARE: "bare"}
AGAIN = "again"  # of the control prompts that the base draws once more, from other noise


def plan(config: Brand, method: MethodInfo) -> list[Cell]:
    """The base, the styled teacher if there is one, then the adapter by steps.

    `method`: what made the adapter, which says how it is drawn where the config does not.
    """
    cells = [Cell("teacher", None, "ddim", config.teacher_steps, config.teacher_guidance)]
    if config.style is not None:
        cells.append(Cell("teacher", STYLE, "ddim", config.teacher_steps, config.teacher_guidance))
    sampler = config.sampler or method.sampler
    scale = config.guidance_scale or method.guidance_beside(config.teacher_guidance)
    return cells + [
        Cell("student", ADAPTER, sampler, n, scale, config.lora_weight)
        for n in dict.fromkeys(config.steps or method.judged_steps)
    ]


def output(config: Brand) -> Path:
    """Where brand.json goes."""
    if config.output is not None:
        return Path(config.output)
    run = Path(config.run)
    return run if run.is_dir() else run.parent / "brand"


def require_one_file(run: str) -> None:
    """Raise `UserError` if the run's adapter is half of a pair: it would be drawn without its style."""
    folder = Path(run) / "adapter"
    teacher = read_provenance(folder).teacher if folder.is_dir() else None
    if teacher and teacher.in_student:
        raise UserError(
            f"{run} learned speed alone (teacher.in_student), so it is drawn with its style beside it; merge "
            "the two with `lcm-kit merge` and give the merged file as run=FILE"
        )


def trigger_of(config: Brand, file: Path) -> str | None:
    """What calls the style: the config's trigger, or what the adapter's `file` says; None: nothing does."""
    said = config.trigger
    if said is None:
        said = provenance_from_header(untrusted.inspect(file).metadata, file.stem).data.trigger
    return said if said and trigger.phrases(said) else None


def lists(config: Brand, wanted: Samples, control: Samples, called: str | None) -> dict[str, Samples]:
    """What all cells draw, by list: the prompts of the style and the control prompts; and for the contract of
    the trigger `called` those of the style without it, from the same noise.

    Raises `UserError` for a prompt that says nothing but the trigger.
    """
    found = {MAIN: wanted, CONTROL: control}
    if not config.contract or called is None:
        return found
    bare = tuple(trigger.without(prompt, called) for prompt in wanted.prompts)
    if "" in bare:
        raise UserError(
            f"prompt {wanted.prompts[bare.index('')]!r} says nothing but the trigger {called!r}, so it "
            "cannot be drawn without it; let it say what is in the picture, or set contract=false"
        )
    return {**found, BARE: replace(wanted, prompts=bare)}


def prompts_and_pictures(
    config: Brand, called: str | None = None
) -> tuple[tuple[str, ...], list[records.Record | None]]:
    """The prompts of the style, `config.count` of them, and the brand's picture of each if there is one.

    All of them say the trigger `called`, which is put in front of those that do not.
    """
    trained = _trained_on(config)
    how = trained.data.captions if trained else Captions()
    found, _ = records.open_records(
        Data(
            path=config.brand, kind="folder", captions=how, trigger=trained.data.trigger if trained else None
        )
    )
    if config.prompts is not None:
        wanted = repeated(records.prompts(config.prompts), config.count)
    else:
        held = _held_out(trained, found) if trained else []
        wanted = repeated([record.caption for record in held or found], config.count)
    by_caption = {record.caption: record for record in found}
    shown = [by_caption.get(prompt) for prompt in wanted[: config.pictures]]
    if called is None:
        return wanted, shown
    asked = tuple(trigger.saying(prompt, called) for prompt in wanted)
    if added := sum(a != b for a, b in zip(asked, wanted, strict=True)):
        console.say(
            f"{added} of {len(wanted)} prompts of the style do not say the trigger {called!r}: it is put in "
            "front of them",
            err=True,
        )
    return asked, shown


def _trained_on(config: Brand) -> Finetune | None:
    """What the style was trained with, if it was on these pictures."""
    file = Path(config.style or "") / "config.yaml"
    if config.style is None or not file.is_file():
        return None
    trained = load(file)
    if not isinstance(trained, Finetune) or assets.resolve(trained.data.path) != assets.resolve(config.brand):
        return None
    return trained


def _held_out(trained: Finetune, found: Sequence[records.Record]) -> list[records.Record]:
    """The pictures that the style's run held out."""
    content = {record.id: sha256_bytes(record.read()) for record in found}
    held = split.chosen(set(content.values()), trained.validation.held_out, trained.seed)
    return [record for record in found if content[record.id] in held]


def own_similarity(brand: Tensor, control: Tensor) -> float | None:
    """What the brand's own pictures get, from the features of both sets; None for a set of one picture."""
    return None if min(len(brand), len(control)) < 2 else similarity.ends(brand, control)[1]


def save_pictures(
    pictures: Sequence[records.Record | None], folder: Path, resolution: Resolution
) -> list[str | None]:
    """The brand's pictures as `brand-NNN.png`, cut to the shape of what is drawn; names within `folder`, None
    for none.
    """
    names: list[str | None] = []
    for k, picture in enumerate(pictures):
        names.append(None if picture is None else f"brand-{k:03d}.png")
        if picture is not None:
            cut = sample.to_pil(picture.pixels(resolution)[None])[0]
            cut.save(folder / f"brand-{k:03d}.png", optimize=True)
    return names
