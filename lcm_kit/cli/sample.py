"""The verb that draws. `main.py` puts it beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
from lcm_kit.errors import UserError

verbs = typer.Typer()


@verbs.command(rich_help_panel="The stages")
def sample(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; repeat it for more pictures.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts, one a line, or asset:tiny-sd.")
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
    width: Annotated[
        int | None,
        typer.Option(
            callback=in_range("width", "--width"),
            help="Pixels, a multiple of 8.",
            show_default="the base's own",
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(
            callback=in_range("height", "--height"), help="As --width.", show_default="as the width"
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(callback=in_range("count", "--count"), help="Pictures of each prompt.")
    ] = 1,
    batch_size: BatchSize = "auto",
    device: Device = None,
    dtype: Dtype = None,
    decoder: Decoder = None,
    tiling: Tiling = False,
    compile: Compile = False,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    sign: SignKey = None,
    cert: SignCert = None,
    sign_prompt: SignPrompt = False,
) -> None:
    """Draw pictures and a contact sheet."""
    from lcm_kit import assets, console
    from lcm_kit.api import pictures
    from lcm_kit.api.calls import call

    wanted = [*(prompt or []), *(assets.prompts(prompts) if prompts else [])]
    if not wanted:
        raise UserError(
            "there is nothing to draw; give --prompt TEXT (more than once if you like) or --prompts FILE"
        )
    require_signing(sign, cert, sign_prompt)
    with call(verbose=True):
        from lcm_kit.sample import sample_to_folder

        how = pictures.drawing(
            wanted, adapter=adapter, base=base, sampler=sampler, steps=steps, guidance_scale=guidance,
            weight=weight, negative_prompt=negative, emphasis=emphasis, width=width, height=height,
            count=count, seed=seed, batch_size=require_batch_size(batch_size), device=device, dtype=dtype,
            decoder=decoder, tiling=tiling, compile=compile,
        )  # fmt: skip
        signing: dict[str, Any] = {}
        if signer := signer_of(sign, cert, sign_prompt):
            signing["sign"] = signer.of_drawing(how.base, how.settings)
            signing["say_prompts"] = sign_prompt
        with console.working(how.title):
            sheet = sample_to_folder(how.base, how.prompts, output, **signing, **how.settings)
    console.say(sheet)
