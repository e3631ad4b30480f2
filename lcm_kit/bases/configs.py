"""What the configuration files of a base may say: the fields that count here, typed and bounded.

They are read before a library sees them: a stranger's number must not ask for memory without end, and noise,
conditions or latents that this kit does not compute with have to be refused, not passed over. All that
changes what a library computes is listed: diffusers and transformers take 10**7 for true, and a text for a
list of letters. `weights.empty_model` tells what they cannot build from values that are each in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lcm_kit.bases.source import read_json
from lcm_kit.errors import UserError
from lcm_kit.families import listed

_Width = Annotated[int, Field(ge=1, le=65_536)]  # channels and features: SDXL's widest layer has 10,240
_Count = Annotated[int, Field(ge=1, le=256)]  # blocks and layers: SDXL's second text encoder has 32
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Widths = Annotated[list[_Width], Field(min_length=1, max_length=16)]
_Depth = Annotated[int, Field(ge=0, le=256)]  # transformer layers of a block: pruned UNets have some without
_Depths = Annotated[list[_Depth | list[_Depth]], Field(min_length=1, max_length=16)]
_Names = Annotated[list[str], Field(min_length=1, max_length=16)]
_Variance = Annotated[float, Field(gt=0, le=1)]
_Above = Annotated[float, Field(gt=0, le=1e6)]  # a factor
_Tiny = Annotated[float, Field(gt=0, le=1)]  # added to a variance
_Share = Annotated[float, Field(ge=0, lt=1)]
_Kernel = Literal[1, 3, 5, 7]
_Token = Annotated[int, Field(ge=0, le=2_000_000)]
_Act = Literal["silu", "swish", "mish", "gelu", "relu"]  # diffusers' activations
_Dtype = Literal["float32", "float16", "bfloat16", "float64"]

# diffusers' schedulers whose noise is sqrt(abar) x0 + sqrt(1 - abar) eps with abar from betas, and that hand
# the UNet the integer timestep. Not among them: EDM*, Cosine* and FlowMatch*, whose noise is another
SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete",
        "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete",
        "PNDM", "SASolver", "TCD", "UniPCMultistep",
    )
)  # fmt: skip


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", populate_by_name=True)


class Unet(_Fields):
    """unet/config.json: its sizes; what is absent is diffusers' default."""

    class_name: Literal["UNet2DConditionModel"] = Field("UNet2DConditionModel", alias="_class_name")
    in_channels: _Width = 4
    out_channels: _Width = 4
    sample_size: Annotated[int, Field(ge=1, le=4096)]
    block_out_channels: _Widths = [320, 640, 1280, 1280]
    down_block_types: _Names | None = None
    up_block_types: _Names | None = None
    layers_per_block: _Count | Annotated[list[_Count], Field(max_length=16)] = 2
    transformer_layers_per_block: _Depth | _Depths = 1
    reverse_transformer_layers_per_block: _Depths | None = None
    cross_attention_dim: _Width | _Widths = 1280
    attention_head_dim: _Width | _Widths = 8
    num_attention_heads: _Width | _Widths | None = None
    norm_num_groups: _Width | None = 32
    use_linear_projection: bool = False
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: _Width | None = None
    addition_embed_type_num_heads: _Width = 64
    projection_class_embeddings_input_dim: _Width | None = None
    class_embed_type: str | None = None
    class_embeddings_concat: bool = False
    num_class_embeds: _Width | None = None
    encoder_hid_dim: _Width | None = None
    encoder_hid_dim_type: str | None = None
    act_fn: _Act = "silu"
    attention_type: Literal["default"] = "default"
    center_input_sample: bool = False
    conv_in_kernel: _Kernel = 3
    conv_out_kernel: _Kernel = 3
    cross_attention_norm: Literal["layer_norm"] | None = None
    downsample_padding: Annotated[int, Field(ge=0, le=1)] = 1
    dropout: _Share = 0.0
    dual_cross_attention: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Field(ge=0, le=1)] = 0
    mid_block_only_cross_attention: bool | None = None
    mid_block_scale_factor: _Above = 1
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] | None = "UNetMidBlock2DCrossAttn"
    norm_eps: _Tiny = 1e-5
    only_cross_attention: bool | Annotated[list[bool], Field(max_length=16)] = False
    resnet_out_scale_factor: _Above = 1.0
    resnet_skip_time_act: bool = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    time_cond_proj_dim: _Width | None = None
    time_embedding_act_fn: _Act | None = None
    time_embedding_dim: _Width | None = None
    time_embedding_type: Literal["positional"] = "positional"
    timestep_post_act: _Act | None = None
    upcast_attention: bool = False


class Teacher(Unet):
    """unet/config.json of a UNet that is told x_t, t, text and, for SDXL, sizes, and nothing else."""

    class_embed_type: None = None
    num_class_embeds: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None

    @field_validator("time_cond_proj_dim")
    @classmethod
    def _not_distilled(cls, value: int | None) -> int | None:
        if value is not None:
            raise ValueError(
                "this UNet takes the guidance as an input: it is already distilled, and no teacher; give the "
                "base that it was distilled from"
            )
        return value


class Vae(_Fields):
    """vae/config.json; what is absent is diffusers' default."""

    class_name: Literal["AutoencoderKL"] = Field("AutoencoderKL", alias="_class_name")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: _Width = 4
    block_out_channels: _Widths
    layers_per_block: _Count = 1
    norm_num_groups: _Width = 32
    scaling_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.18215
    shift_factor: _Number | None = None
    latents_mean: list[_Number] | None = None
    latents_std: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    force_upcast: bool = True
    act_fn: _Act = "silu"
    down_block_types: _Names | None = None
    up_block_types: _Names | None = None
    mid_block_add_attention: bool = True
    sample_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    use_post_quant_conv: bool = True
    use_quant_conv: bool = True

    @model_validator(mode="after")
    def _one_for_each_channel(self) -> Self:
        mean, std = self.latents_mean, self.latents_std
        if (mean is None) != (std is None):
            raise ValueError("latents_mean and latents_std belong together, and one of them is missing")
        if mean is not None and std is not None and {len(mean), len(std)} != {self.latent_channels}:
            raise ValueError(
                f"latents_mean and latents_std need a number for each of {self.latent_channels} channels"
            )
        return self


class Text(_Fields):
    """config.json of a CLIP text encoder; what is absent is transformers' default."""

    model_type: Literal["clip_text_model"] = "clip_text_model"
    hidden_size: _Width
    intermediate_size: _Width
    num_hidden_layers: _Count
    num_attention_heads: _Count = 8
    vocab_size: Annotated[int, Field(ge=1, le=2_000_000)] = 49_408
    max_position_embeddings: Annotated[int, Field(ge=1, le=8192)] = 77
    projection_dim: _Width = 512
    hidden_act: Literal["quick_gelu", "gelu", "gelu_new"] = "quick_gelu"
    layer_norm_eps: _Tiny = 1e-5
    attention_dropout: _Share = 0.0
    dropout: _Share = 0.0
    bos_token_id: _Token | None = None
    pad_token_id: _Token | None = None
    eos_token_id: _Token = 49_407
    dtype: _Dtype | None = None
    torch_dtype: _Dtype | None = None
    use_attention_mask: bool = False


class Index(_Fields):
    """model_index.json; which parts there are is read beside this."""

    force_zeros_for_empty_prompt: bool = True


class Tokenizer(_Fields):
    """tokenizer_config.json, or special_tokens_map.json; what is absent is transformers' default."""

    tokenizer_class: str | None = None
    model_max_length: Annotated[int | float, Field(ge=3, allow_inf_nan=False)] | None = None
    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    unk_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None

    def tokens(self) -> dict[str, str]:
        """The special tokens that are named, by field."""
        found = {}
        for field in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = getattr(self, field)
            text = value.get("content") if isinstance(value, dict) else value
            if value is not None:
                found[field] = str(text)
        return found


class Noise(_Fields):
    """scheduler_config.json: what describes the noise; how to sample is not read."""

    class_name: str | None = Field(None, alias="_class_name")
    prediction_type: str = "epsilon"
    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    trained_betas: Annotated[list[_Variance], Field(min_length=1, max_length=100_000)] | None = None
    beta_start: _Variance | None = None
    beta_end: _Variance | None = None
    beta_schedule: str | None = None
    rescale_betas_zero_snr: bool = False
    use_flow_sigmas: bool | None = None
    timestep_type: str = "discrete"


class Scheduler(Noise):
    """scheduler_config.json of a noise that this kit computes with."""

    @field_validator("class_name")
    @classmethod
    def _variance_preserving(cls, value: str | None) -> str | None:
        if value is not None and value not in SCHEDULERS:
            raise ValueError(
                f"its noise is not one that this kit computes with; those of {', '.join(SCHEDULERS)} are"
            )
        return value

    @model_validator(mode="after")
    def _says_its_noise(self) -> Self:
        if self.use_flow_sigmas or self.timestep_type != "discrete":
            key = "use_flow_sigmas" if self.use_flow_sigmas else "timestep_type"
            raise ValueError(
                f"{key} {getattr(self, key)!r} is a noise that this kit does not compute with; "
                "give a base with betas and integer timesteps"
            )
        wanted = ("beta_schedule",) if self.beta_schedule == "squaredcos_cap_v2" else (
            "beta_start", "beta_end", "beta_schedule",
        )  # fmt: skip
        lacking = [key for key in wanted if getattr(self, key) is None]
        if self.trained_betas is None and lacking:
            raise ValueError(
                f"it lacks {', '.join(lacking)}, so that nothing says which noise the base was trained with; "
                "take the scheduler_config.json of the base that it was made from"
            )
        if self.trained_betas is None and (self.beta_start or 0) > (self.beta_end or 1):
            raise ValueError(
                f"beta_start {self.beta_start} is above beta_end {self.beta_end}; take the "
                "scheduler_config.json of the base that it was made from"
            )
        return self


_Model = TypeVar("_Model", Unet, Teacher, Vae, Text, Index, Tokenizer, Noise, Scheduler)


def parse(kind: type[_Model], content: Mapping[str, Any], name: str) -> _Model:
    """`content` as `kind`. Raises `UserError` for its first fault; `name`: base and file, in sentences."""
    try:
        return kind.model_validate(dict(content))
    except ValidationError as error:
        raise UserError(f"{name}: {_sentence(error, content)}") from None


def require_sizes(folder: Path, path: str) -> None:
    """Raise `UserError` for a size without sense in the configuration of a part of `folder` that has one.

    `path`: the base as a user calls it. Whether it can be a teacher is not asked: `inspect_base` does.
    """
    kinds: tuple[tuple[str, Any], ...] = (
        ("unet", Unet), ("vae", Vae), ("text_encoder", Text), ("text_encoder_2", Text), ("scheduler", Noise),
    )  # fmt: skip
    for part, kind in kinds:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        if (folder / part).is_dir():  # and then with its configuration
            parse(kind, read_json(folder / part / name, path), f"base {path!r}: {part}/{name}")


def _sentence(error: ValidationError, content: Mapping[str, Any]) -> str:
    """Of a union pydantic tells each member's complaint; the first is enough, with the field's own value."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{first['loc'][0]} is missing; download or save the base again"
    if not first["loc"]:
        return message
    field = str(first["loc"][0])
    value = repr(content[field])
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    if first["type"] == "value_error":
        return f"{field} {shown}: {message}"
    reason = f"{message[:1].lower()}{message[1:]}"
    return f"{field} {shown} is not supported ({reason}); give an {listed()} base"
