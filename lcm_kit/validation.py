"""Is it working? Pictures while it trains, and the one number that tells, because the loss does not.

`one_step_distance` is the RMS in latents between the student's one-step sample and the teacher's 50-step
sample (DDIM, with guidance) from the same noise. It falls while distillation works; the consistency loss may
fall or rise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lcm_kit import assets, sample
from lcm_kit.adapter import teacher, text_encoders
from lcm_kit.config import schema
from lcm_kit.files import atomic_file, sha256_bytes

TEACHER_STEPS = 50
STUDENT_STEPS = (1, 2, 4)
STYLE_STEPS = 30
_HEADING = 14  # pixels above the columns


def rms(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared difference over all elements of two equal shapes."""
    return float((a.float() - b.float()).square().mean().sqrt())


def due(config: schema.Validation, step: int, steps: int) -> bool:
    """Whether to validate after `step` of `steps`: every `config.every` steps and at the end."""
    return step == steps or bool(config.every and step % config.every == 0)


@dataclass(frozen=True)
class Validation:
    """Fixed prompts and noise for the student, and the teacher's samples of them."""

    config: schema.Validation
    base: schema.Base
    base_hash: str
    resolution: int  # pixels
    folder: Path  # validation/ of the run
    prompts: tuple[str, ...]
    teacher_steps: ClassVar[int] = TEACHER_STEPS

    @classmethod
    def prepare(cls, config: schema.Training, base_hash: str) -> Self | None:
        """What `config.validation` asks for, if anything. Raises `UserError` for missing prompts."""
        if config.validation.prompts is None:
            return None
        prompts = tuple(islice(cycle(assets.prompts(config.validation.prompts)), config.validation.count))
        folder = Path(config.output) / "validation"
        return cls(config.validation, config.base, base_hash, config.data.resolution, folder, prompts)

    def due(self, step: int, steps: int) -> bool:
        """As the function `due`."""
        return due(self.config, step, steps)

    @torch.no_grad()
    def __call__(self, unet: Any, step: int) -> float:
        """Write `step-NNNNNN.png`, a row a prompt: teacher, student at 1, 2, 4 steps; return the distance.

        `unet` carries the adapter and is left as it was. The VAE and the text encoder are loaded for this
        call only. No number is taken from the global random state.
        """
        pipe = self._pipe(unet)
        wanted = self._teacher(pipe)
        drawn = {n: self._latents(pipe, "lcm", n, 1.0) for n in STUDENT_STEPS}
        columns = {f"teacher {TEACHER_STEPS}": wanted, **{f"student {n}": x for n, x in drawn.items()}}
        self._show(pipe, columns, step)
        return rms(drawn[1], wanted)

    def _pipe(self, unet: Any) -> Any:
        return sample.pipeline(
            self.base.path, unet=unet, revision=self.base.revision, variant=self.base.variant,
            dtype=next(unet.parameters()).dtype, device=unet.device, text_encoders=text_encoders(unet),
        )  # fmt: skip

    def _show(self, pipe: Any, columns: Mapping[str, Tensor], step: int) -> None:
        """Write the pictures of `columns` (latents by heading) as `step-NNNNNN.png`."""
        pictures = {name: sample.to_pil(sample.decode(pipe, x)) for name, x in columns.items()}
        sample.save_png(_grid(pictures), self.folder / f"step-{step:06d}.png")

    def _latents(self, pipe: Any, solver: str, steps: int, guidance_scale: float) -> Tensor:
        return sample.latents(
            pipe, self.prompts, solver=solver, steps=steps, guidance_scale=guidance_scale,
            seed=self.config.seed, size=self.resolution,
        )  # fmt: skip

    def _teacher(self, pipe: Any) -> Tensor:
        """The teacher's samples, latents [count, C, h, w]: drawn once, then read from the run's folder."""
        from safetensors.torch import load_file, save_file

        drawn_from = [
            self.prompts,
            self.config.seed,
            self.config.guidance_scale,
            self.base_hash,
            self.resolution,
        ]
        file = self.folder / f"teacher-{sha256_bytes(json.dumps(drawn_from).encode())[:12]}.safetensors"
        if not file.is_file():
            with teacher(pipe.unet):
                latents = self._latents(pipe, "ddim", self.teacher_steps, self.config.guidance_scale)
            with atomic_file(file) as temporary:
                save_file({"latents": latents}, temporary)
        return load_file(file)["latents"]


class StyleValidation(Validation):
    """The base beside the base with the LoRA, both as users draw with a style LoRA, from the same noise."""

    teacher_steps: ClassVar[int] = STYLE_STEPS

    @torch.no_grad()
    def __call__(self, unet: Any, step: int) -> float:
        """Write `step-NNNNNN.png`, a row a prompt: base, LoRA; return their RMS distance in latents.

        Both at 30 steps of DDIM with `config.guidance_scale`. Otherwise as `Validation`.
        """
        pipe = self._pipe(unet)
        plain = self._teacher(pipe)
        drawn = self._latents(pipe, "ddim", STYLE_STEPS, self.config.guidance_scale)
        self._show(pipe, {f"base {STYLE_STEPS}": plain, f"with LoRA {STYLE_STEPS}": drawn}, step)
        return rms(drawn, plain)


def _grid(columns: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Columns of pictures of one size, each under its name (who drew it, in how many steps)."""
    rows = sample.contact_sheet([p for row in zip(*columns.values(), strict=True) for p in row], len(columns))
    sheet = Image.new("RGB", (rows.width, rows.height + _HEADING), "white")
    sheet.paste(rows, (0, _HEADING))
    draw = ImageDraw.Draw(sheet)
    for k, name in enumerate(columns):
        draw.text((k * rows.width / len(columns) + 1, 1), name, fill="black", font_size=9)
    return sheet
