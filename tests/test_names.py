"""Names: both spellings against diffusers' own checkpoint converter; one name for each module each way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.config import schema
from lcm_kit.errors import UserError
from lcm_kit.families import FAMILIES
from lcm_kit.lora import kohya_format, names, reading, structure
from lcm_kit.lora.spelling import Speller
from tests.loras import lcm_modules, random_lora

GENERATIONS = ("sd1", "sd2", "sdxl")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_original_spelling_is_the_one_that_diffusers_converts_from(generation: str) -> None:
    """Each tensor of a checkpoint in our spelling holds its own number; it lands where we say."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = structure.empty_unet(structure.known(generation).unet_config)
    keys = list(unet.state_dict())
    spelled = names.sgm_names({key.rpartition(".")[0] for key in keys})
    checkpoint = {}
    for number, key in enumerate(keys):
        module, _, kind = key.rpartition(".")
        checkpoint[f"model.diffusion_model.{spelled[module]}.{kind}"] = torch.tensor(float(number))
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert {key: int(value) for key, value in converted.items()} == {key: k for k, key in enumerate(keys)}


@pytest.mark.parametrize(
    ("generation", "modules", "millions"), [("sd1", 278, 67.25), ("sd2", 278, 67.78), ("sdxl", 788, 196.75)]
)
def test_the_lcm_targets_of_the_real_bases(generation: str, modules: int, millions: float) -> None:
    """Counted by peft on the real UNet without weights, and again from the structure."""
    unet = structure.empty_unet(structure.known(generation).unet_config)
    with torch.device("meta"):
        parameters = AdaptedUNet(unet).add_lora(schema.Adapter(rank=64, alpha=64.0))
    assert len(parameters) == 2 * modules
    assert round(sum(p.numel() for p in parameters) / 1e6, 2) == millions

    base = structure.known(generation)
    chosen = lcm_modules(base)
    shapes = [base.modules[name] for name in chosen]
    assert len(chosen) == modules
    assert round(sum(64 * (shape[0] + math.prod(shape[1:])) for shape in shapes) / 1e6, 2) == millions


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_module_has_one_name_in_a_kohya_file(generation: str) -> None:
    base = structure.known(generation)
    kohya = base.kohya
    assert kohya.keys() == base.modules.keys() | base.projections.keys()
    assert len(set(kohya.values())) == len(kohya)
    assert {name.split("_")[1] for name in kohya.values()} == (
        {"unet", "te1", "te2"} if generation == "sdxl" else {"unet", "te"}
    )


def test_the_names_that_sd_scripts_writes() -> None:
    """As in files made by sd-scripts; SDXL's names by its own UNet code."""
    sd1, sdxl = structure.known("sd1").kohya, structure.known("sdxl").kohya
    block = "transformer_blocks.0.attn1.to_out.0"
    assert sd1[f"unet.down_blocks.0.attentions.1.{block}"] == (
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"
    )
    assert sd1["unet.up_blocks.0.upsamplers.0.conv"] == "lora_unet_up_blocks_0_upsamplers_0_conv"
    wanted = {
        "unet.down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
        "unet.down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
        "unet.down_blocks.0.resnets.1.conv2": "input_blocks_2_0_out_layers_3",
        "unet.down_blocks.0.resnets.1.time_emb_proj": "input_blocks_2_0_emb_layers_1",
        "unet.down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        "unet.down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "unet.up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "unet.up_blocks.2.resnets.2.conv1": "output_blocks_8_0_in_layers_2",
        "unet.mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
        "unet.add_embedding.linear_1": "label_emb_0_0",
        "unet.time_embedding.linear_2": "time_embed_2",
        "unet.conv_in": "input_blocks_0_0",
        "unet.conv_out": "out_2",
    }
    assert {name: sdxl[name] for name in wanted} == {k: f"lora_unet_{v}" for k, v in wanted.items()}
    layer = "text_model.encoder.layers.3.self_attn.q_proj"
    joined = "text_model_encoder_layers_3_self_attn_q_proj"
    assert sd1[f"text_encoder.{layer}"] == f"lora_te_{joined}"
    assert sdxl[f"text_encoder.{layer}"] == f"lora_te1_{joined}"
    assert sdxl[f"text_encoder_2.{layer}"] == f"lora_te2_{joined}"


def test_a_module_without_a_name_or_with_anothers_is_refused() -> None:
    with pytest.raises(UserError, match="a base of Stable Diffusion 1.x and 2.x has no text_encoder_2"):
        names.kohya_names(["text_encoder_2.text_model.encoder.layers.0.mlp.fc1"], FAMILIES["sd"])
    with pytest.raises(UserError, match="has no name for it"):
        names.kohya_names(["unet.somewhere.else"], FAMILIES["sdxl"])
    with pytest.raises(UserError, match=r"unet\.a\.b and unet\.a_b would share a name"):
        names.kohya_names(["unet.a.b", "unet.a_b"], FAMILIES["sd"])


@pytest.mark.parametrize(
    "prefix",
    ["lora_te{}_text_model_encoder_layers_{}_mlp_fc1", "text_encoder{}.text_model.encoder.layers.{}.mlp.fc1"],
)
def test_each_text_encoder_of_sdxl_is_found_by_its_own_prefix(prefix: str) -> None:
    """The second has 32 layers, the first 12: a mix-up would find no module, or the other encoder's."""
    find = Speller(structure.known("sdxl")).find
    first, second = ("1", "2") if prefix.startswith("lora_te") else ("", "_2")
    for number, part, layer in ((first, "", 0), (second, "_2", 0), (second, "_2", 31)):
        place = find(prefix.format(number, layer))
        assert place is not None
        assert place.name == f"text_encoder{part}.text_model.encoder.layers.{layer}.mlp.fc1"
    assert find(prefix.format(first, 31)) is None


def test_a_file_with_fewer_modules_than_its_header_counts_is_not_whole(tmp_path: Path) -> None:
    place = structure.of_base("asset:tiny-sd")
    lora = random_lora(place, lcm_modules(place)[:6])
    tensors = kohya_format.tensors(lora, place)
    for counted, problems in (("5", 0), ("6", 0), ("7", 1)):
        save_file(tensors, tmp_path / "lora.safetensors", {"lcm_kit.modules": counted})
        found = reading.read(tmp_path / "lora.safetensors", place).problems
        assert len(found) == problems
    assert "it holds 6 of the 7 modules that its header counts" in found[0]
