"""Options that several verbs have, each with its words in one place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lcm_kit import samplers
from lcm_kit.config.numbers import in_range, require_batch_size
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from lcm_kit.drawing.signing import Signer


def _batch_size(given: str) -> str:
    return str(require_batch_size(given, "--batch-size"))


BaseOption = Annotated[
    str | None, typer.Option(help="Diffusers folder, hub id or asset:NAME.", show_default="the run's")
]
AdapterOption = Annotated[
    Path | None, typer.Option(metavar="FILE|RUN", help="The LoRA; none draws with the base.")
]
BatchSize = Annotated[
    str,
    typer.Option(
        callback=_batch_size, metavar="N|auto", help="Pictures at once; fewer where memory runs out."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="As cuda, cuda:1, mps or cpu.", show_default="cuda if there is one")
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="Precision.", show_default="float16 on a GPU, float32 on a CPU"),
]
Steps = Annotated[
    int | None,
    typer.Option(
        callback=in_range("steps", "--steps"),
        help="Sampler steps: 1 to 8 for an adapter.",
        show_default="what a sweep recommends for the LoRA, else 4",
    ),
]
Seed = Annotated[int, typer.Option(callback=in_range("seed", "--seed"), help="Of the initial noise.")]
Weight = Annotated[
    float | None,
    typer.Option(
        callback=in_range("weight", "--weight"),
        help="Strength of the LoRA.",
        show_default="recommended, else 1.0",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        callback=in_range("guidance_scale", "--guidance"),
        help="guidance_scale; 1 is none, and right for an adapter with guidance baked in.",
        show_default="recommended, else as it was trained for",
    ),
]


def _known_sampler(name: str | None) -> str | None:
    return name if name is None else samplers.spelled(name)


KnownSampler = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        "--solver",
        callback=_known_sampler,
        metavar="|".join(samplers.names()),
        help=f"{', '.join(samplers.for_adapter())} for an adapter; tcd:0.5 is TCD with a gamma of 0.5.",
        show_default="recommended, else its method's",
    ),
]
Negative = Annotated[
    str | None, typer.Option(help="What guidance leads away from; it takes a --guidance above 1.")
]
Emphasis = Annotated[
    bool | None,
    typer.Option(
        "--emphasis/--no-emphasis",
        help="Read brackets in prompts as weights, as apps do: (word), (word:1.2), square ones for less.",
        show_default="where a prompt has such a number",
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Decodes in the VAE's place: an AutoencoderTiny (previews) or a ConsistencyDecoderVAE.",
    ),
]
Tiling = Annotated[
    bool, typer.Option("--tiling", help="Decode very large pictures in tiles, which is not exact.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the UNet: minutes first, then faster on a GPU.")
]
SignKey = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY.pem", help="Sign the pictures (C2PA) with this key; takes --cert."),
]
SignCert = Annotated[
    Path | None,
    typer.Option("--cert", metavar="CERT.pem", help="The key's certificate, then those that vouch for it."),
]
SignPrompt = Annotated[bool, typer.Option("--sign-prompt", help="Say the prompt in the signed manifest.")]


def require_signing(sign: Path | None, cert: Path | None, sign_prompt: bool) -> None:
    """Raise `UserError` for a key without certificates, and the like."""
    if (sign is None) != (cert is None) or (sign_prompt and sign is None):
        raise UserError("--sign and --cert go together, and --sign-prompt with them; give both, or none")


def signer_of(sign: Path | None, cert: Path | None, sign_prompt: bool) -> Signer | None:
    """Who signs the pictures, of options that `require_signing` let pass; None: nobody."""
    if sign is None or cert is None:
        return None
    from lcm_kit.drawing.signing import Signer

    return Signer.load(sign, cert, with_prompt=sign_prompt)
