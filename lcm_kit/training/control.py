"""Is it forgetting? Control prompts, which do not name the style, measured without a vision model.

`control_distance` of a distilled LoRA: the RMS in latents between the student's one-step sample and the
teacher's 50-step sample from the same noise; more steps renew noise on their way, in which forgetting drowns
(docs/training.md). `control_loss` of a style LoRA: the denoising loss on what the
base itself draws for these prompts; distance in pictures would tell how strong the style is and not what is
lost. Either rises when the LoRA unlearns what the brand's pictures lack (docs/finetuning.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lcm_kit import assets, bases
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.text import Captions, TextLora
from lcm_kit.bases.condition import Condition
from lcm_kit.config import schema
from lcm_kit.data.encoder import Encoder
from lcm_kit.data.order import Run
from lcm_kit.errors import UserError
from lcm_kit.training.held_out import HeldOut, LossesAt, Measures
from lcm_kit.training.validation import STYLE_STEPS, Fixed, rms, student_of


class Control(Fixed):
    """The control prompts of a distillation, each with the noise of its own number."""

    kind: ClassVar[str] = "control"

    @classmethod
    def prepare(cls, config: schema.Training, base_hash: str) -> Self:
        """What `config.validation.control` asks for; no prompts where it is null.

        Raises `UserError` for missing prompts, and if the run has been measured with others until now.
        """
        wanted = config.validation
        lines = assets.prompts(wanted.control) if wanted.control else []
        prompts = tuple(islice(cycle(lines), wanted.control_count))
        folder = Path(config.output) / "validation"
        size, method = config.drawn_at, student_of(config)
        found = cls(wanted, config.base, base_hash, size, folder, prompts, method)
        started = prompts and any((Path(config.output) / "state").glob("step-*"))
        if started and not found.file.is_file() and any(folder.glob(f"{cls.kind}-*.safetensors")):
            raise UserError(
                f"{config.output}: this run was measured on other control prompts, and figures of both do "
                "not compare; set validation.control, control_count, seed, guidance_scale and resolution "
                "back, or give another output"
            )
        return found

    def measures(self, adapted: AdaptedUNet) -> Measures:
        """`distance` under its name; nothing where there are no prompts."""
        return {"control_distance": partial(self.distance, adapted)} if self.prompts else {}

    @torch.no_grad()
    def distance(self, adapted: AdaptedUNet) -> float:
        """`control_distance` of what is trained on `adapted`, which is left as it was."""
        pipe = self.pipe(adapted)
        drawn = self.latents(pipe, self.method.sampler, 1, self.method.usual_guidance)
        return rms(drawn, self.teacher(adapted, pipe))


@dataclass(frozen=True)
class Drawn:
    """The base's pictures of control prompts, to measure a loss on as on held-out ones."""

    ids: list[str]
    all_latents: Tensor  # [n, C, h, w] float32
    all_conditions: Condition

    several: ClassVar[bool] = False

    @property
    def runs(self) -> list[Run]:
        """All of one shape."""
        return [Run(len(self.ids))]

    def latents(self, index: Sequence[int]) -> Tensor:
        """Latents [n, C, h, w] at `index`."""
        return self.all_latents[list(index)]

    def weights(self, index: Sequence[int]) -> None:
        """All cells count alike."""

    def condition(self, index: Sequence[int], chances: Sequence[float] | None = None) -> Condition:
        """Conditions at `index`; each has one caption."""
        return self.all_conditions[list(index)]


class StyleControl(Control):
    """The control prompts of a style LoRA."""

    teacher_steps: ClassVar[int] = STYLE_STEPS

    def draw(self, adapted: AdaptedUNet, pipe: Any) -> dict[str, Tensor]:
        """As `Fixed.draw`, and the conditions that the UNet is told of the prompts."""
        base = bases.inspect_base(self.base.path, revision=self.base.revision, variant=self.base.variant)
        encoder = Encoder.load(base, str(pipe.device), vae=False, chunks=None)  # as they are drawn
        conditions = encoder.of_whole_pictures(self.prompts, self.resolution)
        return {**super().draw(adapted, pipe), **conditions}

    def pictures(self, adapted: AdaptedUNet, text: TextLora | None = None) -> Drawn:
        """What the base draws: made once, then read from the run's folder.

        The UNet is told of the prompts as `text` encodes them by then, if text encoders are trained.
        """
        tensors = self.kept(lambda: self.draw(adapted, self.pipe(adapted)))
        latents, condition = tensors.pop("latents"), Condition(**tensors)
        if text:
            condition = Captions.of(self.prompts, text, condition.time_ids)
        return Drawn(list(self.prompts), latents, condition)

    def measures_at(
        self, adapted: AdaptedUNet, measure: HeldOut, losses_at: LossesAt, text: TextLora | None = None
    ) -> Measures:
        """`control_loss` of what is trained on `adapted`: as `measure`, on what the base draws.

        Nothing where there are no prompts.
        """

        def loss() -> float:
            return replace(measure, pictures=self.pictures(adapted, text)).mean_at(losses_at)

        return {"control_loss": loss} if self.prompts else {}
