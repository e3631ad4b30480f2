"""Around the step: learning rate, run folder, state, metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from pydantic import TypeAdapter

from lcm_kit.config.continued import bound, flat
from lcm_kit.config.finetune import Finetune, TextEncoder
from lcm_kit.config.schema import Distill, Optimizer
from lcm_kit.errors import UserError
from lcm_kit.io import own_files
from lcm_kit.training import checkpoints, run_files, run_folder, run_metrics, runtime
from lcm_kit.training.checkpoints import Origin, State
from tests.recipes.small import TEMPLATE, configure


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def config(output: Path, **changes: Any) -> Distill:
    return configure(TEMPLATE, output, **changes)


def rates(schedule: str, steps: int, warmup: int) -> list[float]:
    optimizer = TypeAdapter(Optimizer).validate_python(
        {"lr": 2.0, "schedule": schedule, "warmup_steps": warmup}
    )
    return [runtime.learning_rate(optimizer, step, steps) for step in range(steps)]


def test_learning_rates() -> None:
    assert rates("constant", 4, 2) == [1.0, 2.0, 2.0, 2.0]
    assert rates("linear", 4, 0) == [2.0, 1.5, 1.0, 0.5]
    assert rates("linear", 6, 2) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert rates("cosine", 4, 0) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    assert rates("cosine", 2, 2) == [1.0, 2.0]  # warm-up only: nothing is divided by zero


def test_flat_names_every_key(tmp_path: Path) -> None:
    keys = flat(config(tmp_path))
    assert keys["optimizer.lr"] == 1e-2
    assert keys["optimizer.betas"] == [0.9, 0.999]
    assert keys["base.path"] == "asset:tiny-sd"


def save(run: Path, step: int, batch: int = 2, **known: Any) -> None:
    lora = {"a.lora_A.weight": torch.full((2, 2), float(step))}
    state = State(step, lora, {}, {"adapter": {"state": {}, "param_groups": []}}, None, [0.5])
    checkpoints.write(run, state, Origin("unet", "data", (), batch, 1), keep=2, **known)


def test_metrics_are_cut_to_the_resumed_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 2, "lo'
    )
    accelerator = runtime.start(config(tmp_path))
    metrics = run_metrics.Metrics.open(config(tmp_path), accelerator, 2)
    metrics.log(3, loss=1.5, grad_norm=math.inf)  # float16 may overflow in a step that is then skipped
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(len(line.pop("hash")) == 32 for line in lines)
    assert lines == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.5}]


def claim(run: Path, **changes: Any) -> bool:
    """What a recipe does before its first step; whether there is anything to do."""
    wanted, accelerator = config(run, **changes), Accelerator()
    if not run_folder.claim(wanted, accelerator):
        return False
    run_folder.begin(wanted, accelerator)
    return True


def test_another_config_is_refused_by_its_key(tmp_path: Path) -> None:
    assert claim(tmp_path)
    assert claim(tmp_path, seed=1)  # nothing is trained yet
    save(tmp_path, 2)
    assert claim(tmp_path, seed=1)
    with pytest.raises(UserError, match=r"started with seed 1 and the config says 0"):
        claim(tmp_path)
    with pytest.raises(UserError, match=r"started with adapter\.rank 4 and the config says 8"):
        claim(tmp_path, seed=1, adapter={"rank": 8})
    assert claim(
        tmp_path, seed=1, steps=9, validation={"count": 1}, checkpoint={"every": 1}, logging={"every": 5}
    )
    assert "steps: 9" in (tmp_path / "config.yaml").read_text()


LORA = {"path": "a.safetensors", "weight": 0.5}


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"path": "/elsewhere", "cache": "/another"}},
        {"data": {"kind": "folder", "split": "all", "image_column": "i", "caption_column": "c"}},
        {"data": {"skip_bad": True, "shard_size": 9, "batch_size": 3}},
        {"data": {"regularization": "/moved/general", "samples": {"prompts": "moved.txt"}}},
        {"data": {"leave_out": "runs/../runs/style"}},
        {"teacher": {"adapters": [{**LORA, "path": "b.safetensors"}]}},
        {"batch_size": 6, "accumulation": 1},
        {"batch_size": 1, "accumulation": 6},
    ],
)
def test_what_is_hashed_may_be_elsewhere(changes: dict[str, Any], tmp_path: Path) -> None:
    started: dict[str, Any] = {
        "data": {"path": "a", "regularization": "general", "leave_out": "runs/style"},
        "teacher": {"adapters": [LORA]}, "batch_size": 2, "accumulation": 3,
    }  # fmt: skip
    assert claim(tmp_path, **started)
    save(tmp_path, 2)
    blocks = {key: {**started.get(key, {}), **value} if isinstance(value, dict) else value
              for key, value in changes.items()}  # fmt: skip
    assert claim(tmp_path, **{**started, **blocks})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 3}, r"batch_size x accumulation 2 x 1 and the config says 3 x 1"),
        ({"optimizer": {"weight_decay": 0.5}}, r"optimizer\.weight_decay 0\.0 and the config says 0\.5"),
        ({"optimizer": {"name": "adamw8bit"}}, r"optimizer\.name 'adamw' and the config says 'adamw8bit'"),
        ({"data": {"resolution": 128}}, r"data\.resolution 64 and the config says 128"),
        ({"data": {"regularization": "x"}}, r"data\.regularization None and the config says 'x'"),
        ({"data": {"leave_out": "x"}}, r"data\.leave_out None and the config says 'x'"),
        ({"teacher": {"adapters": [LORA]}}, r"teacher\.adapters \[\] and the config says \[\{.*0\.5"),
        ({"adapter": {"start": [LORA]}}, r"adapter\.start \[\] and the config says"),
        (
            {"data": {"source": "mix", "samples": {"resolutions": [64, [96, 64]]}}},
            r".*data\.samples\.resolutions \[\] and the config says \[64, \[96, 64\]\]",
        ),
        ({"validation": {"held_out": 0.2}}, r"validation\.held_out 0\.0 and the config says 0\.2"),
        ({"base": {"path": "elsewhere"}}, r"base\.path 'asset:tiny-sd' and the config says 'elsewhere'"),
    ],
)
def test_what_makes_another_result_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert claim(tmp_path)
    save(tmp_path, 2)  # a state of a kit that kept no hash of the whole base
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"this run was started with {sentence}"):
        claim(tmp_path, **changes)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_what_helps_a_run_that_diverged_may_change_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert claim(tmp_path, optimizer={"lr": 1e-2, "warmup_steps": 0})
    save(tmp_path, 2)
    capsys.readouterr()
    assert claim(tmp_path, precision="bfloat16", optimizer={"lr": 1e-3, "warmup_steps": 4})
    told = " ".join(capsys.readouterr().out.split())
    for change in (
        "optimizer.lr was 0.01 and is 0.001",
        "optimizer.warmup_steps was 0 and is 4",
        "precision was 'auto' and is 'bfloat16'",
    ):
        assert f"{change} from here on" in told


def test_lines_that_were_lost_are_told(tmp_path: Path) -> None:
    """By the number that the newest state counted; who removed the file knows of it."""
    for step in (1, 2, 3):
        own_files.append_line(tmp_path / "metrics.jsonl", {"step": step, "loss": 0.5})
    save(tmp_path, 3, lines=3)
    assert [line["step"] for line in run_files.metrics_of(tmp_path)] == [1, 2, 3]
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[: whole.rindex('{"step": 3')])
    with pytest.raises(own_files.Damaged, match="of its 3 lines until step 3 2 are there"):
        run_files.metrics_of(tmp_path)
    assert len(run_files.metrics_of(tmp_path, step=2)) == 2  # of that state nothing is known
    (tmp_path / "metrics.jsonl").unlink()
    assert run_files.metrics_of(tmp_path) == []


def test_a_config_that_says_other_than_the_run_kept_is_told(tmp_path: Path) -> None:
    assert claim(tmp_path)
    save(tmp_path, 2, config=bound(config(tmp_path)))
    assert run_files.config_of(tmp_path)["adapter"]["rank"] == 4
    for key, changed in (
        ("steps: 4", "steps: 400"),
        ("lr: 0.01", "lr: 0.02"),
        ("asset:tiny-sd", "moved"),
    ):  # may
        text = (tmp_path / "config.yaml").read_text()
        (tmp_path / "config.yaml").write_text(text.replace(key, changed))
        run_files.config_of(tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("rank: 4", "rank: 5"))
    with pytest.raises(own_files.Damaged, match="adapter.rank is 5, and the run was trained with 4"):
        run_files.config_of(tmp_path)


def test_a_finished_run_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert claim(tmp_path)
    (tmp_path / "adapter").mkdir()
    facts = {"steps": 4, "base": {"path": "a base", "hash": "abc"}}
    facts["lora_config"] = {"r": 4, "lora_alpha": 4.0, "target_modules": ["to_q"]}
    (tmp_path / "adapter/adapter.json").write_text(json.dumps(facts))
    (tmp_path / "adapter/lora.safetensors").touch()
    assert not claim(tmp_path)
    assert "finished, 4 of 4 steps; nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="state/ is gone"):
        claim(tmp_path, steps=8)


def test_impossible_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match="'tensorbord' is not a tracker .* choose from .*tensorboard"):
        runtime.start(config(tmp_path, logging={"trackers": ["tensorbord"]}))
    with pytest.raises(UserError, match="'wandb' is not installed"):
        runtime.start(config(tmp_path, logging={"trackers": ["wandb"]}))
    with pytest.raises(UserError, match="float16 does not train on a CPU"):
        runtime.start(config(tmp_path, precision="float16"))
    assert runtime.dtype(runtime.start(config(tmp_path, precision="bfloat16"))) == torch.bfloat16
    assert runtime.dtype(runtime.start(config(tmp_path))) == torch.float32


def test_a_newer_kit_with_more_keys_strands_no_run(tmp_path: Path) -> None:
    assert claim(tmp_path)
    save(tmp_path, 2)
    file = tmp_path / "config.yaml"
    keys = yaml.safe_load(file.read_text())
    for key in ("memory", "teacher", "non_finite", "ema"):  # as if they had not been there at the time
        del keys[key]
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    with pytest.raises(UserError, match=r"started with ema 0\.0 and the config says 0\.5"):
        claim(tmp_path, ema=0.5)
    with pytest.raises(UserError, match=r"started with memory\.quantize 'none' and the config says 'nf4'"):
        claim(tmp_path, memory={"quantize": "nf4"})
    file.write_text(yaml.safe_dump({**keys, "gone": 1}, sort_keys=False))  # and a key that is not there now
    with pytest.raises(UserError, match=r"started with ema 0\.0 and the config says 0\.5"):
        claim(tmp_path, ema=0.5)
    assert claim(tmp_path)


def test_what_helps_a_run_through_may_change(tmp_path: Path) -> None:
    assert claim(tmp_path)
    save(tmp_path, 2)
    memory = {"compile": True, "tf32": False, "channels_last": True}
    assert claim(tmp_path, non_finite="skip", gradient_checkpointing=True, memory=memory)


def test_the_global_batch_is_kept(tmp_path: Path) -> None:
    """Of a run whose steps see 12 images, whatever the config's batch_size and the processes now."""

    def resume(world: int) -> tuple[Origin, State | None]:
        accelerator: Any = SimpleNamespace(num_processes=world, print=print)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "main_does", lambda _, work: work())
            return runtime.resume(accelerator, config(tmp_path), unet="unet", data="data")

    assert resume(3)[0].batch == 2 * 1 * 3  # nothing to resume: batch_size * accumulation * processes
    save(tmp_path, 2, batch=12)
    for world in (1, 2, 3, 12):
        origin, state = resume(world)
        assert (origin.batch, origin.world) == (12, world) and state is not None and state.step == 2
    for world in (5, 24):
        with pytest.raises(UserError, match=rf"sees 12 images, which {world} processes cannot share equally"):
            resume(world)


@pytest.mark.parametrize(
    ("kind", "fsdp2", "ema", "sentence"),
    [
        (DistributedType.DEEPSPEED, False, 0.0, "DeepSpeed.*choose FSDP"),
        (DistributedType.FSDP, False, 0.0, "set fsdp_version to 2"),
        (DistributedType.FSDP, True, 0.5, r"ema 0\.5 does not work"),
    ],
)
def test_ways_to_share_that_do_not_work_are_refused(
    kind: DistributedType, fsdp2: bool, ema: float, sentence: str, tmp_path: Path
) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp2)
    with pytest.raises(UserError, match=sentence):
        runtime._check_sharing(config(tmp_path, ema=ema), accelerator)


def test_text_encoders_are_not_trained_where_fsdp_shards(tmp_path: Path) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    for rank in (None, 4):
        wanted = Finetune("train/finetune", str(tmp_path), text_encoder=TextEncoder(rank))
        if rank is None:
            runtime._check_sharing(wanted, accelerator)
        else:
            with pytest.raises(UserError, match=r"text_encoder\.rank 4 does not work where FSDP shards"):
                runtime._check_sharing(wanted, accelerator)


@pytest.mark.parametrize(
    ("trackers", "name"), [((), ""), (("tensorboard",), ""), (("tensorboard", "mlflow"), "my run")]
)
def test_trackers_get_the_runs_name(
    trackers: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: seen.append(name))
    run = config(tmp_path / "my run", logging={"trackers": trackers})
    run_metrics.Metrics.open(run, Accelerator(), 0)
    assert seen == [name]


def test_validation_without_memory_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def draw() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert runtime.validate(Accelerator(), draw) == {}
    assert "out of memory while drawing for validation" in capsys.readouterr().out
    assert runtime.validate(Accelerator(), lambda: 0.5) == {"one_step_distance": 0.5}
