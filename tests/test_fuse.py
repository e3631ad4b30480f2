"""Fusing LoRAs into a base: the folder as diffusers loads it, its dtypes and shards, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.lora import loading, structure
from lcm_kit.lora.fuse import fuse_into
from lcm_kit.lora.layers import Layer, Lora
from tests.loras import fuse, lcm_modules, random_lora, text_modules
from tests.test_merge import ATTENTION, dense, dense_sum, one

UNET = "unet/diffusion_pytorch_model.safetensors"


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
    refused(base, lora, "has no safetensors weights of variant 'fp16' in unet/", output, variant="fp16")
    refused(base / "unet", lora, "model_index.json is missing", output)
    (base / UNET).rename(base / "unet/pytorch.bin")
    index = base / "unet/diffusion_pytorch_model.safetensors.index.json"
    outside = "does not say which files hold the weights"
    named = {
        "../../secret.safetensors": outside, "../text_encoder/model.safetensors": outside,
        "gone.safetensors": "names gone.safetensors, which is not there",
        "..": r"names \.\., which is not there",
    }  # fmt: skip
    for value, words in named.items():
        index.write_text(json.dumps({"weight_map": {f"{ATTENTION}.weight": value}}))
        refused(base, lora, words, output)
    index.write_text("{}")
    refused(base, lora, outside, output)
    index.unlink()  # diffusers, too, takes an index first
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
