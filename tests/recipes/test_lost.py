"""Nothing is lost: signals, a full disk, damaged states, NaN, memory that runs out: held by final weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lcm_kit.adapter import roles
from lcm_kit.bases import inspect_base
from lcm_kit.config.load import dump
from lcm_kit.data.batches import Batches
from lcm_kit.data.cache import Cache
from lcm_kit.errors import UserError
from lcm_kit.training import checkpoints, run_files, runtime, stepping
from lcm_kit.training.stopping import stoppable
from tests.recipes.small import configure, environment
from train import distill

Keys = dict[str, Any]
SETTINGS: Keys = {"steps": 6, "ema": 0.5, "logging": {"every": 3}, "checkpoint": {"every": 2, "keep": 9}}
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def straight(distill_keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    return distill.main(configure(distill_keys, tmp_path_factory.mktemp("straight"), **SETTINGS))


def states(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in run_files.folders(run)]


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("images_per_second", "hash")}
        for line in lines
    ]


def assert_same_state(a: Path, b: Path) -> None:
    """LoRA, EMA and moments of two states, bit for bit."""
    first, second = checkpoints.read(a), checkpoints.read(b)
    for name in ("lora", "ema"):
        x, y = getattr(first, name), getattr(second, name)
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in y)
    before, after = (state.optimizers["adapter"]["state"] for state in (first, second))
    for index, moments in after.items():
        assert all(torch.equal(before[index][key], value) for key, value in moments.items())


def assert_same(run: Path, straight: Path) -> None:
    assert_same_state(run / "state/step-000006", straight / "state/step-000006")
    weights = "adapter/lora.safetensors"
    assert (run / weights).read_bytes() == (straight / weights).read_bytes()
    assert metrics(run) == metrics(straight)


def largest_difference(a: Path, b: Path) -> float:
    x, y = (load_file(run / "adapter/lora.safetensors") for run in (a, b))
    return max(float((x[key] - y[key]).abs().max()) for key in y)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """`at(3, f)`: call f amid step 3 (from 1), once."""
    step_randomness = distill.step_randomness

    def arrange(number: int, happens: Callable[[], object]) -> None:
        left = [happens]

        def draw(config: Any, method: Any, schedule: Any, batch: Any, step: int) -> Any:
            if step + 1 == number and left:
                left.pop()()
            return step_randomness(config, method, schedule, batch, step)

        monkeypatch.setattr(distill, "step_randomness", draw)

    return arrange


# -- Signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "error", "code"), [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, KeyboardInterrupt, None)]
)
def test_a_signal_finishes_the_step_and_saves_it(
    distill_keys: Keys, straight: Path, tmp_path: Path, at: Any, capsys: pytest.CaptureFixture[str],
    number: int, error: type[BaseException], code: int | None,
) -> None:  # fmt: skip
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    config = configure(distill_keys, tmp_path, **SETTINGS)
    at(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(error) as stopped:
        distill.main(config)
    assert getattr(stopped.value, "code", None) == code
    assert states(tmp_path) == [2, 3]
    assert "stopped and saved after step 3 of 6; the same command continues" in capsys.readouterr().out
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    distill.main(config)
    assert "continuing after step 3 of 6" in capsys.readouterr().out
    assert_same(tmp_path, straight)


def test_a_signal_in_the_last_step_lets_it_finish(
    distill_keys: Keys, straight: Path, tmp_path: Path, at: Any
) -> None:
    at(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    distill.main(configure(distill_keys, tmp_path, **SETTINGS))
    assert_same(tmp_path, straight)


def test_a_second_signal_stops_at_once(distill_keys: Keys, tmp_path: Path) -> None:
    accelerator = runtime.start(configure(distill_keys, tmp_path))
    with pytest.raises(KeyboardInterrupt), stoppable(accelerator) as asked:
        assert asked() == 0
        signal.raise_signal(signal.SIGTERM)
        assert asked() == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one was only noted")


@pytest.mark.slow
def test_the_command_line_says_so_and_continues(distill_keys: Keys, straight: Path, tmp_path: Path) -> None:
    config = configure(distill_keys, tmp_path / "run", **SETTINGS)
    (tmp_path / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "lcm_kit", "train", str(tmp_path / "config.yaml")]
    told: dict[str, Any] = {"env": environment(torch.get_num_threads()), "text": True}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **told)
    while process.poll() is None and not (tmp_path / "run/state/step-000002").exists():
        time.sleep(0.01)
    process.terminate()
    said, errors = process.communicate()
    assert process.returncode == 143, errors[-2000:]
    assert "the same command continues" in said and "Traceback" not in errors
    assert states(tmp_path / "run")[-1] < 6
    done = subprocess.run(command, capture_output=True, **told)
    assert done.returncode == 0 and "continuing after step" in done.stdout, done.stderr[-2000:]
    assert_same(tmp_path / "run", straight)


# -- Disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path) -> None:
    """Write until the disk is full."""
    size = 2**16
    with file.open("wb", buffering=0) as handle:
        while size:
            try:
                handle.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                size //= 2


def test_a_full_disk_leaves_the_state_before(
    distill_keys: Keys, straight: Path, small_disk: Path, at: Any
) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    config = configure(distill_keys, run, **SETTINGS)
    at(4, lambda: fill(ballast))
    with pytest.raises(UserError, match="step-000004: cannot be written .*No space left") as full:
        distill.main(config)
    assert "\n" not in str(full.value)
    assert os.listdir(run / "state") == ["step-000002"]
    assert_same_state(run / "state/step-000002", straight / "state/step-000002")
    ballast.unlink()
    distill.main(config)
    assert_same(run, straight)


def test_a_damaged_state_costs_the_steps_since_the_one_before(
    distill_keys: Keys, straight: Path, tmp_path: Path, at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(distill_keys, tmp_path, **SETTINGS)
    at(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        distill.main(config)
    assert states(tmp_path) == [2, 4, 5]
    for step, name in ((5, "lora.safetensors"), (4, "training.pt")):
        file = tmp_path / f"state/step-{step:06d}" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(data)
    distill.main(config)
    said = capsys.readouterr().out
    for step, name in ((5, "lora.safetensors"), (4, "training.pt")):
        assert f"step-{step:06d}: this state is damaged ({name} is not what was written)" in said
    assert "continuing after step 2 of 6" in said
    assert_same(tmp_path, straight)


def test_another_base_or_cache_is_refused(
    distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill.main(configure(distill_keys, tmp_path, steps=1))
    said = run_files.manifest(tmp_path / "state/step-000001")
    base = inspect_base(str(distill_keys["base"]["path"]))
    data = configure(distill_keys, tmp_path).data
    assert said["unet"] == base.hash_of("unet") and (said["batch"], said["world"]) == (2, 1)
    assert said["data"] == Cache.open(data.cache, base=base, data=data).fingerprint
    with monkeypatch.context() as patch, pytest.raises(UserError, match="other images or captions"):
        patch.setattr(Cache, "fingerprint", "other")
        distill.main(configure(distill_keys, tmp_path, steps=2))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="another (base|config)"):
        patch.setattr(type(base), "hash_of", lambda self, part: "other")
        distill.main(configure(distill_keys, tmp_path, steps=2))


# -- Losses that are no numbers ------------------------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`spoil((2, 3), f)`: the losses [B] of these calls of the loss (from 1) go through f."""
    whole = roles.consistency_loss

    def arrange(calls: Any, change: Callable[[Tensor], Tensor]) -> None:
        counted = [0]

        def loss(**parts: Any) -> Tensor:
            counted[0] += 1
            losses = whole(**parts)
            return change(losses) if counted[0] in calls else losses

        monkeypatch.setattr(roles, "consistency_loss", loss)

    return arrange


def second_is_nan(losses: Tensor) -> Tensor:
    return losses * torch.tensor([1.0, float("nan")])


def gradient_is_inf(losses: Tensor) -> Tensor:
    losses.register_hook(lambda gradient: gradient * float("inf"))
    return losses


def records(config: Any, step: int) -> list[str]:
    cache = Cache.open(config.data.cache, base=inspect_base(config.base.path), data=config.data)
    return Batches(cache, config.batch_size, config.seed).at(step - 1).ids


def test_a_nan_stops_and_names_what_it_came_from(
    distill_keys: Keys, straight: Path, tmp_path: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(distill_keys, tmp_path, **SETTINGS)
    with monkeypatch.context(), pytest.raises(UserError, match="training diverged") as stopped:
        spoil((5,), second_is_nan)
        distill.main(config)
    first, second = records(config, 5)
    said = str(stopped.value)
    assert f"the loss is nan at step 5, records {second}: " in said and first not in said
    assert f"the last good checkpoint is {tmp_path / 'state/step-000004'}" in said
    spoil((), second_is_nan)  # whatever it was, it is gone: nothing of it is left
    distill.main(config)
    assert_same(tmp_path, straight)


def test_a_gradient_that_is_no_number_stops_too(distill_keys: Keys, tmp_path: Path, spoil: Any) -> None:
    spoil((1,), gradient_is_inf)
    config = configure(distill_keys, tmp_path, **SETTINGS)
    with pytest.raises(UserError, match="the gradient's norm is (nan|inf) at step 1, records") as stopped:
        distill.main(config)
    assert ", ".join(records(config, 1)) in str(stopped.value) and "no checkpoint yet" in str(stopped.value)


@pytest.mark.parametrize("how", [second_is_nan, gradient_is_inf])
def test_a_skipped_step_changes_nothing(
    distill_keys: Keys, tmp_path: Path, spoil: Any, capsys: pytest.CaptureFixture[str], how: Any
) -> None:
    each = {"checkpoint": {"every": 1, "keep": 9}, "logging": {"every": 1}, "steps": 4, "non_finite": "skip"}
    spoil((3,), how)
    run = distill.main(configure(distill_keys, tmp_path, **{**SETTINGS, **each}))
    assert_same_state(run / "state/step-000003", run / "state/step-000002")
    assert not torch.equal(*(next(iter(load_file(run / f"state/step-00000{step}/lora.safetensors").values()))
                             for step in (3, 4)))  # fmt: skip
    found = metrics(run)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert found[2] == {"step": 3, "skipped": 1} and all("loss" in found[i] for i in (0, 1, 3))
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: the" in said and "at step 3, records" in said and "update is left out" in said


def test_ten_skipped_steps_in_a_row_are_enough(distill_keys: Keys, tmp_path: Path, spoil: Any) -> None:
    settings = {"steps": 30, "non_finite": "skip", "checkpoint": {"every": 1, "keep": 2}}
    spoil({*range(2, 11), *range(12, 40)}, second_is_nan)  # nine, one that is good, then no end
    with pytest.raises(UserError, match="nan at step 21, .*the 10th in a row"):
        distill.main(configure(distill_keys, tmp_path, **settings))


# -- Memory --------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`limited(2, "student")`: memory for 2 samples in the student's forward; what each forward was given."""
    from diffusers import UNet2DConditionModel

    whole = UNet2DConditionModel.forward

    def arrange(most: int, part: str, after: int = 0) -> list[int]:
        seen: list[int] = []

        def forward(self: Any, x: Tensor, t: Tensor, *arguments: Any, **conditions: Any) -> Any:
            student = torch.is_grad_enabled()
            samples = len(x) if student else len(x) // 2  # the teacher's pass has both conditions
            seen.extend([len(x)] if student else [])
            output = whole(self, x, t, *arguments, **conditions)
            if samples > most and len(seen) >= after and student == (part != "teacher"):
                if part != "backward":
                    raise OOM
                output.sample.register_hook(raise_oom)
            return output

        monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
        return seen

    def raise_oom(gradient: Tensor) -> Tensor:
        raise OOM

    return arrange


BOUND = 1e-4  # sums in another order move weights by 2e-5 at most; parts weighted wrongly by 1e-2
EXACT: Keys = {
    "steps": 3,
    "batch_size": 8,
    "optimizer": {"eps": 1e-3},
}  # eps: as in test_distill


@pytest.fixture(scope="module")
def whole_batch(distill_keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that has memory for eight samples at once."""
    return distill.main(configure(distill_keys, tmp_path_factory.mktemp("whole"), **EXACT))


@pytest.mark.parametrize("part", ["student", "teacher", "backward"])
def test_memory_that_runs_out_halves_the_micro_batch(
    distill_keys: Keys, whole_batch: Path, tmp_path: Path, limited: Any, part: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    step = 3 if part == "backward" else 1
    seen = limited(2, part, after=3 if part == "backward" else 0)  # in a later step that time
    run = distill.main(configure(distill_keys, tmp_path, **EXACT))
    said = " ".join(capsys.readouterr().out.split())
    assert [said.count(f"going on with {n} samples") for n in (8, 4, 2, 1)] == [0, 1, 1, 0]
    assert f"out of memory at step {step}: going on with 2 samples a forward and 4 forwards a step" in said
    assert seen[-4:] == [2, 2, 2, 2]
    assert largest_difference(run, whole_batch) < BOUND
    losses = [[line["loss"] for line in metrics(each)] for each in (run, whole_batch)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_an_odd_batch_is_halved_too(distill_keys: Keys, tmp_path: Path, limited: Any) -> None:
    odd = {**EXACT, "batch_size": 7, "steps": 2}
    whole = distill.main(configure(distill_keys, tmp_path / "whole", **odd))
    seen = limited(2, "student")
    run = distill.main(configure(distill_keys, tmp_path / "parts", **odd))
    assert seen == [7, 4, 2, 2, 2, 1, 2, 2, 2, 1]
    assert largest_difference(run, whole) < BOUND


def test_one_sample_too_many_says_what_helps(distill_keys: Keys, tmp_path: Path, limited: Any) -> None:
    limited(0, "student")
    words = "out of memory at step 1 with one sample a forward; run the same command .* gradient_check"
    with pytest.raises(UserError, match=words):
        distill.main(configure(distill_keys, tmp_path, **EXACT))


def test_memory_that_runs_out_beside_the_passes_is_a_sentence(
    distill_keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Any, closure: Any = None) -> None:
        raise OOM

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match=r"out of memory \(CUDA out of memory\); lower batch_size"):
        distill.main(configure(distill_keys, tmp_path, **EXACT))


def test_gradients_are_averaged_in_buckets_that_hold_them_all() -> None:
    sizes = [stepping._BUCKET - 1, 1, 1, 3 * stepping._BUCKET, 5]
    grads = [torch.empty(size, device="meta") for size in sizes]
    buckets = [[g.numel() for g in bucket] for bucket in stepping._buckets(grads)]
    assert buckets == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:]] and list(stepping._buckets([])) == []
