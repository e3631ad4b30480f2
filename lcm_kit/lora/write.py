"""One LoRA file on disk, in one style, with the metadata that apps read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_file
from lcm_kit.lora import diffusers_format, kohya_format, metadata, untrusted
from lcm_kit.lora.layers import Lora
from lcm_kit.lora.provenance import Provenance
from lcm_kit.lora.structure import Structure

FORMATS: dict[str, Any] = {"diffusers": diffusers_format, "kohya": kohya_format}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def file_name(style: str, title: str) -> str:
    """diffusers looks for one name; apps show a LoRA's file name to the user, so that is the run's."""
    return diffusers_format.FILE if style == "diffusers" else f"{title}.safetensors"


def write(path: Path, lora: Lora, structure: Structure, style: str, dtype: str, facts: Provenance) -> Lora:
    """Write `lora` to `path` as `style` ("diffusers" or "kohya") in `dtype`; returns it as the file has it.

    The same weights and facts give the same bytes.

    Raises `UserError`, leaving what stood at `path`, if a weight is NaN or Inf, overflows `dtype` or has no
    name in the style.
    """
    from safetensors.torch import save_file

    assert lora.plain, "what is not a layer would be lost"
    form = FORMATS[style]
    even = form.as_written(lora)
    rounded = {name: layer.to(DTYPES[dtype]) for name, layer in even.layers.items()}
    done = Lora(rounded, metadata.build(even, structure, facts, style=style) | form.header(even))
    tensors = {key: value.contiguous() for key, value in form.tensors(done, structure).items()}
    _check_finite(form.tensors(even, structure), tensors, dtype)
    digest = metadata.tensor_hash(tensors)
    header = {**done.metadata, "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **header})
        _sort_metadata(temporary)
    return Lora(rounded, header)


def _sort_metadata(file: Path) -> None:
    """safetensors writes the keys of the metadata in another order every time; this sorts them in place."""
    with file.open("rb+") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length, "safetensors spells its header in another way than it did"
        handle.seek(8)
        handle.write(text)


def _check_finite(exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor], dtype: str) -> None:
    if bad := untrusted.not_finite(exact):
        raise UserError(
            f"{bad[0]} holds NaN or Inf ({len(bad)} tensors do); train again from a checkpoint before"
        )
    if bad := untrusted.not_finite(rounded):
        most = max(float(exact[name].float().abs().max()) for name in bad)
        raise UserError(
            f"{bad[0]} overflows {dtype}: {most:.3g} is above {torch.finfo(DTYPES[dtype]).max:.3g} "
            f"({len(bad)} tensors do); write bfloat16 or float32 instead"
        )
