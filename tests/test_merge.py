"""Merging: sums against dense updates, the reduction against torch's dense SVD."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lcm_kit.errors import UserError
from lcm_kit.lora import loading, structure
from lcm_kit.lora.layers import Layer, Lora, layer_group
from lcm_kit.lora.merge import concatenate, interference, truncate
from tests.loras import fuse, lcm_modules, random_lora

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def dense(lora: Lora, weight: float = 1.0) -> dict[str, Tensor]:
    """weight * alpha / rank * up @ down in float64 by module, as [out, n]."""
    return {
        name: weight
        * layer.alpha
        / len(layer.down)
        * layer.up.double().flatten(1)
        @ layer.down.double().flatten(1)
        for name, layer in lora.layers.items()
    }


def dense_sum(loras: Sequence[Lora], weights: Sequence[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for name, update in dense(lora, weight).items():
            total[name] = total[name] + update if name in total else update
    return total


def whole(updates: dict[str, Tensor], group: str = "all") -> Tensor:
    """All updates of a block in one vector."""
    return torch.cat([u.flatten() for name, u in updates.items() if group in ("all", layer_group(name))])


def one(up: Tensor, down: Tensor, alpha: float = 1.0, name: str = ATTENTION) -> Lora:
    return Lora({name: Layer(down, up, alpha)})


def two_loras(base: Path) -> tuple[Lora, Lora]:
    """Mixed ranks, alpha != rank, convolutions among them; each lacks some of the other's modules."""
    place = structure.of_base(str(base))
    modules = lcm_modules(place)
    a = random_lora(place, modules[:-9], ranks=(4, 2, 7), alphas=(8.0, 1.0), seed=1)
    return a, random_lora(place, modules[5:], ranks=(3, 6), alphas=(2.0, 6.0, 12.0), seed=2)


# -- Several LoRAs into one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 0.8), (-0.5, 1.3), (0.0, 1.0)])
def test_the_concatenation_is_the_sum(real_sd_base: Path, weights: tuple[float, float]) -> None:
    a, b = two_loras(real_sd_base)
    merged, wanted = concatenate([a, b], weights), dense_sum([a, b], weights)
    assert merged.layers.keys() == wanted.keys() == a.layers.keys() | b.layers.keys()
    assert a.layers.keys() - b.layers.keys() and b.layers.keys() - a.layers.keys()
    assert {layer.down.shape[2:] for layer in merged.layers.values()} >= {(), (1, 1), (3, 3)}
    found = dense(merged)
    for name, layer in merged.layers.items():
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6 * float(wanted[name].norm()))
        assert layer.rank == sum(lora.layers[name].rank for lora in (a, b) if name in lora.layers)
        assert layer.alpha == layer.rank
        assert layer.shape == (a if name in a.layers else b).layers[name].shape
        assert layer.up.ndim == layer.down.ndim
        assert float(layer.up.norm()) == pytest.approx(float(layer.down.norm()), rel=1e-5)
    assert merged.metadata == {}


@pytest.mark.parametrize("size", ["two blocks", "real blocks"])
def test_the_unet_gives_the_same_output(sd_base: Callable[..., Path], real_sd_base: Path, size: str) -> None:
    from diffusers import UNet2DConditionModel

    base = real_sd_base if size == "real blocks" else sd_base("epsilon")
    a, b = two_loras(base)

    def output(*fused: tuple[Lora, float]) -> Tensor:
        unet = UNet2DConditionModel.from_pretrained(base / "unet").eval()
        for lora, weight in fused:
            fuse(unet, lora, weight)
        return loading.probe({"unet": unet})["unet"]

    both = output((a, 1.0), (b, -0.7))
    assert loading.relative_error(output((concatenate([a, b], [1.0, -0.7]), 1.0)), both) <= 1e-5
    assert min(loading.relative_error(output(*other), both) for other in ([], [(a, 1.0)], [(b, -0.7)])) > 1e-2


def test_three_loras_add_up_in_any_grouping(real_sd_base: Path) -> None:
    a, b = two_loras(real_sd_base)
    at_once = dense(concatenate([a, b, a], [1.0, 2.0, -3.0]))
    in_turn = dense(concatenate([concatenate([a, b], [1.0, 2.0]), a], [1.0, -3.0]))
    error = (whole(at_once) - whole({name: in_turn[name] for name in at_once})).norm() / whole(at_once).norm()
    assert float(error) < 1e-6


def test_peft_concatenates_to_the_same_update() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(10, 12), nn.Conv2d(3, 5, 3))
    model = get_peft_model(
        bare, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"]), adapter_name="first"
    )
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=5, target_modules=["0", "1"]))
    layers = {f"unet.{k}": model.base_model.model.get_submodule(k) for k in "01"}
    loras = []
    for key, alpha in (("first", 6.0), ("second", 5.0)):
        for layer in layers.values():
            nn.init.normal_(layer.lora_B[key].weight)
        loras.append(
            Lora({n: Layer(x.lora_A[key].weight, x.lora_B[key].weight, alpha) for n, x in layers.items()})
        )
    model.add_weighted_adapter(["first", "second"], [0.7, -1.5], "both", combination_type="cat")
    merged = concatenate(loras, [0.7, -1.5])
    for name, layer in layers.items():
        torch.testing.assert_close(merged.layers[name].delta(), layer.get_delta_weight("both").detach())


def test_lopsided_factors_survive_float16() -> None:
    torch.manual_seed(0)
    lora = one(torch.randn(8, 4) * 1e-7, torch.randn(4, 6) * 1e3, alpha=400.0)
    merged = concatenate([lora, one(torch.randn(8, 4) * 1e3, torch.randn(4, 6) * 1e-7)], [3.0, -1e3])
    wanted = dense(merged)[ATTENTION]
    rounded = Lora({name: layer.to(torch.float16) for name, layer in merged.layers.items()})
    assert float((dense(rounded)[ATTENTION] - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zero_layers_and_weights_stay_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    untrained = one(torch.zeros(8, 4, dtype=dtype), torch.randn(4, 6).to(dtype), alpha=4.0)
    plain = one(torch.randn(8, 2).to(dtype), torch.randn(2, 6).to(dtype))
    both = concatenate([untrained, plain], [1.0, 1.0]).layers[ATTENTION]
    assert both.up.dtype == both.down.dtype == torch.float32
    torch.testing.assert_close(both.delta(), plain.layers[ATTENTION].delta())
    for lora, weight in ((untrained, 1.0), (plain, 0.0)):
        assert float(concatenate([lora], [weight]).layers[ATTENTION].delta().abs().max()) == 0


def test_a_linear_layer_and_a_1x1_convolution_are_one_module() -> None:
    torch.manual_seed(0)
    linear = one(torch.randn(8, 4), torch.randn(4, 6))
    conv = one(torch.randn(8, 2, 1, 1), torch.randn(2, 6, 1, 1))
    for pair, shape in (((linear, conv), (8, 6)), ((conv, linear), (8, 6, 1, 1))):
        merged = concatenate(pair, [1.0, 2.0])
        assert merged.layers[ATTENTION].delta().shape == shape
        torch.testing.assert_close(
            dense(merged)[ATTENTION], dense_sum(pair, [1.0, 2.0])[ATTENTION], rtol=1e-5, atol=1e-5
        )
    assert interference(linear, conv)[-1].shared == 1


@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 2, 1), (8, 6, 3, 3)])
def test_other_shapes_are_for_other_bases(shape: tuple[int, ...]) -> None:
    a = one(torch.randn(8, 4), torch.randn(4, 6))
    b = one(torch.randn(shape[0], 4, *(1,) * (len(shape) - 2)), torch.randn(4, *shape[1:]))
    for call in (lambda: concatenate([a, b], [1.0, 1.0]), lambda: interference(a, b)):
        with pytest.raises(UserError, match=r"attn1\.to_q: .*\[8, 6\].* different bases; "):
            call()


def test_numbers_that_are_none_are_refused() -> None:
    good, bad = (one(torch.full((8, 2), value), torch.ones(2, 6)) for value in (1.0, math.nan))
    for weight in (math.nan, math.inf):
        with pytest.raises(UserError, match=f"weight {weight} is not a finite number"):
            concatenate([good], [weight])
    for call in (
        lambda: concatenate([bad], [1.0]),
        lambda: truncate(bad, 1),
        lambda: interference(good, bad),
    ):
        with pytest.raises(UserError, match=r"attn1\.to_q: its update holds NaN"):
            call()


# -- Fewer ranks ---------------------------------------------------------------------------------------------


def test_the_reduction_is_the_best_and_its_error_is_told(real_sd_base: Path) -> None:
    a, b = two_loras(real_sd_base)
    merged = concatenate([a, b], [1.0, -0.5])
    exact, largest, last = dense(merged), max(layer.rank for layer in merged.layers.values()), math.inf
    for rank in (1, 3, 5, 8, largest):
        small, errors = truncate(merged, rank)
        found = dense(small)
        for name, update in exact.items():
            u, s, v = torch.linalg.svd(update, full_matrices=False)
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            # the least error is a number; the update that has it is not, where two singular values are close
            least = float((update - best).norm())
            assert float((update - found[name]).norm()) <= least + 1e-6 * float(update.norm()), name
            assert small.layers[name].shape == merged.layers[name].shape
            kept = merged.layers[name].rank
            assert small.layers[name].rank == (kept if kept <= rank else min(rank, *update.shape))
        for group, error in errors.items():
            measured = (whole(found, group) - whole(exact, group)).norm() / whole(exact, group).norm()
            assert error == pytest.approx(float(measured), rel=1e-4, abs=1e-6), (rank, group)
        assert list(errors) == [*dict.fromkeys(map(layer_group, merged.layers)), "all"]
        assert errors["all"] < last
        last = errors["all"]
    assert set(errors.values()) == {0.0}


def test_small_layers_are_left_alone_and_large_ones_balanced() -> None:
    torch.manual_seed(0)
    small = Layer(torch.randn(2, 6).half(), torch.randn(8, 2).half(), 5.0)
    large = Layer(torch.randn(4, 6, 3, 3) * 100, torch.randn(8, 4, 1, 1), 5.0)
    found, _ = truncate(Lora({"unet.conv_in": large, ATTENTION: small}, {"ss_network_dim": "4"}), 2)
    assert found.layers[ATTENTION] is small
    layer = found.layers["unet.conv_in"]
    assert (layer.down.shape, layer.up.shape, layer.alpha) == ((2, 6, 3, 3), (8, 2, 1, 1), 2.0)
    assert float(layer.up.norm()) == pytest.approx(float(layer.down.norm()), rel=1e-5)
    assert found.metadata == {}


def test_known_singular_values_give_the_error() -> None:
    lora = one(torch.diag(torch.tensor([4.0, 3.0, 12.0])), torch.eye(3), alpha=6.0)  # 8, 6, 24
    assert truncate(lora, 2)[1] == pytest.approx({"unet.down_blocks.0": 6 / 26, "all": 6 / 26})
    assert truncate(lora, 1)[1]["all"] == pytest.approx(10 / 26)
    # And what is kept is the larger ones, at their own values
    for rank, wanted in ((1, [0.0, 0.0, 24.0]), (2, [8.0, 0.0, 24.0])):
        kept = dense(truncate(lora, rank)[0])[ATTENTION]
        torch.testing.assert_close(kept, torch.diag(torch.tensor(wanted)).to(kept), rtol=1e-5, atol=1e-5)


def test_a_zero_update_has_no_error_and_rank_0_is_refused() -> None:
    zero = one(torch.zeros(8, 4), torch.randn(4, 6))
    found, errors = truncate(zero, 1)
    assert errors == {"unet.down_blocks.0": 0.0, "all": 0.0}
    assert float(found.layers[ATTENTION].delta().abs().max()) == 0
    assert truncate(Lora({}), 1) == (Lora({}), {"all": 0.0})
    with pytest.raises(UserError, match="rank 0 is below 1"):
        truncate(zero, 0)


def test_ranks_beyond_the_shape_cost_nothing() -> None:
    torch.manual_seed(0)
    lora = one(torch.randn(4, 16), torch.randn(16, 20), alpha=3.0)  # rank 16 of a [4, 20] matrix
    found, errors = truncate(lora, 8)
    assert found.layers[ATTENTION].rank == 4 and errors["all"] == 0.0
    torch.testing.assert_close(dense(found)[ATTENTION], dense(lora)[ATTENTION], rtol=0, atol=1e-5)


# -- Where two LoRAs clash -----------------------------------------------------------------------------------


def test_interference_of_dense_updates(real_sd_base: Path) -> None:
    a, b = two_loras(real_sd_base)
    b = concatenate([a, b], [0.3, 1.0])  # so that cosines are not about zero
    b = Lora({name: b.layers[name] for name in list(b.layers)[5:]})
    dense_a, dense_b = dense(a, 0.8), dense(b, -2.0)
    rows = interference(a, b, (0.8, -2.0))
    assert [row.group for row in rows] == [
        *dict.fromkeys(map(layer_group, [*a.layers, *b.layers])),
        "all",
    ]
    for row in rows:
        shared = [n for n in dense_a if n in dense_b and row.group in ("all", layer_group(n))]
        blocks = [
            [update.norm() for n, update in updates.items() if row.group in ("all", layer_group(n))]
            for updates in (dense_a, dense_b)
        ]
        norm_a, norm_b = (float(torch.tensor(norms).norm()) if norms else 0.0 for norms in blocks)
        inner = float(sum((dense_a[n] * dense_b[n]).sum() for n in shared))
        assert (row.norm_a, row.norm_b) == pytest.approx((norm_a, norm_b), rel=1e-5)
        assert row.cosine == pytest.approx(inner / (norm_a * norm_b) if norm_a * norm_b else 0.0, abs=1e-5)
        assert row.shared == len(shared)
    assert rows[-1].cosine < -0.1 and rows[-1].shared < len(a.layers)


def test_interference_in_closed_form() -> None:
    torch.manual_seed(0)
    lora = one(torch.randn(8, 4), torch.randn(4, 6), alpha=8.0)
    norm = float(dense(lora)[ATTENTION].norm())
    for weights, cosine in (((1.0, 1.0), 1.0), ((1.0, -0.5), -1.0), ((0.0, 1.0), 0.0)):
        row = interference(lora, lora, weights)[-1]
        assert row.cosine == pytest.approx(cosine, abs=1e-6) and abs(row.cosine) <= 1
        assert (row.norm_a, row.norm_b) == pytest.approx([abs(w) * norm for w in weights], rel=1e-5)
    x, y = (one(torch.eye(4, 1), torch.eye(1, 6).roll(k, 1)) for k in (0, 3))
    assert interference(x, y)[-1] == ("all", 0.0, 1.0, 1.0, 1)
    elsewhere = Lora({"unet.mid_block.attentions.0.proj_in": lora.layers[ATTENTION]})
    rows = interference(lora, elsewhere)
    assert [(row.group, row.cosine, row.shared) for row in rows] == [
        ("unet.down_blocks.0", 0.0, 0), ("unet.mid_block", 0.0, 0), ("all", 0.0, 0),
    ]  # fmt: skip
    assert interference(Lora({}), Lora({})) == [("all", 0.0, 0.0, 0.0, 0)]


def test_modules_that_one_alone_changes_lessen_the_cosine() -> None:
    layer = Layer(torch.ones(1, 6), torch.ones(8, 1), 1.0)
    a = Lora({ATTENTION: layer})
    b = Lora({ATTENTION: layer, ATTENTION.replace("to_q", "to_k"): layer})
    row = interference(a, b)[0]
    assert row.cosine == pytest.approx(1 / math.sqrt(2)) and row.shared == 1


def test_parts_that_cancel_leave_a_small_norm() -> None:
    torch.manual_seed(0)
    lora = one(torch.randn(8, 4), torch.randn(4, 6))
    nothing = concatenate([lora, lora], [1.0, -1.0])
    assert interference(nothing, lora)[-1].norm_a < 1e-5 * float(dense(lora)[ATTENTION].norm())
