"""What is said of a family of bases, of a published model and of the parts of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

# How the names of tensors begin in a checkpoint of the original layout
CHECKPOINT_UNET = "model.diffusion_model."
CHECKPOINT_VAE = tuple(
    f"first_stage_model.{name}." for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")
)
CONDITIONER = "conditioner."
FIRST_EMBEDDER, SECOND_EMBEDDER = f"{CONDITIONER}embedders.0.", f"{CONDITIONER}embedders.1."


class Part(NamedTuple):
    """One folder of a base: which library loads it, and how its weights are called."""

    library: str
    class_name: str  # "": whichever the base names
    stem: str | None = None  # of its weight files; None: it has none

    def kind(self) -> Any:
        """The class; this imports the library."""
        return getattr(import_module(self.library), self.class_name)


# All that families are made of
PARTS: dict[str, Part] = {
    "vae": Part("diffusers", "AutoencoderKL", "diffusion_pytorch_model"),
    "text_encoder": Part("transformers", "CLIPTextModel", "model"),
    "tokenizer": Part("transformers", "CLIPTokenizer"),
    "text_encoder_2": Part("transformers", "CLIPTextModelWithProjection", "model"),
    "tokenizer_2": Part("transformers", "CLIPTokenizer"),
    "unet": Part("diffusers", "UNet2DConditionModel", "diffusion_pytorch_model"),
    "scheduler": Part("diffusers", ""),
}


class Clip(NamedTuple):
    """A published CLIP text encoder."""

    name: str  # as ComfyUI calls it
    layers: int  # that are in use
    width: int
    hidden: int  # width of the layers between
    heads: int
    open_clip: bool = False  # OpenCLIP's, whose attentions original checkpoints hold in one piece


CLIP_L = Clip("clip_l", 12, 768, 3072, 12)
CLIP_H = Clip("clip_h", 23, 1024, 4096, 16, open_clip=True)
CLIP_G = Clip("clip_g", 32, 1280, 5120, 20, open_clip=True)


@dataclass(frozen=True)
class Family:
    """What one pipeline of diffusers draws with."""

    name: str  # in manifests and messages
    title: str  # in sentences
    module: str  # its code: the functions of `lcm_kit.bases.Code`
    pipeline: str  # class in diffusers, or MODULE:CLASS
    parts: tuple[str, ...]  # folders of a base, of `PARTS`
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
    # (width, height) in pixels of what its bases were trained on, by the side of the square; () is unknown
    shapes: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The text encoders among its parts."""
        return tuple(part for part in self.parts if part.startswith("text_encoder"))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers among its parts, in the order of the text encoders."""
        return tuple(part for part in self.parts if part.startswith("tokenizer"))

    def pipeline_class(self) -> Any:
        """Its pipeline; this imports diffusers."""
        module, _, name = self.pipeline.rpartition(":")
        return getattr(import_module(module or "diffusers"), name)


@dataclass(frozen=True)
class Motion:
    """How AnimateDiff moves a generation: diffusers' pipeline, and a published motion adapter."""

    pipeline: str
    adapter: str  # on the hub, in diffusers' form
    middle: bool  # whether it has modules in the UNet's middle: `use_motion_mid_block` of its config.json


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
    configs: str | None = None  # that `finetune` takes: distill/NAME_styled and finetune/NAME_style
    pruned_from: str | None = None  # the generation that it has the text encoders and the names of
    checkpoint_lacks: tuple[str, ...] = ()  # beginnings of names that no file of it has
    unknown_to: tuple[str, ...] = ()  # apps that do not load a UNet with these blocks
    motion: Motion | None = None  # None: no motion adapter was published for its blocks

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
