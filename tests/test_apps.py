"""What the apps load: whole kohya files at exact strengths, and every known failure with its exact count.

The rules of the first four were also held against the apps' own functions on 1,000 random files.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lcm_kit.lora import structure
from lcm_kit.lora.apps import APPS, WHOLE
from lcm_kit.lora.apps.comfyui import unet_to_diffusers
from lcm_kit.lora.apps.invokeai import walk
from tests.app_files import (
    GENERATIONS,
    UPSAMPLER,
    everything,
    in_diffusers_spelling,
    of,
    peft,
    refusal,
    strengths,
)
from tests.loras import lcm_modules, text_modules


@pytest.mark.parametrize("app", WHOLE)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_kohya_file_is_loaded_whole(app: str, generation: Any) -> None:
    """The LCM modules, with the text encoders, and all modules there are; mixed ranks, alpha beside rank."""
    base = structure.known(generation)
    counts = {"sd1": (278, 350, 354), "sd2": (278, 416, 420), "sdxl": (788, 1052, 1058)}[generation]
    assert len(set(strengths(base).values())) == 6
    for count, names in zip(counts, (lcm_modules(base), everything(base), list(base.modules)), strict=True):
        backwards = dict(reversed(of(base, names).items()))
        assert APPS[app](backwards, base) == (strengths(base, names), [], None, {})
        assert len(names) == count


@pytest.mark.parametrize("app", [*WHOLE, "sd.cpp"])
def test_without_alphas_the_strength_is_one_and_locons_third_factor_is_used(app: str) -> None:
    base = structure.known("sd1")
    mid = {f"{base.kohya['unet.mid_block.resnets.0.conv1']}.lora_mid.weight": torch.ones(4, 4, 3, 3)}
    assert APPS[app](of(base, alphas=()) | mid, base) == (dict.fromkeys(strengths(base), 1.0), [], None, {})


def test_a1111_loses_the_first_upsampler_of_sdxl_in_diffusers_spelling() -> None:
    """Its rule puts it at output_blocks.2.1, where SDXL has an attention; it finds the second one at 5.2."""
    base = structure.known("sdxl")
    file = of(base, spell=in_diffusers_spelling(base))
    wanted = strengths(base)
    for app in ("comfyui", "forge", "invokeai"):
        assert APPS[app](file, base) == (wanted, [], None, {})
    loaded = APPS["a1111"](file, base)
    assert loaded.refused is None
    assert loaded.modules == {name: value for name, value in wanted.items() if name != UPSAMPLER}
    key = "lora_unet_up_blocks_0_upsamplers_0_conv"
    assert loaded.unmatched == [f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"]


@pytest.mark.parametrize("generation", ["sd1", "sd2"])
def test_the_original_spelling_of_sd_is_nothing_to_invokeai(generation: Any) -> None:
    """The three others take it; InvokeAI is left with the text encoder."""
    base = structure.known(generation)

    def spell(name: str) -> str:
        module = base.sgm.get(name.removeprefix("unet."))
        return f"lora_unet_{module.replace('.', '_')}" if module else base.kohya[name]

    file = of(base, spell=spell)
    for app in ("comfyui", "a1111", "forge"):
        assert APPS[app](file, base) == (strengths(base), [], None, {})
    loaded = APPS["invokeai"](file, base)
    assert loaded.modules.keys() == set(text_modules(base))
    assert len(loaded.unmatched) == 3 * 278


def test_invokeai_refuses_mixed_spellings() -> None:
    base = structure.known("sdxl")
    other, odd = in_diffusers_spelling(base), "unet.mid_block.attentions.0.proj_in"
    file = of(base, spell=lambda name: other(name) if name == odd else base.kohya[name])
    for app in ("comfyui", "a1111", "forge"):
        assert APPS[app](file, base) == (strengths(base), [], None, {})
    words = "2361 of its UNet keys are in the original spelling, but 3 are not"
    assert refusal("invokeai", file, base) == words


@pytest.mark.parametrize(("generation", "attention"), [("sd1", 16 * 8), ("sd2", 16 * 8), ("sdxl", 70 * 8)])
def test_peft_keys(generation: Any, attention: int) -> None:
    """ComfyUI knows them but for the attention's (eight to a transformer block), and never their alpha."""
    base = structure.known(generation)
    file = peft(base)
    rest = {name for name in everything(base) if ".to_" not in name}
    assert len(rest) == len(everything(base)) - attention

    loaded = APPS["comfyui"](file, base)
    assert (loaded.modules, loaded.refused) == (dict.fromkeys(rest, 1.0), None)
    assert len(loaded.unmatched) == 2 * attention
    assert APPS["a1111"](file, base) == ({}, list(file), None, {})

    assert f"{2 * attention} of {len(file)} keys match nothing" in refusal("forge", file, base)
    assert "finds no layer by which it tells a base" in refusal("invokeai", file, base)
    small = dataclasses.replace(base, unet_config={**base.unet_config, "cross_attention_dim": 32})
    words = "must start with lora_unet_, " if generation == "sdxl" else "does not know the format of unet."
    assert words in refusal("invokeai", file, small)


def test_forge_forgives_twelve_keys() -> None:
    base = structure.known("sd1")
    conv = [name for name in lcm_modules(base) if name.endswith("conv1")]
    query = [name for name in lcm_modules(base) if name.endswith("to_q")]
    file = peft(base, conv + query[:6]) | {"lora_unet_conv_in.alpha": torch.tensor(1.0)}  # it knows that one
    assert APPS["forge"](file, base).modules == dict.fromkeys(conv, 1.0)
    file |= {"what.ever": torch.tensor(1.0)}
    assert "13 of 58 keys match nothing" in refusal("forge", file, base)
    assert APPS["comfyui"](file, base).modules == dict.fromkeys(conv, 1.0)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_attention_processors_of_old_diffusers(generation: Any) -> None:
    base = structure.known(generation)
    names = [name for name in base.modules if ".to_" in name]

    def spell(name: str) -> str:
        return name.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")

    file = of(base, names, spell, ("_lora.down.weight", "_lora.up.weight"), ())
    for app in ("comfyui", "forge"):
        assert APPS[app](file, base) == (dict.fromkeys(names, 1.0), [], None, {})
    assert APPS["a1111"](file, base).modules == {}


def test_a1111_forgets_the_alpha_of_peft_endings() -> None:
    base = structure.known("sd1")
    file = of(base, ends=(".lora_A.weight", ".lora_B.weight"))
    assert APPS["comfyui"](file, base).modules == strengths(base)
    loaded = APPS["a1111"](file, base)
    assert loaded.modules == dict.fromkeys(strengths(base), 1.0)
    assert len(loaded.unmatched) == 350


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_layer_without_up(generation: Any) -> None:
    base = structure.known(generation)
    file, lost = of(base), "unet.mid_block.resnets.0.conv1"
    key = base.kohya[lost]
    del file[f"{key}.lora_up.weight"]
    rest = {name: value for name, value in strengths(base).items() if name != lost}
    for app in ("comfyui", "forge"):
        assert APPS[app](file, base) == (rest, [f"{key}.lora_down.weight", f"{key}.alpha"], None, {})
    assert APPS["a1111"](file, base).refused == (
        f"it stops at {key}.lora_down.weight, whose layer lacks a part that it needs"
    )
    assert "does not know the format of lora_unet_mid" in refusal("invokeai", file, base)


@pytest.mark.parametrize("app", APPS)
def test_a_layer_without_down(app: str) -> None:
    """It stops the first four; the others pass it over."""
    base = structure.known("sd1")
    file, lost = of(base), "unet.mid_block.resnets.0.conv1"
    del file[f"{base.kohya[lost]}.lora_down.weight"]
    if app in ("comfyui", "a1111", "forge", "invokeai"):
        assert "it " in refusal(app, file, base)
    else:
        rest = {name: value for name, value in strengths(base).items() if name != lost}
        assert APPS[app](file, base).modules == rest


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_layer_that_belongs_nowhere(generation: Any) -> None:
    base = structure.known(generation)
    file = of(base)
    stray = {f"lora_unet_nowhere.{end}": torch.ones(4, 4) for end in ("lora_down.weight", "lora_up.weight")}
    for app, loads in APPS.items():
        loaded = loads(file | stray, base)
        if app == "invokeai" and generation == "sdxl":  # what it cannot convert counts as the other spelling
            assert "original spelling, but 2 are not" in (loaded.refused or "")
        elif (app, generation) != ("sd.cpp", "sd2"):
            assert loaded == (strengths(base), list(stray), None, {})


def test_a_foreign_key() -> None:
    base = structure.known("sdxl")
    file = of(base) | {"vae.x": torch.ones(1)}
    for app in ("comfyui", "a1111", "forge"):
        assert APPS[app](file, base) == (strengths(base), ["vae.x"], None, {})
    assert "must start with lora_unet_, lora_te1_, lora_te2_" in refusal("invokeai", file, base)
    base = structure.known("sd1")
    assert "format of vae.x" in refusal("invokeai", of(base) | {"vae.x": torch.ones(1)}, base)
    assert "cannot take the key 'x'" in refusal("invokeai", of(base) | {"x": torch.ones(1)}, base)


def test_a_name_that_is_a_block_stops_a1111_and_invokeai() -> None:
    base = structure.known("sd1")
    for app, block in (("a1111", "middle_block"), ("invokeai", "mid_block")):
        key = f"lora_unet_{block}.lora"
        file = of(base) | {f"{key}_down.weight": torch.ones(4, 4), f"{key}_up.weight": torch.ones(4, 4)}
        assert f"it stops at lora_unet_{block}" in refusal(app, file, base)
        assert APPS["comfyui"](file, base).modules == strengths(base)


@pytest.mark.parametrize("app", APPS)
def test_odd_shapes_are_refused_and_not_a_crash(app: str) -> None:
    base = structure.known("sd1")
    key = base.kohya["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    for odd in ({f"{key}.lora_down.weight": torch.tensor(1.0)}, {f"{key}.alpha": torch.ones(4)}):
        assert f"it stops at {key}.lora_down.weight" in refusal(app, of(base) | odd, base)


@pytest.mark.parametrize(("generation", "part"), [("sd2", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_a1111_wants_whole_attentions_of_openclip(generation: Any, part: str) -> None:
    """Without one of q, k, v and out the three others do nothing; the other encoders do not mind."""
    base = structure.known(generation)
    place = f"{part}.text_model.encoder.layers.3.self_attn"
    names = [name for name in everything(base) if name != f"{place}.k_proj"]
    loaded = APPS["a1111"](of(base, names), base)
    lost = {f"{place}.{end}_proj" for end in ("q", "v", "out")}
    assert strengths(base, names).keys() - loaded.modules.keys() == lost
    assert len(loaded.unmatched) == 9
    assert APPS["comfyui"](of(base, names), base).modules == strengths(base, names)

    first = structure.known("sd1" if generation == "sd2" else "sdxl")
    names = [name for name in everything(first) if name != place.replace("_2", "") + ".k_proj"]
    assert APPS["a1111"](of(first, names), first).modules == strengths(first, names)


def test_the_first_of_two_text_encoders_in_a_base_with_one() -> None:
    """`lora_te1_` on SD: nothing to InvokeAI, SD.Next and sd-scripts, and to A1111 with SD2.x."""
    lacking = set()
    for generation in ("sd1", "sd2"):
        base = structure.known(generation)
        file = of(base, spell=lambda name: base.kohya[name].replace("lora_te_", "lora_te1_"))  # noqa: B023
        for app in (*WHOLE, "sd-scripts"):
            missing = strengths(base).keys() - APPS[app](file, base).modules.keys()
            assert missing in (set(), set(text_modules(base)))
            lacking |= {(generation, app)} if missing else set()
    both = {
        (generation, app) for generation in ("sd1", "sd2") for app in ("invokeai", "sdnext", "sd-scripts")
    }
    assert lacking == both | {("sd2", "a1111")}


@pytest.mark.parametrize(
    ("generation", "ending", "reason"),
    [
        ("sd1", "attn2.to_k", None),
        ("sd1", "attn1.to_k", "finds no layer by which it tells a base"),
        ("sd1", "conv1", "finds no layer by which it tells a base"),
        ("sd1", "time_emb_proj", "takes the file for a LoRA of SDXL"),  # 1280 wide in all bases
        ("sd2", "attn2.to_v", None),
        ("sd2", "time_emb_proj", "takes the file for a LoRA of SDXL"),
        ("sdxl", "attn2.to_k", None),
        ("sdxl", "attn1.to_k", None),  # by its attentions of ten transformer blocks
        ("sdxl", "time_emb_proj", "finds no layer by which it tells a base"),  # emb_layers in a kohya file
    ],
)
def test_a_lora_of_some_modules(generation: Any, ending: str, reason: str | None) -> None:
    base = structure.known(generation)
    names = [name for name in base.modules if name.endswith(ending)]
    loaded = APPS["invokeai"](of(base, names), base)
    assert (loaded.refused is None) == (reason is None)
    assert loaded.modules == ({} if reason else strengths(base, names))
    assert (reason or "") in (loaded.refused or "")
    for app in ("comfyui", "a1111", "forge"):
        assert APPS[app](of(base, names), base) == (strengths(base, names), [], None, {})


def test_a_lora_of_text_encoders_alone() -> None:
    """InvokeAI knows SDXL by the sum of both widths, and forgets the first when it reads the up behind it."""
    base = structure.known("sdxl")
    text = text_modules(base)
    first = [name for name in text if name.startswith("text_encoder.")]
    assert "Flux" in refusal("invokeai", of(base, first), base)
    assert "finds no layer by which it tells a base" in refusal("invokeai", of(base, text), base)
    for app in ("comfyui", "a1111", "forge", "sdnext", "sd-scripts", "sd.cpp"):
        assert APPS[app](of(base, text), base) == (strengths(base, text), [], None, {})
    for generation in ("sd1", "sd2"):
        base = structure.known(generation)
        text = text_modules(base)
        assert APPS["invokeai"](of(base, text), base).modules == strengths(base, text)


def test_a_lora_of_another_generation() -> None:
    one, two = structure.known("sd1"), structure.known("sd2")
    assert APPS["invokeai"](of(one), two).refused == "it takes the file for a LoRA of SD1.x"
    assert APPS["invokeai"](of(two), one).refused == "it takes the file for a LoRA of SD2.x"


@pytest.mark.parametrize("generation", GENERATIONS)
def test_comfyuis_arithmetic_gives_the_original_spelling(generation: Any) -> None:
    """`structure.sgm` is tested against diffusers' own converter."""
    base = structure.known(generation)
    table = unet_to_diffusers(base.unet)
    assert {name: table[name] for name in base.unet} == base.sgm


@pytest.mark.parametrize("generation", GENERATIONS)
def test_invokeais_search_in_the_real_unet(generation: Any) -> None:
    """Norms, activations and whatever else there is in it do not lead the search astray."""
    base = structure.known(generation)
    tree: dict[str, Any] = {}
    for name, _ in structure.empty_unet(base.unet_config).named_modules():
        node = tree
        for word in filter(None, name.split(".")):
            node = node.setdefault(word, {})
    assert [walk(tree, name.replace(".", "_")) for name in base.unet] == list(base.unet)
    assert walk(tree, "mid_block_attentions_7_proj_in") is None
