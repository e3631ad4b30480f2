"""The verb that edits pictures. `main.py` puts it beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from lcm_kit.cli.options import (
    AdapterOption,
    BaseOption,
    BatchSize,
    Compile,
    Decoder,
    Device,
    Dtype,
    Emphasis,
    Guidance,
    KnownSampler,
    Negative,
    Seed,
    SignCert,
    SignKey,
    SignPrompt,
    Steps,
    Tiling,
    Weight,
    require_signing,
    signer_of,
)  # fmt: skip
from lcm_kit.config.numbers import in_range, require_batch_size
from lcm_kit.edits.tasks import Task

verbs = typer.Typer()
_TASKS = get_args(Task)


@verbs.command(rich_help_panel="The stages")
def edit(
    task: Annotated[Task, typer.Argument(metavar="TASK", help=f"{', '.join(_TASKS[:-1])} or {_TASKS[-1]}.")],
    picture: Annotated[
        Path | None, typer.Argument(metavar="[PICTURE]", help="The file; interpolate may do without.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the whole picture shows when it is done.")] = "",
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="inpaint: white where it is drawn anew.", show_default="the transparency"
        ),
    ] = None,
    grow: Annotated[
        str | None,
        typer.Option(metavar="N|L,T,R,B", help="outpaint: pixels to add on all sides, or on each."),
    ] = None,
    feather: Annotated[
        int | None,
        typer.Option(
            callback=in_range("feather", "--feather"),
            help="inpaint, outpaint: pixels of the soft edge, within what is drawn.",
            show_default="half a latent",
        ),
    ] = None,
    scale: Annotated[
        int | None,
        typer.Option(
            callback=in_range("scale", "--scale"), help="upscale: how many times as large.", show_default="2"
        ),
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="interpolate: the last picture.")] = None,
    prompt_to: Annotated[str | None, typer.Option(help="interpolate: the last prompt.")] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            callback=in_range("frames", "--frames"),
            help="interpolate: pictures in all, the ends among them.",
            show_default="8",
        ),
    ] = None,
    animation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="interpolate: a .gif, .webp or .mp4 of the frames, too."),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            callback=in_range("fps", "--fps"), help="Frames a second of --animation.", show_default="8"
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="--animation plays once; GIF and WebP play for ever else.")
    ] = False,
    ping_pong: Annotated[
        bool, typer.Option("--ping-pong", help="--animation goes to the last frame and back again.")
    ] = False,
    strength: Annotated[
        float | None,
        typer.Option(
            callback=in_range("strength", "--strength"),
            help="How much noise it begins with, above 0 to 1.",
            show_default="1 to draw parts or colours, 0.8 from a sketch, else 0.5",
        ),
    ] = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    steps: Steps = None,
    seed: Seed = 0,
    weight: Weight = None,
    guidance: Guidance = None,
    sampler: KnownSampler = None,
    negative: Negative = None,
    emphasis: Emphasis = None,
    count: Annotated[
        int, typer.Option(callback=in_range("count", "--count"), help="Pictures; not of interpolate.")
    ] = 1,
    batch_size: BatchSize = "auto",
    device: Device = None,
    dtype: Dtype = None,
    decoder: Decoder = None,
    tiling: Tiling = False,
    compile: Compile = False,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("edits"),
    sign: SignKey = None,
    cert: SignCert = None,
    sign_prompt: SignPrompt = False,
) -> None:
    """Edit a picture: fill a part, go beyond its edge, colour, enlarge, from a sketch, vary, interpolate."""
    from lcm_kit import console
    from lcm_kit.api import editing
    from lcm_kit.api.animations import animation_of
    from lcm_kit.api.calls import call
    from lcm_kit.edits import options

    require_signing(sign, cert, sign_prompt)
    with call(verbose=True):
        from lcm_kit.drawing.signing import EDITED

        wanted = options.checked(
            task, picture, strength=strength, count=count, mask=mask, feather=feather, scale=scale, to=to,
            grow=None if grow is None else options.grow_of(grow), prompt_to=prompt_to, frames=frames,
        )  # fmt: skip
        moving = animation_of(task, animation, fps=fps, once=once, ping_pong=ping_pong)
        how = editing.settled(
            wanted, prompt, adapter=adapter, base=base, sampler=sampler, steps=steps, guidance_scale=guidance,
            weight=weight, negative_prompt=negative, emphasis=emphasis, count=count, seed=seed,
            batch_size=require_batch_size(batch_size), device=device, dtype=dtype, decoder=decoder,
            tiling=tiling, compile=compile,
        )  # fmt: skip
        signer = signer_of(sign, cert, sign_prompt)
        signing = None if signer is None else signer.of_drawing(how.base, how.settings, EDITED)
        with console.working(how.title):
            sheet = editing.edit_to_folder(
                wanted, how, output, signing, moving, say_prompts=sign_prompt or signer is None
            )
    console.say(sheet)
    if moving is not None:
        console.say(moving.path)
