"""Latent consistency fine-tuning by train/distill: from an LCM-LoRA, without a teacher or with a share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcm_kit.adapter import roles
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.styles import start_from
from lcm_kit.bases import inspect_base, load_unet
from lcm_kit.config import schema
from lcm_kit.config.load import dump, load
from lcm_kit.errors import UserError
from lcm_kit.export.run import export_run
from lcm_kit.lora import reading, structure
from tests import broken
from tests.loras import lcm_modules, random_lora
from tests.recipes.small import configure
from tests.runs import build_run, load_adapter
from train import distill

Keys = dict[str, Any]


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def run(sd_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and exported LCM-LoRA of rank 4, alpha 8."""
    folder = build_run(tmp_path_factory.mktemp("start") / "run", sd_base(), rank=4, alpha=8.0)
    export_run(folder, "diffusers", "float32")
    return folder


def tuned(keys: Keys, output: Path, start: Path, **changes: Any) -> schema.Distill:
    """LCF of `start` with an odd step: curriculum, whole-sample Huber, weights."""
    mine = {
        **{key: value for key, value in keys.items() if key != "guidance"},
        "teacher": {"weight": 0.0},
        "loss": {"name": "huber_norm", "c": 0.00054, "weighting": "interval"},
    }
    return configure(mine, output, **{"adapter": {"start": str(start)}, **changes})


def started(config: schema.Distill) -> AdaptedUNet:
    base = inspect_base(config.base.path)
    adapted = AdaptedUNet(load_unet(base))
    adapted.add_lora(config.adapter, seed=config.seed)
    start_from(adapted, config.adapter, base)
    return adapted


def test_it_starts_from_an_lcm_lora_bit_for_bit(distill_keys: Keys, run: Path, tmp_path: Path) -> None:
    wanted = load_file(run / "adapter" / "lora.safetensors")
    place = structure.of_base(distill_keys["base"]["path"])
    lora = reading.read(run / "export" / "pytorch_lora_weights.safetensors", place).lora
    broken.save(tmp_path / "kohya.safetensors", broken.kohya_diffusers_spelling(lora, place))
    for start in (run, tmp_path / "kohya.safetensors"):
        adapted = started(tuned(distill_keys, tmp_path, start))
        state = adapted.state()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    other = load_unet(inspect_base(distill_keys["base"]["path"]))
    load_adapter(run / "adapter", other)
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 8, 32)
    with torch.no_grad():
        first, second = (u(x, 500, encoder_hidden_states=text).sample for u in (adapted.unet, other))
    assert torch.equal(first, second)


def test_a_start_that_does_not_fit_is_refused(distill_keys: Keys, run: Path, tmp_path: Path) -> None:
    def refused(start: Path, **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            started(tuned(distill_keys, tmp_path, start, **changes))
        return str(caught.value)

    where = {"start": str(run)}
    assert "has rank 4, more than adapter.rank 2; set adapter.rank to 4" in refused(
        run, adapter={**where, "rank": 2}
    )
    assert "layers of the UNet that adapter.targets attention leaves alone, such as" in refused(
        run, adapter={**where, "targets": "attention"}
    )
    assert "is not a run's folder or a .safetensors file" in refused(tmp_path / "missing.safetensors")


def test_a_smaller_start_keeps_its_effect_in_a_larger_lora(distill_keys: Keys, tmp_path: Path) -> None:
    """Three layers of rank 3 at strength 2, in a LoRA of rank 8 on all layers at strength 1/2."""
    place = structure.of_base(distill_keys["base"]["path"])
    names = lcm_modules(place)
    small = random_lora(place, [names[0], names[5], names[-1]], ranks=(3,), alphas=(6.0,))
    file = tmp_path / "small.safetensors"
    broken.save(file, broken.kohya_diffusers_spelling(small, place))
    keys = {"start": str(file), "rank": 8, "alpha": 4.0}
    state = started(tuned(distill_keys, tmp_path, file, adapter=keys)).state()
    for name in (key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key):
        a, b = (state[f"{name}.lora_{side}.weight"] for side in "AB")
        product = 0.5 * b.flatten(1) @ a.flatten(1)
        layer = small.layers.get(f"unet.{name}")
        wanted = (
            torch.zeros_like(product) if layer is None else 2 * layer.up.flatten(1) @ layer.down.flatten(1)
        )
        assert torch.allclose(product, wanted, atol=1e-6)
        assert a.shape[0] == 8 and bool((a[3:].flatten(1).norm(dim=1) > 0).all())  # the rest can learn


def test_it_starts_as_the_sum_of_several(distill_keys: Keys, run: Path, tmp_path: Path) -> None:
    """0.5 of the run (rank 4, strength 2) and -1 of five layers of rank 3, in rank 7 at strength 3."""
    place = structure.of_base(distill_keys["base"]["path"])
    few = random_lora(place, lcm_modules(place)[:5], ranks=(3,), alphas=(6.0,))
    file = tmp_path / "few.safetensors"
    broken.save(file, broken.kohya_diffusers_spelling(few, place))
    start = [{"path": str(run), "weight": 0.5}, {"path": str(file), "weight": -1.0}]
    keys = {"start": start, "rank": 7, "alpha": 21.0}
    config = tuned(distill_keys, tmp_path / "tuned", run, adapter=keys)
    state = started(config).state()
    own = load_file(run / "adapter" / "lora.safetensors")
    for name in (key.removesuffix(".lora_A.weight") for key in own if ".lora_A." in key):
        a, b = (state[f"{name}.lora_{side}.weight"].flatten(1) for side in "AB")
        old_a, old_b = (own[f"{name}.lora_{side}.weight"].flatten(1) for side in "AB")
        wanted = 0.5 * 2 * old_b @ old_a
        if layer := few.layers.get(f"unet.{name}"):
            wanted -= 2 * layer.up.flatten(1) @ layer.down.flatten(1)
        assert torch.allclose(3 * b @ a, wanted, atol=1e-6)
    facts = json.loads((distill.main(config) / "adapter" / "adapter.json").read_text())
    assert [(e["path"], e["weight"]) for e in facts["start"]] == [
        (str(run), 0.5),
        (str(file), -1),
    ]
    with pytest.raises(UserError, match=r"run and .*few.safetensors has rank 7, more than adapter.rank 6"):
        started(tuned(distill_keys, tmp_path, run, adapter={**keys, "rank": 6}))


def test_without_a_teacher_none_is_asked_and_no_guidance_is_claimed(
    distill_keys: Keys, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "guide", lambda *_: pytest.fail("the teacher was asked"))
    trained = distill.main(tuned(distill_keys, tmp_path / "run", run))
    facts = json.loads((trained / "adapter" / "adapter.json").read_text())
    assert facts["guidance"] == {"min": 1.0, "max": 1.0} and "solver" not in facts
    assert facts["teacher"]["weight"] == 0 and facts["start"][0]["path"] == str(run)
    before, after = (load_file(folder / "adapter" / "lora.safetensors") for folder in (run, trained))
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_the_teacher_term_asks_it_and_moves_the_weights_elsewhere(
    distill_keys: Keys, run: Path, tmp_path: Path
) -> None:
    guided = {"guidance": {"min": 2.0, "max": 6.0}}
    mixed = distill.main(tuned(distill_keys, tmp_path / "a", run, teacher={"weight": 0.5}, **guided))
    alone = distill.main(tuned(distill_keys, tmp_path / "b", run))
    a, b = (load_file(folder / "adapter" / "lora.safetensors") for folder in (mixed, alone))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) > 1e-3
    facts = json.loads((mixed / "adapter" / "adapter.json").read_text())
    assert facts["guidance"] == {"min": 1.0, "max": 6.0}


@pytest.mark.slow
def test_stopped_and_continued_is_the_straight_run(distill_keys: Keys, run: Path, tmp_path: Path) -> None:
    straight = distill.main(tuned(distill_keys, tmp_path / "straight", run, steps=6))
    distill.main(tuned(distill_keys, tmp_path / "twice", run, steps=3))
    twice = distill.main(tuned(distill_keys, tmp_path / "twice", run, steps=6))
    weights = [(folder / "adapter" / "lora.safetensors").read_bytes() for folder in (straight, twice)]
    assert weights[0] == weights[1]


def test_another_file_under_the_starts_name_is_noticed(distill_keys: Keys, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "start.safetensors"
    file.write_bytes((run / "export" / "pytorch_lora_weights.safetensors").read_bytes())
    distill.main(tuned(distill_keys, tmp_path / "run", file, steps=2))
    place = structure.of_base(distill_keys["base"]["path"])
    other = random_lora(place, lcm_modules(place), ranks=(4,), alphas=(8.0,))
    broken.save(file, broken.kohya_diffusers_spelling(other, place))
    with pytest.raises(UserError, match=r"files of teacher.adapters and adapter.start are not those"):
        distill.main(tuned(distill_keys, tmp_path / "run", file, steps=4))


def test_another_weight_of_the_start_is_noticed(distill_keys: Keys, run: Path, tmp_path: Path) -> None:
    def go(steps: int, weight: float) -> None:
        start = {"start": [{"path": str(run), "weight": weight}]}
        distill.main(tuned(distill_keys, tmp_path / "run", run, steps=steps, adapter=start))

    go(2, 0.5)
    with pytest.raises(UserError, match=r"was started with adapter.start .*0.5.* and the config says .*0.6"):
        go(4, 0.6)
    go(4, 0.5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("solver: heun", "so solver has no effect"),
        ("guidance: {min: 2}", "so guidance has no effect"),
        ("teacher: {weight: 0, adapters: [{path: a.safetensors}]}", "so teacher.adapters has no effect"),
        ("data: {source: teacher, flip: true}", "with source teacher there are none"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    teacher = "" if text.startswith("teacher") else "teacher: {weight: 0}\n"
    (tmp_path / "c.yaml").write_text(f"recipe: train/distill\noutput: x\n{teacher}{text}\n")
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("weight", "source", "scales"),
    [(1, "images", (3, 8)), (0, "images", (1, 1)), (0.5, "images", (1, 8)), (0, "teacher", (5, 5)),
     (0.5, "teacher", (3, 8)), (0, "mix", (1, 5)), (1, "mix", (3, 8))],
)  # fmt: skip
def test_the_guidance_that_is_taught(weight: float, source: str, scales: tuple[float, float]) -> None:
    data = schema.Data(source=source)  # type: ignore[arg-type]
    config = schema.Distill("train/distill", "x", data=data, teacher=schema.Teacher(weight=weight))
    assert config.baked_guidance() == schema.Guidance(*scales)
    assert "weight" in dump(config)
