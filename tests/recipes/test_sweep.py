"""The guidance sweep on the embedded base: the same twice, shared, killed and resumed; broken adapters."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from lcm_kit import sample
from lcm_kit.config import shipped
from lcm_kit.config.load import dump
from lcm_kit.config.sweep import GuidanceSweep
from lcm_kit.errors import UserError
from lcm_kit.evaluation.metrics.distance import rms
from lcm_kit.lora import structure
from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.provenance import Base, Provenance
from lcm_kit.lora.write import write
from tests.loras import random_lora
from tests.recipes.small import launch

SMALL: dict[str, Any] = {
    "recipe": "evaluation/guidance_sweep", "base": "asset:tiny-sd", "count": 3, "images_per_prompt": 2,
    "batch_size": 4, "pictures": 2, "resamples": 100, "brand": "asset:brand", "control": "asset:general",
    "teacher": {"steps": 4, "guidance_scales": [1.0, 5.0], "guidance_scale": 3.0},
    "student": [{"samplers": ["lcm"], "steps": [1, 2], "guidance_scales": [1.0, 2.0]}],
    "plain": {"samplers": ["ddim"], "unet_calls": [2], "guidance_scales": [1.0]},
}  # fmt: skip


def configure(adapters: list[Path], output: Path, **changes: Any) -> GuidanceSweep:
    keys = {**SMALL, "adapters": [str(path) for path in adapters], "output": str(output), **changes}
    return TypeAdapter(GuidanceSweep).validate_python(keys)


def run(config: GuidanceSweep, report: bool = False) -> dict[str, Any]:
    """Sweep; the page, whose plots take longer than all the rest here, only if it is asked for."""
    recipe = shipped.load_recipe("evaluation/guidance_sweep")
    with pytest.MonkeyPatch.context() as patch:
        if not report:
            patch.setattr(recipe, "write_sweep_report", lambda folder: folder)
        return json.loads(recipe.main(config).read_text())


def tiny() -> structure.Structure:
    return structure.of_base("asset:tiny-sd")


@pytest.fixture(scope="module")
def lora() -> Lora:
    """A weak random LoRA of the embedded base: it moves pictures without breaking them."""
    return random_lora(tiny(), size=0.02)


def save(lora: Lora, path: Path) -> Path:
    write(path, lora, tiny(), "diffusers", "float32", Provenance(path.stem, base=Base("asset:tiny-sd")))
    return path


@pytest.fixture(scope="module")
def swept(lora: Lora, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole small sweep: its folder and results."""
    folder = tmp_path_factory.mktemp("sweep")
    file = save(lora, folder / "weak.safetensors")
    return folder, run(configure([file], folder / "out"), report=True)


def untimed(results: dict[str, Any]) -> dict[str, Any]:
    """Without what the clock says."""
    clock = ("seconds", "energy", "cost_1000")
    cells = [
        {**cell, "metrics": {k: v for k, v in cell["metrics"].items() if k not in clock}}
        for cell in results["cells"]
    ]
    comparisons = [each for each in results["comparisons"] if each["metric"] not in clock]
    # the file's path, which is where the test put it, is in the settings too
    varied = ("name", "adapters", "machine", "settings")
    kept = {k: v for k, v in results.items() if k not in varied}
    return {**kept, "cells": cells, "comparisons": comparisons}


def test_what_it_writes(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, results = swept
    assert [cell["id"] for cell in results["cells"]] == [
        "teacher-ddim-4-g1", "teacher-ddim-4-g3", "teacher-ddim-4-g5", "plain-ddim-2-g1", "plain-lcm-2-g1",
        "weak-lcm-1-g1-w1", "weak-lcm-1-g2-w1", "weak-lcm-2-g1-w1", "weak-lcm-2-g2-w1",
    ]  # fmt: skip
    assert [cell["unet_calls"] for cell in results["cells"]] == [4, 8, 8, 2, 2, 1, 2, 2, 4]
    with (folder / "out/results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["id"] for row in rows] == [cell["id"] for cell in results["cells"]]
    for row, cell in zip(rows, results["cells"], strict=True):
        figure = cell["metrics"]["saturation"]
        assert (
            float(row["saturation"]) == figure["value"] and figure["low"] <= figure["value"] <= figure["high"]
        )
    from pyarrow import parquet

    samples = parquet.read_table(folder / "out/samples.parquet").to_pylist()
    assert len(samples) == 9 * 6 and samples[3]["prompt"] == results["prompts"]["main"]["texts"][1]
    assert parquet.read_table(folder / "out/results.parquet").num_rows == 9
    recommended = json.loads((folder / "out/recommended.json").read_text())
    assert len(recommended.pop("hash")) == 32 and recommended == results["recommended"]
    assert results["prompts"]["main"]["shown"] == [0, 2]
    assert all((folder / "out" / name).is_file() for cell in results["cells"] for name in cell["pictures"])
    assert (folder / "out/report.html").is_file()


def test_cells_are_what_plain_diffusers_draws(swept: tuple[Path, dict[str, Any]]) -> None:
    """Figures of one cell, from the pictures that `lcm_kit.sample` draws with the same file and noise."""
    folder, results = swept
    pipe = sample.pipeline("asset:tiny-sd")
    texts = [prompt for prompt in results["prompts"]["main"]["texts"] for _ in range(2)]

    def draw(**settings: Any) -> torch.Tensor:
        return torch.cat([sample.latents(pipe, texts[k : k + 4], first=k, **settings) for k in (0, 4)])

    teacher = draw(sampler="ddim", steps=4, guidance_scale=3.0)
    sample.load_adapter(pipe, folder / "weak.safetensors")
    student = draw(sampler="lcm", steps=1, guidance_scale=1.0)
    cell = next(cell for cell in results["cells"] if cell["id"] == "weak-lcm-1-g1-w1")
    assert cell["metrics"]["latent_distance"]["value"] == pytest.approx(
        float(rms(student, teacher).mean()), rel=1e-5
    )
    two = next(cell for cell in results["cells"] if cell["id"] == "weak-lcm-2-g1-w1")
    assert two["metrics"]["latent_distance"] is None  # LCM draws noise on its way: nothing to compare with
    own = next(cell for cell in results["cells"] if cell["id"] == "teacher-ddim-4-g3")
    assert own["metrics"]["saturation"]["value"] == own["metrics"]["sharpness"]["value"] == 1.0


@pytest.mark.slow  # a sweep twice
def test_the_same_twice(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, results = swept
    again = run(configure([folder / "weak.safetensors"], tmp_path / "out"))
    assert untimed(again) == untimed(results)


@pytest.mark.slow  # sweeps three times; test_brand keeps what it drew too
def test_killed_and_resumed(
    swept: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed amid the sixth cell: the five before stay, are not drawn again, and all figures are the same."""
    folder, results = swept
    calls, draw = [0], sample.latents

    def dies(*arguments: Any, **settings: Any) -> Any:
        calls[0] += settings.get("size") is not None and len(arguments[1]) > 1
        if calls[0] == 12:
            raise KeyboardInterrupt
        return draw(*arguments, **settings)

    config = configure([folder / "weak.safetensors"], tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "latents", dies)
        run(config)
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/cells").iterdir()}
    assert len(cells) == 5 and all(path.suffix == ".safetensors" for path in cells)
    assert untimed(run(config)) == untimed(results)
    assert all(path.stat().st_mtime_ns == before for path, before in cells.items())


RANK = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from lcm_kit.config import shipped
from lcm_kit.training import processes
from lcm_kit.config.load import load
assert processes.share().world == 2
shipped.load_recipe("evaluation/guidance_sweep").main(load(Path(sys.argv[1])))
"""


@pytest.mark.slow  # processes that import torch anew
def test_two_processes_are_one(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, results = swept
    config = configure([folder / "weak.safetensors"], tmp_path / "two")
    (tmp_path / "two.yaml").write_text(dump(config))
    launch(RANK, tmp_path, tmp_path / "two.yaml")
    if torch.get_num_threads() > 1:  # sums of several threads differ in their last bits
        torch.set_num_threads(1)
        results = run(replace(config, output=str(tmp_path / "one")))
    assert untimed(json.loads((tmp_path / "two/results.json").read_text())) == untimed(results)


# -- Broken adapters, each for its reason --------------------------------------------------------------------


def zeros(lora: Lora, path: Path) -> Path:
    layers = {
        name: Layer(each.down, torch.zeros_like(each.up), each.alpha) for name, each in lora.layers.items()
    }
    return save(Lora(layers), path)


def half(lora: Lora, path: Path) -> Path:
    """Every second module of the file is gone."""
    from safetensors import safe_open

    whole = save(lora, path)
    with safe_open(whole, "pt") as opened:
        known = opened.metadata()
    tensors = load_file(whole)
    modules = sorted({key.rpartition(".lora_")[0] for key in tensors})
    gone = set(modules[::2])
    save_file(
        {k: v for k, v in tensors.items() if k.rpartition(".lora_")[0] not in gone}, path, metadata=known
    )
    return path


def orphans(lora: Lora, path: Path) -> Path:
    """Half of the keys of all modules are gone: each second one has no `lora_B`."""
    whole = save(lora, path)
    tensors = load_file(whole)
    gone = sorted(key for key in tensors if ".lora_B" in key)[::2]
    save_file({key: value for key, value in tensors.items() if key not in gone}, path)
    return path


def tenfold(lora: Lora, path: Path) -> Path:
    layers = {name: Layer(each.down, each.up * 250, each.alpha) for name, each in lora.layers.items()}
    return save(Lora(layers), path)


@pytest.mark.parametrize(
    ("breaks", "kind", "said"),
    [
        (zeros, {"no_effect"}, "has no effect: its pictures are those of the base alone"),
        pytest.param(
            half,
            {"failed_to_load"},
            "it holds 64 of the 129 modules that its header counts",
            marks=pytest.mark.slow,
        ),  # fmt: skip
        pytest.param(orphans, {"failed_to_load"}, "does not load whole", marks=pytest.mark.slow),
        pytest.param(tenfold, {"off_target"}, "is broken at every setting", marks=pytest.mark.slow),
    ],
)
def test_a_broken_adapter_is_flagged(
    breaks: Callable[[Lora, Path], Path], kind: set[str], said: str, lora: Lora, tmp_path: Path
) -> None:
    file = breaks(lora, tmp_path / "broken.safetensors")
    found = run(
        configure(
            [file], tmp_path / "out", teacher={"steps": 4, "guidance_scales": [3.0], "guidance_scale": 3.0}
        )
    )
    recommended = found["recommended"]
    assert recommended["cell"] is None and recommended["sentence"].startswith("None of these settings")
    (warning,) = recommended["warnings"]
    assert warning["kind"] in kind and said in warning["sentence"]


def test_a_gamma_is_swept_like_a_sampler(lora: Lora, tmp_path: Path) -> None:
    """Without renewed noise pictures compare with the teacher's one by one, else they do not."""
    file = save(lora, tmp_path / "weak.safetensors")
    student = [{"samplers": ["tcd:0", "tcd:0.6"], "steps": [2], "guidance_scales": [1.0]}]
    found = run(configure([file], tmp_path / "out", student=student))
    cells = {cell["sampler"]: cell for cell in found["cells"] if cell["kind"] == "student"}
    assert {name: cell["id"] for name, cell in cells.items()} == {
        "tcd:0": "weak-tcd0-2-g1-w1", "tcd:0.6": "weak-tcd0.6-2-g1-w1",
    }  # fmt: skip
    assert not [path for path in (tmp_path / "out").rglob("*") if ":" in path.name]
    assert cells["tcd:0.6"]["metrics"]["latent_distance"] is None
    pipe = sample.pipeline("asset:tiny-sd")
    texts = [prompt for prompt in found["prompts"]["main"]["texts"] for _ in range(2)]

    def draw(**settings: Any) -> torch.Tensor:
        return torch.cat([sample.latents(pipe, texts[k : k + 4], first=k, **settings) for k in (0, 4)])

    teacher = draw(sampler="ddim", steps=4, guidance_scale=3.0)
    sample.load_adapter(pipe, file)
    distance = float(rms(draw(sampler="tcd:0", steps=2), teacher).mean())
    assert cells["tcd:0"]["metrics"]["latent_distance"]["value"] == pytest.approx(distance, rel=1e-5)


# -- Mistakes ------------------------------------------------------------------------------------------------


def test_mistakes_are_sentences(lora: Lora, tmp_path: Path) -> None:
    file = save(lora, tmp_path / "weak.safetensors")
    with pytest.raises(UserError, match="prompts"):
        run(configure([file], tmp_path / "out", prompts=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match="no/where: there is no such folder"):
        run(configure([file], tmp_path / "out", brand="no/where"))
    with pytest.raises(UserError, match="reads no text; name a CLIP"):
        run(configure([file], tmp_path / "out", text_features="asset:probe"))
    with pytest.raises(UserError, match="set features to the folder or hub id"):
        run(configure([file], tmp_path / "out", resolution=32))
    with pytest.raises(ValueError, match="brand and control need each other"):
        configure([file], tmp_path / "out", control=None)
    assert not (tmp_path / "out").exists()
