"""The arithmetic of merging: several LoRAs into one, into fewer ranks, or into a base; and where they clash.

Everything works on the thin factors. With R ranks in all, a module of [m, n] costs O((m + n) R^2), and its
full update is formed only where it is added to a weight. All arithmetic is float32 on the CPU.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.export import untrusted
from lcm_kit.export.lora import Layer, Lora, layer_group
from lcm_kit.families.source import STEMS, read_json
from lcm_kit.files import atomic_folder

Plan = dict[Path, dict[str, str]]  # a part's file, relative to the base: tensor -> module that changes it


# -- Several LoRAs into one ----------------------------------------------------------------------------------


def concatenate(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """The LoRA whose update is sum_i weight_i * update_i, exactly: the ranks of each module add up.

    Every layer has strength 1 (alpha = rank) and ||down|| = ||up||; a module that one LoRA alone has keeps
    that one's rank. A linear layer and a 1x1 convolution of one module take the form of the first.
    The metadata is empty. Raises `UserError` if a weight or an update is not finite or two shapes differ.
    """
    for weight in weights:
        if not math.isfinite(weight):
            raise UserError(f"weight {weight} is not a finite number; give one such as 0.8")
    found: dict[str, list[tuple[Layer, float]]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for name, layer in lora.layers.items():
            found.setdefault(name, []).append((layer, weight))
    return Lora({name: _side_by_side(name, pieces) for name, pieces in found.items()})


def _side_by_side(name: str, pieces: Sequence[tuple[Layer, float]]) -> Layer:
    first = pieces[0][0]
    for layer, _ in pieces:
        _check_same_shape(name, first, layer)
    ups, downs = zip(*(_balanced(name, layer, weight) for layer, weight in pieces), strict=True)
    return _layer(torch.cat(ups, dim=1), torch.cat(downs), like=first)


def _factors(layer: Layer) -> tuple[Tensor, Tensor]:
    """up [out, r] and down [r, n], float32 on the CPU; n counts a convolution's inputs times its kernel."""
    up, down = (tensor.detach().to("cpu", torch.float32).flatten(1) for tensor in (layer.up, layer.down))
    return up, down


def _layer(up: Tensor, down: Tensor, like: Layer) -> Layer:
    """A layer of strength 1 from up [out, r] and down [r, n], in the form of `like`."""
    rank, ones = down.shape[0], (1,) * (like.down.ndim - 2)
    return Layer(down.reshape(rank, *like.shape[1:]), up.reshape(*up.shape, *ones), float(rank))


def _balanced(name: str, layer: Layer, weight: float) -> tuple[Tensor, Tensor]:
    """up [out, r] and down [r, n] of equal norm, whose product is weight * the layer's update.

    Only the product counts, so the norms are free. Files hold float16, which overflows at 65504 and loses
    digits below 6e-5; trained layers are lopsided (up starts at zero), and weight * alpha / rank on one side
    alone would add to it. Equal norms keep the larger factor as small, and the smaller as large, as can be.
    """
    up, down = _factors(layer)
    factor = weight * layer.scale
    norms = [float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in (up, down)]
    _check_finite(name, *norms)
    if factor == 0 or 0 in norms:
        return torch.zeros_like(up), torch.zeros_like(down)
    # One root each: a quotient under the root could overflow
    root, (tall, wide) = math.sqrt(abs(factor)), map(math.sqrt, norms)
    return up * math.copysign(root * wide / tall, factor), down * (root * tall / wide)


def _check_finite(name: str, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise UserError(f"{name}: its update holds NaN or Inf; take a file from an earlier checkpoint")


def _check_same_shape(name: str, a: Layer, b: Layer) -> None:
    if _plain_shape(a.shape) != _plain_shape(b.shape):
        raise UserError(
            f"{name}: one LoRA changes a weight of shape {list(a.shape)}, another one of {list(b.shape)}, so "
            "they are for different bases; merge LoRAs of one base"
        )


def _plain_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Without the kernel of a 1x1 convolution, which is a linear layer written differently."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


# -- Fewer ranks ---------------------------------------------------------------------------------------------


def truncate(lora: Lora, rank: int) -> tuple[Lora, dict[str, float]]:
    """The closest LoRA of at most `rank` for each module (Eckart and Young 1936), and what it costs.

    Errors are relative Frobenius norms, ||update - truncated|| / ||update||, for each `layer_group` and for
    "all"; 0.0 where the update is zero. A layer of rank <= `rank` is left as it is; others get strength 1 and
    balanced factors. The metadata is empty: what it said of ranks is no longer true.
    Raises `UserError` if `rank` is below 1 or an update is not finite.
    """
    if rank < 1:
        raise UserError(f"rank {rank} is below 1; choose 1 or more")
    layers, dropped, total = {}, defaultdict[str, float](float), defaultdict[str, float](float)
    for name, layer in lora.layers.items():
        u, s, v = _svd(name, layer)
        if layer.rank <= rank:
            layers[name] = layer
        else:
            root = s[:rank].sqrt()
            layers[name] = _layer(u[:, :rank] * root, root[:, None] * v[:rank], like=layer)
        for group in (layer_group(name), "all"):
            dropped[group] += _square(s[rank:])
            total[group] += _square(s)
    return Lora(layers), {
        group: math.sqrt(dropped[group] / total[group]) if total[group] else 0.0
        for group in [*(group for group in total if group != "all"), "all"]
    }


def _svd(name: str, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k] falling, V [k, n] of the update, k <= rank, without forming it.

    up = Q_u R_u and down^T = Q_d R_d give up @ down = Q_u (R_u R_d^T) Q_d^T, and only the core, which is
    at most [rank, rank], needs an SVD.
    """
    up, down = _factors(layer)
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    core = layer.scale * (r_up @ r_down.T)
    _check_finite(name, float(core.abs().max()))
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    return q_up @ u, s, v @ q_down.T


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())


# -- Where two LoRAs clash -----------------------------------------------------------------------------------


class Interference(NamedTuple):
    """How the updates of two LoRAs lie to each other within a block."""

    group: str  # `lora.layer_group`, or "all"
    cosine: float  # 1: the same direction, 0: independent, -1: they cancel
    norm_a: float  # Frobenius, with the LoRA's weight
    norm_b: float
    shared: int  # modules that both change


def interference(a: Lora, b: Lora, weights: tuple[float, float] = (1.0, 1.0)) -> list[Interference]:
    """Compare the updates, by block and last for "all"; each times its weight.

    cosine = <a, b> / (||a|| ||b||), the inner product over the modules that both have, but each norm over all
    modules that the LoRA has in the block: what only one of them changes is orthogonal to the other. It is
    0.0 where a norm is zero. Raises `UserError` if shapes differ or an update is not finite.
    """
    inner, shared = defaultdict[str, float](float), defaultdict[str, int](int)
    squares_a, squares_b = (_squares(lora, weight) for lora, weight in zip((a, b), weights, strict=True))
    for name in (name for name in a.layers if name in b.layers):
        product = weights[0] * weights[1] * _inner(name, a.layers[name], b.layers[name])
        for group in (layer_group(name), "all"):
            inner[group] += product
            shared[group] += 1
    rows = []
    for group in [*dict.fromkeys(g for g in (*squares_a, *squares_b) if g != "all"), "all"]:
        norm_a, norm_b = (math.sqrt(squares.get(group, 0.0)) for squares in (squares_a, squares_b))
        # One norm at a time: their product could underflow to zero
        cosine = inner[group] / norm_a / norm_b if norm_a and norm_b else 0.0
        rows.append(Interference(group, max(-1.0, min(1.0, cosine)), norm_a, norm_b, shared[group]))
    return rows


def _squares(lora: Lora, weight: float) -> dict[str, float]:
    """||weight * update||^2 by block and for "all"."""
    found = defaultdict[str, float](float)
    for name, layer in lora.layers.items():
        # From the singular values: a Gram matrix would lose half of the digits where parts cancel
        square = weight**2 * _square(_svd(name, layer)[1])
        for group in (layer_group(name), "all"):
            found[group] += square
    return found


def _inner(name: str, a: Layer, b: Layer) -> float:
    """<up_a down_a, up_b down_b> = sum of (up_a^T up_b) * (down_a down_b^T), which are [rank_a, rank_b]."""
    _check_same_shape(name, a, b)
    (up_a, down_a), (up_b, down_b) = _factors(a), _factors(b)
    products = (up_a.T @ up_b).double() * (down_a @ down_b.T).double()
    return a.scale * b.scale * float(products.sum())


# -- Into a base ---------------------------------------------------------------------------------------------


def fuse_into(
    loras: Sequence[Lora], weights: Sequence[float], base: Path, output: Path, *, variant: str | None = None
) -> None:
    """Write the diffusers pipeline `output`: the folder `base` with W + sum_i weight_i * update_i for each W.

    Weights keep their dtype, file and header; the sum is float32 and rounded once. Of the parts that change,
    only the safetensors files of `variant` come along: other variants and formats would be the old weights.
    Raises `UserError`, writing nothing, if `output` exists, `base` is no such folder, it lacks a module or
    has it in another shape, or a sum overflows its dtype.
    """
    if os.path.lexists(output):
        raise UserError(f"{output} exists already; choose another output")
    index = read_json(base / "model_index.json", str(base))
    lora = concatenate(loras, weights)
    plan: Plan = {}
    for part in lora.parts():
        plan |= _plan(lora, base, part, variant)
    copies = list(_copies(base, index, lora.parts()))  # listed first: `output` may lie within `base`
    with atomic_folder(output) as temporary:
        for file in [*copies, *(file for file, changes in plan.items() if not changes)]:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, temporary / file)  # the content of the hub cache's links
        for file, changes in plan.items():
            if changes:
                _fuse_file(base / file, temporary / file, changes, lora)


def _plan(lora: Lora, base: Path, part: str, variant: str | None) -> Plan:
    """The files of a part's weights, and the tensors in each that change; reads the headers alone."""
    names = [name for name in lora.layers if name.startswith(f"{part}.")]
    if not (base / part).is_dir():
        raise UserError(f"{names[0]}: base {str(base)!r} has no {part}; take the base that the LoRA is for")
    files = _weight_files(base, part, variant)
    held = {file: untrusted.inspect(base / file).entries for file in files if file.suffix != ".json"}
    homes = {key: file for file, entries in held.items() for key in entries}
    plan: Plan = {file: {} for file in files}
    for name in names:
        key = next((key for key in _keys(name) if key in homes), None)
        if key is None:
            raise UserError(
                f"{name}: base {str(base)!r} has no such module; take the base that the LoRA is for"
            )
        _check_weight(name, lora.layers[name], *held[homes[key]][key])
        plan[homes[key]][key] = name
    return plan


def _keys(name: str) -> list[str]:
    """What a base can call the weight: transformers 5 saves CLIPTextModel without `text_model.` in front."""
    module = name.partition(".")[2]
    return [f"{module}.weight", f"{module.removeprefix('text_model.')}.weight"]


def _check_weight(name: str, layer: Layer, dtype: str, shape: Sequence[int]) -> None:
    if _plain_shape(layer.shape) != _plain_shape(shape):
        raise UserError(
            f"{name}: the LoRA changes a weight of shape {list(layer.shape)}, the base's is {list(shape)}; "
            "take the base that the LoRA is for"
        )
    if not dtype.startswith(("F", "BF")):
        raise UserError(f"{name}: the base holds {dtype} numbers, so it is quantised; take the original base")


def _weight_files(base: Path, part: str, variant: str | None) -> list[Path]:
    """The safetensors files of a part, relative to `base`: one, or an index and its shards.

    The names are diffusers' and transformers' (`_add_variant` of either): the variant stands before the last
    ending, also in the index's name; what shards are called, the index says.
    """
    mark = f".{variant}" if variant else ""
    single = Path(part, f"{STEMS[part]}{mark}.safetensors")
    index = Path(part, f"{STEMS[part]}.safetensors.index{mark}.json")
    if (base / single).is_file():
        return [single]
    if not (base / index).is_file():
        raise UserError(
            f"base {str(base)!r} has no {single}; check the variant, or save the base as safetensors"
        )
    shards = read_json(base / index, str(base)).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, Mapping) else []
    # A name that leads out of the folder would be read, and written, elsewhere
    if not names or any(Path(name).name != name or not (base / part / name).is_file() for name in names):
        raise UserError(
            f"base {str(base)!r}: {index} names files that are not beside it; save the base again"
        )
    return [index, *(Path(part, name) for name in names)]


def _copies(base: Path, index: Mapping[str, Any], changed: Collection[str]) -> Iterator[Path]:
    """What of a pipeline folder is copied as it is, relative to `base`, whose model_index.json is `index`.

    The hub's folders hold more: whole checkpoints beside model_index.json, other frameworks' and other
    variants' weights. None of them would have the LoRA. So the top level gives its texts and the parts that
    `index` names; a part that changes gives its JSON and Python files.
    """
    for entry in sorted(base.iterdir()):
        if entry.is_dir() and isinstance(index.get(entry.name), list):
            for file in sorted(entry.rglob("*")):
                text = file.suffix in (".json", ".py") and ".index." not in file.name
                hidden = any(part.startswith(".") for part in file.relative_to(base).parts)
                if file.is_file() and not hidden and (text or entry.name not in changed):
                    yield file.relative_to(base)
        elif entry.is_file() and _is_text(entry):
            yield entry.relative_to(base)


def _is_text(file: Path) -> bool:
    licence = not file.suffix and not file.name.startswith(".")
    return licence or file.suffix in (".json", ".md", ".txt", ".py")


def _fuse_file(source: Path, target: Path, changes: Mapping[str, str], lora: Lora) -> None:
    """Copy a safetensors file with the updates of the modules in `changes` (tensor -> module) added."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with safe_open(source, framework="pt") as file:
            header = {"format": "pt"} | (file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key, name in changes.items():
            tensors[key] = _added(name, tensors[key], lora.layers[name])
        save_file(tensors, target, metadata=header)
    except SafetensorError as error:  # also where the disk is full: safetensors raises no OSError
        raise UserError(f"{source} cannot be copied with its changes ({error}); free some space") from error


def _added(name: str, weight: Tensor, layer: Layer) -> Tensor:
    """weight + update, in the weight's dtype."""
    exact = weight.float() + layer.delta().reshape(weight.shape)
    rounded = exact.to(weight.dtype)
    if untrusted.not_finite({name: rounded}):
        raise UserError(
            f"{name}: its sum, up to {float(exact.abs().max()):.3g}, overflows the base's "
            f"{str(weight.dtype).removeprefix('torch.')}; take smaller weights or a base in float32"
        )
    return rounded
