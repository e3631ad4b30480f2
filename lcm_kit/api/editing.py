"""Edits of pictures: drawn anew in part, in colour, larger, from a sketch, varied, or from one to another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lcm_kit import console
from lcm_kit.api.calls import call
from lcm_kit.api.pictures import Drawing, drawing
from lcm_kit.api.stages import Place
from lcm_kit.edits.options import TASKS, Sides, Wanted, checked
from lcm_kit.edits.tasks import Task
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcm_kit.drawing.animations import Animation
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
    decoder: Place | None = None,
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
    the samplers lcm, tcd and ddim edit, and colorize and upscale take no `decoder`. Picture i is a function
    of (seed, i): no batch size changes it.

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
            count=count, seed=seed, batch_size=batch_size, device=device, dtype=dtype, decoder=decoder,
            tiling=tiling, compile=compile,
        )  # fmt: skip
        with console.working(how.title):
            return list(draw_edit(wanted, how))


# -- What it is drawn with -----------------------------------------------------------------------------------


def settled(wanted: Wanted, prompt: str, **options: Any) -> Drawing:
    """Base, LoRA and settings that an edit is drawn with; `options` are those of `drawing`.

    Raises `UserError` as `drawing`, and for what does not edit.
    """
    from lcm_kit.drawing.schedulers import require_guided
    from lcm_kit.edits.plan import require_edits

    how = drawing([prompt, *([] if wanted.prompt_to is None else [wanted.prompt_to])], **options)
    adapter = how.settings["adapter"]
    require_edits(how.settings["sampler"], {} if adapter is None else {adapter: how.made_by})
    require_guided(how.settings["negative_prompt"], how.settings["guidance_scale"])
    if how.settings["decoder"] is not None and TASKS[wanted.task].by_vae:
        raise UserError(
            f"{wanted.task} is decoded and encoded by the base's VAE after each step, so that what it keeps "
            "is kept; leave out decoder"
        )
    return how._replace(title=f"{TASKS[wanted.task].doing} in {how.settings['steps']} steps")


# -- Drawing it ----------------------------------------------------------------------------------------------


def draw_edit(wanted: Wanted, how: Drawing) -> Iterator[Image]:
    """The pictures, one after another. Raises `UserError` for what the base cannot draw, before weights."""
    from lcm_kit import bases, sample
    from lcm_kit.drawing.batches import Batches
    from lcm_kit.drawing.how import How
    from lcm_kit.drawing.prompts import as_read
    from lcm_kit.edits.plan import Plan

    given = how.settings
    named = {key: given[key] for key in ("revision", "variant")}
    info = bases.inspect_base(how.base, **named)
    plan = Plan.of(wanted, info, given["sampler"], given["steps"], given["count"])
    for note in plan.notes:
        console.say(note, err=True)
    prompts, negative = as_read(how.prompts, given["negative_prompt"], given["emphasis"])
    drawn_by = How.of(info, given["decoder"], given["tiling"], given["compile"])
    where = sample.placement(given["device"], given["dtype"])
    pipe = sample.adapted(how.base, given["adapter"], given["lora_weight"], how=drawn_by, **named, **where)
    drawn_by.say(pipe.vae, *plan.size)
    yield from plan.draw(
        pipe, prompts, guidance_scale=given["guidance_scale"], negative=negative, seed=given["seed"],
        batches=Batches.of_pictures(given["batch_size"], *plan.size, where["device"]),
    )  # fmt: skip


# -- Into a folder -------------------------------------------------------------------------------------------


def edit_to_folder(
    wanted: Wanted,
    how: Drawing,
    output: Path,
    sign: Sign | None = None,
    animation: Animation | None = None,
    *,
    say_prompts: bool = True,
) -> Path:
    """Write `NNN-TASK.png` for each picture and `contact-sheet.png` into `output`; other files there stay.

    Each is written when its batch is drawn, by `sign` (`drawing.signing`), the `animation` of all at the end.
    Its PNG text says how it was made (`drawing.made`), with `say_prompts` by which prompt too. Returns the
    contact sheet's path.
    """
    from lcm_kit.drawing.made import of_drawing
    from lcm_kit.drawing.pictures import contact_sheet, save_png
    from lcm_kit.drawing.signing import unsigned
    from lcm_kit.io.files import require_writable
    from lcm_kit.io.locks import sweep

    sign = sign or unsigned
    sweep(output, deep=False)
    require_writable(output)
    source, known = of_drawing(how.base, how.settings)
    own = {name: getattr(wanted, name) for name in TASKS[wanted.task].takes if name not in ("mask", "to")}
    known |= {"task": wanted.task, "prompt": how.prompts[0], "count": how.settings["count"], **own}
    known["strength"] = wanted.strength
    ends = [each.image for each in (wanted.picture, wanted.to) if each is not None]
    pictures = []
    for number, picture in enumerate(draw_edit(wanted, how)):
        name = f"{number:03d}-{wanted.task}.png"
        told: dict[str, str] = {}
        if not any(picture is each for each in ends):  # those of interpolate were not drawn
            told = source.decoded | source.told(
                known, picture.size, number, emphasis=how.settings["emphasis"], prompts=say_prompts
            )
        save_png(picture, output / name, told, partial(sign, name, how.prompts[0]))
        pictures.append(picture)
    if animation is not None:
        animation.write(pictures, partial(sign, animation.path.name, how.prompts[0]))
    sheet = output / "contact-sheet.png"
    return save_png(contact_sheet(pictures), sheet, source.decoded, partial(sign, sheet.name, None))
