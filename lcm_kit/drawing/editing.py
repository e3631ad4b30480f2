"""Edits of pictures with a pipeline whose adapter jumps to x0: what each task starts from, knows and keeps.

Each task makes an `Edit` of a picture; `drawn` draws it, in batches, with the pipeline's UNet as it is: LoRA
fused or beside it, guidance as asked. The mathematics is `lcm_kit.core.editing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lcm_kit.bases import Prompt
from lcm_kit.bases.condition import Condition
from lcm_kit.core.editing import (
    Grey,
    Known,
    Measure,
    Measured,
    Nothing,
    Outside,
    Pooled,
    Walk,
    agreeing_in_range,
    edited,
)  # fmt: skip
from lcm_kit.core.guidance import guide
from lcm_kit.core.prediction import Predict, predictor
from lcm_kit.core.schedule import Schedule
from lcm_kit.drawing import vae
from lcm_kit.drawing.batches import AfterStep, Batches
from lcm_kit.drawing.canvas import Canvas, cells, filled, meeting, pasted
from lcm_kit.drawing.noise import Picture, streams
from lcm_kit.drawing.pictures import to_pil
from lcm_kit.drawing.placed import place
from lcm_kit.drawing.prompts import conditions

Finish = Callable[[Tensor], list[Image.Image]]
"""Decoded pixels [B, 3, H, W], about [-1, 1] -> the B pictures that are handed out."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What is drawn: so many pictures, by number of their noise, from one start or each from its own."""

    size: tuple[int, int]  # (height, width) in pixels that the UNet draws
    prompts: Sequence[Prompt]  # one, or two that the pictures go between
    start: Tensor | None  # latents [1 or n, C, h, w] that the noise is laid on; None: the noise alone
    numbers: Sequence[int]  # n of them
    known: Known = field(default_factory=Nothing)
    finish: Finish = to_pil
    between: tuple[float, ...] = ()  # where each picture stands from the first prompt (0) to the second (1)
    by_vae: bool = False  # decoded by the base's VAE, whatever else decodes for the pipeline


@dataclass(frozen=True)
class Settings:
    """How an edit is drawn, whatever it shows."""

    walk: Walk
    guidance_scale: float = 1.0
    negative: Prompt | None = None
    seed: int = 0


# -- Models --------------------------------------------------------------------------------------------------


def schedule_of(pipe: Any) -> Schedule:
    """The noise of the pipeline's base, where the pipeline is."""
    return Schedule.from_config(pipe.scheduler.config).to(pipe.device)


@torch.no_grad()
def encode(pipe: Any, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] as latents, float32, where the pipeline is."""
    return vae.encode(pipe.vae, pixels).to(pipe.device)


@torch.no_grad()
def decode(
    pipe: Any, latents: Tensor, of: Sequence[Picture] | None = None, *, by_vae: bool = False
) -> Tensor:
    """Latents as pixels [B, 3, H, W], about [-1, 1] and not clipped, float32, where the pipeline is.

    `of` as in `vae.decode`; `by_vae`: by the base's own, though another decoder is in its place.
    """
    model = vae.own(pipe.vae) if by_vae else pipe.vae
    return vae.decode(model, latents, of).to(pipe.device)


def _predict(
    pipe: Any, schedule: Schedule, told: Condition, other: Condition, guidance_scale: float
) -> Predict:
    """The UNet's (x0, eps) under a condition for each picture, led away from `other` (B = 1)."""
    guided, (_, dtype) = guidance_scale > 1, place(pipe)
    if guided:
        told = Condition.cat([other.expand(len(told)), told])

    def model(x: Tensor, t: Tensor) -> Tensor:
        x = x.to(dtype)
        if not guided:
            return pipe.unet(x, t, **told.kwargs(), return_dict=False)[0]
        both = pipe.unet(torch.cat([x, x]), torch.cat([t, t]), **told.kwargs(), return_dict=False)[0]
        uncond, cond = both.chunk(2)
        return guide(uncond, cond, guidance_scale)

    return predictor(model, schedule, pipe.scheduler.config.prediction_type)


def drawn(
    pipe: Any,
    edit: Edit,
    how: Settings,
    batches: Batches,
    rows: Sequence[int] | None = None,
    after_step: AfterStep | None = None,
) -> Iterator[list[Image.Image]]:
    """The pictures of an edit, batch after batch; `rows`: which of them, by default all.

    `after_step` is called by places in `rows`, and what it raises ends the drawing. Noise follows from (seed,
    number of the picture, step) alone, so that no batching changes a picture. What is known may say nothing
    of single pictures: it is one for all of them.
    """
    told, other = conditions(pipe, edit.prompts, how.negative, edit.size)
    schedule, chosen = schedule_of(pipe), range(len(edit.numbers)) if rows is None else rows
    sides = [side // pipe.vae_scale_factor for side in edit.size]
    shape = (pipe.unet.config.in_channels, *sides)

    @torch.no_grad()
    def work(at: int, rows: Sequence[int]) -> list[Image.Image]:
        of = [(how.seed, edit.numbers[row]) for row in rows]
        drawn_from = streams(of)

        def noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=each) for each in drawn_from]).to(pipe.device)

        start = edit.start
        if start is not None:
            start = (start[list(rows)] if len(start) > 1 else start.expand(len(rows), *shape)).to(pipe.device)
        own = _between(told, [edit.between[row] for row in rows]) if edit.between else told.expand(len(rows))
        predict = _predict(pipe, schedule, own, other, how.guidance_scale)

        def stepped(step: int) -> None:
            if after_step is not None:
                after_step(range(at, at + len(rows)), step, len(how.walk.points))

        found = edited(predict, schedule, how.walk, start, noise, edit.known, stepped)
        return edit.finish(decode(pipe, found, of, by_vae=edit.by_vae).cpu())

    yield from batches.run(chosen, work)


def _between(told: Condition, places: Sequence[float]) -> Condition:
    """Conditions on the line between two, the last of `told` at 1; one alone is the same everywhere."""

    def mixed(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        part = tensor.new_tensor(places).view(-1, *[1] * (tensor.ndim - 1))
        return torch.lerp(tensor[:1], tensor[-1:], part)

    embeds = mixed(told.embeds)
    assert embeds is not None
    return Condition(embeds, mixed(told.pooled), mixed(told.time_ids))


# -- Tasks ---------------------------------------------------------------------------------------------------


def inpainted(
    pipe: Any, canvas: Canvas, hole: Tensor, prompt: Prompt, count: int, *, feather: int, anew: bool = True
) -> Edit:
    """Draw what lies in `hole`, bool [H, W] of the canvas; every pixel outside it stays, exactly.

    `anew`: nothing of what lay in the hole is seen; else the noise is laid on it.
    """
    whole = encode(pipe, filled(canvas.pixels, hole) if anew else canvas.pixels)

    def finish(pixels: Tensor) -> list[Image.Image]:
        made = meeting(canvas.pixels, pixels.clamp(-1, 1), hole, feather)
        size = canvas.picture.size
        return [pasted(canvas.picture, each, hole) for each in _cropped(made, size)]

    known = Outside(whole, cells(hole, pipe.vae_scale_factor).to(pipe.device))
    return Edit(canvas.size, [prompt], whole, range(count), known, finish)


def colorized(pipe: Any, canvas: Canvas, prompt: Prompt, count: int) -> Edit:
    """Draw colours on the greys of a picture, which stay, but for the rounding to 8 bits."""
    measure = Grey()
    grey = measure.of(canvas.pixels)
    return _measured(pipe, measure, grey, measure.spread(grey), prompt, count, canvas.picture.size)


def upscaled(pipe: Any, canvas: Canvas, scale: int, prompt: Prompt, count: int) -> Edit:
    """Draw a picture `scale` times as large, whose blocks have the small one's pixels as their means."""
    height, width = (scale * side for side in canvas.size)
    small = canvas.pixels
    large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic", align_corners=False)
    size = (scale * canvas.picture.width, scale * canvas.picture.height)
    measure = Pooled(scale)
    smooth = agreeing_in_range(measure, small, large)
    return _measured(pipe, measure, small, smooth, prompt, count, size)


def _measured(
    pipe: Any,
    measure: Measure,
    value: Tensor,
    begin: Tensor,
    prompt: Prompt,
    count: int,
    size: tuple[int, int],
) -> Edit:
    """Of a measurement `value`, from the pixels `begin`; pictures are cut to `size` (width, height).

    Latents are made to agree with it by what the base's VAE makes of them, so that one decodes them, too.
    """

    def finish(pixels: Tensor) -> list[Image.Image]:
        return _cropped(agreeing_in_range(measure, value, pixels), size)

    def decoded(latents: Tensor) -> Tensor:
        return decode(pipe, latents, by_vae=True)

    known = Measured(measure, value.to(pipe.device), decoded, lambda x: encode(pipe, x))
    whole = begin.shape[2], begin.shape[3]
    return Edit(whole, [prompt], encode(pipe, begin), range(count), known, finish, by_vae=True)


def redrawn(pipe: Any, canvas: Canvas, prompt: Prompt, count: int) -> Edit:
    """Draw a picture again from noise on it: a sketch, strokes, or one to be varied. Nothing is kept."""
    finish = partial(_cropped, size=canvas.picture.size)
    return Edit(canvas.size, [prompt], encode(pipe, canvas.pixels), range(count), finish=finish)


def interpolated(pipe: Any, ends: tuple[Canvas, Canvas], prompts: Sequence[Prompt], frames: int) -> Edit:
    """Draw the frames between two pictures of one size, from the same noise on latents between theirs.

    The two themselves are no part of it. Latents go along the sphere (`spherical`), at the length of the
    ends, which was measured to be no better than a cross-fade (docs/editing.md); two prompts along the line.
    """
    places = _places(frames, inner=True)
    first, last = (encode(pipe, end.pixels) for end in ends)
    start = torch.cat([spherical(first, last, place) for place in places])
    finish = partial(_cropped, size=ends[0].picture.size)
    return Edit(ends[0].size, prompts, start, [0] * frames, finish=finish, between=places)


def between_prompts(size: tuple[int, int], prompts: Sequence[Prompt], frames: int) -> Edit:
    """Draw `frames` pictures from the first prompt to the second, all from the same noise."""
    return Edit(size, prompts, None, [0] * frames, between=_places(frames, inner=False))


def _places(frames: int, *, inner: bool) -> tuple[float, ...]:
    """So many numbers at equal distances from 0 to 1; `inner`: the two ends are not among them."""
    if inner:
        return tuple((k + 1) / (frames + 1) for k in range(frames))
    return tuple(k / (frames - 1) for k in range(frames))


def spherical(a: Tensor, b: Tensor, part: float) -> Tensor:
    """From `a` (part 0) to `b` (1), [1, ...], by angle and, between their lengths, along the line.

    Where they point nearly the same way it is the line.
    """
    long_a, long_b = a.norm(), b.norm()
    if not (long_a > 0 and long_b > 0):
        return torch.lerp(a, b, part)
    cosine = float((a * b).sum() / (long_a * long_b))
    if abs(cosine) > 1 - 1e-4:
        return torch.lerp(a, b, part)
    angle = math.acos(cosine)
    on_a, on_b = math.sin((1 - part) * angle), math.sin(part * angle)
    direction = (on_a * a / long_a + on_b * b / long_b) / math.sin(angle)
    return direction * torch.lerp(long_a, long_b, part)


def _cropped(pixels: Tensor, size: tuple[int, int]) -> list[Image.Image]:
    """As pictures of `size` (width, height), without what they were padded by."""
    return [each if each.size == size else each.crop((0, 0, *size)) for each in to_pil(pixels)]
