"""Export: plain diffusers gets back what was trained, every app all of it, or no file is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lcm_kit import sample
from lcm_kit.adapter import folder as adapter
from lcm_kit.cli.main import app
from lcm_kit.errors import UserError
from lcm_kit.evaluation import recommended
from lcm_kit.export.run import export_run
from lcm_kit.lora import delivery, loading, structure, untrusted, verify, write
from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.provenance import Provenance
from tests.loras import fuse, lcm_modules, random_lora, text_modules
from tests.runs import build_run, load_adapter
from tests.sweeps import build_sweep

APPS = ("diffusers", "animatediff", "comfyui", "a1111", "forge", "invokeai", "sdnext", "sd-scripts", "sd.cpp")


@pytest.fixture
def run(sd_base: Callable[..., Path], tmp_path: Path) -> Path:
    return build_run(tmp_path / "lumo", sd_base("epsilon"))


@pytest.fixture
def real_run(real_sd_base: Path, tmp_path: Path) -> Path:
    """With the blocks that the apps have rules for."""
    return build_run(tmp_path / "lumo", real_sd_base)


def outputs(unet: Any) -> torch.Tensor:
    return loading.probe({"unet": unet})["unet"]


def test_plain_diffusers_gets_the_trained_adapter_back_from_both_files(
    run: Path, sd_base: Callable[..., Path]
) -> None:
    """rank 8, alpha 16: the scale is 2, and the weight delta B A is applied twice over, in every module."""
    from diffusers import StableDiffusionPipeline

    base = str(sd_base("epsilon"))
    files = export_run(run, dtype="float32")
    assert files == {
        "diffusers": run / "export" / "pytorch_lora_weights.safetensors",
        "kohya": run / "export" / "lumo.safetensors",
    }
    with safe_open(files["diffusers"], "pt") as opened:
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 16
        keys = set(opened.keys())
    assert {key.split(".")[0] for key in keys} == {"unet"}
    assert {key.rpartition(".lora_")[2] for key in keys} == {"A.weight", "B.weight"}
    with safe_open(files["kohya"], "pt") as opened:
        assert "lora_adapter_metadata" not in opened.metadata()
        assert opened.metadata()["ss_network_alpha"] == "16.0"
        assert {key.split(".", 1)[1] for key in opened.keys()} == {  # noqa: SIM118
            "lora_down.weight", "lora_up.weight", "alpha"
        }  # fmt: skip

    trained = sample.pipeline(base).unet
    load_adapter(run / "adapter", trained)
    for file in files.values():
        pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
        with loading.complaints() as said:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        assert said == []
        assert loading.relative_error(outputs(pipe.unet), outputs(trained)) <= 1e-6

    # and against arithmetic, without peft: W + (16 / 8) B A
    merged = sample.pipeline(base).unet
    plain = {name: w.clone() for name, w in merged.state_dict().items()}
    weights = load_file(run / "adapter" / "lora.safetensors")
    for key in [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]:
        a, b = weights[f"{key}.lora_A.weight"], weights[f"{key}.lora_B.weight"]
        delta = (b.flatten(1) @ a.flatten(1)).reshape(plain[f"{key}.weight"].shape)
        merged.get_submodule(key).weight.data += 2 * delta
    error = loading.relative_error(outputs(merged), outputs(trained))
    bare = sample.pipeline(base).unet
    assert error <= 1e-4 < 1e-2 < loading.relative_error(outputs(bare), outputs(trained))


def test_the_proof_lies_beside_the_files(real_run: Path) -> None:
    files = export_run(real_run)
    record = json.loads((real_run / "export" / "verified.json").read_text())["files"]
    assert record.keys() == {"pytorch_lora_weights.safetensors", "lumo.safetensors"}
    count = len(load_file(real_run / "adapter" / "lora.safetensors")) // 2
    for style, apps in (("diffusers", APPS[:2]), ("kohya", APPS)):
        told = record[files[style].name]
        assert (told["format"], told["dtype"]) == (style, "float16")
        assert tuple(told["apps"]) == apps
        for row in told["apps"].values():
            assert (row["modules"], row["loaded"], row["verdict"]) == (count, count, "ok")
    card = (real_run / "export" / "README.md").read_text()
    assert "lumo.safetensors" in card and "pytorch_lora_weights.safetensors" in card


def test_a_gap_of_an_app_is_told_and_does_not_stop_the_delivery(sd2_v_base: Path, tmp_path: Path) -> None:
    """stable-diffusion.cpp drops q, k and v of SD2.x's text encoder, however the file is spelled."""
    against = verify.base_of(str(sd2_v_base))
    text = text_modules(against.structure)
    lora = random_lora(against.structure, lcm_modules(against.structure) + text)
    reports = delivery.deliver(
        lora, against, tmp_path, {"kohya": "a.safetensors"}, "float32", Provenance("a")
    )
    lost = [name for name in text if name.endswith(("q_proj", "k_proj", "v_proj"))]
    record = json.loads((tmp_path / "verified.json").read_text())["files"]["a.safetensors"]["apps"]
    assert {app for app, row in record.items() if row["verdict"] != "ok"} == {"sd.cpp"}
    assert record["sd.cpp"]["verdict"].startswith(f"drops {len(lost)} modules, such as text_encoder.")
    line = delivery.summary("a.safetensors", "float32", reports["kohya"])
    assert (
        "load in diffusers, ComfyUI, A1111, Forge, InvokeAI, SD.Next and sd-scripts; diffusers' output"
        in line
    )
    assert line.endswith(f"\n  stable-diffusion.cpp: {record['sd.cpp']['verdict']}")


@pytest.mark.slow
def test_ssd1bs_blocks_get_the_rows_of_the_apps_that_can_load_them(ssd1b_base: Path, tmp_path: Path) -> None:
    run = build_run(tmp_path / "fast", ssd1b_base)
    export_run(run, "kohya")
    record = json.loads((run / "export" / "verified.json").read_text())["files"]["fast.safetensors"]["apps"]
    assert tuple(record) == tuple(app for app in APPS if app not in ("sd-scripts", "animatediff"))
    assert {(row["loaded"], row["verdict"]) for row in record.values()} == {(423, "ok")}
    card = (run / "export" / "README.md").read_text()
    assert "| ComfyUI 0.19.3 | kohya | 423 of 423 modules |" in card


def test_apps_are_not_asked_about_blocks_that_they_do_not_know(run: Path) -> None:
    """Two blocks of one layer: only diffusers can load such a base, so only diffusers answers."""
    export_run(run, "kohya")
    record = json.loads((run / "export" / "verified.json").read_text())["files"]
    assert tuple(record["lumo.safetensors"]["apps"]) == ("diffusers",)


def test_one_style_into_another_folder(run: Path, tmp_path: Path) -> None:
    assert export_run(run, "kohya", output=tmp_path / "out") == {
        "kohya": tmp_path / "out" / "lumo.safetensors"
    }
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "lumo.safetensors",
        "verified.json",
        "README.md",
    }
    assert not (run / "export").exists()


def test_the_same_weights_give_the_same_bytes(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    """safetensors shuffles the metadata; with 20 keys and more two files are hardly ever alike by chance."""
    run = build_run(tmp_path / "lümo", sd_base("epsilon"))
    first = {style: file.read_bytes() for style, file in export_run(run).items()}
    again = export_run(run, output=tmp_path / "again")
    assert {style: file.read_bytes() for style, file in again.items()} == first
    for file in again.values():
        with safe_open(file, framework="pt") as opened:
            said = opened.metadata()
        assert len(said) >= 20 and said["modelspec.title"] == "lümo"


@pytest.mark.parametrize(("dtype", "least", "most"), [("float16", 1e-6, 2e-3), ("bfloat16", 1e-5, 2e-2)])
def test_half_precision_rounds_the_weights_only(run: Path, dtype: str, least: float, most: float) -> None:
    for style, file in export_run(run, dtype=dtype).items():
        weights = {value.dtype for key, value in load_file(file).items() if not key.endswith(".alpha")}
        assert weights == {getattr(torch, dtype)}
        record = json.loads((run / "export" / "verified.json").read_text())["files"][file.name]
        assert least < record["apps"]["diffusers"]["output_error"] < most, style


def real_files(base: Path, folder: Path, lora: Lora, style: str) -> Any:
    """Write `lora` and load it with the pipeline of the base that a user has; gives the pipeline."""
    from diffusers import DiffusionPipeline

    place = structure.of_base(str(base))
    write.write(folder / "lora.safetensors", lora, place, style, "float32", Provenance("lora"))
    pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    with loading.complaints() as said:
        pipe.load_lora_weights(str(folder), weight_name="lora.safetensors", adapter_name="it")
    assert said == []
    return pipe


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("fixture", "ranks", "alphas"),
    [
        ("real_sd_base", (4,), (10.0,)),
        ("real_sd_base", (*[4] * 15, 2), (8.0,)),
        ("real_sd_base", (*[4] * 15, 2), (*[8.0] * 8, 1.5)),
        pytest.param("sdxl_base", (4,), (10.0,), marks=pytest.mark.slow),
        pytest.param("sdxl_base", (*[4] * 15, 2), (8.0,), marks=pytest.mark.slow),
        ("sdxl_base", (*[4] * 15, 2), (*[8.0] * 8, 1.5)),
    ],
)
def test_both_files_give_the_exact_output_on_the_real_blocks(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    style: str,
    fixture: str,
    ranks: tuple[int, ...],
    alphas: tuple[float, ...],
) -> None:
    """All LCM targets, linear and convolution: against W + alpha / r up down by arithmetic."""
    base = request.getfixturevalue(fixture)
    place = structure.of_base(str(base))
    lora = random_lora(place, ranks=ranks, alphas=alphas, size=0.05)
    assert len(lora.layers) == (278 if fixture == "real_sd_base" else 788)
    pipe = real_files(base, tmp_path, lora, style)
    assert loading.layers({"unet": pipe.unet}).keys() == lora.layers.keys()
    found = outputs(pipe.unet)
    pipe.unload_lora_weights()
    bare = outputs(pipe.unet)
    wanted = outputs(fuse(pipe.unet, lora))
    assert loading.relative_error(found, wanted) <= 1e-4
    assert loading.relative_error(bare, wanted) > 0.05  # the LoRA matters


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize("fixture", ["real_sd_base", "sdxl_base"])
def test_text_encoders_come_back_too(
    request: pytest.FixtureRequest, tmp_path: Path, style: str, fixture: str
) -> None:
    base = request.getfixturevalue(fixture)
    place = structure.of_base(str(base))
    modules = lcm_modules(place)[:4] + text_modules(place)
    lora = random_lora(place, modules, ranks=(4, 2), alphas=(8.0, 3.0), size=0.2)
    pipe = real_files(base, tmp_path, lora, style)
    names = ["text_encoder", "text_encoder_2"] if fixture == "sdxl_base" else ["text_encoder"]
    parts = {name: getattr(pipe, name) for name in names}
    assert {n for n in lora.layers if n.startswith("text")} == loading.layers(parts).keys()
    found = loading.probe(parts)
    fresh = loading.models(lora, place, base, None)
    bare = loading.probe(fresh)
    loading.fuse(fresh, lora)
    wanted = loading.probe(fresh)
    for name in names:
        assert loading.relative_error(found[name], wanted[name]) <= 1e-5
        assert loading.relative_error(bare[name], wanted[name]) > 0.05


def test_a_weight_beyond_float16_is_an_error(run: Path, sd_base: Callable[..., Path], tmp_path: Path) -> None:
    place = structure.of_base(str(sd_base("epsilon")))
    lora = random_lora(place)
    name = next(iter(lora.layers))
    layer = lora.layers[name]
    big = Lora({**lora.layers, name: Layer(layer.down, layer.up * 1e7, layer.alpha)})
    with pytest.raises(
        UserError, match=rf"{name}.lora_B.weight overflows float16: .* write bfloat16 or float32"
    ):
        write.write(tmp_path / "a.safetensors", big, place, "diffusers", "float16", Provenance("a"))
    assert list(tmp_path.glob("*.safetensors")) == []
    write.write(tmp_path / "a.safetensors", big, place, "diffusers", "bfloat16", Provenance("a"))
    broken = Lora({**lora.layers, name: Layer(layer.down * float("nan"), layer.up, layer.alpha)})
    with pytest.raises(UserError, match=r"lora_A.weight holds NaN or Inf \(1 tensors do\)"):
        write.write(tmp_path / "b.safetensors", broken, place, "diffusers", "float32", Provenance("b"))


def damage(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """Make each written file pass through `change(weights, header)`."""
    real = write.write

    def wrong(path: Path, *args: Any) -> Lora:
        written = real(path, *args)
        with safe_open(path, "pt") as opened:
            header = dict(opened.metadata())
        weights = load_file(path)
        change(weights, header)
        save_file(weights, path, metadata=header)
        return written

    monkeypatch.setattr(delivery, "write", wrong)


def lose_alpha(weights: dict[str, Any], header: dict[str, str]) -> None:
    header.pop("lora_adapter_metadata", None)
    header.pop("ss_network_alpha", None)
    for key in [key for key in weights if key.endswith(".alpha")]:
        del weights[key]


def lose_a_module(weights: dict[str, Any], header: dict[str, str]) -> None:
    for key in [key for key in weights if "down_blocks" in key and "resnets" in key and "conv1" in key]:
        del weights[key]


def change_a_weight(weights: dict[str, Any], header: dict[str, str]) -> None:
    weights[next(key for key in weights if "lora_B" in key or "lora_up" in key)][0] += 1e-6


def add_a_key(weights: dict[str, Any], header: dict[str, str]) -> None:
    weights["unet.nowhere.lora_A.weight"] = torch.ones(8, 4)


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_alpha, "modules come back with other weights"),
        (lose_a_module, "modules do not come back, such as unet.down_blocks.0.resnets.0.conv1"),
        (change_a_weight, "1 modules come back with other weights"),
        (add_a_key, "belong to no module of .*, such as unet.nowhere"),
    ],
)
def test_a_file_that_disagrees_is_not_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], words: str, style: str
) -> None:
    damage(monkeypatch, change)
    with pytest.raises(UserError, match=words):
        export_run(run, style, "float32")
    assert not (run / "export").exists()


def test_an_app_that_would_drop_a_module_stops_the_export(
    real_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcm_kit.lora.apps import APPS as rules
    from lcm_kit.lora.apps import Loaded

    real = rules["forge"]

    def forgetful(tensors: Any, place: Any) -> Loaded:
        loaded = real(tensors, place)
        return loaded._replace(modules=dict(list(loaded.modules.items())[1:]))

    monkeypatch.setitem(rules, "forge", forgetful)
    with pytest.raises(UserError, match="Forge: drops 1 modules, such as unet"):
        export_run(real_run)
    assert not (real_run / "export").exists()


def test_the_output_itself_is_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify.TOLERANCE, "float32", -1.0)
    with pytest.raises(UserError, match="diffusers: its output is off by"):
        export_run(run, dtype="float32")


def test_changed_base_and_wrong_options_and_no_adapter(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float32, float16, bfloat16"):
        export_run(run, dtype="int8")
    with pytest.raises(UserError, match="format 'ckpt' is unknown; choose diffusers, kohya or both"):
        export_run(run, "ckpt")
    with pytest.raises(UserError, match="lcm-kit train"):
        export_run(tmp_path)
    facts = adapter.read_provenance(run / "adapter").to_json()
    facts["base"]["hash"] = "0" * 64
    (run / "adapter" / "adapter.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="has changed since"):
        export_run(run)


def test_lora_weight_scales_the_adapter(run: Path, sd_base: Callable[..., Path]) -> None:
    base = str(sd_base("epsilon"))
    for file in export_run(run).values():
        for weight in (1.0, 0.5):
            pipe = sample.pipeline(base)
            sample.load_adapter(pipe, file, weight)
            assert {layer.scale for layer in loading.layers({"unet": pipe.unet}).values()} == {2.0 * weight}


def test_what_a_sweep_recommends_goes_into_the_file_and_its_card(run: Path) -> None:
    """And only that of these very weights; the file still counts as the one that was swept."""
    with pytest.raises(UserError, match="holds no sweep of these weights; run `lcm-kit evaluate"):
        export_run(run, "both", "float32", with_evaluation=True)
    files = export_run(run, "both", "float32")
    before = recommended.weights_hash(files["diffusers"])
    warnings = {"other": "other is bad", "lumo": "Mind it."}
    found = {
        "sentence": "Use 2 steps of TCD.", "cell": None, "adapter": "lumo", "sampler": "tcd", "steps": 2,
        "guidance_scale": 1.5, "lora_weight": 0.8, "reasons": ["because"],
        "warnings": [
            {"adapter": name, "kind": "no_effect", "sentence": text} for name, text in warnings.items()
        ],
    }  # fmt: skip

    def sweep(weights: str) -> None:
        results = build_sweep(run / "sweep", adapters=("lumo",), size=8)
        results["adapters"][0]["weights"] = weights
        results["recommended"] = found
        (run / "sweep/results.json").write_text(json.dumps(results))

    sweep("of other weights")
    with pytest.raises(UserError, match="no sweep of these weights"):
        export_run(run, "both", "float32", with_evaluation=True)
    sweep(before)
    files = export_run(run, "both", "float32", with_evaluation=True)
    for file in files.values():
        header = untrusted.inspect(file).metadata
        assert header["lcm_kit.sampler"] == "tcd" and header["lcm_kit.sampling_steps"] == "2"
        assert header["modelspec.usage_hint"].startswith("Sampler TCD, 2 steps, guidance_scale / CFG 1.5")
    assert recommended.weights_hash(files["diffusers"]) == before
    card = (files["kohya"].parent / "README.md").read_text()
    for line in ("| sampler | TCD |", "| steps | 2 |", "| guidance (CFG) | 1.5 |", "| LoRA strength | 0.8 |"):
        assert line in card
    assert "**Warning.** Mind it." in card and "because" in card and "other is bad" not in card


@pytest.mark.parametrize("damage", [b"{", b'{"version": 1, "recipe": "evaluation/guidance_sweep"}'])
def test_a_sweep_that_cannot_be_read_does_not_stop_sampling(run: Path, damage: bytes, tmp_path: Path) -> None:
    """It is named in one line; then the file's own header advises, and where it says nothing the defaults."""
    base = adapter.read_provenance(run / "adapter").base.path

    def draw(name: str) -> str:
        words = ["sample", "--prompt", "a", "--base", base, "--adapter", run, "--output", tmp_path / name]
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0 and (tmp_path / name).is_dir(), done.output
        return " ".join(done.output.split())

    names = ("whole", "damaged", "header")
    files = export_run(run, "diffusers", "float32")
    results = build_sweep(run / "sweep", adapters=("lumo",), size=8)
    results["adapters"][0]["weights"] = recommended.weights_hash(files["diffusers"])
    results["recommended"] |= {"sampler": "tcd", "steps": 2, "lora_weight": 0.8}
    results["resolution"] = [16, 8]  # no square: it is said where it was measured
    advice = "tcd, 2 steps, guidance_scale 1, LoRA weight 0.8; measured for it at 16 × 8 pixels"
    file = run / "sweep/results.json"
    file.write_text(json.dumps(results))
    assert advice in draw("whole")
    file.write_bytes(damage)
    told = draw("damaged")
    assert told.count(str(file)) == 1 and "the sweep's recommendation is left out" in told
    assert "measured for" not in told
    file.write_text(json.dumps(results))
    export_run(run, "diffusers", "float32", with_evaluation=True)
    file.write_bytes(damage)
    assert advice in draw("header")
    whole, damaged, header = ((tmp_path / name / "contact-sheet.png").read_bytes() for name in names)
    assert header == whole != damaged


def test_results_of_another_version_cost_the_card_its_figures_and_nothing_else(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "results.json").write_text('{"version": 1, "cells": []}')
    later = (run / "adapter" / "lora.safetensors").stat().st_mtime + 60
    os.utime(run / "results.json", (later, later))
    export_run(run, "diffusers", "float32")
    words = " ".join(capsys.readouterr().err.split())
    assert "the card has no figures of it:" in words and "has version 1 of results" in words
    assert (run / "export" / "README.md").is_file()
