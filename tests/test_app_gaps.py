"""The newer apps, a pruned base, and what a file may hold beside a LoRA.

The counts of `test_the_counts_of_the_apps_themselves` were measured in the apps' own loaders.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lcm_kit.lora import structure
from lcm_kit.lora.apps import APPS, able
from lcm_kit.lora.structure import Structure
from tests.app_files import GENERATIONS, UPSAMPLER, in_diffusers_spelling, of, peft, refusal, strengths
from tests.loras import lcm_modules, text_modules


def trial(base: Structure) -> list[str]:
    """The LCM modules, and two layers of each text encoder."""
    return lcm_modules(base) + [
        n for n in text_modules(base) if n.partition("layers.")[2][:2] in ("0.", "1.")
    ]


@pytest.mark.parametrize(
    ("name", "count", "diffusers_style"),
    [("sd1", 290, 162), ("sd2", 290, 162), ("sdxl", 812, 252), ("ssd1b", 447, None)],
)
def test_the_counts_of_the_apps_themselves(name: Any, count: int, diffusers_style: int | None) -> None:
    """Of the kohya file all, and at its strength, but for what stable-diffusion.cpp drops of SD2.x; of the
    diffusers-style file ComfyUI's part, stable-diffusion.cpp's whole UNet, and nothing in the five others.
    """
    base = structure.known(name)
    wanted = strengths(base, trial(base))
    assert len(wanted) == count
    for app in able(base):
        loaded = APPS[app](of(base, trial(base)), base)
        lost = 2 * 3 if (name, app) == ("sd2", "sd.cpp") else 0  # q, k, v of two layers
        assert (loaded.refused, loaded.remarks) == (None, {})
        assert len(loaded.modules) == count - lost and loaded.modules.items() <= wanted.items()
    file = peft(base, trial(base))
    for app in able(base):
        loaded = APPS[app](file, base)
        assert set(loaded.modules.values()) <= {1.0}  # alpha = rank: the header is not read
        if app == "comfyui":
            assert diffusers_style is None or len(loaded.modules) == diffusers_style
        elif app == "sd.cpp":
            assert loaded.modules.keys() == set(lcm_modules(base))
        else:
            assert loaded.modules == {}
            assert (loaded.refused is not None) == (app in ("forge", "invokeai"))


def test_which_apps_can_load_a_base() -> None:
    """sd-scripts has one SDXL, of full size; no app but diffusers has a UNet of other blocks."""
    assert all(able(structure.known(generation)) == tuple(APPS) for generation in GENERATIONS)
    assert able(structure.known("ssd1b")) == tuple(app for app in APPS if app != "sd-scripts")
    assert structure.known("ssd1b").blocks.name == "ssd1b"
    sdxl = structure.known("sdxl")
    fewer = {name: shape for name, shape in sdxl.modules.items() if "mid_block.attentions" not in name}
    assert able(dataclasses.replace(sdxl, modules=fewer)) == ()


@pytest.mark.parametrize(("generation", "outside"), [("sd1", 4), ("sd2", 4), ("sdxl", 6)])
def test_what_sd_scripts_and_stable_diffusion_cpp_lack(generation: Any, outside: int) -> None:
    """sd-scripts: layers outside of the blocks. stable-diffusion.cpp: names with an underscore that it takes
    for a dot, and q, k and v of SD2.x.
    """
    base = structure.known(generation)
    names = list(base.modules)
    ends = {n for n in base.modules if n.startswith(("unet.conv_", "unet.time_embed", "unet.add_embed"))}
    assert len(ends) == outside
    assert strengths(base, names).keys() - APPS["sd-scripts"](of(base, names), base).modules.keys() == ends
    lost = {n for n in base.modules if generation == "sd2" and n.endswith(("q_proj", "k_proj", "v_proj"))}
    embeddings = {n for n in ends if "embedding" in n}
    in_the_file = ends if generation != "sdxl" else embeddings  # diffusers' conv_in is none of its names
    found = APPS["sd.cpp"](of(base, names), base).modules
    assert strengths(base, names).keys() - found.keys() == lost | in_the_file
    assert len(lost) == (69 if generation == "sd2" else 0)


def test_half_converted_sdxl_in_the_newer_apps() -> None:
    """All of it in SD.Next, sd-scripts and stable-diffusion.cpp; in one spelling too."""
    base = structure.known("sdxl")
    other = in_diffusers_spelling(base)
    for spell in (lambda n: base.kohya[n] if ".attentions." in n else other(n), other):
        for app in ("sdnext", "sd-scripts", "sd.cpp"):
            assert APPS[app](of(base, spell=spell), base) == (strengths(base), [], None, {}), app


def test_sd_next_loses_sd1s_first_upsampler_in_the_original_spelling() -> None:
    """Its table is SDXL's, which has an attention at output_blocks.2.1."""
    base = structure.known("sd1")
    file = of(base, lcm_modules(base), lambda n: f"lora_unet_{base.sgm[n[5:]].replace('.', '_')}")
    wanted = strengths(base, lcm_modules(base))
    assert wanted.keys() - APPS["sdnext"](file, base).modules.keys() == {UPSAMPLER}
    assert APPS["sd.cpp"](file, base).modules == wanted
    assert APPS["sd-scripts"](file, base).modules == {}


def test_stable_diffusion_cpp_takes_nearly_every_style() -> None:
    base = structure.known("sd1")
    unet = lcm_modules(base)
    for ends in (
        (".lora.down.weight", ".lora.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora_A", ".lora_B"),
    ):
        for spell in (lambda n: n, lambda n: n[5:], lambda n: f"diffusion_model.{base.sgm[n[5:]]}"):
            assert APPS["sd.cpp"](of(base, unet, spell, ends), base) == (strengths(base, unet), [], None, {})
    attention = [name for name in unet if ".to_" in name]
    file = of(base, attention, lambda n: n.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out"))
    assert APPS["sd.cpp"](file, base).modules == strengths(base, attention)


def test_stable_diffusion_cpp_joins_the_second_encoders_attention_in_turn() -> None:
    """Without q it gets to neither k nor v; without v the two others stay."""
    base = structure.known("sdxl")
    place = "text_encoder_2.text_model.encoder.layers.3.self_attn"
    for absent, lost in (("q_proj", ("k_proj", "v_proj")), ("k_proj", ("v_proj",)), ("v_proj", ())):
        names = [name for name in text_modules(base) if name != f"{place}.{absent}"]
        missing = set(names) - APPS["sd.cpp"](of(base, names), base).modules.keys()
        assert missing == {f"{place}.{end}" for end in lost}


def test_sd_scripts_wants_its_own_shapes_and_takes_alpha_0_for_none() -> None:
    base = structure.known("sd1")
    key = base.kohya["unet.down_blocks.0.attentions.0.proj_in"]  # a 1x1 convolution
    flat = {f"{key}.lora_down.weight": torch.ones(4, 320), f"{key}.lora_up.weight": torch.ones(320, 4)}
    assert "lora_down.weight, which has another shape than its layer" in refusal("sd-scripts", flat, base)
    file = of(base, ["unet.mid_block.resnets.0.conv1"], alphas=(0.0,))
    for app in APPS:
        (found,) = APPS[app](file, base).modules.values() if app != "invokeai" else (0.0,)
        assert found == (1.0 if app == "sd-scripts" else 0.0)


def test_sd_scripts_leaves_out_what_is_no_down_and_no_up() -> None:
    base = structure.known("sd1")
    name = "unet.mid_block.resnets.0.conv1"
    file = of(base, [name]) | {f"{base.kohya[name]}.lora_mid.weight": torch.ones(4, 4, 3, 3)}
    loaded = APPS["sd-scripts"](file, base)
    assert loaded.modules == {name: 2.0} and "lora_mid" in loaded.remarks[name]


# -- Beside a LoRA -------------------------------------------------------------------------------------------


def test_a_bundled_embedding() -> None:
    """A1111 and SD.Next use it, InvokeAI strips it, Forge counts it among what it does not know."""
    base = structure.known("sdxl")
    bundle = {f"bundle_emb.brand.{k}": torch.ones(1, 768) for k in ("clip_l", "clip_g")}
    for app, loads in APPS.items():
        loaded = loads(of(base) | bundle, base)
        assert (loaded.modules, loaded.refused) == (strengths(base), None)
        assert loaded.unmatched == ([] if app in ("a1111", "sdnext") else list(bundle))
    many = {f"bundle_emb.{k}.clip_l": torch.ones(1, 768) for k in range(13)}
    assert "13 of" in refusal("forge", of(base) | many, base)
    assert APPS["invokeai"](of(base) | many, base).modules == strengths(base)


def test_a_scale_beats_alpha_in_three_apps() -> None:
    base = structure.known("sd1")
    names = trial(base)
    file = of(base, names) | {f"{base.kohya[name]}.scale": torch.tensor(0.3) for name in names}
    for app in APPS:
        found = APPS[app](file, base).modules
        if app in ("a1111", "sdnext", "sd.cpp"):
            assert found == pytest.approx(dict.fromkeys(names, 0.3))
        elif app == "forge":  # to which the other keys are too many that it does not know
            assert found == {}
        else:
            assert found == strengths(base, names)
