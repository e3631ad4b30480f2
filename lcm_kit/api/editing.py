"""Edits of pictures: drawn anew in part, in colour, larger, from a sketch, varied, or from one to another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lcm_kit import console
from lcm_kit.api.calls import call
from lcm_kit.api.edit_options import TASKS, Sides, Wanted, checked, size_of
from lcm_kit.api.edit_tasks import Task
from lcm_kit.api.pictures import Drawing, drawing
from lcm_kit.api.stages import Place
from lcm_kit.config.numbers import RANGES
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcm_kit.bases import BaseInfo
    from lcm_kit.core.editing import Walk
    from lcm_kit.drawing.animations import Animation
    from lcm_kit.drawing.editing import Edit
    from lcm_kit.drawing.signing import Sign


def edit(
    task: Task,
    picture: Place | Image | None = None,
    prompt: str = "",
    *,
    mask: Place | Image | None = None,
    feather: int | None = None,
    grow: Sides | None = None,
    scale: int | None = None,
    strength: float | None = None,
    to: Place | Image | None = None,
    prompt_to: str | None = None,
    frames: int | None = None,
    adapter: Place | None = None,
    base: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    weight: float | None = None,
    negative_prompt: str | None = None,
    emphasis: bool | None = None,
    count: int = 1,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    device: str | None = None,
    dtype: str | None = None,
    tiling: bool = False,
    compile: bool = False,
    verbose: bool = False,
) -> list[Image]:
    """Edit a picture with a few-step LoRA, which needs no training for it; `picture`: a file, or PIL's.

    `task`: "inpaint" draws the white of `mask` anew (without one: where the picture is transparent) and keeps
    every other pixel, exactly; "outpaint" draws `grow` pixels (left, top, right, bottom) around it;
    "colorize" draws colours on its greys, which stay; "upscale" draws it `scale` times as large, with its
    pixels as the means of blocks; "sketch" and "vary" draw it again from noise on it, as much as `strength`
    says; "interpolate" draws `frames` pictures from it to the picture `to`, both of one size, or without
    pictures from `prompt` to `prompt_to`.

    `strength`: how much noise the drawing begins with, above 0 to 1; by default 1 for inpaint, outpaint and
    colorize, 0.8 for sketch, 0.5 for the others. At 1 inpaint sees nothing of what lies under the mask.
    `feather`: pixels over which what is drawn goes over into what is kept, within the mask; by default half a
    cell of the latents. Pictures of any size are drawn at the next larger one that the base can, and cut
    back. `count` pictures are drawn; of interpolate one of each frame. All else is as in `sample_images`; of
    the samplers lcm, tcd and ddim edit. Picture i is a function of (seed, i): no batch size changes it.

    Returns 8-bit RGB pictures. Raises `UserError`, before weights are loaded, for what cannot be: a picture
    that is none, a mask of another size or without white, options of other tasks, a LoRA whose student does
    not jump to x0 with that sampler.

        fixed = lcm_kit.edit("inpaint", "room.png", "a red sofa", mask="hole.png", adapter="runs/mine")
        fixed[0].save("room-with-sofa.png")
    """
    with call(verbose):
        wanted = checked(
            task, picture, strength=strength, mask=mask, feather=feather, grow=grow, scale=scale, to=to,
            prompt_to=prompt_to, frames=frames, count=count,
        )  # fmt: skip
        how = settled(
            wanted, prompt, adapter=adapter, base=base, sampler=sampler, steps=steps,
            guidance_scale=guidance_scale, weight=weight, negative_prompt=negative_prompt, emphasis=emphasis,
            count=count, seed=seed, batch_size=batch_size, device=device, dtype=dtype, tiling=tiling,
            compile=compile,
        )  # fmt: skip
        with console.working(how.title):
            return list(draw_edit(wanted, how))


# -- What it is drawn with -----------------------------------------------------------------------------------


def settled(wanted: Wanted, prompt: str, **options: Any) -> Drawing:
    """Base, LoRA and settings that an edit is drawn with; `options` are those of `drawing`.

    Raises `UserError` as `drawing`, and for what does not edit.
    """
    from lcm_kit.drawing.schedulers import require_guided
    from lcm_kit.samplers import sampler_of

    how = drawing([prompt, *([] if wanted.prompt_to is None else [wanted.prompt_to])], **options)
    sampler, adapter = how.settings["sampler"], how.settings["adapter"]
    plain = sampler.partition(":")[0]
    if plain not in ("lcm", "tcd", "ddim"):
        raise UserError(
            f"sampler {sampler} cannot edit: its steps follow from those before, and what is put back would "
            "be none of them; choose lcm, tcd or ddim"
        )
    if "timesteps" in sampler_of(sampler).call:
        raise UserError(f"sampler {sampler} draws from pure noise alone and cannot edit; choose lcm or tcd")
    if adapter is not None:
        made = how.made_by
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
    require_guided(how.settings["negative_prompt"], how.settings["guidance_scale"])
    return how._replace(title=f"{TASKS[wanted.task].doing} in {how.settings['steps']} steps")


# -- Drawing it ----------------------------------------------------------------------------------------------


def draw_edit(wanted: Wanted, how: Drawing) -> Iterator[Image]:
    """The pictures, one after another. Raises `UserError` for what the base cannot draw, before weights."""
    from lcm_kit import bases, sample
    from lcm_kit.drawing import editing
    from lcm_kit.drawing.batches import Batches
    from lcm_kit.drawing.how import How
    from lcm_kit.drawing.prompts import as_read

    given = how.settings
    named = {key: given[key] for key in ("revision", "variant")}
    info = bases.inspect_base(how.base, **named)
    walk = _walk(info, given["sampler"], given["steps"], _strength(wanted))
    size = _drawn_size(wanted, info)
    prompts, negative = as_read(how.prompts, given["negative_prompt"], given["emphasis"])
    drawn_by = How.of(info, None, given["tiling"], given["compile"])
    where = sample.placement(given["device"], given["dtype"])
    pipe = sample.adapted(how.base, given["adapter"], given["lora_weight"], how=drawn_by, **named, **where)
    drawn_by.say(pipe.vae, *size)
    batches = Batches.of_pictures(given["batch_size"], *size, where["device"])
    asked = editing.Settings(walk, given["guidance_scale"], negative, given["seed"])
    made = _edit(pipe, wanted, info, prompts, given["count"])
    if wanted.picture is not None and wanted.to is not None:
        yield wanted.picture.image
    for pictures in editing.drawn(pipe, made, asked, batches):
        yield from pictures
    if wanted.to is not None:
        yield wanted.to.image


def _strength(wanted: Wanted) -> float:
    """Between prompts alone there is nothing that the noise is laid on."""
    return 1.0 if wanted.picture is None else wanted.strength


def _walk(info: BaseInfo, sampler: str, steps: int, strength: float) -> Walk:
    from lcm_kit.core.editing import Walk
    from lcm_kit.core.schedule import Schedule
    from lcm_kit.samplers import sampler_of

    schedule = Schedule.from_config(info.scheduler_config)
    gamma = sampler_of(sampler).call.get("eta", 0.0)
    walk = Walk.of(schedule, sampler.partition(":")[0], steps, strength, gamma)
    begins = walk.begins(schedule)
    if abs(begins - strength) > 0.05:
        console.say(
            f"strength {strength:g}: begun at {begins:g} with {len(walk.points)} of {steps} steps, the "
            f"nearest of those that {sampler} has",
            err=True,
        )
    return walk


def _multiple(wanted: Wanted, info: BaseInfo) -> int:
    """Of the pixels of the picture that is given; what is drawn is a multiple of the base's own."""
    return info.multiple // math.gcd(info.multiple, wanted.scale)


def _drawn_size(wanted: Wanted, info: BaseInfo) -> tuple[int, int]:
    """(height, width) that the UNet draws; says where that is not the picture's, or far from the base's own.

    Raises `UserError` for what is too large.
    """
    if wanted.picture is None:
        return info.resolution, info.resolution
    left, top, right, bottom = wanted.grow
    scale, multiple = wanted.scale, _multiple(wanted, info)
    own = wanted.picture.image.width + left + right, wanted.picture.image.height + top + bottom
    asked = scale * own[0], scale * own[1]
    width, height = (scale * (side + -side % multiple) for side in own)
    most = int(RANGES["width"].high)
    if max(width, height) > most:
        raise UserError(
            f"a picture of {size_of((width, height))} pixels is more than the {most} a side that are drawn; "
            "make it smaller"
        )
    if (width, height) != asked:
        console.say(
            f"{size_of(asked)} pixels are drawn as {size_of((width, height))}, multiples of {info.multiple}, "
            "and cut back",
            err=True,
        )
    if max(width, height) > 2 * info.resolution:
        console.say(
            f"{size_of((width, height))} pixels are more than twice the {info.resolution} that the base was "
            "made for: things may be drawn twice; make the picture smaller",
            err=True,
        )
    return height, width


def _edit(pipe: Any, wanted: Wanted, info: BaseInfo, prompts: list[Any], count: int) -> Edit:
    """The task as the pipeline draws it."""
    from lcm_kit.drawing import editing
    from lcm_kit.drawing.canvas import Canvas, grown

    if wanted.picture is None:
        return editing.between_prompts((info.resolution,) * 2, prompts, wanted.frames)
    picture = wanted.picture.image
    if wanted.task in ("inpaint", "outpaint"):
        mask = wanted.mask
        if mask is None:
            picture, mask = grown(picture, *wanted.grow)
        canvas = Canvas.of(picture, info.multiple)
        feather = info.factor // 2 if wanted.feather is None else wanted.feather
        return editing.inpainted(
            pipe, canvas, canvas.hole(mask), prompts[0], count, feather=feather, anew=wanted.anew
        )
    canvas = Canvas.of(picture, _multiple(wanted, info))
    if wanted.task == "colorize":
        return editing.colorized(pipe, canvas, prompts[0], count)
    if wanted.task == "upscale":
        return editing.upscaled(pipe, canvas, wanted.scale, prompts[0], count)
    if wanted.to is not None:
        ends = canvas, Canvas.of(wanted.to.image, info.multiple)
        return editing.interpolated(pipe, ends, prompts, wanted.frames - 2)
    return editing.redrawn(pipe, canvas, prompts[0], count)


# -- Into a folder -------------------------------------------------------------------------------------------


def edit_to_folder(
    wanted: Wanted, how: Drawing, output: Path, sign: Sign | None = None, animation: Animation | None = None
) -> Path:
    """Write `NNN-TASK.png` for each picture and `contact-sheet.png` into `output`; other files there stay.

    Each is written when its batch is drawn, by `sign` (`drawing.signing`), the `animation` of all at the end.
    Returns the contact sheet's path.
    """
    from lcm_kit.drawing.pictures import contact_sheet, save_png
    from lcm_kit.drawing.signing import unsigned
    from lcm_kit.io.locks import sweep

    sign = sign or unsigned
    sweep(output, deep=False)
    pictures = []
    for number, picture in enumerate(draw_edit(wanted, how)):
        name = f"{number:03d}-{wanted.task}.png"
        save_png(picture, output / name, {}, partial(sign, name, how.prompts[0]))
        pictures.append(picture)
    if animation is not None:
        animation.write(pictures, partial(sign, animation.path.name, how.prompts[0]))
    sheet = output / "contact-sheet.png"
    return save_png(contact_sheet(pictures), sheet, {}, partial(sign, sheet.name, None))
