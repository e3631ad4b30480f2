"""What `evaluation/brand` draws, and for which prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lcm_kit import assets, sample
from lcm_kit.adapter.folder import read_provenance
from lcm_kit.config.brand import Brand
from lcm_kit.config.data import Captions
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.load import load
from lcm_kit.config.schema import Data
from lcm_kit.core.methods import MethodInfo
from lcm_kit.data import records, split
from lcm_kit.errors import UserError
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.draw import repeated
from lcm_kit.evaluation.metrics import similarity
from lcm_kit.io.files import sha256_bytes

STYLE, ADAPTER = "style", "adapter"


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


def prompts_and_pictures(config: Brand) -> tuple[tuple[str, ...], list[records.Record | None]]:
    """The prompts of the style, `config.count` of them, and the brand's picture of each if there is one."""
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
    return wanted, [by_caption.get(prompt) for prompt in wanted[: config.pictures]]


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


def save_pictures(pictures: Sequence[records.Record | None], folder: Path, size: int) -> list[str | None]:
    """The brand's pictures as `brand-NNN.png`, cut as for training; names within `folder`, None for none."""
    names: list[str | None] = []
    for k, picture in enumerate(pictures):
        names.append(None if picture is None else f"brand-{k:03d}.png")
        if picture is not None:
            cut = sample.to_pil(picture.pixels(size)[None])[0]
            cut.save(folder / f"brand-{k:03d}.png", optimize=True)
    return names
