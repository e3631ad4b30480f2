"""Export: plain diffusers gets back exactly the adapter that was trained, or there is no file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lcm_kit import adapter, sample
from lcm_kit.errors import UserError
from lcm_kit.export import diffusers_format, export_run, verify
from tests.runs import build_run


@pytest.fixture
def run(sd_base: Callable[..., Path], tmp_path: Path) -> Path:
    return build_run(tmp_path / "run", sd_base("epsilon"))


def outputs(unet: Any) -> torch.Tensor:
    return verify.probe_unet(unet)


def test_plain_diffusers_gets_the_trained_adapter_back(
    run: Path, sd_base: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """rank 8, alpha 16: the scale is 2, and the weight delta B A is applied twice over, in every module."""
    from diffusers import StableDiffusionPipeline

    base = str(sd_base("epsilon"))
    file = export_run(run)
    assert file == run / "export" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 16
        assert all(key.startswith("unet.") for key in opened.keys())  # noqa: SIM118

    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    plain = {name: w.clone() for name, w in pipe.unet.state_dict().items()}
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        pipe.load_lora_weights(str(file.parent))
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    # diffusers says of every file without text encoder weights that it has none; nothing else may be said
    assert [r for r in caplog.messages if "No LoRA keys associated to CLIPTextModel" not in r] == []

    trained = sample.pipeline(base).unet
    adapter.load_adapter(run / "adapter", trained)
    assert verify.relative_error(outputs(pipe.unet), outputs(trained)) <= 1e-6

    # and against arithmetic, without peft: W + (16 / 8) B A
    merged = sample.pipeline(base).unet
    weights = load_file(run / "adapter" / "lora.safetensors")
    for key in [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]:
        a, b = weights[f"{key}.lora_A.weight"], weights[f"{key}.lora_B.weight"]
        delta = (b.flatten(1) @ a.flatten(1)).reshape(plain[f"{key}.weight"].shape)
        merged.get_submodule(key).weight.data += 2 * delta
    error = verify.relative_error(outputs(merged), outputs(pipe.unet))
    assert error <= 1e-4
    bare = sample.pipeline(base).unet
    assert verify.relative_error(outputs(bare), outputs(pipe.unet)) > 1000 * error  # the LoRA matters


@pytest.mark.parametrize(("dtype", "least", "most"), [("float16", 1e-6, 2e-3), ("bfloat16", 1e-5, 2e-2)])
def test_half_precision_rounds_the_weights_only(run: Path, dtype: str, least: float, most: float) -> None:
    file = export_run(run, dtype)
    assert {value.dtype for value in load_file(file).values()} == {getattr(torch, dtype)}
    base = adapter.read_facts(run / "adapter")["base"]
    assert least < verify.check(file, run / "adapter", base, dtype) < most


def damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any], dict[str, str]], None]
) -> None:
    """Make the writer's file pass through `change(weights, header)`."""
    write = diffusers_format.write

    def wrong(*args: Any) -> Path:
        file = write(*args)
        with safe_open(file, "pt") as opened:
            header = dict(opened.metadata())
        weights = load_file(file)
        change(weights, header)
        save_file(weights, file, metadata=header)
        return file

    monkeypatch.setattr(diffusers_format, "write", wrong)


def lose_alpha(weights: dict[str, Any], header: dict[str, str]) -> None:
    del header["lora_adapter_metadata"]


def lose_a_module(weights: dict[str, Any], header: dict[str, str]) -> None:
    for key in [key for key in weights if "down_blocks.0.resnets.0.conv1" in key]:
        del weights[key]


def change_a_weight(weights: dict[str, Any], header: dict[str, str]) -> None:
    weights[next(key for key in weights if "lora_B" in key)][0] += 1e-6


def add_a_key(weights: dict[str, Any], header: dict[str, str]) -> None:
    weights["unet.nowhere.lora_A.weight"] = torch.ones(8, 4)
    weights["unet.nowhere.lora_B.weight"] = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_alpha, "scale 1 instead of 2"),
        (lose_a_module, "(not matched, such as down_blocks.0.resnets.0.conv1|comes back with other weights)"),
        (change_a_weight, "comes back with other weights"),
        (add_a_key, "nowhere"),
    ],
)
def test_a_file_that_disagrees_is_not_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], words: str
) -> None:
    damage(run, monkeypatch, change)
    with pytest.raises(UserError, match=words):
        export_run(run)
    assert not (run / "export").exists()


def test_the_output_itself_is_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify.TOLERANCE, "float32", -1.0)
    with pytest.raises(UserError, match="output is off"):
        export_run(run)


def test_changed_base_and_wrong_dtype_and_no_adapter(run: Path, tmp_path: Path) -> None:
    facts = adapter.read_facts(run / "adapter")
    facts["base"]["hash"] = "0" * 64
    (run / "adapter" / "adapter.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="has changed since"):
        export_run(run)
    with pytest.raises(UserError, match="float32, float16, bfloat16"):
        export_run(run, "int8")
    with pytest.raises(UserError, match="lcm-kit train"):
        export_run(tmp_path)


def test_lora_weight_scales_the_adapter(run: Path, sd_base: Callable[..., Path]) -> None:
    base = str(sd_base("epsilon"))
    file = export_run(run)

    def scales(weight: float) -> set[float]:
        pipe = sample.pipeline(base)
        sample.load_adapter(pipe, file, weight)
        return {scale for scale, _, _ in verify._layers(pipe.unet).values()}

    assert scales(1.0) == {2.0}
    assert scales(0.5) == {1.0}
