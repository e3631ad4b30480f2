"""The verb that draws. `cli.py` puts it beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lcm_kit import samplers
from lcm_kit.cli_numbers import SEED, WEIGHT, within
from lcm_kit.console import say, working
from lcm_kit.errors import UserError
from lcm_kit.quiet import quiet

if TYPE_CHECKING:
    from lcm_kit.config.schema import Base

verbs = typer.Typer()


def _known_sampler(name: str | None) -> str | None:
    if name is not None:
        samplers.sampler_of(name)
    return name


@verbs.command(rich_help_panel="The stages")
def sample(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; repeat it for more pictures.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts, one a line, or asset:tiny-sd.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Diffusers folder, hub id or asset:NAME.", show_default="the run's")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="FILE|RUN", help="The LoRA; none draws with the base.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            callback=within("--steps", 1, 1000),
            help="Solver steps: 1 to 8 for an adapter.",
            show_default="what a sweep recommends for the LoRA, else 4",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(callback=within("--seed", -SEED - 1, SEED), help="Of the initial noise.")
    ] = 0,
    weight: Annotated[
        float | None,
        typer.Option(
            callback=within("--weight", -WEIGHT, WEIGHT),
            help="Strength of the LoRA.",
            show_default="recommended, else 1.0",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            callback=within("--guidance", 1, 1000),
            help="guidance_scale; 1 is none, and right for an adapter.",
            show_default="recommended, else 1.0",
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            "--sampler",
            "--solver",
            callback=_known_sampler,
            metavar="|".join(samplers.names()),
            help=f"{', '.join(samplers.for_adapter())} for an adapter.",
            show_default="recommended, else its method's",
        ),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What guidance leads away from; it takes a --guidance above 1.")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            callback=within("--width", 8, 8192),
            help="Pixels, a multiple of 8.",
            show_default="the base's own",
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(callback=within("--height", 8, 8192), help="As --width.", show_default="as the width"),
    ] = None,
    count: Annotated[
        int, typer.Option(callback=within("--count", 1, 1000), help="Pictures of each prompt.")
    ] = 1,
    batch_size: Annotated[
        int, typer.Option(callback=within("--batch-size", 1, 1000), help="Pictures at once.")
    ] = 8,
    device: Annotated[
        str | None, typer.Option(help="As cuda, cuda:1, mps or cpu.", show_default="cuda if there is one")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Precision.", show_default="float16 on a GPU, float32 on a CPU"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
) -> None:
    """Draw pictures and a contact sheet."""
    import torch

    from lcm_kit import assets
    from lcm_kit.config.schema import Base
    from lcm_kit.export.recommended import method_of, of_adapter, settings
    from lcm_kit.methods import DEFAULT
    from lcm_kit.sample import sample_to_folder
    from lcm_kit.written import from_command

    wanted = [*map(from_command, prompt or []), *(assets.prompts(prompts) if prompts else [])]
    if not wanted:
        raise UserError(
            "there is nothing to draw; give --prompt TEXT (more than once if you like) or --prompts FILE"
        )
    quiet()
    found = Base(path=base) if base else _base_of(adapter)
    advice, made_by = None, DEFAULT
    if adapter is not None:
        with working(f"checking {adapter}"):
            file = _insist_on_a_pair(adapter, found)
            advice, made_by = of_adapter(adapter, file), method_of(file)
    side = width or height
    use = settings(advice, made_by, sampler=sampler, steps=steps, guidance_scale=guidance, lora_weight=weight)
    if advice and advice.steps:
        say(f"{adapter}: {use}; measured for {advice.part or 'it'}, where no option says otherwise")
    with working(f"drawing {len(wanted) * count} of {found.path} in {use.steps} steps"):
        sheet = sample_to_folder(
            found.path, wanted, output, adapter=adapter, steps=use.steps, guidance_scale=use.guidance_scale,
            seed=seed, lora_weight=use.lora_weight, sampler=use.sampler, revision=found.revision,
            variant=found.variant, negative_prompt=None if negative is None else from_command(negative),
            size=None if side is None else (height or side, width or side), count=count,
            batch_size=batch_size, device=device, dtype=None if dtype is None else getattr(torch, dtype),
        )  # fmt: skip
    say(sheet)


def _insist_on_a_pair(adapter: Path, base: Base) -> Path:
    """The LoRA's file. Raises `UserError` if it is not for this base, before any of the base is loaded."""
    from lcm_kit.export import convert, verify
    from lcm_kit.lora_file import adapter_file

    against = verify.base_of(base.path, base.revision, base.variant)
    file = adapter_file(adapter)
    convert.insist_on_diffusers(file, against)
    return file


def _base_of(adapter: Path | None) -> Base:
    """The base that a run was made with; the embedded one if there is no run to ask."""
    from lcm_kit.config.load import load
    from lcm_kit.config.schema import Base, Training

    config = adapter / "config.yaml" if adapter else None
    if config is None or not config.is_file():
        return Base(path="asset:tiny-sd")
    loaded = load(config)
    if not isinstance(loaded, Training):
        raise UserError(f"{config} is for {loaded.recipe}, which trains no adapter on a base; give --base")
    return loaded.base
