"""The verb `plan`: what a run will need. `cli.py` puts it beside the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lcm_kit.errors import UserError
from lcm_kit.quiet import quiet

if TYPE_CHECKING:
    from lcm_kit.config.schema import Distill
    from lcm_kit.plan.estimate import Planner

verbs = typer.Typer()


@verbs.command(rich_help_panel="Recipes and configs")
def plan(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, as batch_size=4.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Make two real steps on random weights, and measure.")
    ] = False,
    device_memory: Annotated[
        float | None,
        typer.Option(metavar="GB", min=0.0, help="Of the card to plan for. [default: the one that is here]"),
    ] = None,
    structure: Annotated[
        Literal["sd1", "sd2", "sdxl", "ssd1b"] | None,
        typer.Option(help="What to take the base for. [default: what its files say, else its name]"),
    ] = None,
) -> None:
    """Say what a run will need, and what to change if it does not fit; no weights are loaded.

    Exit code 1 if the card's memory is too small.
    """
    wanted = _distill(config, overrides or [])
    quiet()
    from lcm_kit.plan import advice, estimate, show, subject
    from lcm_kit.plan.rehearsal import Stage

    found = subject.find(wanted.base, structure)
    if found.note:
        typer.echo(f"note: {found.note}")
    if wanted.teacher.adapters:
        typer.echo("note: the teacher's adapters are not counted")
    planner = estimate.Planner(Stage(found, wanted.adapter))
    planned = planner(wanted)
    show.facts(planned, estimate.disk(wanted, planner))
    show.cards(planned)
    show.presets(advice.presets(planner, wanted))
    if probe:
        _probe(wanted, structure, planner)
    card = device_memory if device_memory is not None else _card()
    if card is not None and not planned.fits(card):
        show.advice(advice.what_to_change(planner, wanted, card), card)
        raise typer.Exit(1)


def _distill(config: str, overrides: list[str]) -> Distill:
    from lcm_kit import shipped
    from lcm_kit.config.load import load
    from lcm_kit.config.schema import Distill

    loaded = load(shipped.config_path(config), overrides)
    if not isinstance(loaded, Distill):
        raise UserError(f"config {config} is for {loaded.recipe}; `lcm-kit plan` takes one for train/distill")
    return loaded


def _probe(config: Distill, structure: str | None, planner: Planner) -> None:
    from lcm_kit.plan import estimate, probe, show

    measured = probe.run(config, structure)
    here = planner if measured.device == "cuda" else estimate.Planner(planner.stage, "cpu")
    show.probe(measured, here(config))


def _card() -> float | None:
    """GiB of the CUDA device that is here; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 2**30
