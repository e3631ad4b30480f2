"""Does it collapse? How different the pictures of one prompt are, beside the teacher's from the same noise.

`diversity` is the mean RMS distance in latents between two pictures of one prompt, over all pairs and
prompts, of the student at its usual few steps over that of the teacher in 50 with guidance: 1 is as various
as the teacher, 0 one picture a prompt. Distances to the teacher do not tell: a student that draws the mean of
the teacher's pictures is near to each of them. `overtraining.py` has the level and the words.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from lcm_kit import assets
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.config import schema
from lcm_kit.training.held_out import Measures
from lcm_kit.training.overtraining import DIVERSITY
from lcm_kit.training.validation import Fixed, student_of

PICTURES = 4  # of a prompt, which are six pairs


def spread(latents: Tensor, together: int) -> Tensor:
    """The mean RMS distance between two of `together` that follow one another, of [n, C, h, w]; a scalar."""
    groups = latents.double().flatten(1).unflatten(0, (-1, together))
    apart = (groups[:, :, None] - groups[:, None, :]).square().mean(-1).sqrt()
    first, second = torch.triu_indices(together, together, offset=1)
    return apart[:, first, second].mean()


class Diversity(Fixed):
    """Prompts of a distillation's validation, each `PICTURES` times in a row with noise of its own."""

    kind: ClassVar[str] = "diversity"

    @classmethod
    def prepare(cls, config: schema.Distill, base_hash: str) -> Self:
        """What `config.validation.diversity` asks for; no prompts where it is 0.

        Raises `UserError` for missing prompts.
        """
        wanted = config.validation
        lines = assets.prompts(wanted.prompts) if wanted.diversity and wanted.prompts else []
        prompts = tuple(p for p in islice(cycle(lines), wanted.diversity) for _ in range(PICTURES))
        folder = Path(config.output) / "validation"
        size, method = config.drawn_at, student_of(config)
        return cls(wanted, config.base, base_hash, size, folder, prompts, method)

    def measures(self, adapted: AdaptedUNet) -> Measures:
        """`ratio` under its name; nothing where there are no prompts."""
        return {DIVERSITY: partial(self.ratio, adapted)} if self.prompts else {}

    @torch.no_grad()
    def ratio(self, adapted: AdaptedUNet) -> float:
        """`diversity` of what is trained on `adapted`, which is left as it was.

        Not a number where the teacher itself draws one picture a prompt.
        """
        pipe = self.pipe(adapted)
        drawn = self.latents(pipe, self.method.sampler, self.method.usual_steps, self.method.usual_guidance)
        return float(spread(drawn, PICTURES) / spread(self.teacher(adapted, pipe), PICTURES))
