"""Merging: sums against dense updates, the reduction against torch's dense SVD, a fused base in diffusers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lcm_kit.errors import UserError
from lcm_kit.export import loading, structure
from lcm_kit.export.lora import Layer, Lora, layer_group
from lcm_kit.export.merge import concatenate, fuse_into, interference, truncate
from tests.loras import fuse, lcm_modules, random_lora, text_modules

UNET = "unet/diffusion_pytorch_model.safetensors"
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
            assert float((found[name] - best).norm()) < 1e-5 * float(update.norm()), name
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


# -- Into a base ---------------------------------------------------------------------------------------------


def weight_of(pipe: Any, name: str) -> Tensor:
    part, _, module = name.partition(".")
    model = getattr(pipe, part)
    if part != "unet" and not hasattr(model, "text_model"):
        module = module.removeprefix("text_model.")
    return model.get_submodule(module).weight


def outputs(pipe: Any) -> dict[str, Tensor]:
    parts = ("unet", "text_encoder", "text_encoder_2")
    return loading.probe(
        {part: getattr(pipe, part) for part in parts if getattr(pipe, part, None) is not None}
    )


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def text_and_unet(base: Path, seed: int) -> Lora:
    place = structure.of_base(str(base))
    modules = [*lcm_modules(place)[seed::3], *text_modules(place)[seed:]]
    return random_lora(place, modules, ranks=(4, 2), alphas=(8.0, 1.0), seed=seed)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_fused_folder_in_diffusers(
    real_sd_base: Path, sdxl_base: Path, tmp_path: Path, family: str
) -> None:
    from diffusers import DiffusionPipeline

    base = sdxl_base if family == "sdxl" else real_sd_base
    loras, weights = [text_and_unet(base, 1), text_and_unet(base, 2)], [1.0, -0.6]
    fuse_into(loras, weights, base, tmp_path / "fused")
    assert files(tmp_path / "fused") == files(base)
    plain = DiffusionPipeline.from_pretrained(base)
    before = outputs(plain)
    for name, update in dense_sum(loras, weights).items():
        weight = weight_of(plain, name)
        weight.data += update.float().reshape(weight.shape)
    wanted, found = outputs(plain), outputs(DiffusionPipeline.from_pretrained(tmp_path / "fused"))
    assert len(found) == (3 if family == "sdxl" else 2)
    for part, output in found.items():
        assert loading.relative_error(output, wanted[part]) <= 1e-5
        assert loading.relative_error(before[part], wanted[part]) > 1e-2


@pytest.fixture
def base(sd_base: Callable[..., Path], tmp_path: Path) -> Path:
    """A base that a test may change."""
    return Path(shutil.copytree(sd_base("epsilon"), tmp_path / "base"))


def test_halves_are_rounded_once_and_stale_weights_stay_behind(base: Path, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in load_file(base / UNET).items()}
    file = "unet/diffusion_pytorch_model.fp16.safetensors"
    save_file(half, base / file, metadata={"format": "pt", "who": "me"})
    for stale in (
        "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors.index.json", "unet/model.onnx", "unet/model.onnx_data",
        "unet/openvino_model.xml", "unet/weights.ckpt", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt",
        "vae_decoder/model.onnx", ".cache/x.json", "unet/.cache/x.json",
    ):  # fmt: skip
        (base / stale).parent.mkdir(exist_ok=True)
        (base / stale).write_text("{}")
    (base / "LICENSE").write_text("mine")
    (base / "vae/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"kept")
    place = structure.of_base(str(base))
    loras, weights = [random_lora(place, seed=k) for k in (1, 2)], [0.5, 1.5]
    fuse_into(loras, weights, base, tmp_path / "fused", variant="fp16")

    with safe_open(tmp_path / "fused" / file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "who": "me"}
    found, updates, different = load_file(tmp_path / "fused" / file), dense_sum(loras, weights), []
    assert found.keys() == half.keys()
    for key, value in found.items():
        update = updates.pop(f"unet.{key.removesuffix('.weight')}", None)
        exact = half[key].double() + (0 if update is None else update.reshape(value.shape))
        assert value.dtype == torch.float16
        torch.testing.assert_close(value, exact.half(), rtol=1e-3, atol=1e-6)
        if update is None:
            assert torch.equal(value, half[key])
        else:
            different.append((value != exact.half()).flatten())
    # Float32's own rounding tips a tie in 2 of 10,000; rounding after each LoRA would change a quarter
    assert float(torch.cat(different).double().mean()) < 1e-3
    assert not updates
    words = ("token", "scheduler", "vocab", "merges")
    assert {name for name in files(tmp_path / "fused") if not name.startswith(words)} == {
        "LICENSE", "model_index.json", "unet/config.json", file, "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/config.json", "text_encoder/model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_stay_shards(base: Path, tmp_path: Path, variant: str | None) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    (base / UNET).unlink()
    unet.save_pretrained(base / "unet", max_shard_size="100KB", variant=variant)
    shards = {name for name in files(base) if name.startswith("unet/") and name.endswith(".safetensors")}
    assert len(shards) > 3
    lora = random_lora(structure.of_base(str(base)), lcm_modules(structure.of_base(str(base)))[:4])
    fuse_into([lora], [1.0], base, tmp_path / "fused", variant=variant)
    assert files(tmp_path / "fused") == files(base)
    for shard in shards:
        assert load_file(tmp_path / "fused" / shard).keys() == load_file(base / shard).keys()
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "fused" / "unet", variant=variant)
    fuse(unet, lora)
    for key, value in unet.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=1e-6, atol=1e-7)


def test_an_older_text_encoder_and_links_of_the_hub_cache(base: Path, tmp_path: Path) -> None:
    encoder = base / "text_encoder/model.safetensors"
    weights = load_file(encoder)
    key = "encoder.layers.1.mlp.fc2.weight"
    assert key in weights  # as transformers 5 writes it
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / "abc"
    save_file({f"text_model.{k}": v for k, v in weights.items()}, blob)
    encoder.unlink()
    encoder.symlink_to(blob)
    index = base / "model_index.json"
    index.rename(tmp_path / "blobs" / "def")
    index.symlink_to(tmp_path / "blobs" / "def")
    name = f"text_encoder.text_model.{key.removesuffix('.weight')}"
    lora = random_lora(structure.of_base(str(base)), [name])
    fuse_into([lora], [2.0], base, tmp_path / "fused")
    assert not any(path.is_symlink() for path in (tmp_path / "fused").rglob("*"))
    assert (tmp_path / "fused" / UNET).read_bytes() == (base / UNET).read_bytes()
    found = load_file(tmp_path / "fused/text_encoder/model.safetensors")
    assert found.keys() == {f"text_model.{k}" for k in weights}
    for k, value in weights.items():
        update = dense(lora, 2.0)[name].float() if k == key else torch.zeros(())
        torch.testing.assert_close(found[f"text_model.{k}"], value + update, rtol=1e-6, atol=1e-7)
    assert float((found[f"text_model.{key}"] - weights[key]).norm()) > 0.1


def refused(base: Path, lora: Lora, words: str, output: Path, **more: Any) -> None:
    before = files(output.parent)
    with pytest.raises(UserError, match=words):
        fuse_into([lora], [1.0], base, output, **more)
    assert files(output.parent) == before
    assert not [path for path in output.parent.iterdir() if path.suffix == ".tmp"]


def test_what_does_not_fit_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    place, output = structure.of_base(str(base)), tmp_path / "fused"
    layer = random_lora(place, [ATTENTION]).layers[ATTENTION]
    wide = Layer(torch.ones(2, 99), layer.up[:, :2], 1.0)
    clip = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    refused(
        base,
        Lora({ATTENTION: wide}),
        r"to_q: the LoRA changes .*\[16, 99\], the base's is \[16, 16\]",
        output,
    )
    refused(base, Lora({"unet.nowhere": layer}), "unet.nowhere: .* has no such module", output)
    refused(base, Lora({clip: layer}), "has no text_encoder_2", output)
    lora = Lora({ATTENTION: layer})
    refused(base, lora, r"has no unet/diffusion_pytorch_model\.fp16\.safetensors", output, variant="fp16")
    refused(base / "unet", lora, "model_index.json is missing", output)
    (base / UNET).rename(base / "unet/pytorch.bin")
    index = base / "unet/diffusion_pytorch_model.safetensors.index.json"
    for value in ("../../secret.safetensors", "../text_encoder/model.safetensors", "gone.safetensors", ".."):
        index.write_text(json.dumps({"weight_map": {f"{ATTENTION}.weight": value}}))
        refused(base, lora, "names files that are not beside it", output)
    index.write_text("{}")
    refused(base, lora, "names files that are not beside it", output)
    (base / UNET).write_bytes(b"x" * 100)
    refused(base, lora, "is not a safetensors file", output)


def test_overflow_and_quantised_weights_are_refused(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / UNET)
    key = ATTENTION.removeprefix("unet.") + ".weight"
    save_file({k: v.half() for k, v in weights.items()}, base / UNET)
    out, inner = weights[key].shape
    lora = one(torch.full((out, 1), 300.0), torch.full((1, inner), 250.0))  # 75,000 of at most 65,504
    refused(
        base, lora, r"attn1\.to_q: its sum, up to 7\.5e\+04, overflows the base's float16", tmp_path / "fused"
    )
    save_file(weights | {key: weights[key].to(torch.int8)}, base / UNET)
    refused(base, lora, r"attn1\.to_q: the base holds I8 numbers", tmp_path / "fused")


@pytest.mark.parametrize("kind", ["file", "empty folder", "dangling link"])
def test_an_existing_output_is_refused(base: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "fused"
    if kind == "file":
        output.write_text("mine")
    elif kind == "empty folder":
        output.mkdir()
    else:
        output.symlink_to(tmp_path / "nowhere")
    refused(base, random_lora(structure.of_base(str(base)), [ATTENTION]), "fused exists already", output)


def test_an_output_within_the_base(base: Path) -> None:
    lora = random_lora(structure.of_base(str(base)), [ATTENTION])
    before = files(base)
    fuse_into([lora], [1.0], base, base / "vae" / "fused")
    assert files(base / "vae" / "fused") == before
