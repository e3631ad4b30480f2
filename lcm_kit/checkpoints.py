"""Training states on disk: `state/step-NNNNNN/`, each with a manifest that says what it is and its hashes.

A state is written whole or not at all, and believed only if its files are those that the manifest names: one
that is damaged is passed over for the one before. It holds no randomness, since a step's is a function of
(seed, step, slot). Nothing here knows of other processes but `capture` and `restore`, which all must call
where parameters are sharded over them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_kit import __version__, console, own_files
from lcm_kit.adapter import NAME, load_lora_state, named_parameters
from lcm_kit.errors import UserError, first_line
from lcm_kit.files import atomic_folder, discard, sha256_file
from lcm_kit.run_files import MANIFEST, folders, manifest, step_of

_FILES = ("lora.safetensors", "ema.safetensors", "training.pt")


class State(NamedTuple):
    """What a checkpoint holds. Tensors are on the CPU, under the LoRA's raw peft keys."""

    step: int  # optimizer steps done
    lora: dict[str, Tensor]
    ema: dict[str, Tensor]  # empty without an EMA
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None  # of float16's gradients
    window: list[float]  # losses since the last logged line


@dataclass(frozen=True)
class Origin:
    """What a run must keep when it goes on: the base, the data, the teacher, a step's samples."""

    unet: str  # hash of the base's UNet
    data: str  # the cache's fingerprint
    teacher: tuple[str, ...]  # hashes of the files of its adapters, and of adapter.start
    batch: int  # samples of a step over all processes
    world: int  # processes; they may be others when it goes on
    base: str = ""  # hash of all of the base


# -- On disk -------------------------------------------------------------------------------------------------


def read(folder: Path) -> State:
    """The state in `folder`. Raises `ValueError`, saying why, if its files are not as written."""
    from safetensors.torch import load_file

    try:
        said = manifest(folder)
        for name, wanted in said["files"].items() if said else ():
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            if sha256_file(folder / name) != wanted["sha256"]:
                raise ValueError(f"{name} is not what was written")
        rest = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        lora, ema = (load_file(folder / f"{name}.safetensors") for name in ("lora", "ema"))
        state = State(lora=lora, ema=ema, **rest)
    except own_files.Damaged as error:
        raise ValueError(f"{MANIFEST}: {error.reason}") from error
    except Exception as error:  # torch, zip, json and safetensors raise kinds of their own
        raise ValueError(first_line(error)) from error
    if state.step != step_of(folder):
        raise ValueError(f"it holds step {state.step}")
    return state


def newest(run: Path, say: Callable[[str], None] = console.say) -> Path | None:
    """The folder of the newest state of `run` that is good; None if there is no state at all.

    Every damaged one that is passed over is told to `say`. Raises `UserError` if none is good.
    """
    found = folders(run)
    for folder in reversed(found):
        try:
            read(folder)
        except ValueError as error:
            last = f"{folder}: this state is damaged ({error})"
            say(f"warning: {last}; trying the one before")
        else:
            return folder
    if found:
        raise UserError(
            f"{last} and no other is good; remove {run / 'state'} to start anew, or give another output"
        )
    return None


def check_origin(folder: Path, origin: Origin) -> None:
    """Raise `UserError` if the state in `folder` was trained on another base or on other cached data."""
    said, run = manifest(folder), folder.parents[1]
    if said and said["unet"] != origin.unet:
        raise UserError(
            f"{run}: this run was trained on another base, its UNet had the hash {said['unet'][:12]} and now "
            f"has {origin.unet[:12]}; give back the base that it was started with, or give another output"
        )
    if said and origin.base and said.get("base", origin.base) != origin.base:
        raise UserError(
            f"{run}: the base has changed since this run was started (its UNet is the same, another part or "
            "its noise schedule is not); give back the base that it was started with, or give another output"
        )
    if said and said["data"] != origin.data:
        raise UserError(
            f"{run}: the cache holds other images or captions than when this run was started, or in other "
            "shards (data.shard_size); encode the old ones again to continue, or give another output"
        )
    if said and tuple(said["teacher"]) != origin.teacher:
        raise UserError(
            f"{run}: the files of teacher.adapters and adapter.start are not those that this run was started "
            "with; give them back to continue, or give another output"
        )


def write(
    run: Path,
    state: State,
    origin: Origin,
    keep: int,
    config: Mapping[str, Any] | None = None,
    lines: int | None = None,
) -> None:
    """Write `state/step-NNNNNN/` whole or not at all, then remove all but the `keep` newest.

    `config`: what of the run's may not change, by dotted key. `lines`: how many `metrics.jsonl` has by now.

    States of later steps go too: they are damaged ones that were passed over. Raises `UserError` for weights
    that are not finite, which no training continues from, and as `atomic_folder` does.
    """
    from safetensors.torch import save

    if not all(tensor.isfinite().all() for tensor in state.lora.values()):
        raise UserError(
            f"{run}: the LoRA's weights are not finite after step {state.step}, training diverged, and "
            "no state is saved; train again with a lower optimizer.lr or more optimizer.warmup_steps"
        )
    rest = _canonical(state._asdict())
    known = {name: value for name, value in (("config", config), ("lines", lines)) if value is not None}
    with atomic_folder(run / "state" / f"step-{state.step:06d}") as folder:
        # As bytes, and through a handle: given a path, safetensors and torch hide that the disk is full.
        (folder / "lora.safetensors").write_bytes(save(rest.pop("lora")))
        (folder / "ema.safetensors").write_bytes(save(rest.pop("ema")))
        with (folder / "training.pt").open("wb") as handle:
            torch.save(rest, handle)
        own_files.write_json(folder / MANIFEST, _manifest(folder, state.step, origin, known))
    for later in folders(run):
        if step_of(later) > state.step:
            discard(later)
    prune(run, state.step, keep)


def prune(run: Path, step: int, keep: int) -> None:
    """Remove the states of `run` until `step` but the `keep` newest. Raises `UserError` if it is refused."""
    for old in [each for each in folders(run) if step_of(each) <= step][:-keep]:
        discard(old)


def _canonical(value: Any) -> Any:
    """`value` in fresh containers, equal text as one object and tensors on their own.

    Pickle writes which objects are the same one, and that is another thing after a state was read: so the
    states of a run that was stopped are the same bytes as those of one that was not.
    """
    if isinstance(value, dict):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_canonical, value))
    if isinstance(value, str):
        return sys.intern(value)
    return value.detach().cpu().clone().contiguous() if isinstance(value, Tensor) else value


def _manifest(folder: Path, step: int, origin: Origin, known: Mapping[str, Any]) -> dict[str, Any]:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in _FILES
    }
    return {"kit_version": __version__, "step": step, **asdict(origin), **known, "files": files}


# -- In memory -----------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, put together where it is sharded over processes, all of which must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which is whole on every process, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def _named(unet: Any) -> dict[str, Tensor]:
    name = f".{NAME}."
    named = named_parameters(unet)
    return {key.replace(name, "."): p for key, p in named if ".lora_" in key and name in key}


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).float().cpu().clone().contiguous()


def lora_of(unet: Any) -> dict[str, Tensor]:
    """As `adapter.lora_state`, whole where it is sharded: all processes must call it then."""
    return {key: _copy(p) for key, p in _named(unet).items()}


def unsharded(unet: Any) -> Any:
    """What `adapter.save_adapter` reads of a UNet, weights put together; all processes call it."""
    weights = {
        key.replace(".lora_A.", f".lora_A.{NAME}.").replace(".lora_B.", f".lora_B.{NAME}."): tensor
        for key, tensor in lora_of(unet).items()
    }
    return SimpleNamespace(peft_config=unet.peft_config, named_parameters=weights.items)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return change(value) if isinstance(value, Tensor) else value


def capture(
    step: int, unet: Any, ema: Sequence[Tensor], optimizer: Any, window: Sequence[float], scaler: Any = None
) -> State:
    """The training's state after `step` optimizer steps; on all processes where parameters are sharded."""
    lora = lora_of(unet)
    averages = {name: _copy(tensor) for name, tensor in zip(lora, ema, strict=True)} if ema else {}
    moments = _map(optimizer.state_dict(), whole)
    return State(step, lora, averages, moments, scaler.state_dict() if scaler else None, list(window))


def restore(state: State, unet: Any, ema: Sequence[Tensor], optimizer: Any, scaler: Any = None) -> None:
    """Put `state` back into the LoRA, its EMA and the optimizer, in place."""
    named = _named(unet)
    load_lora_state(unet, {key: _as(t, named[key]) if key in named else t for key, t in state.lora.items()})
    if ema:
        for average, key in zip(ema, named, strict=True):  # by key: a file has an order of its own
            average.copy_(state.ema[key])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {name: _placed(value, parameters[index]) for name, value in slots.items()}
        for index, slots in state.optimizer["state"].items()
    }
    optimizer.load_state_dict({**state.optimizer, "state": moments})
    if scaler and state.scaler:
        scaler.load_state_dict(state.scaler)


def _placed(value: Any, like: Tensor) -> Any:
    """An optimizer's value for the parameter `like`: moments are sharded as it is, counters never."""
    return _as(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
