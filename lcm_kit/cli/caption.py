"""The verb that has pictures captioned by a model. `main.py` puts it beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcm_kit.cli.options import BatchSize, Device, Dtype
from lcm_kit.config.numbers import require_batch_size, within
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from lcm_kit.data.captioning import Accepted, Captioned

verbs = typer.Typer()


@verbs.command(rich_help_panel="The stages")
def caption(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of pictures.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A vision-language model: a folder that transformers loads."),
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Make caption files of what the table does not reject.")
    ] = False,
    prompt: Annotated[
        str | None,
        typer.Option(help="What the model is asked; BLIP and its like go on from it."),
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="The words to put before each caption.")] = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The table for review.", show_default="FOLDER/captions.csv"),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Also pictures that have captions; with --accept replace these."),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(callback=within("--max-tokens", 1, 1000), help="Of a caption, at most.")
    ] = 75,
    batch_size: BatchSize = "auto",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Caption pictures by a model into a table for review, and make caption files of what stands there."""
    from lcm_kit.api import captions

    if accept:
        asked = {"--model": model, "--prompt": prompt, "--trigger": trigger, "--device": device}
        for option in (option for option, value in {**asked, "--dtype": dtype}.items() if value is not None):
            raise UserError(f"{option} has no effect with --accept, which asks no model; leave it out")
        _say_accepted(captions.accept_captions(folder, table=table, overwrite=overwrite, verbose=True))
        return
    if model is None:
        raise UserError(
            "give the vision-language model as --model PATH, or --accept for a table that you have looked at"
        )
    done = captions.caption(
        folder, model, prompt=prompt, trigger=trigger, table=table, batch_size=require_batch_size(batch_size),
        max_tokens=max_tokens, device=device, dtype=dtype, overwrite=overwrite, verbose=True,
    )  # fmt: skip
    _say_captioned(done, folder, table)


def _say_captioned(done: Captioned, folder: Path, table: Path | None) -> None:
    from lcm_kit import console
    from lcm_kit.data.findings import few, number
    from lcm_kit.data.progress import listing

    had = f"; {number(done.had, 'picture', after=('has', 'have'))} a caption already" if done.had else ""
    console.say(f"{done.table}: {number(done.rows, 'row')}, {done.written} of them new{had}")
    if done.silent:
        console.say(
            f"warning: the model said nothing of use about {number(len(done.silent), 'picture')}: "
            f"{few(done.silent)}; their rows are rejected, so write these captions yourself",
            err=True,
        )
    for line in listing(done.unread):
        console.say(f"warning: {line}", err=True)
    where = "" if table is None else f" --table {table}"
    console.say(
        "look at it, put `rejected` into the column status of what is to go, then run `lcm-kit caption "
        f"{folder} --accept{where}`"
    )


def _say_accepted(done: Accepted) -> None:
    from lcm_kit import console
    from lcm_kit.data.findings import few, number

    console.say(f"{number(len(done.files), 'caption file')} written, {number(done.rejected, 'row')} rejected")
    if done.had:
        have = number(len(done.had), "picture", after=("has", "have"))
        console.say(
            f"warning: {have} a caption already, which stays: {few(done.had)}; replace it with --overwrite",
            err=True,
        )
    if done.gone:
        there = number(len(done.gone), "row", after=("names", "name"))
        console.say(f"warning: {there} a picture that is not there: {few(done.gone)}", err=True)
