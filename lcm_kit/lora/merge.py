"""The arithmetic of merging: several LoRAs into one, or into fewer ranks; and where they clash.

Everything works on the thin factors: with R ranks in all, a module of [m, n] costs O((m + n) R^2). All
arithmetic is float32 on the CPU, but for the factorisation of thin layers. Whoever has other kinds than plain
layers makes those of them first (`lcm_kit.lora.plain`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.lora.base_weights import plain_shape
from lcm_kit.lora.layers import Layer, Lora, layer_group

_THIN = 256  # ranks whose factorisation is done in float64

# -- Several LoRAs into one ----------------------------------------------------------------------------------


def concatenate(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """The LoRA whose update is sum_i weight_i * update_i, exactly: the ranks of each module add up.

    Every layer has strength 1 (alpha = rank) and ||down|| = ||up||; a module that one LoRA alone has keeps
    that one's rank. A linear layer and a 1x1 convolution of one module take the form of the first.
    The metadata is empty. Raises `UserError` if a weight or an update is not finite or two shapes differ.
    """
    check_weights(weights)
    found: dict[str, list[tuple[Layer, float]]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for name, layer in lora.layers.items():
            found.setdefault(name, []).append((layer, weight))
    return Lora({name: _side_by_side(name, pieces) for name, pieces in found.items()})


def check_weights(weights: Sequence[float]) -> None:
    """Raise `UserError` for a weight that is not finite."""
    for weight in weights:
        if not math.isfinite(weight):
            raise UserError(f"weight {weight} is not a finite number; give one such as 0.8")


def _side_by_side(name: str, pieces: Sequence[tuple[Layer, float]]) -> Layer:
    first = pieces[0][0]
    for layer, _ in pieces:
        _check_same_shape(name, first, layer)
    ups, downs = zip(*(balanced(name, layer, weight) for layer, weight in pieces), strict=True)
    return layer_of(torch.cat(ups, dim=1), torch.cat(downs), first.shape)


def layer_of(up: Tensor, down: Tensor, shape: Sequence[int]) -> Layer:
    """A layer of strength 1 from up [out, r] and down [r, n], for a weight of `shape`."""
    rank, ones = down.shape[0], (1,) * (len(shape) - 2)
    return Layer(down.reshape(rank, *shape[1:]), up.reshape(*up.shape, *ones), float(rank))


def _factors(layer: Layer) -> tuple[Tensor, Tensor]:
    """up [out, r] and down [r, n], float32 on the CPU; n counts a convolution's inputs times its kernel."""
    up, down = (tensor.detach().to("cpu", torch.float32).flatten(1) for tensor in (layer.up, layer.down))
    return up, down


def balanced(name: str, layer: Layer, weight: float) -> tuple[Tensor, Tensor]:
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
    if plain_shape(a.shape) != plain_shape(b.shape):
        raise UserError(
            f"{name}: one LoRA changes a weight of shape {list(a.shape)}, another one of {list(b.shape)}, so "
            "they are for different bases; merge LoRAs of one base"
        )


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
    reduced = {name: truncate_layer(name, layer, rank) for name, layer in lora.layers.items()}
    return Lora({name: found.layer for name, found in reduced.items()}), relative_errors(reduced)


class Truncated(NamedTuple):
    """A layer of fewer ranks."""

    layer: Layer
    dropped: float  # squared Frobenius norm of what is gone
    total: float  # of what was there


def truncate_layer(name: str, layer: Layer, rank: int) -> Truncated:
    """The closest layer of at most `rank`. Raises `UserError` if the update is not finite."""
    u, s, v = _svd(name, layer)
    dropped, total = _square(s[rank:]), _square(s)
    if layer.rank <= rank:
        return Truncated(layer, dropped, total)
    root = s[:rank].sqrt()
    return Truncated(layer_of(u[:, :rank] * root, root[:, None] * v[:rank], layer.shape), dropped, total)


def relative_errors(reduced: Mapping[str, Truncated]) -> dict[str, float]:
    """||update - truncated|| / ||update|| for each `layer_group` and for "all"; 0.0 where that is zero."""
    dropped, total = defaultdict[str, float](float), defaultdict[str, float](float)
    for name, found in reduced.items():
        for group in (layer_group(name), "all"):
            dropped[group] += found.dropped
            total[group] += found.total
    return {
        group: math.sqrt(dropped[group] / total[group]) if total[group] else 0.0
        for group in [*(group for group in total if group != "all"), "all"]
    }


def _svd(name: str, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k] falling, V [k, n] of the update, k <= rank, without forming it.

    up = Q_u R_u and down^T = Q_d R_d give up @ down = Q_u (R_u R_d^T) Q_d^T, and only the core, which is
    at most [rank, rank], needs an SVD.
    """
    # Where singular values lie close float32 turns their vectors by more than it rounds; thin ones are cheap
    exact = torch.float64 if layer.rank <= _THIN else torch.float32
    up, down = (factor.to(exact) for factor in _factors(layer))
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    core = layer.scale * (r_up @ r_down.T)
    _check_finite(name, float(core.abs().max()))
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    return (q_up @ u).float(), s.float(), (v @ q_down.T).float()


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
