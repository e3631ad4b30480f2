"""A base in one .safetensors file, as model sites give it: made into a diffusers folder, once.

The folder lies in the user's cache under the file's name and hash; everything behind it knows folders only.
The file brings no configuration and no tokenizer: they come from a folder beside it or from the hub and its
cache.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit import assets
from lcm_kit.bases.checkpoint import Contents, contents_of, most_common_dtype
from lcm_kit.bases.source import file_hash
from lcm_kit.bases.weights import Place, entries, hushed, load_model, weight_files
from lcm_kit.errors import UserError, first_line
from lcm_kit.families import PARTS, Generation
from lcm_kit.io.files import atomic_folder, sha256_bytes


def folder_of(file: Path, config: str | None = None) -> Path:
    """The diffusers folder made from the checkpoint `file`: in the cache, converted if it is not there yet.

    `<cache>/lcm-kit/bases/<stem>-<12 hex of the file's SHA-256>`, where <cache> is $LCM_KIT_CACHE or the
    user's (~/.cache); behind it 8 hex of the configuration, where that is a folder of the user's: another
    one makes another base. `config`: a folder or a hub id to take the configuration from; else the folder
    beside the file, `<stem>/` or `config/`; else the hub's copy. Parts that the file lacks, as a UNet alone
    does, are those of that folder. Weights keep each part's dtype.
    Raises `UserError` if the file is no checkpoint of an SD1.x, SD2.x or SDXL base, or lacks a configuration.
    """
    contents = contents_of(file)
    local = _local_config(file, config)
    _require_others(file, contents, local)
    mark = f"-{_config_hash(local, contents.lacking)[:8]}" if local else ""
    target = _bases() / f"{file.stem[:80]}-{file_hash(file)[:12]}{mark}"
    if target.is_dir():
        return target
    with _one_at_a_time(target):
        if not target.is_dir():  # another process may have been faster
            _convert(file, contents, local or _hub_config(file, contents.generation, config), target)
    return target


def _bases() -> Path:
    cache = os.environ.get("LCM_KIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "lcm-kit" / "bases"


@contextlib.contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    """Processes that want the same folder wait for the first; what a killed one left is removed."""
    from huggingface_hub.utils import WeakFileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = WeakFileLock(target.parent / f".{target.name}.lock")
        lock.__enter__()
    except OSError as error:
        raise UserError(
            f"{target.parent}: cannot be written ({error.strerror or error}); set LCM_KIT_CACHE to a folder "
            "with room for a copy of the base"
        ) from error
    try:
        for left in target.parent.iterdir():
            if left.name.startswith(f".{target.name}.") and left.suffix == ".tmp":
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.__exit__(None, None, None)


# --- the configuration ---


def _local_config(file: Path, config: str | None) -> Path | None:
    beside = [file.with_suffix(""), file.parent / "config"] if config is None else [assets.place(config)]
    return next((folder for folder in beside if (folder / "model_index.json").is_file()), None)


def _config_files(config: Path) -> list[Path]:
    parts = [config / part for part in PARTS]
    files = [p for part in parts if part.is_dir() for p in part.iterdir() if p.suffix in (".json", ".txt")]
    return [config / "model_index.json", *sorted(files)]


def _config_hash(config: Path, parts: Sequence[str]) -> str:
    """Of the configuration, and of the weights of `parts`."""
    files = [*_config_files(config), *(f for p in parts for f in weight_files(Place(str(config), config), p))]
    names = [f"{p.relative_to(config).as_posix()}:{file_hash(p)}" for p in files]
    return sha256_bytes("\n".join(names).encode())


def _require_others(file: Path, contents: Contents, config: Path | None) -> None:
    """Raise `UserError` unless the parts that the file lacks lie, with their weights, in `config`."""
    for part in contents.lacking:
        place = Place(str(config), config) if config and (config / part).is_dir() else None
        try:
            held = place is not None and bool(entries(place, part))
        except UserError as error:
            raise UserError(
                f"base {str(file)!r} has no {part}, and that beside it is no help: {error}"
            ) from None
        if not held:
            raise UserError(
                f"base {str(file)!r} lacks weights of an {contents.generation.short} checkpoint "
                f"({', '.join(contents.lacking)}); give the whole checkpoint, or put the diffusers folder of "
                f"a base that has them, weights included, beside it as {file.with_suffix('')}"
            )


def _hub_config(file: Path, generation: Generation, config: str | None) -> Path:
    """A folder of the hub's cache with the family's configuration, downloaded where there is a connection."""
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "*/*.json", "tokenizer*/*.txt"]
    repositories = (config,) if config else generation.repositories
    for repository in repositories:
        try:
            found = Path(snapshot_download(repository, allow_patterns=wanted))
        except Exception as error:  # the hub raises of all kinds, none is our bug
            reason = first_line(error)
            continue
        if lacking := _lacking(found, generation):
            reason = f"its copy in the hub's cache lacks {lacking}"
            continue
        return found
    raise UserError(
        f"base {str(file)!r}: a single {generation.short} file brings no configuration and no tokenizer, and "
        f"those of {repositories[-1]} cannot be had from the hub or its cache ({reason}); put that "
        f"repository's model_index.json and its parts' .json and tokenizer files, without weights, into "
        f"{file.with_suffix('')}"
    )


def _lacking(config: Path, generation: Generation) -> str:
    """Which files are not there, for a sentence; empty if all are."""
    tokenizers = [
        part.replace("text_encoder", "tokenizer") for part in generation.checkpoint if "text" in part
    ]
    names = ["model_index.json", "scheduler/scheduler_config.json"]
    names += [f"{part}/config.json" for part in generation.checkpoint]
    names += [
        f"{part}/tokenizer.json"
        for part in tokenizers
        if not all((config / part / name).is_file() for name in ("vocab.json", "merges.txt"))
    ]
    return ", ".join(name for name in names if not (config / name).is_file())


def _check_config(file: Path, generation: Generation, config: Path) -> None:
    """A stranger's model_index.json names the classes to import: only those of the family may stand there."""
    place = f"{file.with_suffix('')}"
    try:
        index = json.loads((config / "model_index.json").read_text(encoding="utf-8"))
        parts = [
            *generation.checkpoint,
            *(part for part in PARTS if "tokenizer" in part and part in index),
        ]
        wrong = [
            part
            for part in parts
            if index[part][0] not in ("diffusers", "transformers")
            or index[part][1].removesuffix("Fast") != PARTS[part].class_name
        ]
        wrong += ["scheduler"] if index["scheduler"][0] != "diffusers" else []
        wrong += [p for p in index if p.startswith("text_encoder") and p not in generation.family.parts]
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        wrong = [f"model_index.json: {type(error).__name__} {error}"]
    if wrong:
        raise UserError(
            f"base {str(file)!r}: the configuration in {config} is not of an {generation.short} model "
            f"({', '.join(wrong)}); put that of {generation.repositories[-1]} into {place}"
        )
    if lacking := _lacking(config, generation):
        raise UserError(
            f"base {str(file)!r}: its configuration in {config} lacks {lacking}; copy the .json and "
            f"tokenizer files of {generation.repositories[-1]} to {place}"
        )


# --- the conversion ---


def _convert(file: Path, contents: Contents, config: Path, target: Path) -> None:
    from safetensors import SafetensorError

    _check_config(file, contents.generation, config)
    with atomic_folder(target) as temporary:
        try:
            readable = _respelled(file, contents, temporary)
            pipeline = _load(file, readable, contents, config)
            pipeline.save_pretrained(temporary, safe_serialization=True)
        except SafetensorError as error:  # how its writer puts a full disk
            raise OSError(str(error)) from error
        if readable != file:
            readable.unlink()


def _respelled(file: Path, contents: Contents, folder: Path) -> Path:
    """The file, or a copy in `folder` with the original layout's names and every weight times its scale."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if not contents.names.changed:
        return file
    with safe_open(file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(own) for name, own in contents.names.tensors.items()}
        for name, own in contents.names.scales.items():
            if name not in tensors or tensors[name].dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
                raise UserError(
                    f"base {str(file)!r} is quantised in a way that this kit does not read ({own}); take the "
                    "original checkpoint, in float16 or float32"
                )
            tensors[name] = _scaled(tensors[name], handle.get_tensor(own))
    save_file(tensors, folder / "respelled.safetensors")
    return folder / "respelled.safetensors"


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [out, ...] times scale, one number or one for each output, in float16."""
    shape = [-1, *[1] * (weight.ndim - 1)] if scale.numel() > 1 else []
    return (weight.float() * scale.float().reshape(shape)).to(torch.float16)


def _load(file: Path, readable: Path, contents: Contents, config: Path) -> Any:
    """The pipeline with every tensor of the file, each part in its own dtype; `readable`: it, respelled."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    dtypes = set(contents.dtypes.values())
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    family = contents.generation.family
    off = {"feature_extractor": None, "image_encoder": None, **family.pipeline_off}
    others = _others(contents.lacking, config)
    try:
        fault = _misfit(contents, config)
        if fault is None:
            with hushed():
                pipeline = family.pipeline_class().from_single_file(
                    str(readable), config=str(config), local_files_only=True, dtype=dtype,
                    **off, **others,
                )  # fmt: skip
                for part, own in contents.dtypes.items():
                    getattr(pipeline, part).to(own)
            fault = _without_values(pipeline, contents)
    except (
        OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SingleFileComponentError,
    ) as error:  # fmt: skip
        fault = first_line(error)
    if fault:
        raise UserError(
            f"base {str(file)!r}: its weights do not fit the configuration in {config} ({fault}); put the "
            f"configuration of the model that it was made from into {file.with_suffix('')}"
        )
    _tell(pipeline, contents.scheduler)
    return pipeline


def _others(parts: Sequence[str], config: Path) -> dict[str, Any]:
    """The models of `parts` from a diffusers folder, in the dtype of their files."""
    place = Place(str(config), config)
    dtypes = {part: most_common_dtype(entries(place, part).values()) for part in parts}
    return {part: load_model(place, part, dtype) for part, dtype in dtypes.items()}


def _misfit(contents: Contents, config: Path) -> str | None:
    """What a model of this configuration holds more or less than the file, before a tensor is read.

    diffusers drops what it cannot place. Text encoders may: SD2's leaves out the last layer on purpose.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        if part in contents.lacking:
            continue
        with torch.device("meta"):
            expected = len(kind.from_config(kind.load_config(config / part)).state_dict())
        if expected != contents.counts[part]:
            return f"the file has {contents.counts[part]} tensors for the {part}, not {expected}"
    return None


def _without_values(pipeline: Any, contents: Contents) -> str | None:
    """diffusers leaves what it does not find in the file without values."""
    for part in contents.generation.checkpoint:
        state = getattr(pipeline, part).state_dict()
        if empty := [name for name, tensor in state.items() if tensor.is_meta]:
            return f"the file has no {part} {empty[0]}"
    return None


def _tell(pipeline: Any, said: Mapping[str, Any]) -> None:
    """Write what the file says of its noise into the scheduler, or DDIM where that has no such setting."""
    from diffusers import DDIMScheduler

    if not said:
        return
    kind, settings = type(pipeline.scheduler), dict(said)
    if not set(said) <= set(inspect.signature(kind.__init__).parameters):
        kind, settings = DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, **said}
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
