"""Pictures: drawn with a base and a LoRA, and a diffusers pipeline of one's own made ready for a LoRA."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lcm_kit import console
from lcm_kit.api.calls import call
from lcm_kit.api.stages import Place
from lcm_kit.config.numbers import require_batch_size, require_in_range
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcm_kit.config.schema import Base
    from lcm_kit.core.methods import MethodInfo
    from lcm_kit.sample import CallSettings


def sample_images(
    prompts: str | Sequence[str],
    *,
    adapter: Place | None = None,
    base: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    weight: float | None = None,
    negative_prompt: str | None = None,
    emphasis: bool | None = None,
    width: int | None = None,
    height: int | None = None,
    count: int = 1,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    device: str | None = None,
    dtype: str | None = None,
    decoder: Place | None = None,
    tiling: bool = False,
    compile: bool = False,
    verbose: bool = False,
) -> list[Image]:
    """Draw `count` pictures of each prompt: the first of every prompt, then the second of every one, ...

    `adapter`: a LoRA file or a run; None draws with the base. `base`: a diffusers folder, a hub id or
    asset:NAME; by default the run's. What is None of `sampler`, `steps`, `guidance_scale` (diffusers', 1 is
    none) and `weight` is what was measured for the LoRA (`recommended_for`), else what serves its method:
    for LCM lcm, 4, 1 and 1; `guidance_scale` above 1 where no guidance is baked in. `width` and `height` in
    pixels, multiples of 8; the base's own by default, and a square if one is given. Picture i is a function
    of (seed, i): no batch size changes it, and where memory runs out fewer are drawn at once. `device` as
    "cuda:1", `dtype` as "float16": by default CUDA in float16 if there is one, else the CPU in float32.
    `decoder`: a folder, hub id or asset:NAME of what decodes in the VAE's place: a diffusers AutoencoderTiny
    (previews), or a ConsistencyDecoderVAE, whose noise follows from (seed, i), too. `tiling` decodes what is
    larger than the VAE was made for in tiles, which is not exact. `compile` compiles the UNet: minutes first,
    then faster pictures on a GPU. Prompts may be of any length. `emphasis`: True reads `(more)`, `[less]` and
    `(word:1.2)` in them as apps do, False draws them as they stand, None reads those that have a weight's
    number or an escaped bracket.

    Returns 8-bit RGB pictures. Raises `UserError` for a LoRA that is not whole, not for this base, or not in
    a form that diffusers loads, before weights are loaded; and for settings that are impossible.

        images = lcm_kit.sample_images("a fox in a boat", adapter="runs/quickstart")
        images[0].save("fox.png")
    """
    wanted = [prompts] if isinstance(prompts, str) else list(prompts)
    with call(verbose):
        from lcm_kit.sample import draw_images

        how = drawing(
            wanted, adapter=adapter, base=base, sampler=sampler, steps=steps, guidance_scale=guidance_scale,
            weight=weight, negative_prompt=negative_prompt, emphasis=emphasis, width=width, height=height,
            count=count, seed=seed, batch_size=batch_size, device=device, dtype=dtype, decoder=decoder,
            tiling=tiling, compile=compile,
        )  # fmt: skip
        with console.working(how.title):
            return list(draw_images(how.base, how.prompts, **how.settings))


def load_into(
    pipe: Any,
    adapter: Place,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    weight: float | None = None,
    name: str = "lcm",
    verbose: bool = False,
) -> CallSettings:
    """Load a LoRA into a diffusers pipeline of yours, with the scheduler that serves it; returns the rest.

    That is what the pipeline's call takes: `num_inference_steps`, `guidance_scale`, with TCD `eta`. What is
    None is chosen as in `sample_images`. `name`: of the adapter in the pipeline, where it is the one that is
    on then. The noise schedule and the prediction type stay those of the pipeline's own scheduler. Raises
    `UserError`, leaving the pipeline as it was, for a LoRA that is not whole or not for this pipeline.

        pipe = diffusers.StableDiffusionPipeline.from_pretrained("my/base")
        settings = lcm_kit.load_into(pipe, "lumo.safetensors")
        image = pipe("a fox in a boat", **settings).images[0]
    """
    from lcm_kit import sample
    from lcm_kit.evaluation.recommended import method_of, misfit, of_adapter, settings
    from lcm_kit.lora import structure
    from lcm_kit.lora.convert import require_diffusers
    from lcm_kit.lora.locate import adapter_file
    from lcm_kit.lora.verify import Against

    require_in_range(steps=steps, guidance_scale=guidance_scale, weight=weight)
    with call(verbose):
        file = adapter_file(os.fspath(adapter))
        require_diffusers(file, Against(structure.of_pipeline(pipe)))
        use = settings(
            of_adapter(Path(adapter), file), method_of(file), sampler=sampler, steps=steps,
            guidance_scale=guidance_scale, lora_weight=weight,
        )  # fmt: skip
        if said := misfit(use, method_of(file)):
            console.say(f"{adapter}: {said}")
        chosen = sample.scheduler(use.sampler, pipe.scheduler.config)
        sample.load_adapter(pipe, file, use.lora_weight, name=name)
        pipe.scheduler = chosen
        return sample.call_settings(use.sampler, use.steps, use.guidance_scale)


class Drawing(NamedTuple):
    """What is drawn, checked and settled: `settings` are those of `sample.draw_images`."""

    base: str
    prompts: list[str]
    title: str  # what is being done, in words
    settings: dict[str, Any]
    made_by: MethodInfo  # what made the LoRA; LCM where there is none


def drawing(
    prompts: Sequence[str],
    *,
    adapter: Place | None = None,
    base: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    weight: float | None = None,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    count: int = 1,
    dtype: str | None = None,
    batch_size: int | Literal["auto"] = "auto",
    decoder: Place | None = None,
    **more: Any,
) -> Drawing:
    """What `sample_images` and `lcm-kit sample` draw, by their options; `more` is for `draw_images` as it is.

    Says in a line where it takes what was measured. Raises `UserError` as `sample_images`, with nothing
    loaded.
    """
    import torch

    from lcm_kit.config.schema import Base
    from lcm_kit.core.methods import DEFAULT
    from lcm_kit.evaluation.recommended import method_of, misfit, no_negative, of_adapter, settings
    from lcm_kit.io.written import from_command
    from lcm_kit.lora.write import DTYPES

    require_in_range(steps=steps, guidance_scale=guidance_scale, weight=weight)
    require_in_range(count=count, width=width, height=height)
    require_batch_size(batch_size)
    wanted = [*map(from_command, prompts)]
    found = Base(path=base) if base else base_of(adapter)
    advice, made_by, given = None, DEFAULT, None if adapter is None else Path(adapter)
    if given is not None:
        with console.working(f"checking {given}"):
            file = _require_a_pair(given, found)
            advice, made_by = of_adapter(given, file), method_of(file)
    side = width or height
    use = settings(
        advice, made_by, sampler=sampler, steps=steps, guidance_scale=guidance_scale, lora_weight=weight
    )
    if advice and advice.steps:
        at = f" at {advice.at} pixels" if advice.at else ""
        console.say(f"{given}: {use}; measured for {advice.part or 'it'}{at}, where no option says otherwise")
    if given is not None and (said := misfit(use, made_by)):
        console.say(f"{given}: {said}")
    if negative_prompt is not None and given is not None and use.guidance_scale <= 1:
        raise UserError(no_negative(given, made_by.guidance_scale))
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be drawn in; choose one of {', '.join(DTYPES)}")
    return Drawing(
        found.path, wanted, f"drawing {len(wanted) * count} of {found.path} in {use.steps} steps",
        {
            "adapter": given, "sampler": use.sampler, "steps": use.steps,
            "guidance_scale": use.guidance_scale, "lora_weight": use.lora_weight,
            "revision": found.revision, "variant": found.variant,
            "negative_prompt": None if negative_prompt is None else from_command(negative_prompt),
            "size": None if side is None else (height or side, width or side), "count": count,
            "dtype": None if dtype is None else getattr(torch, dtype),
            "batch_size": batch_size, "decoder": None if decoder is None else os.fspath(decoder), **more,
        },
        made_by,
    )  # fmt: skip


def _require_a_pair(adapter: Path, base: Base) -> Path:
    """The LoRA's file. Raises `UserError` if it is not for this base, before any of the base is loaded."""
    from lcm_kit.lora import convert, verify
    from lcm_kit.lora.locate import adapter_file

    against = verify.base_of(base.path, base.revision, base.variant)
    file = adapter_file(adapter)
    convert.require_diffusers(file, against)
    return file


def base_of(adapter: Place | None) -> Base:
    """The base that a run was made with; the embedded one if there is no run to ask."""
    from lcm_kit.config.load import load
    from lcm_kit.config.schema import Base, Training

    config = Path(adapter) / "config.yaml" if adapter else None
    if config is None or not config.is_file():
        return Base(path="asset:tiny-sd")
    loaded = load(config)
    if not isinstance(loaded, Training):
        raise UserError(f"{config} is for {loaded.recipe}, which trains no adapter on a base; give --base")
    return loaded.base
