"""What every stage of a story needs, planned before any runs: `lcm-kit finetune --dry-run` prints it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lcm_kit import console
from lcm_kit.config.brand import Brand
from lcm_kit.config.evaluation import Quality
from lcm_kit.config.resolution import height_width
from lcm_kit.config.schema import Training
from lcm_kit.drawing.batches import at_once
from lcm_kit.plan import advice, base_profile, evaluating, show
from lcm_kit.plan.dry_run import MetaModel
from lcm_kit.plan.estimate import CARDS, Planner, Stage, largest_batch
from lcm_kit.plan.meter import capacity
from lcm_kit.plan.sizes import dtype_of
from lcm_kit.plan.style import Style
from lcm_kit.plan.text import rank_of
from lcm_kit.workflow.configs import Story, configs_for

_TITLES = {"style": "style", "distill": "distil"}  # of a training, by the name of its overrides


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's bytes by batch size, and its own."""

    batch_size: int
    by_batch: Mapping[int, int]


@dataclass(frozen=True)
class Needs:
    """The stages of a story with what they need."""

    trainings: Mapping[str, tuple[Planner, Training]]  # by the name of their overrides
    evaluations: Mapping[str, Evaluation]  # the same
    device: str

    @classmethod
    def of(cls, story: Story, device: str) -> Needs:
        """Rehearse `story` for a `device`, cuda or cpu: seconds, for SDXL a minute. Reads no weights."""
        base = base_profile.find(story.distill.base)
        style = Planner(MetaModel(base, story.style.adapter, text_rank=rank_of(story.style)), device)
        # the teacher has the style, which is not trained yet: as large as its config makes it
        unet = style.stage.built(dtype_of(story.style, device)).adapted.unet
        names = [n.split(".lora_A.")[0] for n, _ in unet.named_parameters() if ".lora_A." in n]
        look = Style(dict.fromkeys(names, story.style.adapter.rank), story.distill.teacher.in_student)
        distil = Planner(MetaModel(base, story.distill.adapter, look), device)
        judged = {}
        for config in story.evaluations:
            assert isinstance(config, Brand | Quality)
            size = config.resolution or story.distill.data.resolution
            wanted = at_once(config.batch_size, *height_width(size), device)
            sizes: dict[int, int] = {}
            for batch in {*evaluating.BATCHES, wanted}:
                parts = evaluating.parts(size, distil.stage, device, batch)
                sizes[batch] = sum(parts.values())
            judged[config.recipe.removeprefix("evaluation/")] = Evaluation(wanted, sizes)
        return cls({"style": (style, story.style), "distill": (distil, story.distill)}, judged, device)

    def stages(self) -> Iterator[tuple[str, Stage]]:
        """Each stage by the name of its overrides, in the order in which they run."""
        seen = set()
        for name, (planner, config) in self.trainings.items():
            for stage in planner(config).stages:
                if stage.verb == "encode" and stage.phase not in seen:
                    seen.add(stage.phase)  # the distillation reads what the style has encoded
                    yield name, stage
                elif stage.verb == "train":
                    yield name, Stage(_TITLES[name], stage.phase, stage.size)
        for name, each in self.evaluations.items():
            phase = f"{name}, batch_size={each.batch_size}"
            yield name, Stage("evaluate", phase, each.by_batch[each.batch_size])

    def largest(self) -> Stage:
        """The stage that needs most."""
        return max((stage for _, stage in self.stages()), key=lambda stage: stage.size)

    def advice(self, card: float) -> list[str]:
        """Each stage that does not fit into a card of `card` GiB, and what to change; empty if all fit."""
        said, asked = [], set()
        for name, stage in self.stages():
            if stage.fits(card):
                continue
            needs = f"{stage.name} needs {show.size(stage.size)}"
            if name in self.evaluations:
                batch = largest_batch(self.evaluations[name].by_batch, card)
                said.append(f"{needs}: {f'add {name}.batch_size={batch}' if batch else show.help_for(stage)}")
                continue
            typed, fits = self._change(name, card)
            helped = typed and (fits if stage.verb != "encode" else "data.batch_size" in typed)
            if not helped:
                said.append(f"{needs}: {show.help_for(stage) if stage.verb == 'encode' else show.LESS}")
            elif name not in asked:
                asked.add(name)
                said.append(f"{needs}: add {typed}")
            else:
                said.append(f"{needs}: the same helps")
        return said

    def _change(self, name: str, card: float) -> tuple[str, bool]:
        planner, config = self.trainings[name]
        tried = advice.what_to_change(planner, config, card)
        if not tried:
            return "", False
        typed = " ".join(f"{name}.{each}" for each in tried[-1].typed.split())
        return typed, tried[-1].estimate.train_fits(card)


def tell(story: Story) -> None:
    """Print what each stage needs and whether it fits: into what is here, or into which card.

    A base that is not small wants a GPU: it is planned for one, also where none is.
    """
    small = configs_for(base_profile.find(story.distill.base).structure.width) == "tiny"
    device = "cpu" if small and not torch.cuda.is_available() else "cuda"
    memory = capacity(device)
    if memory is None:
        console.say("note: there is no GPU here; what each stage needs is told for one")
    needs = Needs.of(story, device)
    show.stages([stage for _, stage in needs.stages()], needs.largest())
    cards: Sequence[float] = CARDS if memory is None else (memory,)
    for card in cards:
        said = needs.advice(card)
        console.say(f"{card:.3g} GB of memory: {'not all stages fit' if said else 'every stage fits'}")
        for sentence in said:
            console.say(f"- {sentence}")
        if not said:
            break
