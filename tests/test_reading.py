"""Files broken in each public way are read back as what they were; what cannot be repaired is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_kit.errors import UserError
from lcm_kit.lora import reading, structure
from lcm_kit.lora.layers import Layer, Lora
from tests import broken
from tests.loras import lcm_modules, random_lora, text_modules

_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


def same(a: Lora, b: Lora) -> bool:
    return a.layers.keys() == b.layers.keys() and all(
        x.alpha == y.alpha and torch.equal(x.down, y.down) and torch.equal(x.up, y.up)
        for x, y in ((a.layers[name], b.layers[name]) for name in a.layers)
    )


@pytest.fixture(scope="module")
def base(sdxl_base: Path) -> structure.Structure:
    return structure.of_base(str(sdxl_base))


# (how it is broken, alpha must be given, words that tell of it)
CASES = [
    (broken.peft_wrapper, True, "base_model.model"),
    (broken.mixed_styles, True, "mixed key styles: 560 in lora.down/up style, 228 in peft style"),
    (broken.attention_processors, True, "560 modules carry `.processor`"),
    (broken.processors_without_prefix, True, "560 modules carry `.processor`"),
    (broken.lora_down_up, True, "lora.down/up style"),
    (broken.named_adapter, True, "base_model.model"),
    (broken.kohya_diffusers_spelling, False, "788 modules in kohya style"),
    (broken.kohya_two_spellings, False, "two spellings: 722 modules in the original (sgm) one, 66 in diff"),
    (broken.kohya_without_alphas, False, "788 layers without alpha: taken from ss_network_alpha"),
    (broken.kohya_with_peft_header, False, "in one file, which diffusers refuses"),
    (broken.sgm_with_dots, False, "original (sgm) spelling"),
]


@pytest.mark.parametrize(
    ("breaker", "alpha", "words"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_broken_files_come_back_as_they_were(
    base: structure.Structure, tmp_path: Path, breaker: broken.Breaker, alpha: bool, words: str
) -> None:
    modules = lcm_modules(base)
    if "processors" in breaker.__name__:
        modules = [name for name in modules if name.endswith(_ATTENTION)]
    if breaker is broken.lora_down_up:
        modules += text_modules(base)
    original = random_lora(base, modules, alphas=(10.0,))
    file = broken.save(tmp_path / "broken.safetensors", breaker(original, base))
    read = reading.read(file, base, alpha=10.0 if alpha else None)
    assert same(read.lora, original)
    assert read.problems == () and read.lacks_alpha == 0
    assert any(words in finding for finding in read.findings), read.findings
    if alpha:  # without being told, the rank is what every app would take, and the file is said to lack it
        untold = reading.read(file, base)
        assert untold.lacks_alpha == len(modules)
        assert {layer.scale for layer in untold.lora.layers.values()} == {1.0}


@pytest.mark.parametrize("generation", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("breaker", [broken.peft_wrapper, broken.kohya_diffusers_spelling])
def test_the_base_is_told_from_the_file(tmp_path: Path, generation: Any, breaker: broken.Breaker) -> None:
    real = structure.known(generation)
    original = random_lora(real, lcm_modules(real)[:40], ranks=(1,), alphas=(1.0,))
    read = reading.read(broken.save(tmp_path / "a.safetensors", breaker(original, real)))
    assert read.structure.generation.name == generation
    assert same(read.lora, original) and read.problems == ()


def test_diffusers_own_writer_is_read(base: structure.Structure, tmp_path: Path) -> None:
    """Mixed ranks and alphas and both text encoders, as diffusers saves them with their metadata."""
    from diffusers import StableDiffusionXLPipeline

    modules = lcm_modules(base) + text_modules(base)
    original = random_lora(base, modules, ranks=(4, 2), alphas=(8.0, 3.0, 1.0))
    layers: dict[str, dict[str, Any]] = {part: {} for part in original.parts()}
    config: dict[str, dict[str, Any]] = {}
    for name, layer in original.layers.items():
        part, _, module = name.partition(".")
        layers[part] |= {f"{module}.lora_A.weight": layer.down, f"{module}.lora_B.weight": layer.up}
        told = config.setdefault(part, {"r": 4, "lora_alpha": 8.0, "alpha_pattern": {}, "rank_pattern": {}})
        told["alpha_pattern"] |= {module: layer.alpha}
        told["rank_pattern"] |= {module: layer.rank}
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"],
        text_encoder_2_lora_layers=layers["text_encoder_2"], unet_lora_adapter_metadata=config["unet"],
        text_encoder_lora_adapter_metadata=config["text_encoder"],
        text_encoder_2_lora_adapter_metadata=config["text_encoder_2"],
    )  # fmt: skip
    read = reading.read(tmp_path / "pytorch_lora_weights.safetensors", base)
    assert same(read.lora, original)
    assert read.problems == () and read.findings == (f"{len(modules)} modules in peft style",)


def test_rank_stabilised_loras_keep_their_strength(base: structure.Structure, tmp_path: Path) -> None:
    """peft's use_rslora: alpha / sqrt(rank) instead of alpha / rank."""
    original = random_lora(base, lcm_modules(base)[:2], ranks=(4,))
    tensors, _ = broken.peft_wrapper(original, base)
    told = json.dumps({"unet.r": 4, "unet.lora_alpha": 6.0, "unet.use_rslora": True})
    file = broken.save(tmp_path / "a.safetensors", (tensors, {"lora_adapter_metadata": told}))
    read = reading.read(file, base)
    assert {layer.scale for layer in read.lora.layers.values()} == {6.0 / 2.0}


def test_locons_third_factor_is_folded(base: structure.Structure, tmp_path: Path) -> None:
    """up (mid (down x)) as three convolutions equals up (down' x) as two."""
    name = next(n for n in lcm_modules(base) if n.endswith("conv1"))
    out, inner, height, width = base.modules[name]
    torch.manual_seed(0)
    down, mid, up = torch.randn(3, inner, 1, 1), torch.randn(3, 3, height, width), torch.randn(out, 3, 1, 1)
    key = base.kohya[name]
    tensors = {
        f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(6.0),
    }  # fmt: skip
    layer = reading.read(broken.save(tmp_path / "a.safetensors", (tensors, {})), base).lora.layers[name]
    conv = torch.nn.functional.conv2d
    x = torch.randn(1, inner, 5, 5)
    wanted = 2.0 * conv(conv(conv(x, down), mid, padding=1), up)
    torch.testing.assert_close(conv(x, layer.delta(), padding=1), wanted, rtol=1e-4, atol=1e-4)


def test_linear_and_1x1_convolution_are_one(tmp_path: Path, real_sd_base: Path) -> None:
    """SD1.5's proj_in is a 1x1 convolution; some trainers store a linear layer's shape for it."""
    base = structure.of_base(str(real_sd_base))
    original = random_lora(base, [name for name in lcm_modules(base) if name.endswith("proj_in")])
    flat = Lora({n: Layer(x.down.flatten(1), x.up.flatten(1), x.alpha) for n, x in original.layers.items()})
    read = reading.read(
        broken.save(tmp_path / "a.safetensors", broken.kohya_diffusers_spelling(flat, base)), base
    )
    assert same(read.lora, original)
    assert any("another shape" in finding for finding in read.findings)


def damaged(base: structure.Structure, tmp_path: Path, change: Any) -> reading.Reading:
    original = random_lora(base, lcm_modules(base)[:6])
    file = broken.save(tmp_path / "a.safetensors", broken.kohya_diffusers_spelling(original, base))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return reading.read(file, base)


def lose_half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in tensors if key.endswith("lora_up.weight"))]


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(key for key in tensors if key.endswith("lora_up.weight"))][0] = float("nan")


def wrong_width(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if key.endswith("lora_down.weight"))
    tensors[key] = torch.zeros(4, 3, 1, 1)


def other_rank(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if key.endswith("lora_down.weight"))
    tensors[key] = tensors[key][:3].contiguous()


def stranger(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lora_unet_nowhere.lora_up.weight"] = torch.zeros(4, 4)


def dora(tensors: dict[str, torch.Tensor]) -> None:
    key = next(iter(tensors)).rpartition(".lora")[0]
    tensors[f"{key}.dora_scale"] = torch.zeros(4, 1)


def twice(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key.replace("down_blocks_0_resnets_0_conv1", "input_blocks_1_0_in_layers_2")] = tensors[key] + 1


@pytest.mark.parametrize(
    ("change", "words", "layers"),
    [
        (lose_half, "has only alpha and down", 5),
        (not_a_number, "1 tensors hold NaN or Inf, such as lora_unet_", 6),
        (wrong_width, "do not fit", 5),
        (other_rank, "do not fit", 5),
        (stranger, "1 keys belong to no module of .*, such as lora_unet_nowhere", 6),
        (dora, r"1 keys \(DoRA\) belong to no module", 6),
        (twice, "is there twice, with different weights", 6),
    ],
)
def test_what_cannot_be_mended_is_said(
    base: structure.Structure, tmp_path: Path, change: Any, words: str, layers: int
) -> None:
    import re

    read = damaged(base, tmp_path, change)
    assert len(read.problems) == 1 and re.search(words, read.problems[0]), read.problems
    assert len(read.lora.layers) == layers


def test_files_that_are_no_lora(tmp_path: Path) -> None:
    save_file({"model.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds no LoRA \(its first key is 'model.weight'\)"):
        reading.read(tmp_path / "model.safetensors")
    save_file({"lora_unet_x.oft_diag": torch.zeros(2)}, tmp_path / "oft.safetensors")
    with pytest.raises(UserError, match=r"holds no LoRA \(but OFT\)"):
        reading.read(tmp_path / "oft.safetensors")
    save_file({"lora_unet_x.hada_w1_a": torch.zeros(2)}, tmp_path / "loha.safetensors")
    with pytest.raises(UserError, match="fits none of SD1.x, SD2.x and SDXL"):
        reading.read(tmp_path / "loha.safetensors")


# One or two keys of each model as its trainers spell them, and the name that the sentence must have
FOREIGN = [
    ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
    ("lora_unet_single_blocks_3_linear1.lora_down.weight", "Flux"),
    ("transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight", "Flux"),
    ("diffusion_model.double_blocks.0.img_mlp.fc1.lora_A.weight", "HunyuanVideo"),
    ("lora_unet_single_blocks_3_modulation_linear.lora_down.weight", "HunyuanVideo"),
    ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "Stable Diffusion 3"),
    ("transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight", "Flux or Stable Diffusion 3"),
    ("transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight", "Qwen-Image"),
    ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "Wan"),
    ("lora_unet_blocks_11_cross_attn_k.lora_down.weight", "Wan"),
    ("transformer.blocks.0.attn1.to_q.lora_A.weight", "Wan"),
    ("net.blocks.0.adaln_modulation_self_attn.1.lora_A.weight", "Cosmos"),
    ("diffusion_model.layers.0.attention.qkv.lora_A.weight", "Lumina or Z-Image"),
    ("lora_prior_unet_down_blocks_0_1_channelwise_0.lora_down.weight", "Stable Cascade"),
    ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight", "a T5 text encoder"),
    ("transformer.something_new.lora_A.weight", "a video or image transformer"),
]


@pytest.mark.parametrize(("key", "model"), FOREIGN, ids=[key[:40] for key, _ in FOREIGN])
def test_loras_of_other_models_are_named(tmp_path: Path, key: str, model: str) -> None:
    """Also beside layers of CLIP, which SD1.x has as well, and with a base given."""
    sd1 = structure.known("sd1")
    clip = sd1.kohya[text_modules(sd1)[0]].replace("lora_te_", "lora_te1_")
    tensors = {key: torch.zeros(2, 8), f"{clip}.lora_down.weight": torch.zeros(2, 768)}
    save_file(tensors, tmp_path / "a.safetensors")
    for place in (None, sd1):
        with pytest.raises(UserError, match=f"is a LoRA of .*{model}.*, which fits none of SD1.x, SD2.x and"):
            reading.read(tmp_path / "a.safetensors", place)


def test_a_header_names_another_model(tmp_path: Path) -> None:
    save_file(
        {"x.lora_A.weight": torch.zeros(2, 8)},
        tmp_path / "a.safetensors",
        metadata={"modelspec.architecture": "flux-1-dev/lora"},
    )
    with pytest.raises(UserError, match="is a LoRA of Flux"):
        reading.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("generation", ["sd1", "sd2", "sdxl"])
def test_no_key_of_stable_diffusion_is_taken_for_another_model(generation: Any) -> None:
    from lcm_kit.lora import foreign

    place = structure.known(generation)
    unet = [f"unet.{name}" for name in place.unet]
    spelled = [f"diffusion_model.{name}" for name in place.sgm.values()]
    joined = [f"lora_unet_{name.replace('.', '_')}" for name in (*place.unet, *place.sgm.values())]
    for key in (*unet, *spelled, *joined, *place.modules, *place.norms, *place.kohya.values(), *place.unet):
        for wrapped in (key, f"base_model.model.{key}"):
            assert foreign.model_of([f"{wrapped}.lora_A.weight"], {}) is None, wrapped
