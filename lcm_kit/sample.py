"""Sampling with plain diffusers, `StableDiffusionPipeline` and its own schedulers: we judge what users run.

`guidance_scale` is diffusers' (1 = no classifier-free guidance, and then no second pass). The noise of prompt
i is a function of (seed, i) alone: every sampler starts from the same noise and no batch size changes a
picture.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from lcm_kit import bases
from lcm_kit.bases.emphasis import Prompt
from lcm_kit.drawing import vae
from lcm_kit.drawing.batches import AUTO, AfterStep, Batches
from lcm_kit.drawing.fused import fuse
from lcm_kit.drawing.how import PLAIN, How
from lcm_kit.drawing.made import of_drawing
from lcm_kit.drawing.noise import generators, pictures, streams
from lcm_kit.drawing.pictures import contact_sheet, save_png, slug, to_pil
from lcm_kit.drawing.placed import place, placed
from lcm_kit.drawing.prompts import as_read, told
from lcm_kit.drawing.schedulers import (
    CallSettings,
    call_settings,
    noise_of,
    require_guided,
    require_possible,
    scheduler,
    unet_calls,
)
from lcm_kit.drawing.signing import Sign, unsigned
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.files import require_writable
from lcm_kit.io.locks import sweep
from lcm_kit.lora.locate import adapter_file

__all__ = [
    "CallSettings", "adapted", "call_settings", "contact_sheet", "decode", "draw_images", "generators",
    "latents", "load_adapter", "noise_of", "pipeline", "placement", "sample", "sample_to_folder", "save_png",
    "scheduler", "slug", "to_pil", "unet_calls",
]  # fmt: skip

_ADAPTER_NAME = "lcm"


def placement(device: str | None = None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Device and dtype for drawing: CUDA if there is one, else the CPU; float16, on a CPU float32.

    What is given stays. Raises `UserError` for a device that is not here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"device {device!r} cannot be used ({first_line(error)}); give cpu") from error
    usual = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    return {"device": device, "dtype": dtype or usual}


def pipeline(
    base: str,
    *,
    unet: torch.nn.Module | None = None,
    text_encoders: Mapping[str, torch.nn.Module] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    how: How = PLAIN,
) -> Any:
    """The base's pipeline without safety checker; `unet`, if given, takes the place of its own, and so
    do `text_encoders` (by part, as `text_encoder_2`).

    `base` is a folder, a hub id or `asset:NAME`. On CUDA convolutions lie channels last, but those of `unet`,
    which is another's. In half precision the VAE computes as `ProvenVae` finds, on a CPU in float32. Raises
    `UserError` if there is no such pipeline, and as `How.compiled`.
    """
    from diffusers import DDIMScheduler

    info = bases.inspect_base(base, revision=revision, variant=variant)
    parts: dict[str, Any] = {
        # as the pipelines want it; `latents` puts another in its place
        "scheduler": DDIMScheduler.from_config(
            noise_of(info.scheduler_config), clip_sample=False, steps_offset=1
        ),
        "vae": how.load(info, dtype, device),
        **(text_encoders or {}),
        **({} if unet is None else {"unet": unet}),
    }
    for part in info.parts:
        if part.startswith("tokenizer"):
            parts[part] = bases.load_tokenizer(info, part)
        elif part not in parts:
            parts[part] = bases.load_part(info, part, dtype)
    if info.family.zeros_when_empty:
        parts["force_zeros_for_empty_prompt"] = info.zeros_when_empty
    pipe = placed(info.family.pipeline_class())(**parts, **info.family.pipeline_off)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    if torch.device(device).type == "cuda":
        for model in (pipe.vae, *(() if unet is not None else (pipe.unet,))):
            model.to(memory_format=torch.channels_last)
    how.compiled(pipe.unet)
    return pipe


# What diffusers warns of and we want: (module, how it begins). Of every LoRA without text encoder weights
# that it has none, and of `lcm:399` that its step does not begin at the last timestep
_UNET_ONLY = "loaders.lora_base", "No LoRA keys associated to CLIPTextModel"
_OWN_TIMESTEP = "schedulers.scheduling_lcm", "The first timestep on the custom timestep schedule"


@contextlib.contextmanager
def _expecting(module: str, beginning: str) -> Iterator[None]:
    """Mute one warning of diffusers."""
    logger = logging.getLogger(f"diffusers.{module}")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def load_adapter(pipe: Any, adapter: str | Path, weight: float = 1.0, *, name: str = _ADAPTER_NAME) -> None:
    """Load a LoRA (`adapter_file`) into `pipe` as users do, at the strength `weight` (1 = as trained).

    It is the one that is on then; others that were loaded under other names stay, and are off.
    """
    file = adapter_file(adapter)
    try:
        with _expecting(*_UNET_ONLY):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"adapter {str(file)!r} does not load onto this base ({reason})") from error
    pipe.set_adapters([name], [weight])


def adapted(base: str, adapter: str | Path | None, weight: float = 1.0, **settings: Any) -> Any:
    """A `pipeline` with a LoRA, if one is given, in its weights, which it then draws with for good."""
    pipe = pipeline(base, **settings)
    if adapter is not None:
        load_adapter(pipe, adapter, weight)
        fuse(pipe, keep=False)
    return pipe


@torch.no_grad()
def latents(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    sampler: str,
    steps: int,
    guidance_scale: float = 1.0,
    seed: int | Sequence[int] = 0,
    first: int | Sequence[int] = 0,
    size: int | tuple[int, int] | None = None,
    negative_prompt: Prompt | None = None,
    chunks: int | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Draw one batch as latents [B, C, h, w]: that of `prompts[k]` comes from the noise of (seed, first + k),
    or of (seed, first[k]); with a sequence of seeds, of seed[k].

    Prompts are plain text, or what `emphasis.read` made of them, in as many as `chunks` chunks of tokens,
    None: all that they take (`drawing.prompts`). `size`, of a side or (height, width) in pixels, is the
    UNet's own by default. `negative_prompt` stands in the place of the empty one, which guidance leads away
    from; with none (1) it does nothing. LCM's renewed noise follows the same generators, so it too is a
    function of (seed, index). What `after_step` raises ends the drawing.
    `pipe` is left as it was. Returns float32 on the CPU. Raises `UserError` for an unknown sampler,
    impossible steps or guidance.
    """
    require_possible(sampler, steps, guidance_scale)
    own = pipe.scheduler
    own_side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    height, width = size if isinstance(size, tuple) else (size or own_side,) * 2
    sides = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    shape = (pipe.unet.config.in_channels, *sides)
    of = streams(pictures(len(prompts), seed, first))
    noise = torch.stack([torch.randn(shape, generator=stream) for stream in of])
    drawn = torch.empty_like(noise)
    pipe.scheduler = scheduler(sampler, own.config)
    try:
        with _expecting(*_OWN_TIMESTEP):
            for rows, asked in told(pipe, prompts, negative_prompt, guidance_scale > 1, chunks):
                drawn[rows] = pipe(
                    **asked, generator=[of[row] for row in rows], height=height, width=width,
                    output_type="latent", latents=noise[rows].to(*place(pipe)),
                    callback_on_step_end=None if after_step is None else _calling(after_step, rows),
                    **call_settings(sampler, steps, guidance_scale),
                ).images.float().cpu()  # fmt: skip
    finally:
        pipe.scheduler = own
    return drawn


def _calling(after_step: AfterStep, rows: Sequence[int]) -> Callable[..., dict[str, Any]]:
    """What a pipeline takes to call after each step; it changes nothing."""

    def call(pipe: Any, place: int, *_: Any) -> dict[str, Any]:
        after_step(rows, place + 1, pipe.num_timesteps)
        return {}

    return call


@torch.no_grad()
def decode(
    pipe: Any, latents: Tensor, *, seed: int | Sequence[int] = 0, first: int | Sequence[int] = 0
) -> Tensor:
    """Latents [B, C, h, w] as pixels [B, 3, H, W], clipped to [-1, 1], float32, on the CPU.

    `seed` and `first` are those of `latents`: a decoder that draws takes its noise from them.
    """
    return vae.decode(pipe.vae, latents, pictures(len(latents), seed, first)).cpu().clamp(-1, 1)


def sample(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    seed: int | Sequence[int] = 0,
    first: int | Sequence[int] = 0,
    **settings: Any,
) -> Tensor:
    """Draw one batch as pixels [B, 3, H, W] in [-1, 1]; all settings are those of `latents`."""
    drawn = latents(pipe, prompts, seed=seed, first=first, **settings)
    return decode(pipe, drawn, seed=seed, first=first)


def draw_images(
    base: str,
    prompts: Sequence[str],
    *,
    adapter: str | Path | None = None,
    steps: int = 4,
    guidance_scale: float = 1.0,
    seed: int = 0,
    lora_weight: float = 1.0,
    sampler: str = "lcm",
    revision: str | None = None,
    variant: str | None = None,
    negative_prompt: str | None = None,
    emphasis: bool | None = None,
    size: tuple[int, int] | None = None,
    count: int = 1,
    batch_size: int | Literal["auto"] = AUTO,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    decoder: str | None = None,
    tiling: bool = False,
    compile: bool = False,
) -> Iterator[Image.Image]:
    """Draw `count` pictures of each prompt with a base: the first of every prompt, then the second, ...

    `adapter` is a run's folder or a `.safetensors` file; `emphasis`: whether brackets are weights,
    `emphasis.read`; `size` (height, width) in pixels, the base's own by default. The first picture of each
    prompt is the same whatever `count` and `batch_size` are; where memory runs out fewer are drawn at once,
    and that is said. The adapter is fused into the weights where that is exact enough (`fused.fuse`).
    `device` and `dtype` are by `placement`; `decoder`, `tiling` and `compile` as in `How`. Raises
    `UserError` for everything that the caller can correct, before the first picture.
    """
    if not prompts:
        raise UserError("there is no prompt to draw; give at least one")
    require_possible(sampler, steps, guidance_scale)
    require_guided(negative_prompt, guidance_scale)
    wanted, against = as_read(prompts, negative_prompt, emphasis)
    file = None if adapter is None else adapter_file(adapter)
    where = placement(device, dtype)
    if size is not None and any(side % 8 for side in size):
        raise UserError(f"size {size[1]} x {size[0]}: width and height must be multiples of 8 pixels")
    info = bases.inspect_base(base, revision=revision, variant=variant)
    height, width = size or (info.resolution,) * 2
    info.require_resolution((width, height), "size")
    how = How.of(info, decoder, tiling, compile)
    pipe = adapted(base, file, lora_weight, revision=revision, variant=variant, how=how, **where)
    how.say(pipe.vae, height, width)

    def draw(first: int, batch: Sequence[Prompt]) -> Tensor:
        return sample(
            pipe, batch, sampler=sampler, steps=steps, guidance_scale=guidance_scale, seed=seed, first=first,
            size=size, negative_prompt=against,
        )  # fmt: skip

    for images in Batches.of_pictures(batch_size, height, width, where["device"]).run(wanted * count, draw):
        yield from to_pil(images)


def sample_to_folder(
    base: str,
    prompts: Sequence[str],
    output: Path,
    *,
    count: int = 1,
    sign: Sign = unsigned,
    say_prompts: bool = True,
    **settings: Any,
) -> Path:
    """Write `NNN-prompt.png` for each prompt and `contact-sheet.png` into `output`; other files there stay.

    `count` and `settings` are those of `draw_images`; several pictures of a prompt are `NNN-prompt-K.png`.
    Each is written when its batch is drawn, by `sign`; its PNG text says how it was made (`drawing.made`),
    with `say_prompts` by which prompt too, and names what decoded it, if not the VAE. Returns the contact
    sheet's path, with a row a prompt where there are several pictures. Raises `UserError` as `draw_images`.
    """
    sweep(output, deep=False)
    require_writable(output)
    defaults = {name: each.default for name, each in inspect.signature(draw_images).parameters.items()}
    source, known = of_drawing(base, defaults | settings)
    drawn: list[Image.Image] = []
    for at, picture in enumerate(draw_images(base, prompts, count=count, **settings)):
        k, which = at % len(prompts), at // len(prompts) + 1
        more = f"-{which}" if count > 1 else ""
        name = f"{k:03d}-{slug(prompts[k])}{more}.png"
        made = source.told(
            {"prompt": prompts[k], "count": len(prompts) * count, **known}, picture.size, at,
            emphasis=settings.get("emphasis"), prompts=say_prompts,
        )  # fmt: skip
        save_png(picture, output / name, source.decoded | made, partial(sign, name, prompts[k]))
        drawn.append(picture)
    rows = [drawn[k :: len(prompts)] for k in range(len(prompts))]
    tiled = contact_sheet([each for row in rows for each in row], count if count > 1 else None)
    sheet = output / "contact-sheet.png"
    return save_png(tiled, sheet, source.decoded, partial(sign, sheet.name, None))
