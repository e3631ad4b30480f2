"""Training states on disk: `state/step-NNNNNN/`, each with a manifest that says what it is and its hashes.

A state is written whole or not at all, and believed only if its files are those that the manifest names: one
that is damaged is passed over for the one before. It holds no randomness, since a step's is a function of
(seed, step, slot). Nothing here knows of other processes but `capture` and `restore`, which all must call
where parameters are sharded over them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_kit import __version__, console
from lcm_kit.adapter.adapted_unet import TRAINED, AdaptedUNet
from lcm_kit.adapter.trained_weights import cpu_copy
from lcm_kit.core.sharding import full_tensor, shard_like
from lcm_kit.errors import UserError, first_line
from lcm_kit.io import own_files
from lcm_kit.io.files import atomic_folder, discard, sha256_file
from lcm_kit.training.run_files import MANIFEST, folders, manifest, step_of

# Of an optimizer's group how it computes, which is this device's affair and not read back: a run begun on a
# CPU goes on with a fused step on a GPU, and the reverse
_HOW = ("fused", "foreach", "capturable", "differentiable")
_FILES = ("lora.safetensors", "ema.safetensors", "training.pt")


class State(NamedTuple):
    """What a checkpoint holds. Tensors are on the CPU, under raw peft keys (`AdaptedUNet.named`).

    Of what else is trained than the run's own adapter its name and a slash are in front of the key.
    """

    step: int  # optimizer steps done
    lora: dict[str, Tensor]  # all weights that are trained
    ema: dict[str, Tensor]  # empty without an EMA
    optimizers: dict[str, dict[str, Any]]  # by name of what is trained
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
        if "optimizer" in rest:  # written when a state held one only
            rest["optimizers"] = {TRAINED: rest.pop("optimizer")}
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


def _of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those of what is trained as `name`: under plain keys `TRAINED`'s, under NAME/KEY all others."""
    parts = {key: key.rpartition("/") for key in tensors}
    return {parts[key][2]: t for key, t in tensors.items() if (parts[key][0] or TRAINED) == name}


def _together(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The reverse of `_of`, of all names."""
    return {
        key if name == TRAINED else f"{name}/{key}": tensor
        for name, part in tensors.items()
        for key, tensor in part.items()
    }


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return change(value) if isinstance(value, Tensor) else value


def capture(
    step: int,
    adapted: AdaptedUNet,
    ema: Mapping[str, Sequence[Tensor]],
    optimizers: Mapping[str, Any],
    window: Sequence[float],
    scaler: Any = None,
) -> State:
    """The training's state after `step` optimizer steps; on all processes where parameters are sharded.

    `ema`, `optimizers`: by name of what is trained. Raises `ValueError` if one has no optimizer: a state
    would lack it.
    """
    if set(optimizers) != set(adapted.trained):
        raise ValueError(f"optimizers {sorted(optimizers)} for what is trained, {sorted(adapted.trained)}")
    weights = {name: adapted.state(name) for name in adapted.trained}
    averages = {
        name: {key: cpu_copy(tensor) for key, tensor in zip(weights[name], tensors, strict=True)}
        for name, tensors in ema.items()
        if tensors
    }
    moments = {name: _map(optimizer.state_dict(), full_tensor) for name, optimizer in optimizers.items()}
    scale = scaler.state_dict() if scaler else None
    return State(step, _together(weights), _together(averages), moments, scale, list(window))


def restore(
    run: Path,
    state: State,
    adapted: AdaptedUNet,
    ema: Mapping[str, Sequence[Tensor]],
    optimizers: Mapping[str, Any],
    scaler: Any = None,
) -> None:
    """Put `state` of `run` back into what is trained, its EMA and the optimizers, in place.

    Raises `UserError` for the state of a recipe that trains other things.
    """
    if set(state.optimizers) != set(adapted.trained):
        raise UserError(
            f"{run}: this run trains {_words(state.optimizers)}, and its recipe now trains "
            f"{_words(adapted.trained)}; give back the recipe that it was started with, or another output"
        )
    for name in adapted.trained:
        adapted.load_state(_of(state.lora, name), name)
    for name, tensors in ema.items():
        averages = _of(state.ema, name)
        for average, key in zip(tensors, adapted.named(name) if tensors else (), strict=True):
            average.copy_(averages[key])  # by key: a file has an order of its own
    for name, optimizer in optimizers.items():
        _restore_optimizer(optimizer, state.optimizers[name])
    if scaler and state.scaler:
        scaler.load_state_dict(state.scaler)


def _words(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))


def _restore_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {name: _placed(value, parameters[index]) for name, value in slots.items()}
        for index, slots in state["state"].items()
    }
    groups = [
        group | {key: now[key] for key in _HOW if key in now}
        for group, now in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "state": moments, "param_groups": groups})


def _placed(value: Any, like: Tensor) -> Any:
    """An optimizer's value for the parameter `like`: moments are sharded as it is, counters never."""
    return shard_like(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
