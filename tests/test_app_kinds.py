"""What the apps make of LoHa, LoKr, full differences, norms and DoRA: which modules, at which strength."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lcm_kit.lora import structure, verify
from lcm_kit.lora.apps import APPS, NOT_JUDGED
from lcm_kit.lora.apps.loaded import BASE_NORM, BY_INPUT, LEFT_OUT
from lcm_kit.lora.kinds import Dora
from lcm_kit.lora.layers import Layer
from lcm_kit.lora.structure import Structure
from tests.app_files import File, of, refusal, strengths
from tests.loras import lcm_modules

DORA = ("comfyui", "a1111", "forge", "invokeai", "sdnext")
ALPHA = 6.0


def loha(key: str, shape: tuple[int, ...], rank: int = 4) -> File:
    out, inner = shape[0], torch.Size(shape[1:]).numel()
    sizes = {"w1_a": (out, rank), "w1_b": (rank, inner), "w2_a": (out, rank), "w2_b": (rank, inner)}
    return {f"{key}.hada_{role}": torch.empty(size, device="meta") for role, size in sizes.items()}


def lokr(key: str, shape: tuple[int, ...], rank: int = 4) -> File:
    """The first factor whole and 2 x 2, the second thin: LyCORIS' default."""
    out, inner = shape[0] // 2, torch.Size(shape[1:]).numel() // 2
    sizes = {"w1": (2, 2), "w2_a": (out, rank), "w2_b": (rank, inner)}
    return {f"{key}.lokr_{role}": torch.empty(size, device="meta") for role, size in sizes.items()}


def made(base: Structure, names: list[str], one: Any) -> File:
    file: File = {}
    for name in names:
        key = base.kohya[name]
        file |= one(key, base.modules[name]) | {f"{key}.alpha": torch.tensor(ALPHA)}
    return file


@pytest.mark.parametrize("generation", ["sd1", "sdxl"])
@pytest.mark.parametrize("one", [loha, lokr])
def test_loha_and_lokr_are_loaded_whole_and_at_their_strength(generation: Any, one: Any) -> None:
    """alpha / rank, in all apps but sd-scripts; LoKr's in stable-diffusion.cpp was not tried."""
    base = structure.known(generation)
    names = lcm_modules(base)
    if one is lokr:  # both sizes of conv_in's weight are odd or small; those of the LCM modules are even
        assert all(not base.modules[name][0] % 2 for name in names)
        names = [name for name in names if not base.modules[name][1] % 2]
    file = made(base, names, one)
    for app in APPS:
        loaded = APPS[app](file, base)
        if app == "sd-scripts":
            assert (loaded.modules, loaded.refused) == ({}, None)
        elif app == "invokeai" and one is lokr and generation == "sd1":
            # it asks both factors for their width, and one that is thin tells it none
            assert "finds no layer by which it tells a base" in (loaded.refused or "")
        else:
            assert loaded.modules == dict.fromkeys(names, ALPHA / 4), (app, loaded.refused)
            judged = app != "sd.cpp" or one is loha
            assert set(loaded.remarks.values()) == (set() if judged else {NOT_JUDGED})
            assert loaded.unmatched == []


def test_lokr_of_whole_factors_has_no_rank_and_no_alpha_counts() -> None:
    base = structure.known("sd1")
    name = next(name for name in lcm_modules(base) if name.endswith("attn2.to_k"))
    key = base.kohya[name]
    file = {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(160, 384)}
    file[f"{key}.alpha"] = torch.tensor(ALPHA)
    for app in ("comfyui", "a1111", "forge", "invokeai", "sdnext"):
        assert APPS[app](file, base).modules == {name: 1.0}, app


def test_half_a_loha() -> None:
    """A factor is missing: the first four stop, SD.Next and stable-diffusion.cpp pass the layer over."""
    base = structure.known("sd1")
    names = [name for name in lcm_modules(base) if name.endswith("attn2.to_k")]
    file = made(base, names, loha)
    del file[f"{base.kohya[names[0]]}.hada_w2_b"]
    for app in ("comfyui", "a1111", "forge", "invokeai"):
        assert "it stops at" in refusal(app, file, base), app
    for app in ("sdnext", "sd.cpp"):
        assert APPS[app](file, base).modules == dict.fromkeys(names[1:], ALPHA / 4)


@pytest.mark.parametrize("generation", ["sd1", "sdxl"])
def test_full_differences(generation: Any) -> None:
    base = structure.known(generation)
    names = lcm_modules(base)
    file = {f"{base.kohya[name]}.diff": torch.empty(base.modules[name], device="meta") for name in names}
    for app in APPS:
        assert APPS[app](file, base).modules == (dict.fromkeys(names, 1.0) if app != "sd-scripts" else {})


NORMS = {
    "unet.down_blocks.0.resnets.0.norm1": "input_blocks_1_0_in_layers_0",
    "unet.mid_block.attentions.0.norm": "middle_block_1_norm",
    "unet.up_blocks.1.attentions.0.norm": "output_blocks_3_1_norm",
    "unet.mid_block.attentions.0.transformer_blocks.0.norm3": "middle_block_1_transformer_blocks_0_norm3",
}


@pytest.mark.parametrize("spelling", ["diffusers", "sgm"])
@pytest.mark.parametrize("bias", [False, True])
def test_norms(bias: bool, spelling: str) -> None:
    """Three apps take a norm's weight alone, A1111 and SD.Next want its bias too: the one stops, the other
    passes it over. sd-scripts and stable-diffusion.cpp know none.
    """
    base = structure.known("sdxl")
    rest = [name for name in lcm_modules(base) if ".attn2." in name]
    file, both = of(base, rest), {}
    for name, sgm in NORMS.items():
        key = sgm if spelling == "sgm" else name.removeprefix("unet.").replace(".", "_")
        both[f"lora_unet_{key}.w_norm"] = torch.empty(base.norms[name], device="meta")
        both |= {f"lora_unet_{key}.b_norm": torch.empty(base.norms[name], device="meta")} if bias else {}
    if spelling == "diffusers":
        file = of(base, rest, lambda n: f"lora_unet_{n.removeprefix('unet.').replace('.', '_')}")
    plain = strengths(base, rest)
    for app in APPS:
        loaded = APPS[app](file | both, base)
        if app == "a1111" and not bias:
            assert "whose layer lacks a part that it needs" in (loaded.refused or "")
        elif app in ("sd-scripts", "sd.cpp") or (app == "sdnext" and not bias):
            assert (loaded.modules, loaded.unmatched) == (plain, list(both))
        else:
            assert loaded.modules == plain | dict.fromkeys(NORMS, 1.0), (app, loaded.refused)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_on_either_axis(axis: int) -> None:
    """All that read DoRA are exact by input; by output SD.Next alone is."""
    base = structure.known("sd1")
    names = lcm_modules(base)
    file = of(base, names)
    for name in names:
        out, inner, *kernel = base.modules[name]
        size = (out, 1, *[1] * len(kernel)) if axis == 0 else (1, inner, *[1] * len(kernel))
        file[f"{base.kohya[name]}.dora_scale"] = torch.empty(size, device="meta")
    remark = {"comfyui": BASE_NORM, "forge": BASE_NORM, "a1111": BY_INPUT, "invokeai": BY_INPUT}
    for app in APPS:
        loaded = APPS[app](file, base)
        assert (loaded.refused, loaded.modules) == (None, strengths(base, names))
        if app in DORA:
            words = remark.get(app) if axis == 0 else None
            assert loaded.remarks == (dict.fromkeys(names, words) if words else {}), app
            assert loaded.unmatched == []
        else:
            assert loaded.remarks == dict.fromkeys(names, LEFT_OUT), app


def applied(app: str, weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """The apps' own formulas, in words of arithmetic: the weight after DoRA, the update at its strength."""
    moved = weight + update
    by_column = moved.norm(dim=0, keepdim=True)
    if app in ("comfyui", "forge"):
        by_output = magnitude.shape[0] == weight.shape[0]
        return moved * magnitude / (weight.norm(dim=1, keepdim=True) if by_output else by_column)
    if app == "sdnext" and tuple(magnitude.shape) == (weight.shape[0], 1):
        return moved * magnitude / moved.norm(dim=1, keepdim=True)
    return moved * magnitude / by_column


@pytest.mark.parametrize("axis", [0, 1])
def test_the_remarks_on_dora_hold_in_numbers(axis: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    inner = Layer(torch.randn(2, 5), torch.randn(6, 2), 1.5)
    magnitude = 1 + torch.rand((6, 1) if axis == 0 else (1, 5))
    exact = Dora(inner, magnitude, axis).delta(weight)
    wrong = {
        app: float((applied(app, weight, inner.delta(), magnitude) - weight - exact).norm() / exact.norm())
        for app in DORA
    }
    for app, error in wrong.items():
        assert (error < 1e-5) == (axis == 1 or app == "sdnext"), (app, error)
        assert error < 1e-5 or error > 0.05


@pytest.mark.parametrize("alone", [True, False])
def test_a_change_of_the_bias(alone: bool) -> None:
    """`.diff_b`: ComfyUI, Forge and stable-diffusion.cpp apply it by itself, SD.Next beside a LoRA only."""
    base = structure.known("sd1")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    file = {f"{base.kohya[name]}.diff_b": torch.empty(1280, device="meta")}
    key = next(iter(file))
    file |= {} if alone else of(base, [name])
    for app in ("comfyui", "forge", "sd.cpp", "sdnext"):
        loaded = APPS[app](file, base)
        used = app != "sdnext" or not alone
        assert loaded.modules == ({name: 1.0 if alone else 2.0} if used else {}), app
        assert (key in loaded.unmatched) != used
    if not alone:
        for app in ("a1111", "invokeai", "sd-scripts"):
            assert APPS[app](file, base).unmatched == [key]


def test_onetrainers_text_projection() -> None:
    base = structure.known("sdxl")
    name, key = "text_encoder_2.text_projection", "lora_te2_text_projection"
    file = of(base) | {
        f"{key}.lora_down.weight": torch.empty((4, 1280), device="meta"),
        f"{key}.lora_up.weight": torch.empty((1280, 4), device="meta"),
        f"{key}.alpha": torch.tensor(2.0),
    }
    for app in APPS:
        applied_by = app in ("comfyui", "forge", "invokeai", "sdnext")
        assert APPS[app](file, base).modules == strengths(base) | ({name: 0.5} if applied_by else {}), app


def verdicts(file: File, path: Path, *apps: str) -> tuple[bool, dict[str, str]]:
    """Whether the report is good, and the rows' verdicts, of a file with random values."""
    values = {key: torch.rand(x.shape) if x.is_meta else x for key, x in file.items()}
    save_file(values, path / "a.safetensors")
    report = verify.verify(
        path / "a.safetensors", verify.Against(structure.known("sd1")), apps=apps or tuple(APPS)
    )
    return report.ok, {row.app: row.verdict for row in report.rows}


def test_verify_judges_other_kinds_and_says_what_it_does_not(tmp_path: Path) -> None:
    base = structure.known("sd1")
    names = [name for name in lcm_modules(base) if ".attn2." in name]
    _, found = verdicts(made(base, names, loha), tmp_path)
    assert {app for app, words in found.items() if words != "ok"} == {"sd-scripts"}
    assert found["sd-scripts"].startswith("drops 64 modules")

    good, found = verdicts(made(base, names, lokr), tmp_path, "sd.cpp")
    assert found["sd.cpp"].startswith("not judged: 64 modules") and good  # neither ok nor wrong

    dora = of(base, names)
    for name in names:
        dora[f"{base.kohya[name]}.dora_scale"] = torch.empty((base.modules[name][0], 1), device="meta")
    good, found = verdicts(dora, tmp_path)
    assert not good and found["sdnext"] == "ok"
    assert found["comfyui"].startswith(BASE_NORM) and found["invokeai"].startswith(BY_INPUT)

    oft = of(base, names) | {"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.ones(4, 8, 8)}
    _, found = verdicts(oft, tmp_path)
    assert all(words.startswith("not judged: what it makes of OFT") for words in found.values())
