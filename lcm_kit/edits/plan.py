"""How an edit is drawn: by which steps, at which size, from what, whoever asked for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from lcm_kit.bases import BaseInfo, Prompt
from lcm_kit.bases.out_of_memory import free, out_of_memory
from lcm_kit.config.numbers import RANGES
from lcm_kit.core.editing import Walk
from lcm_kit.core.methods import MethodInfo
from lcm_kit.core.schedule import Schedule
from lcm_kit.drawing import editing
from lcm_kit.drawing.batches import AfterStep, Batches
from lcm_kit.drawing.canvas import Canvas, grown
from lcm_kit.edits.options import Wanted, size_of
from lcm_kit.errors import UserError
from lcm_kit.samplers import sampler_of


def require_edits(sampler: str, adapters: Mapping[Any, MethodInfo]) -> None:
    """Raise `UserError` for a sampler that does not edit, alone or with one of these LoRAs."""
    plain = sampler.partition(":")[0]
    if plain not in ("lcm", "tcd", "ddim"):
        raise UserError(
            f"sampler {sampler} cannot edit: its steps follow from those before, and what is put back would "
            "be none of them; choose lcm, tcd or ddim"
        )
    if "timesteps" in sampler_of(sampler).call:
        raise UserError(f"sampler {sampler} draws from pure noise alone and cannot edit; choose lcm or tcd")
    for adapter, made in adapters.items():
        own = {name.partition(":")[0] for name in made.samplers}
        if any(":" in name for name in made.samplers):
            raise UserError(
                f"{adapter} cannot edit: {made.title} made it for one step from pure noise ({made.sampler})"
            )
        if own and plain != "ddim" and not own & {"lcm", "tcd"}:
            raise UserError(
                f"{adapter} cannot edit with sampler {plain}: {made.title} made it for steps without new "
                "noise; choose ddim"
            )


@dataclass(frozen=True, eq=False)
class Plan:
    """An edit that can be drawn."""

    wanted: Wanted
    base: BaseInfo
    walk: Walk
    size: tuple[int, int]  # (height, width) that the UNet draws
    count: int  # pictures in all; those that interpolate goes between are drawn by nobody
    notes: tuple[str, ...]  # sentences on what is not as asked

    @classmethod
    def of(cls, wanted: Wanted, base: BaseInfo, sampler: str, steps: int, count: int) -> Plan:
        """Of `count` pictures; of interpolate as many as it has frames.

        Raises `UserError` for what the base cannot draw, with nothing loaded.
        """
        walk, begun = _walk(base, sampler, steps, _strength(wanted))
        size, drawn = _drawn_size(wanted, base)
        count = wanted.frames if wanted.task == "interpolate" else count
        return cls(wanted, base, walk, size, count, (*begun, *drawn))

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        *,
        guidance_scale: float,
        negative: Prompt | None,
        seed: int,
        batches: Batches,
        numbers: Sequence[int] | None = None,
        after_step: AfterStep | None = None,
    ) -> Iterator[Image]:
        """The pictures of those `numbers`, rising, by default all; one prompt, or two to go between.

        `after_step` is called by places in `numbers`; what it raises ends the drawing.
        """
        numbers = range(self.count) if numbers is None else numbers
        ends = self._ends()
        inner = [place for place, number in enumerate(numbers) if number not in ends]
        rows = [numbers[place] - (1 if ends else 0) for place in inner]

        def stepped(places: Sequence[int], step: int, steps: int) -> None:
            if after_step is not None:
                after_step([inner[place] for place in places], step, steps)

        yield from (ends[number] for number in numbers if number == 0 and ends)
        if rows:
            how = editing.Settings(self.walk, guidance_scale, negative, seed)
            for pictures in editing.drawn(pipe, self._begun(pipe, prompts), how, batches, rows, stepped):
                yield from pictures
        yield from (ends[number] for number in numbers if number and number in ends)

    def _ends(self) -> dict[int, Image]:
        """The pictures that are given and belong to what comes out, by number."""
        first, last = self.wanted.picture, self.wanted.to
        return {} if first is None or last is None else {0: first.image, self.count - 1: last.image}

    def _begun(self, pipe: Any, prompts: Sequence[Prompt]) -> editing.Edit:
        """`_edit`. Raises `UserError` where memory runs out while pictures are encoded."""
        try:
            return self._edit(pipe, prompts)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            said = str(error).partition(". ")[0]
        free()  # out of the handler: the exception holds what the passes held
        raise UserError(
            f"memory ran out while reading a picture of {size_of(self.size[::-1])} pixels ({said}); make it "
            "smaller, or stop what else uses this device's memory"
        )

    def _edit(self, pipe: Any, prompts: Sequence[Prompt]) -> editing.Edit:
        """The task as the pipeline draws it."""
        wanted, base, count = self.wanted, self.base, self.count
        if wanted.picture is None:
            return editing.between_prompts(self.size, prompts, wanted.frames)
        picture = wanted.picture.image
        if wanted.task in ("inpaint", "outpaint"):
            mask = wanted.mask
            if mask is None:
                picture, mask = grown(picture, *wanted.grow)
            canvas = Canvas.of(picture, base.multiple)
            feather = base.factor // 2 if wanted.feather is None else wanted.feather
            return editing.inpainted(
                pipe, canvas, canvas.hole(mask), prompts[0], count, feather=feather, anew=wanted.anew
            )
        canvas = Canvas.of(picture, _multiple(wanted, base))
        if wanted.task == "colorize":
            return editing.colorized(pipe, canvas, prompts[0], count)
        if wanted.task == "upscale":
            return editing.upscaled(pipe, canvas, wanted.scale, prompts[0], count)
        if wanted.to is not None:
            ends = canvas, Canvas.of(wanted.to.image, base.multiple)
            return editing.interpolated(pipe, ends, prompts, wanted.frames - 2)
        return editing.redrawn(pipe, canvas, prompts[0], count)


def _strength(wanted: Wanted) -> float:
    """Between prompts alone there is nothing that the noise is laid on."""
    return 1.0 if wanted.picture is None else wanted.strength


def _walk(base: BaseInfo, sampler: str, steps: int, strength: float) -> tuple[Walk, list[str]]:
    """With what is to be said of it."""
    schedule = Schedule.from_config(base.scheduler_config)
    gamma = sampler_of(sampler).call.get("eta", 0.0)
    walk = Walk.of(schedule, sampler.partition(":")[0], steps, strength, gamma)
    begins = walk.begins(schedule)
    if abs(begins - strength) <= 0.05:
        return walk, []
    return walk, [
        f"strength {strength:g}: begun at {begins:g} with {len(walk.points)} of {steps} steps, the nearest "
        f"of those that {sampler} has"
    ]


def _multiple(wanted: Wanted, base: BaseInfo) -> int:
    """Of the pixels of the picture that is given; what is drawn is a multiple of the base's own."""
    return base.multiple // math.gcd(base.multiple, wanted.scale)


def _drawn_size(wanted: Wanted, base: BaseInfo) -> tuple[tuple[int, int], list[str]]:
    """(height, width) that the UNet draws; says where that is not the picture's, or far from the base's own.

    Raises `UserError` for what is too large.
    """
    if wanted.picture is None:
        return (base.resolution, base.resolution), []
    left, top, right, bottom = wanted.grow
    scale, multiple = wanted.scale, _multiple(wanted, base)
    own = wanted.picture.image.width + left + right, wanted.picture.image.height + top + bottom
    asked = scale * own[0], scale * own[1]
    width, height = (scale * (side + -side % multiple) for side in own)
    most, notes = int(RANGES["width"].high), []
    if max(width, height) > most:
        raise UserError(
            f"a picture of {size_of((width, height))} pixels is more than the {most} a side that are drawn; "
            "make it smaller"
        )
    if (width, height) != asked:
        notes.append(
            f"{size_of(asked)} pixels are drawn as {size_of((width, height))}, multiples of {base.multiple}, "
            "and cut back"
        )
    if max(width, height) > 2 * base.resolution:
        notes.append(
            f"{size_of((width, height))} pixels are more than twice the {base.resolution} that the base was "
            "made for: things may be drawn twice; make the picture smaller"
        )
    return (height, width), notes
