"""The verb that serves pictures over HTTP. `main.py` puts it beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcm_kit.cli.options import BaseOption, Decoder, Device, Dtype, Tiling
from lcm_kit.config.numbers import within
from lcm_kit.errors import UserError

verbs = typer.Typer()


@verbs.command(rich_help_panel="The stages")
def serve(
    base: BaseOption = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|RUN[=WEIGHT]", help="A LoRA; repeat it for more. The first one is on by default."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; one that others reach takes --token-file.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(callback=within("--port", 0, 65_535), help="0: any that is free.")
    ] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokens, one a line; a request must have one.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name that requests may call this server by; repeat it for more.",
            show_default="localhost, or any with --host",
        ),
    ] = None,
    max_side: Annotated[
        int, typer.Option(callback=within("--max-side", 8, 8192), help="Pixels of a width or a height.")
    ] = 1024,
    max_steps: Annotated[
        int, typer.Option(callback=within("--max-steps", 1, 1000), help="Steps of a picture.")
    ] = 50,
    max_count: Annotated[
        int, typer.Option(callback=within("--max-count", 1, 1000), help="Pictures of a request.")
    ] = 4,
    max_frames: Annotated[
        int, typer.Option(callback=within("--max-frames", 2, 1000), help="Frames of an edit.")
    ] = 16,
    max_prompt: Annotated[
        int, typer.Option(callback=within("--max-prompt", 1, 20_000), help="Characters of a prompt.")
    ] = 2000,
    max_body: Annotated[
        int, typer.Option(callback=within("--max-body", 64, 2**30), help="Bytes of a request.")
    ] = 65_536,
    max_upload: Annotated[
        int,
        typer.Option(callback=within("--max-upload", 1024, 2**30), help="Bytes of a request with pictures."),
    ] = 8_388_608,
    seconds: Annotated[
        float, typer.Option(callback=within("--seconds", 0, 86_400, above=True), help="Of a request.")
    ] = 120.0,
    queue: Annotated[
        int, typer.Option(callback=within("--queue", 1, 100_000), help="Pictures that wait.")
    ] = 64,
    batch: Annotated[
        int,
        typer.Option(callback=within("--batch", 1, 1000), help="Pictures at once; 1: the same bytes always."),
    ] = 8,
    window: Annotated[
        float,
        typer.Option(
            callback=within("--window", 0, 10), help="Seconds that a picture waits to be drawn with others."
        ),
    ] = 0.01,
    rate: Annotated[
        float,
        typer.Option(
            callback=within("--rate", 0, 1e9, above=True), help="Requests a minute of each token or address."
        ),
    ] = 600.0,
    grace: Annotated[
        float,
        typer.Option(callback=within("--grace", 0, 86_400), help="Seconds to finish in when told to stop."),
    ] = 30.0,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep pictures and votes in it.", show_default="nothing is kept"),
    ] = None,
    history: Annotated[
        int,
        typer.Option(
            callback=within("--history", 1, 10_000_000), help="Pictures kept in --data; the oldest go."
        ),
    ] = 1000,
    device: Device = None,
    dtype: Dtype = None,
    decoder: Decoder = None,
    tiling: Tiling = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts into the log, which else has none.")
    ] = False,
) -> None:
    """Draw pictures for whoever asks over HTTP."""
    try:
        import fastapi as _fastapi  # noqa: F401
        import prometheus_client as _prometheus  # noqa: F401
        import uvicorn as _uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serve needs the package {error.name}; install it with `pip install 'lcm-kit[serve]'`"
        ) from error
    import torch

    from lcm_kit.api.calls import call
    from lcm_kit.api.pictures import base_of
    from lcm_kit.config.schema import Base
    from lcm_kit.serve import run
    from lcm_kit.serve.adapters import parted
    from lcm_kit.serve.limits import Limits

    given = adapter or []
    with call(verbose=True):
        found = Base(path=base) if base else base_of(parted(given[0])[0] if given else None)
        run.serve(
            found, given, run.Place(host, port, token_file, tuple(allowed_host or ())),
            Limits(
                side=max_side, steps=max_steps, count=max_count, frames=max_frames, prompt=max_prompt,
                body=max_body, upload=max_upload, seconds=seconds, queue=queue, batch=batch, window=window,
                rate=rate, grace=grace,
            ),
            run.Drawn(device, None if dtype is None else getattr(torch, dtype), decoder, tiling),
            run.Kept(data, history),
            log_prompts=log_prompts,
        )  # fmt: skip
