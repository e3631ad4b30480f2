"""The verbs about LoRA files: export, verify, convert, merge. `cli.py` puts them beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lcm_kit.config.numbers import in_range
from lcm_kit.errors import UserError
from lcm_kit.families import listed

if TYPE_CHECKING:
    from lcm_kit.lora import verify as checks
    from lcm_kit.lora.merge import Interference

verbs = typer.Typer()
_PANEL = "LoRA files"
_PROBLEMS = 20  # that `verify` lists

Style = Annotated[
    Literal["diffusers", "kohya", "both"],
    typer.Option("--format", help="kohya is what every app reads; diffusers is for diffusers alone."),
]
Dtype = Literal["float32", "float16", "bfloat16"]
Base = Annotated[
    str | None,
    typer.Option(help="Diffusers folder, hub id or asset:NAME.", show_default=f"{listed()}, as it fits"),
]
Variant = Annotated[str | None, typer.Option(help="Weight variant of the base, such as fp16.")]
LeaveOut = Annotated[
    list[str] | None,
    typer.Option(
        "--leave-out",
        help="What may be lost, since no LoRA holds it: norms, biases, projections or embeddings; repeat it.",
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        callback=in_range("alpha", "--alpha"),
        help="What it was trained with, for a file that does not say it.",
    ),
]


@verbs.command(rich_help_panel=_PANEL)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as runs/quickstart.")],
    style: Style = "both",
    output: Annotated[Path | None, typer.Option(help="Folder.", show_default="RUN/export")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in the files.")] = "float16",
    with_evaluation: Annotated[
        bool, typer.Option("--with-evaluation", help="Write what its guidance sweep recommends into them.")
    ] = False,
    list_sources: Annotated[
        bool,
        typer.Option("--list-sources", help="Write sources.csv too: the rights of each picture."),
    ] = False,
) -> None:
    """Write a run's adapter for every app, check each file in each, and write a model card."""
    from lcm_kit.api import lora_files

    lora_files.export_run(
        run, format=style, dtype=dtype, output=output, with_evaluation=with_evaluation,
        list_sources=list_sources, verbose=True,
    )  # fmt: skip


@verbs.command(rich_help_panel=_PANEL)
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors LoRA, anybody's.")],
    base: Base = None,
    variant: Variant = None,
    apps: Annotated[
        list[str] | None,
        typer.Option(
            "--app",
            help="diffusers, animatediff, comfyui, a1111, forge, invokeai, sdnext, sd-scripts or sd.cpp; "
            "repeat it.",
            show_default="all",
        ),
    ] = None,
    alpha: Alpha = None,
) -> None:
    """Say how much of a LoRA file each app would load; exit code 1 if any would drop or change something."""
    from lcm_kit.api import lora_files

    report = lora_files.verify(file, base=base, variant=variant, apps=apps, alpha=alpha, verbose=True)
    _print_report(report)
    if not report.ok:
        raise typer.Exit(1)


@verbs.command(rich_help_panel=_PANEL)
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors LoRA, anybody's.")],
    style: Style = "both",
    output: Annotated[Path | None, typer.Option(help="Folder.", show_default="beside FILE")] = None,
    base: Base = None,
    variant: Variant = None,
    alpha: Alpha = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights.", show_default="the file's")] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            callback=in_range("rank", "--rank"),
            help="Reduce to this rank by SVD, at an error that is printed.",
            show_default="exact",
        ),
    ] = None,
    leave_out: LeaveOut = None,
    drop_unknown: Annotated[
        bool,
        typer.Option("--drop-unknown", help="Leave out keys of no module of the base that change nothing."),
    ] = False,
) -> None:
    """Fix a LoRA file and write it in the formats that apps load; FILE itself is left as it is.

    LoHa, LoKr, DoRA and others become plain LoRA layers.
    """
    from lcm_kit import console
    from lcm_kit.api import lora_files
    from lcm_kit.lora import delivery

    done = lora_files.convert(
        file, format=style, output=output, base=base, variant=variant, alpha=alpha, dtype=dtype, rank=rank,
        leave_out=leave_out or (), drop_unknown=drop_unknown, verbose=True,
    )  # fmt: skip
    read = done.read
    console.say(f"{file}: a LoRA for {read.structure.label}, {len(read.lora.updates)} modules")
    for line in (*(f"found: {line}" for line in read.findings), *done.plain.lines()):
        console.say(f"  {line}")
    if drop_unknown and read.unknown:
        console.say(f"  left out: {len(read.unknown)} keys, such as {read.unknown[0]}")
    for path, report in done.reports.items():
        console.say(f"wrote {delivery.summary(str(path), done.dtype, report)}")


@verbs.command(rich_help_panel=_PANEL)
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="FILE:WEIGHT...", help="LoRA files or runs, as style.safetensors:0.8."),
    ],
    style: Style = "both",
    output: Annotated[
        Path, typer.Option(help="NAME: NAME_kohya.safetensors and NAME_diffusers.safetensors; or the folder.")
    ] = Path("merged"),
    rank: Annotated[
        int | None,
        typer.Option(
            callback=in_range("rank", "--rank"),
            help="Reduce to this rank by SVD.",
            show_default="exact, the ranks add up",
        ),
    ] = None,
    fuse_into: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Write this base with the LoRAs in its weights instead."),
    ] = None,
    base: Base = None,
    variant: Variant = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = "float16",
    leave_out: LeaveOut = None,
) -> None:
    """Merge LoRAs, such as a style and an acceleration, into one file or into a base."""
    from lcm_kit import console
    from lcm_kit.api import lora_files

    parts = [_weighted(text) for text in adapters]
    if fuse_into is not None and rank is not None:
        raise UserError("--rank has no effect with --fuse-into, which is exact; remove one of them")
    if fuse_into is not None:
        lora_files.fuse(parts, fuse_into, output, variant=variant, leave_out=leave_out or (), verbose=True)
        console.say(
            f"wrote {output}: {fuse_into} with {len(parts)} LoRA{'s' * (len(parts) > 1)} in its weights"
        )
        return
    done = lora_files.merge(
        parts, output, format=style, rank=rank, base=base, variant=variant, dtype=dtype,
        leave_out=leave_out or (), verbose=True,
    )  # fmt: skip
    for line in done.told:
        console.say(f"  {line}")
    _print_interference(done.interference)
    for group, error in (done.errors or {}).items():
        console.say(f"  relative error of rank {rank} in {group}: {error:.3g}")
    for line in done.written:
        console.say(f"wrote {line}")


def _weighted(text: str) -> tuple[Path, float]:
    """FILE:WEIGHT; the weight is 1 where there is none."""
    from lcm_kit.lora.locate import named

    path, colon, weight = text.rpartition(":")
    if colon and not path:
        raise UserError(f"{text!r} names no file; write FILE:WEIGHT, as style.safetensors:0.8")
    try:
        value = float(weight) if colon else 1.0
        weighed = in_range("weight", f"{path}: weight")(value)
        return (Path(path) if colon else Path(text)), weighed
    except UserError:
        raise
    except ValueError:
        if Path(text).exists() or (named(text) and text.count(":") == 1):
            return Path(text), 1.0
        raise UserError(
            f"{text!r} is not FILE:WEIGHT; give a number behind the colon, as {path}:0.8"
        ) from None


def _print_report(report: checks.Report) -> None:
    from lcm_kit import console
    from lcm_kit.lora.apps import APPS, TITLES, able

    file = report.file
    console.say(f"{file.path}: a LoRA for {file.structure.label}, {len(file.lora.updates)} modules")
    for line in file.findings:
        console.say(f"  found: {line}")
    for line in file.problems[:_PROBLEMS]:
        console.say(f"  problem: {line}")
    if len(file.problems) > _PROBLEMS:
        console.say(f"  and {len(file.problems) - _PROBLEMS:,} more problems")
    table = console.Table()
    for heading in ("app", "modules", "right strength", "verdict"):
        table.add_column(heading, no_wrap=heading != "verdict", overflow="fold")
    for row in report.rows:
        error = "" if row.error is None else f" (output within {row.error:.1e} of the exact one)"
        verdict = console.cell(row.verdict + error if row.ok else row.verdict, "red" if row.wrong else "")
        table.add_row(row.title, f"{row.loaded} of {row.of}", f"{row.right} of {row.of}", verdict)
    console.show(table)
    unable = [TITLES[app] for app in APPS if app not in able(file.structure)]
    if len(unable) == len(APPS):
        console.say("Apps other than diffusers cannot load a base with these blocks: they were not asked.")
    elif unable:
        console.say(f"{', '.join(unable)} cannot load a base with these blocks and was not asked.")
    elif not file.structure.published:
        console.say(
            "Apps other than diffusers cannot load a base of this size: their counts go by the names."
        )


def _print_interference(pairs: dict[str, list[Interference]]) -> None:
    """Where two adapters pull at the same weights: cosine of their updates by block."""
    from lcm_kit import console

    for title, rows in pairs.items():
        table = console.Table(title=title)
        for heading in ("block", "cosine", "size of first", "of second", "shared modules"):
            table.add_column(heading, no_wrap=heading == "block")
        for row in rows:
            table.add_row(
                row.group, f"{row.cosine:+.3f}", f"{row.norm_a:.3g}", f"{row.norm_b:.3g}", str(row.shared)
            )
        console.show(table)
