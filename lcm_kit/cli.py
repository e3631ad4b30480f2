"""The command line. Each verb imports what it needs when it runs, so that help comes at once.

Errors become exit codes in `cli_errors.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcm_kit import cli_finetune, cli_lora, cli_plan, cli_sample, cli_sweep
from lcm_kit.cli_errors import Verbs
from lcm_kit.cli_numbers import within
from lcm_kit.console import encodable, say, working
from lcm_kit.errors import UserError
from lcm_kit.quiet import quiet

if TYPE_CHECKING:
    from lcm_kit.config.load import Config
    from lcm_kit.config.schema import Training


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Brand images in, a LoRA out that draws in 1-8 steps what its base draws in 50.",
    epilog="Start with `lcm-kit quickstart`, then `lcm-kit finetune YOUR_PICTURES --base YOUR_BASE`.",
)

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config (`lcm-kit ls`).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, as optimizer.lr=3e-4 grid.steps=8."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as runs/quickstart.")]


def _version(wanted: bool) -> None:
    if wanted:
        from lcm_kit import __version__

        say(f"lcm-kit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel="Start here")
def quickstart(
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
) -> None:
    """The whole story on the embedded base and brand set: minutes on a CPU."""
    from lcm_kit import story

    quiet()
    story.quickstart(output, overrides or [])


@app.command(rich_help_panel="Recipes and configs")
def ls() -> None:
    """List the recipes and configs that come with the kit."""
    from lcm_kit import shipped

    names = shipped.names()
    width = max(map(len, names))
    for name in names:
        say(f"{name:<{width}}  {shipped.describe(name)}".rstrip())


@app.command(rich_help_panel="Recipes and configs")
def cp(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A name that `lcm-kit ls` lists.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A file, or a folder to put it in.")],
) -> None:
    """Copy a recipe or a config, to change it."""
    from lcm_kit import shipped

    say(shipped.copy(source, target))


@app.command(rich_help_panel="Recipes and configs")
def show(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Print a config with every key resolved."""
    from lcm_kit.config.load import dump

    say(dump(_load(config, overrides, imports=False), plain_ascii=not _unicode()).rstrip("\n"))


@app.command(rich_help_panel="Recipes and configs")
def check(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG|FOLDER", help="A config, or a folder of images (or asset:NAME).")
    ],
    overrides: Overrides = None,
    resolution: Annotated[
        int,
        typer.Option(
            callback=within("--resolution", 8, 4096),
            help="Of a FOLDER: pixels that will be trained at.",
        ),
    ] = 512,
    trigger: Annotated[
        str | None, typer.Option(help="Of a FOLDER: the words that every caption should have.")
    ] = None,
) -> None:
    """Check a config and what it names, or a folder of images, without loading weights."""
    from lcm_kit.check import check as examine
    from lcm_kit.check import check_images

    errors: list[str] = []
    if _is_folder(config):
        if overrides:
            raise UserError(f"{config} is a folder of images, which has no keys; give --resolution instead")
        with working(f"looking at the pictures of {config}"):
            lines, errors = check_images(config, resolution, trigger)
    else:
        loaded = _load(config, overrides)
        with working(f"checking what {config} names"):
            lines = examine(loaded)
    for line in lines:
        say(line)
    if errors:
        raise UserError(" ".join(errors))
    say(f"ok: {config}")


@app.command(rich_help_panel="The stages")
def encode(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Turn images and captions, or prompts, into cached latents and text embeddings."""
    loaded = _training(config, overrides)
    quiet()
    from lcm_kit import processes
    from lcm_kit.config.finetune import Finetune
    from lcm_kit.data import prior, sources

    share = processes.share()
    beside = loaded if isinstance(loaded, Finetune) and loaded.prior.prompts is not None else None
    if beside:
        prior.insist_on_prompts(beside)  # before images are encoded, which takes hours
    sources.encode(loaded, share=share)
    if beside:
        prior.encode(beside, share=share)


@app.command(rich_help_panel="The stages")
def train(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Train; the same command continues a run that was stopped."""
    _run("train", config, overrides)


@app.command(rich_help_panel="The stages")
def evaluate(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Compare teacher, plain solvers and student on the same prompts and noise."""
    _run("evaluation", config, overrides)


@app.command(rich_help_panel="The stages")
def bench(config: ConfigArgument = "evaluation/speed", overrides: Overrides = None) -> None:
    """Time a training step on random weights of a real structure, beside a straight-line one."""
    _run("evaluation", config, overrides)


@app.command(rich_help_panel="The stages")
def report(run: Run) -> None:
    """Write the run's report.html from its results and pictures."""
    from lcm_kit.report.build import write_report

    say(write_report(run))


app.add_typer(cli_finetune.verbs)
app.add_typer(cli_lora.verbs)
app.add_typer(cli_plan.verbs)
app.add_typer(cli_sample.verbs)
app.add_typer(cli_sweep.verbs)


def _is_folder(text: str) -> bool:
    """Whether `check` was given images instead of a config; a config of that name goes first."""
    from lcm_kit import assets, shipped

    try:
        shipped.config_path(text)
    except UserError:
        path = assets.place(text)
        return text.startswith("asset:") or path.is_dir() or path.suffix.lower() in (".zip", ".parquet")
    return False


def _load(config: str, overrides: list[str] | None, *, imports: bool = True) -> Config:
    """What the user wants done. Only to show a config nothing of it is run (`load`)."""
    from lcm_kit import shipped
    from lcm_kit.config.load import load

    return load(shipped.config_path(config), overrides or [], imports=imports)


def _training(config: str, overrides: list[str] | None) -> Training:
    from lcm_kit.config.schema import Training

    loaded = _load(config, overrides)
    if not isinstance(loaded, Training):
        raise UserError(
            f"config {config} is for {loaded.recipe}, which has no data to encode; give one for "
            "train/distill or train/finetune"
        )
    return loaded


def _run(stage: str, config: str, overrides: list[str] | None) -> None:
    """Run the recipe that the config names, if it belongs to the stage."""
    from lcm_kit import shipped

    loaded = _load(config, overrides)
    if not loaded.recipe.startswith(f"{stage}/"):
        verb = "train" if loaded.recipe.startswith("train/") else "evaluate"
        raise UserError(f"config {config} is for {loaded.recipe}; run `lcm-kit {verb} {config}`")
    quiet()
    shipped.load_recipe(loaded.recipe).main(loaded)


def _unicode() -> bool:
    return "utf" in (sys.stdout.encoding or "").lower()


def main() -> None:
    """Entry point of `lcm-kit` and of `python -m lcm_kit`."""
    encodable()
    app(prog_name="lcm-kit")
