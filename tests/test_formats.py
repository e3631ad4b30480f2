"""What the two files of an export hold, by value: every layer's strength and the header that says it."""

from __future__ import annotations

import json

import pytest
import torch

from lcm_kit.lora import diffusers_format, kohya_format, structure
from lcm_kit.lora.layers import Layer, Lora
from tests.loras import lcm_modules

PLACE = structure.of_base("asset:tiny-sd")


def lora(alphas: tuple[float, ...], ranks: tuple[int, ...] = (4, 4, 2)) -> Lora:
    """Linear layers of rank 4, 4, 2."""
    names = [name for name in lcm_modules(PLACE) if len(PLACE.modules[name]) == 2]
    generator, layers = torch.Generator().manual_seed(0), {}
    for name, alpha, rank in zip(names, alphas, ranks, strict=False):
        out, inner = PLACE.modules[name]
        down, up = torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator)
        layers[name] = Layer(down, up, alpha)
    return Lora(layers)


@pytest.mark.parametrize(
    ("alphas", "one"), [((8.0, 8.0, 2.0), 8.0), ((0.1, 4.0, 4.0), 4.0), ((0.0, 0.0, 3.0), 3.0), ((0.0,), 1.0)]
)
def test_a_kohya_file_has_one_alpha_and_every_layer_its_strength(
    alphas: tuple[float, ...], one: float
) -> None:
    """The most common alpha but 0, which has no strength to give to others."""
    whole = lora(alphas)
    written = kohya_format.as_written(whole)
    tensors = kohya_format.tensors(written, PLACE)
    for name, layer in whole.layers.items():
        key = PLACE.kohya[name]
        down, up, alpha = (tensors[f"{key}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert float(alpha) == pytest.approx(one)
        product = up @ down  # up [out, r], down [r, in]
        torch.testing.assert_close(float(alpha) / down.shape[0] * product, layer.delta())


def test_diffusers_header_says_rank_and_alpha_of_every_layer() -> None:
    """peft's own keys: the most common value, and a pattern for layers that have another."""
    whole = lora((8.0, 8.0, 3.0))
    tensors = diffusers_format.tensors(whole, PLACE)
    said = json.loads(diffusers_format.header(whole)[diffusers_format.HEADER])
    *_, odd = (name.removeprefix("unet.") for name in whole.layers)
    assert (said["unet.r"], said["unet.lora_alpha"]) == (4, 8.0)
    assert (said["unet.rank_pattern"], said["unet.alpha_pattern"]) == ({odd: 2}, {odd: 3.0})
    assert said["unet.target_modules"] == sorted(name.removeprefix("unet.") for name in whole.layers)
    for name, layer in whole.layers.items():
        assert torch.equal(tensors[f"{name}.lora_A.weight"], layer.down)
        assert torch.equal(tensors[f"{name}.lora_B.weight"], layer.up)


@pytest.mark.parametrize(("alpha", "rank", "strength"), [(8.0, 4, 2.0), (4.0, 4, 1.0), (1.0, 2, 0.5)])
def test_a_layers_strength_is_alpha_over_rank(alpha: float, rank: int, strength: float) -> None:
    """arXiv:2106.09685, eq. 3, on ones: each element of up @ down is the rank."""
    layer = Layer(torch.ones(rank, 3), torch.ones(5, rank), alpha)
    assert layer.scale == strength
    assert torch.equal(layer.delta(), torch.full((5, 3), strength * rank))
