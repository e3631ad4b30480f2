"""TCD and PCM through all stages: trained, exported, verified, evaluated and drawn as their method says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors import safe_open
from typer.testing import CliRunner

from lcm_kit import sample
from lcm_kit.cli.main import app
from lcm_kit.config.load import dump
from tests.recipes.small import configure, draw_little

BAKED = {"method": {"name": "tcd"}}
LEFT = {
    "method": {"name": "pcm", "phases": 2}, "guidance": {"min": 1, "max": 1}, "caption_dropout": 0.5,
}  # fmt: skip


def cli(*words: object) -> Result:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize(
    ("changes", "sampler", "steps", "scale"),
    [(BAKED, "tcd", (1, 2, 4, 8), 1.0), (LEFT, "ddim", (2,), 3.0)],
    ids=["tcd", "pcm"],
)
def test_every_stage_draws_the_student_as_it_was_trained(
    changes: dict[str, Any], sampler: str, steps: tuple[int, ...], scale: float,
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    draw_little(monkeypatch)
    monkeypatch.chdir(tmp_path)
    drawn: list[tuple[str, int, float]] = []
    plain = sample.latents

    def watched(pipe: Any, prompts: Any, **how: Any) -> torch.Tensor:
        drawn.append((how["sampler"], how["steps"], how.get("guidance_scale", 1.0)))
        return plain(pipe, prompts, **how)

    monkeypatch.setattr(sample, "latents", watched)
    Path("prompts.txt").write_text("a cat\na dog\na bird\n")
    watch = {"prompts": "prompts.txt", "count": 1, "guidance_scale": 3.0, "control": "prompts.txt"}
    config = configure(distill_keys, Path("run"), validation={**watch, "control_count": 1}, **changes)
    Path("my.yaml").write_text(dump(config))
    cli("train", "my.yaml", "steps=2")
    teacher = ("ddim", 1, 3.0)
    assert set(drawn) == {teacher, (sampler, 1, scale)}  # of validation, and of control prompts

    cli("export", "run", "--dtype", "float32")
    base = config.base.path
    cli("verify", "run/export/run.safetensors", "--base", base)
    with safe_open("run/export/run.safetensors", "pt") as file:
        told = file.metadata()
    assert told["lcm_kit.method"] == config.method.name
    assert told["lcm_kit.sampling_guidance_scale"] == f"{scale:g}"
    kept = json.loads(told["lcm_kit.provenance"])
    assert (kept.get("guidance_scale"), kept.get("caption_dropout")) == (
        (3.0, 0.5) if scale > 1 else (None, None)
    )

    drawn.clear()
    few = [
        "prompts=prompts.txt",
        "count=2",
        "teacher_steps=1",
        "unet_calls=[4]",
        "pictures=1",
        "guidance_scale=2",
    ]
    cli("evaluate", "evaluation/quality", "run=run", *few)
    cells = json.loads(Path("run/results.json").read_text())["cells"]
    beside = 2.0 if scale > 1 else 1.0  # as the evaluation's teacher
    students = [
        (c["sampler"], c["steps"], c["guidance_scale"], c["unet_calls"]) for c in cells if c["adapter"]
    ]
    assert students == [(sampler, n, beside, n * (2 if scale > 1 else 1)) for n in steps]
    cli("report", "run")
    assert f"guidance_scale={beside}" in Path("run/report.html").read_text()

    drawn.clear()
    lora = "run/export/run.safetensors"
    cli("sample", "--prompt", "a cat", "--adapter", lora, "--base", base, "--output", "own")
    assert drawn == [(sampler, min(steps, key=lambda n: abs(n - 4)), scale)]
    negative = ["sample", "--prompt", "a cat", "--negative", "a dog", "--adapter", lora, "--base", base]
    done = CliRunner().invoke(app, [*negative, "--output", "against"])
    if scale > 1:
        assert done.exit_code == 0
        pictures = [next(Path(folder).glob("000-*.png")).read_bytes() for folder in ("own", "against")]
        assert pictures[0] != pictures[1]
    else:
        words = " ".join(done.output.split())
        assert done.exit_code == 2 and "a negative prompt does nothing at guidance_scale 1, which" in words


def test_the_shipped_configs_are_of_their_methods() -> None:
    from lcm_kit.config import shipped

    for family in ("tiny", "sd15", "sdxl"):
        for name in ("tcd", "pcm"):
            config = yaml.safe_load(
                (shipped.root() / "configs/distill" / f"{family}_{name}.yaml").read_text()
            )
            assert config["method"]["name"] == name and config["output"] == f"runs/{family}_{name}"
            assert (config["guidance"] == 1) == (config.get("caption_dropout") == 0.1) == (name == "pcm")
            assert family != "sdxl" or config["precision"] == "bfloat16"
