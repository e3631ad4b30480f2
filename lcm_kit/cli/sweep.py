"""The verb that holds adapters against each other. `main.py` puts it beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcm_kit.errors import UserError

verbs = typer.Typer()


@verbs.command(rich_help_panel="The stages")
def compare(
    adapters: Annotated[
        list[str], typer.Argument(metavar="A B [C ...] [KEY=VALUE ...]", help="Runs or .safetensors LoRAs.")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Diffusers folder, hub id or asset:NAME.", show_default="what A was made on"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of report.html and the rest.")] = Path("runs/compare"),
    config: Annotated[str, typer.Option(help="A guidance sweep's config.")] = "evaluation/compare",
) -> None:
    """Sweep adapters over one grid on the same noise, plain samplers beside them, and say what differs."""
    from lcm_kit.config import shipped, yaml_text
    from lcm_kit.config.load import load
    from lcm_kit.config.sweep import GuidanceSweep
    from lcm_kit.quiet import quiet

    overrides = [word for word in adapters if "=" in word and not Path(word).exists()]
    found = [word for word in adapters if word not in overrides]
    if len(found) < 2:
        raise UserError(
            f"compare needs two adapters or more, and {len(found)} are named; name runs or LoRA files"
        )
    told = {"adapters": found, "output": output, **({} if base is None else {"base": base})}
    loaded = load(shipped.config_path(config), [*overrides, *yaml_text.overrides(told)])
    if not isinstance(loaded, GuidanceSweep):
        raise UserError(f"config {config} is for {loaded.recipe}; give one for evaluation/guidance_sweep")
    quiet()
    shipped.load_recipe(loaded.recipe).main(loaded)


@verbs.command(rich_help_panel="The stages")
def compose(
    style: Annotated[str, typer.Argument(metavar="STYLE", help="A run or a .safetensors LoRA.")],
    speed: Annotated[str, typer.Argument(metavar="SPEED", help="The one that makes sampling short.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, as steps=8.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Diffusers folder, hub id or asset:NAME.", show_default="SPEED's")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the merged file and the map.")] = Path(
        "runs/compose"
    ),
    config: Annotated[str, typer.Option(help="A compose config.")] = "evaluation/compose",
) -> None:
    """Find the weights at which a style and an acceleration LoRA serve best together, and merge them."""
    from lcm_kit.config import shipped, yaml_text
    from lcm_kit.config.load import load
    from lcm_kit.config.sweep import Compose
    from lcm_kit.quiet import quiet

    told = {"style": style, "speed": speed, "output": output, **({"base": base} if base else {})}
    loaded = load(shipped.config_path(config), [*(overrides or []), *yaml_text.overrides(told)])
    if not isinstance(loaded, Compose):
        raise UserError(f"config {config} is for {loaded.recipe}; give one for evaluation/compose")
    quiet()
    shipped.load_recipe(loaded.recipe).main(loaded)
