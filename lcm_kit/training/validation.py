"""Is it working? Pictures while it trains, and the one number that tells, because the loss does not.

`one_step_distance` is the RMS in latents between the student's one-step sample and the teacher's 50-step
sample (DDIM, with guidance) from the same noise. It falls while distillation works; the consistency loss may
fall or rise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lcm_kit import assets, sample
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.config import schema
from lcm_kit.config.resolution import Resolution, height_width
from lcm_kit.console import working
from lcm_kit.core.methods import DEFAULT, MethodInfo
from lcm_kit.io import own_files
from lcm_kit.io.files import sha256_bytes

TEACHER_STEPS = 50
STUDENT_COLUMNS = 3  # in the picture: one step, and the least numbers of more that the method serves
STYLE_STEPS = 30
CONTROL_ROWS = 2  # control prompts in the picture
_HEADING = 14  # pixels above the columns


def rms(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared difference over all elements of two equal shapes."""
    return float((a.float() - b.float()).square().mean().sqrt())


def student_of(config: schema.Training) -> MethodInfo:
    """How what `config` distils is drawn; a style LoRA, which has no method, is drawn as its base."""
    return config.student() if isinstance(config, schema.Distill) else DEFAULT


def student_steps(method: MethodInfo) -> tuple[int, ...]:
    """What the student is drawn at while it trains: one step, which the distance is of, and more."""
    return (1, *(n for n in method.judged_steps if n > 1))[:STUDENT_COLUMNS]


def due(config: schema.Validation, step: int, steps: int) -> bool:
    """Whether to validate after `step` of `steps`: every `config.every` steps and at the end."""
    return step == steps or bool(config.every and step % config.every == 0)


@dataclass(frozen=True)
class Fixed:
    """Prompts that are drawn again and again from the same noise, and the teacher's samples of them."""

    config: schema.Validation
    base: schema.Base
    base_hash: str
    resolution: Resolution  # pixels
    folder: Path  # validation/ of the run
    prompts: tuple[str, ...]
    method: MethodInfo = DEFAULT  # that the student is trained by
    teacher_steps: ClassVar[int] = TEACHER_STEPS
    kind: ClassVar[str] = "teacher"  # begins the name of the file that keeps the teacher's samples

    @property
    def file(self) -> Path:
        """Where the teacher's samples are kept: another name if anything that they are drawn from changes."""
        drawn_from = [
            self.prompts,
            self.config.seed,
            self.config.guidance_scale,
            self.base_hash,
            self.resolution,
        ]
        return self.folder / f"{self.kind}-{sha256_bytes(json.dumps(drawn_from).encode())[:12]}.safetensors"

    def pipe(self, adapted: AdaptedUNet) -> Any:
        """The base's pipeline around a UNet and the text encoders that are trained with it."""
        unet = adapted.unet
        return sample.pipeline(
            self.base.path, unet=unet, revision=self.base.revision, variant=self.base.variant,
            dtype=next(unet.parameters()).dtype, device=unet.device, text_encoders=adapted.text_encoders,
        )  # fmt: skip

    def latents(
        self, pipe: Any, sampler: str, steps: int, guidance_scale: float, rows: int | None = None
    ) -> Tensor:
        """Latents [rows, C, h, w] of the first `rows` prompts (all), `config.count` of them at once."""
        wanted, size = self.prompts[:rows], self.config.count
        parts = [
            sample.latents(
                pipe, wanted[first : first + size], sampler=sampler, steps=steps,
                guidance_scale=guidance_scale, seed=self.config.seed, first=first,
                size=height_width(self.resolution),
            )
            for first in range(0, len(wanted), size)
        ]  # fmt: skip
        return torch.cat(parts)

    def teacher(self, adapted: AdaptedUNet, pipe: Any, rows: int | None = None) -> Tensor:
        """The teacher's samples of the first `rows` prompts: drawn once, then read from the run's folder."""
        return self.kept(lambda: self.draw(adapted, pipe))["latents"][:rows]

    def kept(self, draw: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is in the file; what `draw` gives where there is none, or it is not as it was written."""
        if not own_files.is_whole(self.file):
            what = f"{len(self.prompts)} of the {self.kind}'s samples in {self.teacher_steps} steps, once"
            with working(f"drawing {what}"):
                drawn = draw()
            own_files.write_tensors(self.file, drawn)
        return own_files.read_tensors(self.file, "remove it and train again, which draws it anew")

    def draw(self, adapted: AdaptedUNet, pipe: Any) -> dict[str, Tensor]:
        """What is kept in the file: `latents` [n, C, h, w] of the teacher's samples."""
        with adapted.teacher():
            return {"latents": self.latents(pipe, "ddim", self.teacher_steps, self.config.guidance_scale)}


@dataclass(frozen=True)
class Validation(Fixed):
    """Pictures of fixed prompts, and of some control prompts below them, and one distance in latents."""

    control: Fixed | None = None
    distance: ClassVar[str] = "one_step_distance"  # the name of the figure

    @classmethod
    def prepare(cls, config: schema.Training, base_hash: str, control: Fixed | None = None) -> Self | None:
        """What `config.validation` asks for, if anything. Raises `UserError` for missing prompts."""
        if config.validation.prompts is None:
            return None
        prompts = tuple(islice(cycle(assets.prompts(config.validation.prompts)), config.validation.count))
        folder = Path(config.output) / "validation"
        resolution, method = config.drawn_at, student_of(config)
        return cls(config.validation, config.base, base_hash, resolution, folder, prompts, method, control)

    def due(self, step: int, steps: int) -> bool:
        """As the function `due`."""
        return due(self.config, step, steps)

    @torch.no_grad()
    def __call__(self, adapted: AdaptedUNet, step: int) -> float:
        """Write `step-NNNNNN.png`, a row a prompt and a column a sampler (`columns`); return the distance.

        `adapted` is left as it was. The VAE and the text encoder are loaded for this
        call only. No number is taken from the global random state.
        """
        pipe = self.pipe(adapted)
        columns = self.columns(adapted, pipe, self)
        sheet = _grid(self._pictures(pipe, columns))
        if self.control and self.control.prompts:
            below = self.columns(adapted, pipe, self.control, CONTROL_ROWS)
            sheet = _stacked(sheet, _grid(self._pictures(pipe, below), "control: "))
        sample.save_png(sheet, self.folder / f"step-{step:06d}.png")
        wanted, drawn = list(columns.values())[:2]
        return rms(drawn, wanted)

    def columns(
        self, adapted: AdaptedUNet, pipe: Any, of: Fixed, rows: int | None = None
    ) -> dict[str, Tensor]:
        """Latents by heading, of the first `rows` prompts of `of`: teacher, student at `student_steps`.

        The distance is that between the first two. Both have guidance where none is baked into the student.
        """
        sampler, scale = self.method.sampler, self.method.usual_guidance
        drawn = {
            f"student {n}": of.latents(pipe, sampler, n, scale, rows) for n in student_steps(self.method)
        }
        return {f"teacher {TEACHER_STEPS}": of.teacher(adapted, pipe, rows), **drawn}

    def _pictures(self, pipe: Any, columns: Mapping[str, Tensor]) -> dict[str, list[Image.Image]]:
        return {name: sample.to_pil(sample.decode(pipe, x)) for name, x in columns.items()}


class StyleValidation(Validation):
    """The base beside the base with the LoRA, both as users draw with a style LoRA, from the same noise."""

    teacher_steps: ClassVar[int] = STYLE_STEPS
    distance: ClassVar[str] = "distance_to_base"

    def columns(
        self, adapted: AdaptedUNet, pipe: Any, of: Fixed, rows: int | None = None
    ) -> dict[str, Tensor]:
        """Base, then LoRA, both at 30 steps of DDIM with `config.guidance_scale`; else as `Validation`."""
        plain = of.teacher(adapted, pipe, rows)
        drawn = of.latents(pipe, "ddim", STYLE_STEPS, self.config.guidance_scale, rows)
        return {f"base {STYLE_STEPS}": plain, f"with LoRA {STYLE_STEPS}": drawn}


def _grid(columns: Mapping[str, Sequence[Image.Image]], mark: str = "") -> Image.Image:
    """Columns of pictures of one size, each under its name (who drew it, in how many steps).

    `mark` stands before the first name.
    """
    rows = sample.contact_sheet([p for row in zip(*columns.values(), strict=True) for p in row], len(columns))
    sheet = Image.new("RGB", (rows.width, rows.height + _HEADING), "white")
    sheet.paste(rows, (0, _HEADING))
    draw = ImageDraw.Draw(sheet)
    for k, name in enumerate(columns):
        text = name if k else mark + name
        draw.text((k * rows.width / len(columns) + 1, 1), text, fill="black", font_size=9)
    return sheet


def _stacked(above: Image.Image, below: Image.Image) -> Image.Image:
    """One sheet over another of the same width."""
    sheet = Image.new("RGB", (above.width, above.height + below.height), "white")
    sheet.paste(above, (0, 0))
    sheet.paste(below, (0, above.height))
    return sheet
