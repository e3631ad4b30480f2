"""The verb that goes from a studio's pictures to its adapter. `main.py` puts it beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcm_kit.families import listed

verbs = typer.Typer()


@verbs.command(rich_help_panel="Start here")
def finetune(
    folder: Annotated[
        str, typer.Argument(metavar="BRAND_FOLDER", help="20 to 500 pictures, a .txt caption beside each.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STAGE.KEY=VALUE", help="Overrides of a stage: style.steps=800 distill.adapter.rank=32."
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(help=f"{listed()}: diffusers folder, hub id, .safetensors, asset:tiny-sd.")
    ] = ...,  # type: ignore[assignment]  # required, though after an optional argument
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/NAME of the folder")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="What to draw and judge by.",
            show_default="the folder's prompts.txt, or captions",
        ),
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(help="The word of the captions that stands for the style.")
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(
            metavar="LORA",
            help="An LCM-LoRA of the base to start from as well: a file, a run or hub:OWNER/NAME.",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the base, on the hub.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Weight variant of the base; fp16 halves a download.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder, show the plan, stop.")
    ] = False,
) -> None:
    """Your pictures in, one adapter out that draws their style in 4 steps: all stages, each done once."""
    from lcm_kit.api import stages

    stages.finetune(
        folder, base, revision=revision, variant=variant, output=output, prompts=prompts, trigger=trigger,
        speed=speed, overrides=overrides or [], dry_run=dry_run, verbose=True,
    )  # fmt: skip
