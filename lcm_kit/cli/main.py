"""The command line: each verb reads its options, calls a function of `lcm_kit.api` and prints.

It imports what it needs when it runs, and the verbs are built when they are run, so that help comes at once.

Errors become exit codes in `cli/errors.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lcm_kit.cli import caption as cli_caption
from lcm_kit.cli import edit as cli_edit
from lcm_kit.cli import finetune as cli_finetune
from lcm_kit.cli import lora as cli_lora
from lcm_kit.cli import plan as cli_plan
from lcm_kit.cli import sample as cli_sample
from lcm_kit.cli import serve as cli_serve
from lcm_kit.cli import sweep as cli_sweep
from lcm_kit.cli.errors import Verbs
from lcm_kit.config.numbers import within
from lcm_kit.errors import UserError

verbs = typer.Typer()

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config (`lcm-kit ls`).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, as optimizer.lr=3e-4 grid.steps=8."),
]
RequireLicense = Annotated[
    str | None,
    typer.Option(
        "--require-license",
        "--require-licence",
        metavar="NAMES|any",
        help="Stop at pictures whose metadata names none of these licences: CC0-1.0,CC-BY-4.0.",
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as runs/quickstart.")]


@verbs.command(rich_help_panel="Start here")
def quickstart(
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
) -> None:
    """The whole story on the embedded base and brand set: minutes on a CPU."""
    from lcm_kit import workflow
    from lcm_kit.quiet import quiet

    quiet()
    workflow.quickstart(output, overrides or [])


@verbs.command(rich_help_panel="Recipes and configs")
def ls() -> None:
    """List the recipes and configs that come with the kit."""
    from lcm_kit import console
    from lcm_kit.config import shipped

    names = shipped.names()
    width = max(map(len, names))
    console.say("\n".join(f"{name:<{width}}  {shipped.describe(name)}".rstrip() for name in names))


@verbs.command(rich_help_panel="Recipes and configs")
def cp(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A name that `lcm-kit ls` lists.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A file, or a folder to put it in.")],
) -> None:
    """Copy a recipe or a config, to change it."""
    from lcm_kit import console
    from lcm_kit.config import shipped

    console.say(shipped.copy(source, target))


@verbs.command(rich_help_panel="Recipes and configs")
def show(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Print a config with every key resolved."""
    from lcm_kit import console
    from lcm_kit.api import stages
    from lcm_kit.config.load import dump

    loaded = stages.load_config(config, overrides or [], imports=False)
    console.say(dump(loaded, plain_ascii=not _unicode()).rstrip("\n"))


@verbs.command(rich_help_panel="Recipes and configs")
def check(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG|FOLDER", help="A config, or a folder of images (or asset:NAME).")
    ],
    overrides: Overrides = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            callback=within("--resolution", 8, 4096),
            help="Of a FOLDER: pixels that will be trained at.",
            show_default="the base's own, or 512",
        ),
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(help="Of a FOLDER: the words that every caption should have.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Of a FOLDER: the base whose VAE must be able to draw these pictures; loads it."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the base, on the hub.")] = None,
    variant: Annotated[str | None, typer.Option(help="Weight variant of the base, as fp16.")] = None,
    require_license: RequireLicense = None,
) -> None:
    """Check a config and what it names, or a folder of images; weights are loaded for --base alone."""
    from lcm_kit import console
    from lcm_kit.api import stages
    from lcm_kit.cli.check import check as examine
    from lcm_kit.cli.check import check_images
    from lcm_kit.config.schema import Base
    from lcm_kit.quiet import quiet

    errors: list[str] = []
    if base is None and (revision or variant):
        raise UserError("--revision and --variant are of a base; give it with --base, or leave them out")
    if _is_folder(config):
        if overrides:
            raise UserError(f"{config} is a folder of images, which has no keys; give --resolution instead")
        if base is not None:
            quiet()
        with console.working(f"looking at the pictures of {config}"):
            place = None if base is None else Base(base, revision, variant)
            lines, errors = check_images(config, resolution, trigger, place, _names(require_license))
    elif base is not None:
        raise UserError(f"{config} is a config, which names its base; leave --base out, or give a folder")
    else:
        loaded = stages.load_config(config, overrides or [], **_licensed(require_license))
        quiet()
        with console.working(f"checking what {config} names"):
            lines = examine(loaded)
    for line in lines:
        console.say(line)
    if errors:
        raise UserError(" ".join(errors))
    console.say(f"ok: {config}")


@verbs.command(rich_help_panel="The stages")
def encode(
    config: ConfigArgument,
    overrides: Overrides = None,
    require_license: RequireLicense = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Where: in this process, or the shards of a stream on a Ray cluster."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto|local",
            help="Of the Ray cluster.",
            show_default="RAY_ADDRESS, else one that runs here, else one started for this",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(callback=within("--workers", 1, 100_000), help="On Ray.", show_default="all that fit"),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            callback=within("--gpus", 0, 64),
            help="Of each worker on Ray; 0.5: two share one.",
            show_default="1 where the cluster has any",
        ),
    ] = None,
) -> None:
    """Turn images and captions, or prompts, into cached latents and text embeddings."""
    from lcm_kit.api import stages

    stages.encode(
        config, overrides or [], verbose=True, engine=engine, address=address, workers=workers, gpus=gpus,
        **_licensed(require_license),
    )  # fmt: skip


@verbs.command(rich_help_panel="The stages")
def train(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Train; the same command continues a run that was stopped."""
    from lcm_kit.api import stages

    stages.train(config, overrides or [], verbose=True)


@verbs.command(rich_help_panel="The stages")
def evaluate(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Compare teacher, plain samplers and student on the same prompts and noise."""
    from lcm_kit.api import stages

    stages.evaluate(config, overrides or [], verbose=True)


@verbs.command(rich_help_panel="The stages")
def bench(config: ConfigArgument = "evaluation/speed", overrides: Overrides = None) -> None:
    """Time a training step on random weights of a real structure, beside a straight-line one."""
    from lcm_kit.api import stages

    stages.evaluate(config, overrides or [], verbose=True)


@verbs.command(rich_help_panel="The stages")
def report(run: Run) -> None:
    """Write the run's report.html from its results and pictures."""
    from lcm_kit import console
    from lcm_kit.api import stages

    console.say(stages.write_report(run, verbose=True))


class EveryVerb(Verbs):
    """Every verb of the command line."""

    apps = (
        verbs, cli_caption.verbs, cli_edit.verbs, cli_finetune.verbs, cli_lora.verbs, cli_plan.verbs,
        cli_sample.verbs, cli_serve.verbs, cli_sweep.verbs,
    )  # fmt: skip


app = typer.Typer(
    cls=EveryVerb,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Brand images in, a LoRA out that draws in 1-8 steps what its base draws in 50.",
    epilog="Start with `lcm-kit quickstart`, then `lcm-kit finetune YOUR_PICTURES --base YOUR_BASE`.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from lcm_kit import __version__, console

        console.say(f"lcm-kit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _names(given: str | None) -> list[str]:
    """The licences that an option names. Raises `UserError` if it names none."""
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    if given is not None and not names:
        raise UserError("--require-license names no licence; give some, as CC0-1.0,CC-BY-4.0, or any")
    return names


def _licensed(given: str | None) -> dict[str, Any]:
    """The keys of a config that `--require-license` sets."""
    return {} if given is None else {"data": {"require_license": _names(given)}}


def _is_folder(text: str) -> bool:
    """Whether `check` was given images instead of a config; a config of that name goes first."""
    from lcm_kit import assets
    from lcm_kit.config import shipped

    try:
        shipped.config_path(text)
    except UserError:
        path = assets.place(text)
        return text.startswith("asset:") or path.is_dir() or path.suffix.lower() in (".zip", ".parquet")
    return False


def _unicode() -> bool:
    return "utf" in (sys.stdout.encoding or "").lower()


def _spell_out() -> None:
    """From now on write what the terminal's code page lacks in escapes instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a notebook's streams have none, and no code page
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def main() -> None:
    """Entry point of `lcm-kit` and of `python -m lcm_kit`."""
    _spell_out()
    app(prog_name="lcm-kit")
