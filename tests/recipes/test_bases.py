"""The whole way for a base of each kind: encode, three steps, export, reload, sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcm_kit import sample
from lcm_kit.bases import inspect_base
from lcm_kit.config.schema import Distill
from lcm_kit.export.run import export_run
from lcm_kit.lora import loading, reading, structure
from lcm_kit.sample import sample_to_folder
from tests.recipes.small import configure, prepare
from tests.runs import load_adapter
from train import distill

# fixture of the base, modules that LCM-LoRA adapts, prediction type, family
KINDS = [
    pytest.param("sd2_v_base", 278, "v_prediction", "sd", marks=pytest.mark.slow),
    pytest.param("real_sd_base", 278, "epsilon", "sd", marks=pytest.mark.slow),
    pytest.param("sdxl_base", 788, "epsilon", "sdxl", marks=pytest.mark.slow),
    pytest.param("ssd1b_base", None, "epsilon", "sdxl", marks=pytest.mark.slow),
]


def train(base: Path, folder: Path) -> tuple[Distill, Path]:
    keys = prepare(folder, base)
    config = configure(keys, folder / "run", steps=3, checkpoint={"every": 3})
    return config, distill.main(config)


@pytest.mark.parametrize(("fixture", "modules", "prediction", "family"), KINDS)
def test_encode_train_export_reload_sample(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    fixture: str,
    modules: int | None,
    prediction: str,
    family: str,
) -> None:
    base = request.getfixturevalue(fixture)
    info = inspect_base(str(base))
    assert (info.prediction_type, info.family.name) == (prediction, family)
    _, run = train(base, tmp_path)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
    weights = load_file(run / "adapter" / "lora.safetensors")
    count = len(weights) // 2
    assert modules is None or count == modules
    assert any(float(value.abs().max()) > 0 for key, value in weights.items() if "lora_B" in key)

    (file,) = export_run(run, "kohya", "float32").values()
    place = structure.of_base(str(base))
    trained = sample.pipeline(str(base)).unet
    load_adapter(run / "adapter", trained)
    wanted = loading.probe({"unet": trained})["unet"]
    assert torch.isfinite(wanted).all()
    assert len(reading.read(file, place).lora.layers) == count
    pipe = sample.pipeline(str(base))
    sample.load_adapter(pipe, file)
    assert loading.relative_error(loading.probe({"unet": pipe.unet})["unet"], wanted) <= 1e-5
    sheet = sample_to_folder(str(base), ["a fox"], tmp_path / "samples", adapter=file, steps=2)
    assert sheet.is_file() and len(list((tmp_path / "samples").glob("000-*.png"))) == 1
