"""What is no base of ours is told from a file's header, in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.bases import inspect_base
from lcm_kit.bases.checkpoint import contents_of
from lcm_kit.errors import UserError
from lcm_kit.families import GENERATIONS

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
UNET = {FIRST: torch.zeros(8, 4, 3, 3)}
REFUSED = {
    "lora": (
        {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 2)},
        "is a LoRA",
    ),
    "peft": ({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 2)}, "as --adapter"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, "is a checkpoint of Flux"),
    "sd3": ({"model.diffusion_model.joint_blocks.0.x.weight": torch.zeros(2)}, "is a checkpoint of SD3"),
    "inpainting": ({FIRST: torch.zeros(8, 9, 3, 3)}, "is an inpainting model .*takes 9 channels"),
    "depth": ({FIRST: torch.zeros(8, 5, 3, 3)}, "not a plain text-to-image model .*takes 5 channels"),
    "refiner": (UNET | {"conditioner.embedders.0.model.ln_final.bias": torch.zeros(2)}, "SDXL's refiner"),
    "edm": (UNET | {"edm_vpred.sigma_max": torch.tensor(120.0)}, "trained with EDM's noise"),
    "unet": (UNET, r"lacks weights of an SD1.x checkpoint \(vae, text_encoder\)"),
    "part": ({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(2, 2)}, "is one part of a model"),
    "vae": ({"encoder.conv_in.weight": torch.zeros(2, 2)}, "is one part of a model"),
    "text encoder": (
        {"text_model.final_layer_norm.bias": torch.zeros(2)},
        "a text encoder; copy the diffusers",
    ),
    "old vae": ({"decoder.up.0.block.0.norm1.bias": torch.zeros(2)}, "a VAE in the original names; copy"),
    "no vae": (
        UNET | {"cond_stage_model.transformer.text_model.x": torch.zeros(2)},
        r"lacks weights of an SD1.x checkpoint \(vae\); give the whole checkpoint, or put the diffusers",
    ),
    "embedding": ({"emb_params": torch.zeros(2, 2)}, "is not a checkpoint that this kit knows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_base_is_named(name: str, tmp_path: Path):
    tensors, sentence = REFUSED[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=sentence) as caught:
        inspect_base(str(tmp_path / "model.safetensors"))
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.CKPT", "model"])
def test_pickles_are_refused_unread(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(UserError, match="can run code when it is loaded"):
        inspect_base(str(tmp_path / name))


def test_the_repositories_are_those_that_diffusers_infers():
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS as known

    for ours, theirs in (("sd1", "v1"), ("sd2", "v2"), ("sdxl", "xl_base")):
        assert GENERATIONS[ours].repositories[0] == known[theirs]["pretrained_model_name_or_path"]


SDXL_TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")


def _whole(*text: str) -> dict[str, torch.Tensor]:
    """The names that a family is recognised by, and no more."""
    names = (
        "model.diffusion_model.middle_block.1.norm.bias",
        "first_stage_model.decoder.conv_in.bias",
        *(f"{prefix}x" for prefix in text),
    )
    return UNET | {name: torch.zeros(1) for name in names}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SD1.x", ("cond_stage_model.transformer.",)),
        ("SD2.x", ("cond_stage_model.model.",)),
        ("SDXL", SDXL_TEXT),
    ],
)
def test_the_family_is_in_the_names(name: str, text: tuple[str, ...], tmp_path: Path):
    save_file(_whole(*text), tmp_path / "model.safetensors")
    contents = contents_of(tmp_path / "model.safetensors")
    assert contents.generation.short == name
    assert contents.counts == {"unet": 2, "vae": 1} | {f"text_encoder{'_2' * k}": 1 for k in range(len(text))}


def test_a_middle_without_attention_is_the_pruned_sdxl(tmp_path: Path):
    tensors = _whole(*SDXL_TEXT)
    del tensors["model.diffusion_model.middle_block.1.norm.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert contents_of(tmp_path / "model.safetensors").generation.repositories == ("segmind/SSD-1B",)


@pytest.mark.parametrize(
    ("names", "metadata", "said"),
    [
        ([], {}, {}),
        (["v_pred"], {}, {"prediction_type": "v_prediction"}),
        (["v_pred", "ztsnr"], {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ([], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}),
    ],
)
def test_what_the_file_says_of_its_noise(names, metadata, said, tmp_path: Path):
    file = tmp_path / "sdxl.safetensors"
    save_file(_whole(*SDXL_TEXT) | dict.fromkeys(names, torch.tensor([])), file, metadata)
    assert contents_of(file).scheduler == said


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ({"label_emb.0.0.weight": torch.zeros(8, 8), "middle_block.1.norm.bias": torch.zeros(2)}, "SDXL"),
        ({"label_emb.0.0.weight": torch.zeros(8, 8)}, "SSD-1B"),
        ({"middle_block.1.proj_in.weight": torch.zeros(8, 8)}, "SD2.x"),
        ({"middle_block.1.proj_in.weight": torch.zeros(8, 8, 1, 1)}, "SD1.x"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_family_of_a_unet_alone(prefix: str, tensor: dict[str, torch.Tensor], name: str, tmp_path: Path):
    tensors = {"input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3), **tensor}
    save_file({prefix + key: x for key, x in tensors.items()}, tmp_path / "unet.safetensors")
    contents = contents_of(tmp_path / "unet.safetensors")
    assert contents.generation.short == name and contents.counts == {"unet": len(tensors)}
    assert contents.lacking == tuple(part for part in contents.generation.checkpoint if part != "unet")


def test_sd2_at_its_known_step_is_epsilon(tmp_path: Path):
    for step, said in ((875_000, {"prediction_type": "epsilon"}), (110_000, {})):
        tensors = _whole("cond_stage_model.model.") | {"global_step": torch.tensor(step)}
        save_file(tensors, tmp_path / "model.safetensors")
        assert contents_of(tmp_path / "model.safetensors").scheduler == said
