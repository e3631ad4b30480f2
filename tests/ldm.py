"""A small base as one file in the original layout: the inverse of what diffusers' converters do.

Names as in the code that the checkpoints come from: CompVis' latent diffusion (`first_stage_model`,
`cond_stage_model`), Stability's generative models (`conditioner.embedders`), OpenCLIP.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lcm_kit.lora.names import sgm_names

State = dict[str, Tensor]
_OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def states(folder: Path) -> dict[str, State]:
    """The weights of a pipeline folder as its models hold them, by part, in the dtype of the files."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = {
        "unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }  # fmt: skip
    parts = {part: kind for part, kind in kinds.items() if (folder / part).is_dir()}
    return {
        part: kind.from_pretrained(folder / part, dtype="auto" if "text" in part else _dtype(folder / part))
        .state_dict()
        for part, kind in parts.items()
    }  # fmt: skip


def _dtype(folder: Path) -> torch.dtype:
    from safetensors.torch import load_file

    return next(iter(load_file(folder / "diffusion_pytorch_model.safetensors").values())).dtype


def write(folder: Path, file: Path, *, sd2: bool = False, **dtypes: torch.dtype) -> Path:
    """Write the pipeline in `folder` as `file`, with the part's dtype where one is named.

    `sd2`: the text encoder in OpenCLIP's layout, with a 24th layer that SD2 does not use.
    """
    parts = states(folder)
    for part, dtype in dtypes.items():
        parts[part] = {name: tensor.to(dtype) for name, tensor in parts[part].items()}
    text = parts["text_encoder"]
    found = _under("model.diffusion_model.", unet(parts["unet"])) | _under(
        "first_stage_model.", vae(parts["vae"])
    )
    if "text_encoder_2" in parts:
        found |= _under("conditioner.embedders.0.transformer.", clip(text))
        found |= _under("conditioner.embedders.1.model.", open_clip(parts["text_encoder_2"]))
    elif sd2:
        found |= _under("cond_stage_model.model.", _with_last_layer(open_clip(text)))
    else:
        found |= _under("cond_stage_model.transformer.", clip(text))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)
    return file


def config_only(folder: Path, to: Path) -> Path:
    """Copy a pipeline folder without its weights."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    return to


def _under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _renamed(state: Mapping[str, Tensor], name_of: Callable[[str], str]) -> State:
    found = {name_of(name): tensor for name, tensor in state.items()}
    assert len(found) == len(state)
    return found


def unet(state: Mapping[str, Tensor]) -> State:
    """A UNet in the original layout."""
    names = sgm_names({name.rpartition(".")[0] for name in state})
    return _renamed(state, lambda name: f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}")


def vae(state: Mapping[str, Tensor]) -> State:
    """An AutoencoderKL in the original layout: blocks up to the picture count from it, attention is 1x1."""
    ups = 1 + max(int(n) for n in re.findall(r"up_blocks\.(\d+)", " ".join(state)))

    def name_of(name: str) -> str:
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{ups - 1 - int(m[1])}.block", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{ups - 1 - int(m[1])}.upsample", name
        )
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if ".attentions.0." in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            for new, old in _VAE_ATTENTION.items():
                name = name.replace(f".{new}.", f".{old}.")
        return name

    found = _renamed(state, name_of)
    for name, tensor in found.items():
        if ".attn_1." in name and tensor.ndim == 2:
            found[name] = tensor[:, :, None, None]
    return found


def clip(state: Mapping[str, Tensor]) -> State:
    """A CLIPTextModel as old transformers named it, with the positions that it saved."""
    found = _renamed(state, lambda name: f"text_model.{name.removeprefix('text_model.')}")
    length = len(found["text_model.embeddings.position_embedding.weight"])
    return found | {"text_model.embeddings.position_ids": torch.arange(length)[None]}


def open_clip(state: Mapping[str, Tensor]) -> State:
    """A CLIP text model in OpenCLIP's layout: q, k and v as one matrix, the projection transposed."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    width = state["embeddings.position_embedding.weight"].shape[1]
    found = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T
        if "text_projection.weight" in state
        else torch.eye(width),
        "logit_scale": torch.tensor(4.6),
    } | {f"ln_final.{end}": state[f"final_layer_norm.{end}"] for end in ("weight", "bias")}
    layers = 1 + max(int(n) for n in re.findall(r"layers\.(\d+)", " ".join(state)))
    for n in range(layers):
        old, new = f"encoder.layers.{n}", f"transformer.resblocks.{n}"
        for end in ("weight", "bias"):
            fused = [state[f"{old}.self_attn.{x}_proj.{end}"] for x in "qkv"]
            found[f"{new}.attn.in_proj_{end}"] = torch.cat(fused)
            for ours, theirs in _OPEN_CLIP.items():
                found[f"{new}.{theirs}.{end}"] = state[f"{old}.{ours}.{end}"]
    return found


def _with_last_layer(state: Mapping[str, Tensor]) -> State:
    last = {name: tensor for name, tensor in state.items() if ".resblocks.22." in name}
    assert last, "SD2's text encoder has 23 layers"
    return {**state, **{name.replace(".22.", ".23."): tensor + 1 for name, tensor in last.items()}}


def with_real_parts(folder: Path, to: Path, text: Mapping[str, Mapping[str, Any]]) -> Path:
    """A copy of a small base with attention in the VAE, as in real ones, and text encoders of other sizes."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    shutil.copytree(folder, to)
    torch.manual_seed(3)
    config = {**AutoencoderKL.load_config(to / "vae"), "mid_block_add_attention": True}
    AutoencoderKL.from_config(config).save_pretrained(to / "vae")
    for part, sizes in text.items():
        kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
        settings = kind.config_class.from_pretrained(to / part)
        settings.update(sizes)
        kind(settings).save_pretrained(to / part)
    return to
