"""The verb `plan`: what a run will need. `main.py` puts it beside the others."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lcm_kit import families
from lcm_kit.config.numbers import within
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from lcm_kit.config.schema import Training
    from lcm_kit.plan.estimate import Estimate, Planner

verbs = typer.Typer()


def _published(name: str | None) -> str | None:
    return None if name is None else families.generation_of(name).name


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
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="What to plan for.")] = "cuda",
    device_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            callback=within("--device-memory", 0, 1e6, above=True),
            help="Of the device.",
            show_default="of the one that is here",
        ),
    ] = None,
    structure: Annotated[
        str | None,
        typer.Option(
            callback=_published,
            metavar="|".join(families.names()),
            help="What to take the base for.",
            show_default="what its files say, else its name",
        ),
    ] = None,
) -> None:
    """Say what a run will need, and what to change if it does not fit; no weights are loaded.

    Exit code 1 if the device's memory is too small for a stage: encode, train or evaluate.
    """
    wanted = _training(config, overrides or [])
    from lcm_kit.plan import advice, meter, show
    from lcm_kit.quiet import quiet

    quiet()

    planner = _planner(wanted, structure, device)
    planned = planner(wanted)
    _facts(planned, planner)
    if device == "cuda":
        show.presets(wanted, advice.presets(planner, wanted))
    memory = device_memory if device_memory is not None else meter.capacity(device)
    fits = memory is None or planned.fits(memory)
    if memory is not None:
        show.verdict(planned, memory, [] if fits else advice.what_to_change(planner, wanted, memory))
    if probe:
        _probe(wanted, structure, planner)
    if not fits:
        raise typer.Exit(1)


def _training(config: str, overrides: list[str]) -> Training:
    from lcm_kit.config import shipped
    from lcm_kit.config.load import load
    from lcm_kit.config.schema import Training

    loaded = load(shipped.config_path(config), overrides, imports=True)
    if not isinstance(loaded, Training):
        raise UserError(
            f"config {config} is for {loaded.recipe}; `lcm-kit plan` takes one for train/distill or "
            "train/finetune"
        )
    return loaded


def _planner(config: Training, structure: str | None, device: str) -> Planner:
    """For the base of `config` and the LoRAs on it; says what is taken for granted."""
    from lcm_kit import console
    from lcm_kit.plan import base_profile, estimate, show, style, text
    from lcm_kit.plan.dry_run import MetaModel

    found = base_profile.find(config.base, structure)
    teacher_lora, lacking = style.find(config, found.structure)
    for note in filter(None, (found.note, lacking)):
        console.say(f"note: {note}")
    stage = MetaModel(found, config.adapter, teacher_lora, text.rank_of(config))
    return estimate.Planner(stage, device, show.RETURNING in os.environ)


def _facts(planned: Estimate, planner: Planner) -> None:
    from lcm_kit.plan import disk, show, work

    config = planned.config
    written, forwards = disk.disk(config, planner), work.of_forwards(config, planner.rehearse(config))
    show.facts(
        planned, written, work.while_training(config, forwards, written.held),
        work.while_encoding(config, forwards),
    )  # fmt: skip


def _probe(config: Training, structure: str | None, planner: Planner) -> None:
    from lcm_kit import console
    from lcm_kit.plan import advice, estimate, meter, probe, show

    device = "cpu" if meter.capacity("cuda") is None else "cuda"
    here = estimate.Planner(planner.stage, device, show.RETURNING in os.environ)
    expected, free = here(config), _free()
    if device == "cpu" and free is not None and expected.resident > free:
        raise UserError(
            f"the probe needs {show.size(expected.resident)} of memory on this CPU and {show.size(free)} are "
            "free; lower batch_size, or probe on the machine that will train"
        )
    if here.stage.text_rank:
        console.say("note: the probe leaves the text encoders out, and so does its estimate")
        config = advice.changed(config, {"text_encoder.rank": None, "text_encoder.alpha": None})
    console.say(f"probe: {probe.STEPS} steps on the {device}, in a process of its own ...")
    measured = probe.run(config, structure)
    if measured.weights == "random":  # they come from no file
        here.stage.subject = replace(here.stage.subject, stored=None)
    show.probe(measured, here(config))


def _free() -> int | None:
    """Bytes of memory that can be had without swapping; None where there is no /proc."""
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
