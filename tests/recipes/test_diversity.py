"""Diversity while it trains: the figure again from pictures drawn one by one; a collapse is said, once."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_kit import bases, sample
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.core.methods import MethodInfo
from lcm_kit.lora import structure
from lcm_kit.plan import work
from lcm_kit.report.build import _plots
from lcm_kit.training import runtime
from lcm_kit.training.diversity import Diversity, spread
from lcm_kit.training.run_files import lines_of
from lcm_kit.training.validation import Fixed
from tests.loras import fuse, lcm_modules, random_lora
from tests.recipes.small import configure
from train import distill

Keys = dict[str, Any]
LINES = ("a red ball", "blue", "a tree")
FEW = 3  # steps of the teacher in these tests


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(Fixed, "teacher_steps", FEW)


def config(keys: Keys, folder: Path, output: str = "run", **changes: Any) -> Any:
    """Two prompts of three, by four pictures each."""
    (folder / "prompts.txt").write_text("\n".join(LINES))
    asked = {
        "prompts": str(folder / "prompts.txt"), "diversity": 2, "count": 3, "guidance_scale": 3.0,
        **changes.pop("validation", {}),
    }  # fmt: skip
    return configure(keys, folder / output, validation=asked, **changes)


def one(pipe: Any, i: int, sampler: str, steps: int, guidance: float) -> Tensor:
    """Picture i, alone in its batch."""
    return sample.latents(
        pipe, [LINES[i // 4]], sampler=sampler, steps=steps, guidance_scale=guidance, seed=1234,
        first=i, size=64,
    )  # fmt: skip


def apart(pictures: list[Tensor]) -> float:
    """The mean RMS distance of the pairs among the first four, and among the last four."""
    pairs = [pair for four in (pictures[:4], pictures[4:]) for pair in combinations(four, 2)]
    assert len(pairs) == 12
    return math.fsum(float(torch.dist(a, b)) / math.sqrt(a.numel()) for a, b in pairs) / 12


def test_the_spread_of_points_whose_distances_are_known() -> None:
    # a triangle of sides 3, 4, 5 in 4 dimensions, whose RMS halves lengths; then three equal points
    triangle = torch.tensor([[0.0, 0, 0, 0], [3, 0, 0, 0], [0, 4, 0, 0]])
    points = torch.cat([triangle, triangle[:1].expand(3, 4)]).view(6, 1, 2, 2)
    assert float(spread(points[:3], 3)) == pytest.approx(2.0)
    assert float(spread(points, 3)) == pytest.approx(1.0)
    assert float(spread(points[3:], 3)) == 0.0


def test_the_ratio_is_that_of_pictures_drawn_one_by_one(distill_keys: Keys, tmp_path: Path) -> None:
    base = bases.inspect_base(distill_keys["base"]["path"])
    measure = Diversity.prepare(config(distill_keys, tmp_path), base.base_hash)
    assert measure.prompts == (LINES[0],) * 4 + (LINES[1],) * 4
    place = structure.of_base(base.path)
    lora = random_lora(place, lcm_modules(place), ranks=(2,), alphas=(2.0,), size=0.1)
    adapted = AdaptedUNet(bases.load_unet(base))
    adapted.add_lora(config(distill_keys, tmp_path).adapter)
    student, teacher = sample.pipeline(base.path), sample.pipeline(base.path)
    student.unet = fuse(student.unet, lora, 1.0)
    before = torch.get_rng_state(), random.getstate()
    found = measure.ratio(adapted)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    wanted = apart([one(teacher, i, "ddim", FEW, 3.0) for i in range(8)])
    plain = apart([one(teacher, i, "lcm", 4, 1.0) for i in range(8)]) / wanted
    assert found == pytest.approx(plain, rel=1e-4) and abs(found - 1) > 1e-2
    # another student beside the same teacher, whose pictures are kept
    (kept,) = (tmp_path / "run" / "validation").glob("diversity-*.safetensors")
    written = kept.stat().st_mtime_ns
    other = AdaptedUNet(student.unet)
    other.add_lora(config(distill_keys, tmp_path).adapter)
    found = measure.ratio(other)
    changed = apart([one(student, i, "lcm", 4, 1.0) for i in range(8)]) / wanted
    assert found == pytest.approx(changed, rel=1e-4) and abs(changed / plain - 1) > 1e-3
    assert kept.stat().st_mtime_ns == written


def test_the_teacher_itself_is_as_various_as_the_teacher(distill_keys: Keys, tmp_path: Path) -> None:
    base = bases.inspect_base(distill_keys["base"]["path"])
    adapted = AdaptedUNet(bases.load_unet(base))
    wanted = config(distill_keys, tmp_path, validation={"guidance_scale": 1.0})
    adapted.add_lora(wanted.adapter)  # which is zero
    made = Diversity.prepare(wanted, base.base_hash)
    draws_alike = MethodInfo("own", "as the teacher", ("ddim",), (FEW,))
    measure = Diversity(
        made.config, made.base, made.base_hash, made.resolution, made.folder, made.prompts, draws_alike
    )
    assert measure.ratio(adapted) == 1.0


def collapse(patch: pytest.MonkeyPatch, after: int) -> None:
    """From the `after`th measurement on the student draws its first picture every time."""
    real, seen = Fixed.latents, []

    def drawn(of: Fixed, pipe: Any, sampler: str, *how: Any) -> Tensor:
        made = real(of, pipe, sampler, *how)
        if not isinstance(of, Diversity) or sampler == "ddim":
            return made
        seen.append(sampler)
        return made[:1].expand_as(made) if len(seen) > after else made

    patch.setattr(Fixed, "latents", drawn)


def run(config: Any) -> tuple[Path, str]:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        folder = distill.main(config)
    return folder, " ".join(told.getvalue().split())


def test_a_collapse_is_said_once_and_at_the_end(
    distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapse(monkeypatch, after=2)  # step 0 and step 1 are as they are
    folder, said = run(config(distill_keys, tmp_path, steps=4, validation={"every": 1}))
    found = {line["step"]: line["diversity"] for line in lines_of(folder) if "diversity" in line}
    assert list(found) == [0, 1, 2, 3, 4] and found[0] > 0.7 < found[1]
    assert [found[step] for step in (2, 3, 4)] == [0.0, 0.0, 0.0]
    assert said.count("the method is collapsing") == 2
    assert f"{folder}: warning: at step 2 the pictures of one prompt are only 0 times as different" in said
    assert "warning: at step 4 the pictures of one prompt are only 0 times" in said
    facts = json.loads((folder / "adapter" / "adapter.json").read_text())
    assert facts["diversity"] == 0.0 and "control_distance" not in facts
    drawn = _plots(None, lines_of(folder))
    assert drawn["diversity"] and not drawn["control"]


def test_measuring_changes_nothing_and_a_run_goes_on_as_if_it_had_not_stopped(
    distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = {"every": 2, "diversity": 1}
    plain, _ = run(config(distill_keys, tmp_path, "plain", steps=4, validation={"diversity": 0}))
    whole, _ = run(config(distill_keys, tmp_path, "whole", steps=4, validation=often))
    half = config(distill_keys, tmp_path, "half", steps=4, validation=often, checkpoint={"every": 2})
    save = runtime.Saver.save

    def killed(saver: runtime.Saver, step: int, window: Any) -> None:
        save(saver, step, window)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runtime.Saver, "save", killed)
        distill.main(half)
    resumed, _ = run(half)
    weights = [(each / "adapter" / "lora.safetensors").read_bytes() for each in (plain, whole, resumed)]
    assert weights[0] == weights[1] == weights[2]
    figures = [
        [(line["step"], line["diversity"]) for line in lines_of(each) if "diversity" in line]
        for each in (whole, resumed)
    ]
    assert figures[0] == figures[1] and [step for step, _ in figures[0]] == [0, 2, 4]


def test_memory_that_runs_out_stops_no_training(
    distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(Diversity, "ratio", full)
    folder, said = run(config(distill_keys, tmp_path, steps=1))
    assert "out of memory while drawing for validation, left out; lower validation.count" in said
    assert not any("diversity" in line for line in lines_of(folder)) and "collapsing" not in said


def test_where_it_has_no_effect_it_is_refused(distill_keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diversity is of the pictures of prompts, and these are null"):
        configure(distill_keys, tmp_path, validation={"prompts": None, "diversity": 1})
    keys = {key: value for key, value in distill_keys.items() if key != "guidance"}
    with pytest.raises(ValueError, match="validation.diversity is for train/distill"):
        config({**keys, "recipe": "train/finetune"}, tmp_path)


def test_what_is_drawn_is_planned(distill_keys: Keys, tmp_path: Path) -> None:
    wanted = config(distill_keys, tmp_path, steps=4, validation={"every": 2})
    _, found = work.while_training(wanted, {"teacher": 1.0, "student": 3.0}, None)
    # two prompts by four pictures: the teacher's once, by 50 guided steps; the student's at 0, 2 and 4
    assert found.passes == 8 * 100 + 3 * 8 * 4 and found.flops == 8 * 100 + 3 * 3 * 8 * 4
