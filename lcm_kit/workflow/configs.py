"""The configs of a story's stages, all checked before anything runs.

The distillation is read first, with what the user overrides; the style LoRA takes base, pictures and
resolution from it, so that one key says each once. What the story itself decides (where things go, who
teaches) cannot be overridden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lcm_kit import assets
from lcm_kit.config import shipped, yaml_text
from lcm_kit.config.data import Data
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.load import Config, load
from lcm_kit.config.schema import Distill, Weighted
from lcm_kit.data import prior
from lcm_kit.errors import UserError
from lcm_kit.families import unpruned

STYLE, CACHE = "style", "cache"  # folders within the run's
PROMPTS = "prompts.txt"  # in the run's folder: captions of the pictures that the style was not trained on
CAPTIONS = "captions.txt"  # and those of the others
EVALUATIONS = ("brand", "quality")  # each a recipe and a stage
_OWN = (
    "recipe",
    "output",
    "run",
    "style",
    "brand",
    "data.leave_out",
    "teacher.adapters",
    "teacher.in_student",
)
_GIVEN = ("base", "data.path")  # the story's as well where `--base` or another stage says it
_SHARED = (  # of `data`, by both trainings
    "path", "kind", "resolution", "skip_bad", "trigger", "captions", "chunks", "shapes", "masks",
    "require_license",
)  # fmt: skip
_GENERAL = 100  # pictures that the base draws of everyday things
_SEEN = (
    "path", "regularization", "resolution", "flip", "kind", "shard_size", "skip_bad", "trigger", "captions",
    "chunks", "shapes", "masks",
)  # fmt: skip


@dataclass(frozen=True)
class Story:
    """The stages' configs, in their order."""

    style: Finetune
    distill: Distill
    evaluations: tuple[Config, ...]
    own_prompts: bool = False  # whether PROMPTS and CAPTIONS are made from the pictures' captions

    @property
    def run(self) -> Path:
        """The run's folder: that of the adapter with style and speed."""
        return Path(self.distill.output)


@dataclass(frozen=True)
class Overrides:
    """What the user wrote as `STAGE.KEY=VALUE`, by stage, without the stage."""

    stages: tuple[str, ...]
    texts: tuple[str, ...]
    bare: str | None = None  # the stage of a key without one, which decides base and pictures; None: none

    def of(self, stage: str) -> list[str]:
        """The overrides of a stage. Raises `UserError` for a key that the story itself decides."""
        found = [text.removeprefix(f"{stage}.") for text in self.texts if self._stage(text) == stage]
        decided = _OWN if stage == self.bare else (*_OWN, *_GIVEN)
        for text in found:
            key = text.partition("=")[0]
            if any(key == own or key.startswith(f"{own}.") for own in decided):
                raise UserError(
                    f"{stage}.{key} is decided by the story, so that its stages fit together; leave it out, "
                    "or run the stages one by one (docs/finetuning.md)"
                )
        return found

    def check(self) -> None:
        """Raise `UserError` for a text that is no override of any stage."""
        for text in self.texts:
            if self._stage(text) is None:
                stages = ", ".join(f"{stage}.KEY=VALUE" for stage in self.stages)
                raise UserError(f"{text}: it must say which stage it is for; write one of {stages}")

    def _stage(self, text: str) -> str | None:
        first, dot, key = text.partition("=")[0].partition(".")
        if dot and first == "evaluation":
            known = " or ".join(f"{stage}.{key}" for stage in self.stages if stage in EVALUATIONS)
            raise UserError(f"{text}: there is no stage of that name; write {known}")
        return first if dot and first in self.stages else self.bare


def configs_for(width: int) -> str:
    """Which configs a base takes, by their name: sd15 (SD1.x and SD2.x), sdxl, or tiny for a base in small.

    `width`: D of its text embeddings.
    """
    return next((each.configs for each in unpruned() if each.configs and each.width == width), "tiny")


def quickstart(output: Path, overrides: Sequence[str]) -> Story:
    """The story on the embedded base and brand set; `distill` is `configs/quickstart.yaml`.

    Raises one `UserError` a config for all that is wrong with it.
    """
    stages = ("distill", "style", "brand", "quality")
    given = Overrides(stages, tuple(overrides), bare="distill")
    distill = _distill("quickstart", output, {}, given)
    style = _style("finetune/tiny_brand", distill, {}, given)
    distill = _without_held_out(distill, style)
    pictures = distill.data.path
    size = distill.data.resolution
    told = {"run": str(output), "style": style.output, "brand": pictures, "resolution": size}
    brand = _load("evaluation/brand", told, given.of("brand"))
    quality = _load("evaluation/quality", {"run": str(output), "unet_calls": [4]}, given.of("quality"))
    return Story(style, distill, (brand, quality))


def prompts_in(folder: str) -> str | None:
    """The folder itself, if there are prompts in its `prompts.txt`; None otherwise."""
    return folder if (assets.place(folder) / PROMPTS).is_file() else None


def finetune(
    folder: str, base: Mapping[str, str | None], family: str, output: Path, size: int,
    prompts: str | None, overrides: Sequence[str], trigger: str | None = None,
) -> Story:  # fmt: skip
    """The story for a studio's `folder` of pictures on `base` (path, revision, variant) of a `family`.

    `size`: pixels that the base was made for; `prompts`: a file of them, None: made of the pictures'
    captions; `trigger`: as `data.trigger`. Raises one `UserError` a config for all that is wrong with it.
    """
    given = Overrides(("style", "distill", "brand"), tuple(overrides))
    given.check()
    told: dict[str, Any] = {
        **{f"base.{key}": value for key, value in base.items()},
        "data.path": folder, "data.kind": "folder", "data.resolution": size,
        "data.cache": str(output / CACHE), "validation.prompts": prompts or str(output / PROMPTS),
        "data.trigger": trigger,
    }  # fmt: skip
    if family != "tiny":  # whose own are of the embedded world
        told["data.samples.prompts"] = str(output / CAPTIONS)
    distill = _distill(f"distill/{family}_styled", output, told, given)
    look = "tiny_brand" if family == "tiny" else f"{family}_style"
    more = {"validation.prompts": told["validation.prompts"]}
    if family != "tiny":  # whose configs have general pictures
        more |= {"prior.prompts": "asset:everyday", "prior.count": _GENERAL}
    style = _style(f"finetune/{look}", distill, more, given)
    distill = _without_held_out(_with_general(distill, style), style)
    judged = "evaluation/brand" if family == "tiny" else "evaluation/brand_clip"
    subject = {"run": str(output), "style": style.output, "brand": folder, "prompts": prompts}
    brand = _load(judged, {**subject, "resolution": distill.data.resolution}, given.of("brand"))
    return Story(style, distill, (brand,), prompts is None)


def from_speed_too(story: Story, speed: str, rank: int) -> Story:
    """The story whose distillation starts as the sum of the style and `speed`, an LCM-LoRA of `rank`.

    The rank of the LoRA that is trained becomes that of both together at least, its strength stays.
    """
    adapter = story.distill.adapter
    least = max(adapter.rank, story.style.adapter.rank + rank)
    alpha, start = adapter.alpha * least / adapter.rank, (*adapter.start, Weighted(speed))
    wider = replace(adapter, rank=least, alpha=alpha, start=start)
    return replace(story, distill=replace(story.distill, adapter=wider))


def _distill(name: str, output: Path, told: Mapping[str, Any], given: Overrides) -> Distill:
    config = _load(name, {**told, "output": str(output)}, given.of("distill"))
    assert isinstance(config, Distill)  # `recipe` cannot be overridden
    known = config.teacher.adapters[:1] or (Weighted(""),)
    style = str(output / STYLE)
    teacher = replace(config.teacher, adapters=(replace(known[0], path=style),), in_student=False)
    # the start of a config that begins with its teacher's style, alone or among others
    start = tuple(replace(e, path=style) if e.path == known[0].path else e for e in config.adapter.start)
    return replace(config, teacher=teacher, adapter=replace(config.adapter, start=start))


def _without_held_out(distill: Distill, style: Finetune) -> Distill:
    """Without the pictures that the style holds out: the evaluation is then of what no training has seen."""
    seen = not style.validation.held_out or not distill.data.has_images
    return replace(distill, data=replace(distill.data, leave_out=None if seen else style.output))


def _with_general(distill: Distill, style: Finetune) -> Distill:
    """With what the base drew for the style's training as general pictures, unless it names others.

    The base alone teaches these, so that prompts which do not name the style still draw as before.
    """
    if style.prior.prompts is None or distill.data.regularization or not distill.data.has_images:
        return distill
    return replace(distill, data=replace(distill.data, regularization=prior.data_of(style).path))


def _style(name: str, distill: Distill, told: Mapping[str, Any], given: Overrides) -> Finetune:
    """The style's config, on the distillation's pictures; one cache for both if they read the same."""
    base, data = asdict(distill.base), distill.data
    shared = {key: asdict(data)[key] for key in _SHARED}
    told = {
        **told, **{f"base.{key}": value for key, value in base.items()},
        **{f"data.{key}": value for key, value in shared.items()},
        "data.cache": f"{data.cache}-style", "output": str(Path(distill.output) / STYLE),
    }  # fmt: skip
    config = _load(name, told, own := given.of("style"))
    assert isinstance(config, Finetune)
    alike = _seen(config.data) == _seen(_with_general(distill, config).data)
    if alike and not any(text.startswith("data.cache=") for text in own):
        config = replace(config, data=replace(config.data, cache=data.cache))
    return config


def _seen(data: Data) -> dict[str, Any]:
    """What decides which records a cache holds, and how."""
    return {key: getattr(data, key) for key in _SEEN}


def _load(name: str, told: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """A shipped config with the story's values, and over these the user's."""
    given = [*yaml_text.overrides(told), *overrides]
    return load(shipped.find(f"configs/{name}"), given, imports=True)
