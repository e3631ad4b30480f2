"""In which precision a cache's pictures are encoded: one for all of its rows, which its settings name.

`data.vae_precision: auto` asks the first picture, on a GPU alone, and keeps the answer in the cache's folder:
a run that was killed goes on with it, other processes take it, and no cache holds rows of two precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit import bases
from lcm_kit.bases import BaseInfo
from lcm_kit.config.schema import Data
from lcm_kit.drawing.vae import ProvenVae, half_dtypes
from lcm_kit.io import own_files, own_shapes
from lcm_kit.share import Share

FILE = "vae.json"
KEY, FULL = "data.vae_precision", "float32"  # of a cache's settings, which leave the key out where it is FULL


def of(settings: Mapping[str, Any]) -> str:
    """What the rows of a cache with these settings are encoded in."""
    return str(settings.get(KEY, FULL))


def known(folder: Path, base: BaseInfo, data: Data, old: Any) -> str | None:
    """What is settled: the key's value, or with `auto` what the cache in `folder` was begun in; else None.

    `old`: the settings in its manifest, None if it has none yet.
    """
    if data.vae_precision != "auto":
        return data.vae_precision
    vae = base.hash_of("vae")
    if old is not None and old.get("vae") == vae:
        return of(old)
    try:
        begun = own_files.read_json(folder / FILE, own_shapes.VaePrecision, "")
    except own_files.Damaged:
        return None
    return begun["precision"] if begun and begun["vae"] == vae else None


def settle(
    folder: Path,
    base: BaseInfo,
    data: Data,
    old: Any,
    device: str,
    picture: Callable[[], Tensor],
    share: Share,
) -> str:
    """As `known`; where nothing is, what `picture`, pixels [1, 3, H, W], proves on `device`."""
    found = known(folder, base, data, old)
    share.wait()  # every process has looked before the first one writes
    if found is None:
        halves = half_dtypes(device, base.vae_overflows)
        if share.first and halves:
            proven = ProvenVae(bases.load_vae(base).to(device), halves).prove(picture())
            if proven != torch.float32:
                name = str(proven).removeprefix("torch.")
                own_files.write_json(folder / FILE, {"vae": base.hash_of("vae"), "precision": name})
        share.wait()
        found = known(folder, base, data, old)
    return found or FULL


def load(base: BaseInfo, precision: str, device: str) -> ProvenVae:
    """The base's VAE on `device`, which encodes in `precision`; on CUDA convolutions lie channels last."""
    vae = bases.load_vae(base).to(device)
    if torch.device(device).type == "cuda":
        vae.to(memory_format=torch.channels_last)
    return ProvenVae(vae, () if precision == FULL else (getattr(torch, precision),), settled=True)
