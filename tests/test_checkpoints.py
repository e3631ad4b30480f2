"""States on disk: what the manifest says, which damage is seen, what is kept, and a full disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lcm_kit import __version__
from lcm_kit.errors import UserError
from lcm_kit.training import checkpoints
from lcm_kit.training.checkpoints import Origin, State

ORIGIN = Origin(unet="a" * 64, data="b" * 64, teacher=(), batch=8, world=2)


def state(step: int, value: float | None = None) -> State:
    lora = {"a.lora_A.weight": torch.full((2, 2), float(step) if value is None else value)}
    return State(step, lora, {}, {"adapter": {"state": {}, "param_groups": []}}, None, [0.5])


def write(run: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        checkpoints.write(run, state(step), ORIGIN, keep)


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / "state"))


def newest(run: Path) -> tuple[str | None, list[str]]:
    said: list[str] = []
    folder = checkpoints.newest(run, said.append)
    return folder.name if folder else None, said


def test_states_are_kept_whole_and_pruned(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    write(tmp_path, 9, 10, 100, keep=2)
    assert names(tmp_path) == ["step-000010", "step-000100"]
    assert newest(tmp_path) == ("step-000100", [])
    found = checkpoints.read(tmp_path / "state/step-000100")
    assert found.step == 100 and found.window == [0.5]
    assert torch.equal(found.lora["a.lora_A.weight"], torch.full((2, 2), 100.0))


def test_the_manifest_says_what_the_state_is(tmp_path: Path) -> None:
    write(tmp_path, 5)
    folder = tmp_path / "state/step-000005"
    said = json.loads((folder / "manifest.json").read_text())
    assert len(said.pop("hash")) == 32
    assert said.pop("files") == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name in ("lora.safetensors", "ema.safetensors", "training.pt")
        if (data := (folder / name).read_bytes())
    }
    assert said == {
        "kit_version": __version__, "step": 5, "unet": "a" * 64, "data": "b" * 64, "teacher": [], "batch": 8,
        "world": 2, "base": "",
    }  # fmt: skip


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the last bit of the last weight: the file loads as well as before
    file.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda f: _flip(f / "lora.safetensors"), "lora.safetensors is not what was written"),
    "cut": (lambda f: os.truncate(f / "training.pt", 100), "training.pt is not what was written"),
    "missing": (lambda f: (f / "ema.safetensors").unlink(), "ema.safetensors is missing"),
    "no manifest that is JSON": (
        lambda f: (f / "manifest.json").write_text("{"),
        "manifest.json: it is not JSON",
    ),
    "a manifest in part": (
        lambda f: (f / "manifest.json").write_text('{"step": 6}'),
        "manifest.json: unet is missing",
    ),
    "renamed": (lambda f: f.rename(f.with_name("step-000007")), "it holds step 6"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_named_and_passed_over(tmp_path: Path, kind: str) -> None:
    damage, reason = DAMAGE[kind]
    write(tmp_path, 4, 6)
    damage(tmp_path / "state/step-000006")
    found, said = newest(tmp_path)
    assert found == "step-000004" and len(said) == 1
    assert "step-00000" in said[0] and "damaged" in said[0] and reason in said[0]
    os.truncate(tmp_path / "state/step-000004/lora.safetensors", 3)
    with pytest.raises(UserError, match=r"step-000004: this state is damaged .* and no other is good"):
        newest(tmp_path)


def test_what_goes_on_from_an_earlier_state_is_not_pruned_for_the_damaged_one(tmp_path: Path) -> None:
    write(tmp_path, 4, 6)
    _flip(tmp_path / "state/step-000006/lora.safetensors")
    assert newest(tmp_path)[0] == "step-000004"
    write(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-000005"] and newest(tmp_path) == ("step-000005", [])


def test_a_state_without_a_manifest_is_taken_if_it_loads(tmp_path: Path) -> None:
    write(tmp_path, 4, 6)
    for name in names(tmp_path):  # as the kit wrote them before there were manifests
        (tmp_path / "state" / name / "manifest.json").unlink()
    assert newest(tmp_path) == ("step-000006", [])
    checkpoints.check_origin(tmp_path / "state/step-000006", ORIGIN)
    (tmp_path / "state/step-000006/training.pt").write_bytes(b"half")
    found, said = newest(tmp_path)
    assert found == "step-000004" and "step-000006: this state is damaged" in said[0]


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"unet": "c" * 64}, "trained on another base, its UNet had the hash aaaaaaaaaaaa and now has cccc"),
        ({"data": "c" * 64}, "the cache holds other images or captions"),
        ({"teacher": ("c" * 64,)}, "the files of teacher.adapters and adapter.start are not those"),
    ],
)
def test_another_base_teacher_or_data_is_refused(
    tmp_path: Path, other: dict[str, str], sentence: str
) -> None:
    write(tmp_path, 4)
    folder = tmp_path / "state/step-000004"
    checkpoints.check_origin(folder, Origin(ORIGIN.unet, ORIGIN.data, (), batch=8, world=1))
    with pytest.raises(UserError, match=sentence):
        checkpoints.check_origin(folder, Origin(**{**vars(ORIGIN), **other}))


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    write(tmp_path, 4)
    with pytest.raises(UserError, match="not finite after step 6, training diverged"):
        checkpoints.write(tmp_path, state(6, float("nan")), ORIGIN, 1)
    spoiled = state(6)
    spoiled.lora["b.lora_A.weight"] = torch.tensor([1.0, float("inf")])  # a single value is enough
    with pytest.raises(UserError, match="not finite after step 6, training diverged"):
        checkpoints.write(tmp_path, spoiled, ORIGIN, 1)
    assert names(tmp_path) == ["step-000004"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["lora.safetensors", "training.pt"])
def test_a_full_disk_is_a_sentence_and_leaves_the_old_state(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 4)
    whole = checkpoints.atomic_folder

    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        with whole(path) as folder:
            (folder / name).symlink_to("/dev/full")
            yield folder

    monkeypatch.setattr(checkpoints, "atomic_folder", full)
    with pytest.raises(UserError, match="No space left"):
        write(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step-000004"] and newest(tmp_path) == ("step-000004", [])


@pytest.mark.parametrize(("before", "after"), [(None, True), (True, None)])
def test_a_step_is_fused_where_this_device_has_it_fused(before: bool | None, after: bool | None) -> None:
    """A run that began on a CPU goes on on a GPU: the moments come back, how it computes does not."""
    torch.manual_seed(0)
    grads = [torch.randn(3, 2) for _ in range(4)]

    def trained(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer, grads: list[torch.Tensor]) -> None:
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()

    p = torch.nn.Parameter(torch.ones(3, 2))
    first = torch.optim.AdamW([p], lr=0.1, fused=before)
    trained(p, first, grads[:2])
    saved = checkpoints._canonical(first.state_dict())
    q = torch.nn.Parameter(p.detach().clone())
    second = torch.optim.AdamW([q], lr=0.5, fused=after)
    checkpoints._restore_optimizer(second, saved)
    assert second.param_groups[0]["fused"] is after and second.param_groups[0]["lr"] == 0.1
    trained(p, first, grads[2:])
    trained(q, second, grads[2:])
    torch.testing.assert_close(p, q)
