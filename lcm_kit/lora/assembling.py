"""The tensors of one module into its update: which kind it is, whether they fit, at which strength."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lcm_kit.lora.kinds import Dora, Full, LoHa, LoKr, Norm
from lcm_kit.lora.layers import Layer, Update
from lcm_kit.lora.spelling import STRENGTHS

Shape = tuple[int, ...]
Alpha = Callable[[int | None], float]  # rank -> alpha; without a rank the strength itself
Piece = Mapping[str, Tensor]  # role -> tensor

# What tells each kind, the roles that it must and may have
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LORA = ("down", "up", "mid")
_DORA = ("dora_scale", "lora_magnitude_vector")
_BIAS = ("bias", "diff_b", "b_norm")


class Unfit(Exception):
    """The rest of a sentence that begins with the module's name."""


def check(piece: Piece) -> None:
    """Raise `Unfit` for strengths that are no number and weights that are none."""
    for role, tensor in piece.items():
        if role in STRENGTHS:
            if tensor.numel() != 1:
                raise Unfit(f"has {_an(role)} of shape {list(tensor.shape)}, which is not one number")
            if not math.isfinite(float(tensor)):
                raise Unfit(f"has {_an(role)} that is not a finite number")
        elif not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise Unfit(f"has its {role} in {kind} numbers, so it is quantised; take the original file")
        elif not tensor.numel():
            raise Unfit(f"has its {role} of shape {list(tensor.shape)}, which is empty")


def update(piece: Piece, shape: Shape, label: str, alpha: Alpha, notes: Counter[str]) -> Update | None:
    """What the weight of `shape` changes by; None if the piece has nothing for it (a bias alone).

    `label` names the base. Raises `Unfit` where something is missing or does not fit.
    """
    kinds = {
        "a LoRA": [role for role in _LORA if role in piece],
        "a LoHa": [role for role in piece if role.startswith("hada_")],
        "a LoKr": [role for role in piece if role.startswith("lokr_")],
        "a full difference": [role for role in ("diff", "w_norm") if role in piece],
    }
    held = [kind for kind, roles in kinds.items() if roles]
    magnitude = [role for role in _DORA if role in piece]
    if len(held) > 1 or len(magnitude) > 1:
        raise Unfit(f"is there as {' and '.join(held if len(held) > 1 else magnitude)} at once")
    if not held:
        if any(role in piece for role in _BIAS) and not magnitude:
            return None
        raise Unfit(_missing(piece))
    if len(shape) == 1:
        return _norm(piece, shape, label, alpha, magnitude)
    found = _KINDS[held[0]](piece, shape, label, alpha, notes)
    return _dora(found, piece[magnitude[0]], magnitude[0], shape) if magnitude else found


def bias(piece: Piece, shape: Shape, alpha: Alpha) -> Tensor | None:
    """What the bias [out] changes by, float32; None if the piece says nothing of it. Raises `Unfit`."""
    held = [role for role in _BIAS if role in piece]
    if not held:
        return None
    value = piece[held[0]].float().flatten()
    if len(held) > 1 or value.numel() != shape[0]:
        raise Unfit(f"has a change of its bias of shape {list(piece[held[0]].shape)}, not [{shape[0]}]")
    # peft's `lora_bias` is the bias of B, which the strength multiplies too
    return value * (_scale(piece, alpha) if held[0] == "bias" else alpha(None))


def rank_of(piece: Piece) -> int | None:
    """The rank by which alpha is divided; None where the kind has none. As LyCORIS and the apps have it."""
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in piece and piece[role].ndim:
            return int(piece[role].shape[0])
    return None


def _scale(piece: Piece, alpha: Alpha) -> float:
    rank = rank_of(piece)
    return alpha(rank) / rank if rank else alpha(None)


def _an(role: str) -> str:
    return "an alpha" if role == "alpha" else f"a {role}"


def _missing(piece: Piece) -> str:
    has = " and ".join(sorted(piece))
    return f"has only {has}: the rest of it is missing from the file"


def _lora(piece: Piece, shape: Shape, label: str, alpha: Alpha, notes: Counter[str]) -> Layer:
    """In the module's own shapes."""
    if "down" not in piece or "up" not in piece:
        raise Unfit(_missing(piece))
    down, up = piece["down"], piece["up"]
    rank = down.shape[0] if down.ndim else 0
    shapes = (rank, *shape[1:]), (shape[0], rank, *(1,) * (len(shape) - 2))
    if "mid" in piece:
        down = _folded(piece["mid"], down, shape)
        rank = down.shape[0]
        notes["folded"] += 1
    if not rank or down.numel() != math.prod(shapes[0]) or up.numel() != math.prod(shapes[1]):
        raise _misfit(label, shape, {"down": piece["down"], "up": up})
    if tuple(down.shape) != shapes[0]:
        notes["reshaped"] += 1
    return Layer(down.reshape(shapes[0]), up.reshape(shapes[1]), alpha(rank))


def _folded(mid: Tensor, down: Tensor, shape: Shape) -> Tensor:
    """LoCon's third factor (a CP decomposition) times down: exactly a down with a kernel."""
    rank = down.shape[0] if down.ndim else 0
    if tuple(mid.shape) != (rank, rank, *shape[2:]) or mid.ndim != 4 or down.numel() != rank * shape[1]:
        raise Unfit(f"has a mid of shape {list(mid.shape)}, which does not fit down {list(down.shape)}")
    return torch.einsum("rshw,si->rihw", mid.float(), down.float().flatten(1)).to(down.dtype)


def _loha(piece: Piece, shape: Shape, label: str, alpha: Alpha, notes: Counter[str]) -> LoHa:
    factors = {role: piece[role] for role in _LOHA if role in piece}
    cores = {role: piece[role] for role in ("hada_t1", "hada_t2") if role in piece}
    if len(factors) < 4 or len(cores) == 1:
        raise Unfit(_missing(piece))
    for n in ("1", "2"):
        a, b, core = factors[f"hada_w{n}_a"], factors[f"hada_w{n}_b"], cores.get(f"hada_t{n}")
        if not _pair_fits(a, b, core, shape[0], shape[1], shape[2:]):
            raise _misfit(label, shape, factors | cores)
    w1_a, w1_b, w2_a, w2_b = factors.values()
    scale, (t1, t2) = _scale(piece, alpha), map(cores.get, ("hada_t1", "hada_t2"))
    return LoHa(w1_a, w1_b, w2_a, w2_b, scale, shape, t1, t2)


def _pair_fits(a: Tensor, b: Tensor, core: Tensor | None, out: int, inner: int, kernel: Shape) -> bool:
    """Whether a b, or with a core [r, r, kh, kw] the product of all three, is [out, inner, *kernel]."""
    if a.ndim < 2 or b.ndim < 2:
        return False
    rank = b.shape[0]
    if core is None:
        return (
            a.numel() == out * rank
            and a.shape[:2] == (out, rank)
            and b.numel() == rank * inner * math.prod(kernel)
        )
    return (
        tuple(core.shape) == (rank, rank, *kernel)
        and len(kernel) == 2
        and (a.numel(), a.shape[0], b.numel()) == (rank * out, rank, rank * inner)
    )


def _lokr(piece: Piece, shape: Shape, label: str, alpha: Alpha, notes: Counter[str]) -> LoKr:
    got = _lokr_factors(piece)
    if got is None:
        raise Unfit(_missing(piece))
    if not lokr_fits(piece, shape):
        raise _misfit(label, shape, got)
    return LoKr(scale=_scale(piece, alpha), shape=shape, **got)


def lokr_fits(piece: Piece, shape: Shape) -> bool:
    """Whether both factors are there and their Kronecker product is a weight of `shape`."""
    got = _lokr_factors(piece)
    if got is None or len(shape) < 2:
        return False
    first, second = _sides(got, "w1", ()), _sides(got, "w2", shape[2:])
    if first is None or second is None:
        return False
    return (first[0] * second[0], first[1] * second[1]) == shape[:2]


def _lokr_factors(piece: Piece) -> dict[str, Tensor] | None:
    """By the names of `LoKr`'s fields; a whole factor goes before its thin ones. None if one is missing."""
    got = {role.removeprefix("lokr_"): tensor for role, tensor in piece.items() if role.startswith("lokr_")}
    if not all(n in got or {f"{n}_a", f"{n}_b"} <= got.keys() for n in ("w1", "w2")):
        return None
    thin = {"w1": ("w1_a", "w1_b"), "w2": ("w2_a", "w2_b", "t2")}
    gone = {role for n, roles in thin.items() if n in got for role in roles}
    return {role: tensor for role, tensor in got.items() if role not in gone}


def _sides(got: Mapping[str, Tensor], name: str, kernel: Shape) -> tuple[int, int] | None:
    """Rows and columns (a kernel aside) of a factor of a Kronecker product; None if its pieces do not fit."""
    if (whole := got.get(name)) is not None:
        fine = whole.ndim == 2 + len(kernel) and tuple(whole.shape[2:]) == kernel
        one = whole.ndim == 2 and math.prod(kernel) == 1  # a linear layer for a 1x1 convolution
        return (int(whole.shape[0]), int(whole.shape[1])) if fine or one else None
    a, b, core = got[f"{name}_a"], got[f"{name}_b"], got.get("t2") if name == "w2" else None
    if a.ndim < 2 or b.ndim < 2:
        return None
    out = int(a.shape[0] if core is None else a.numel() // a.shape[0])
    inner = b.numel() // b.shape[0] // (1 if core is not None else math.prod(kernel))
    return (out, inner) if _pair_fits(a, b, core, out, inner, kernel) else None


def _full(piece: Piece, shape: Shape, label: str, alpha: Alpha, notes: Counter[str]) -> Full:
    if "diff" not in piece:
        raise Unfit("is no norm, but has a w_norm")
    if piece["diff"].numel() != math.prod(shape) or piece["diff"].shape[:1] != shape[:1]:
        raise _misfit(label, shape, {"diff": piece["diff"]})
    return Full(piece["diff"], shape, alpha(None))


def _norm(piece: Piece, shape: Shape, label: str, alpha: Alpha, magnitude: list[str]) -> Norm:
    value = piece.get("w_norm", piece.get("diff"))
    if value is None or magnitude:
        raise Unfit("is a norm, which holds no LoRA")
    if value.numel() != shape[0]:
        raise _misfit(label, shape, {"w_norm": value})
    return Norm(value, shape, alpha(None))


def _dora(inner: Update, magnitude: Tensor, role: str, shape: Shape) -> Dora:
    """peft's magnitude is for each output; LyCORIS's and kohya's as its shape says ([out, 1] or [1, in])."""
    assert isinstance(inner, Layer | LoHa | LoKr | Full)
    out, into, held = shape[0], shape[1], tuple(magnitude.shape)
    axis: Literal[0, 1] = 0 if role == "lora_magnitude_vector" or held[:1] == (out,) else 1
    if magnitude.numel() != (out if axis == 0 else into):
        raise Unfit(
            f"has a {role} of shape {list(held)}, which does not fit its weight of shape {list(shape)}"
        )
    return Dora(inner, magnitude, axis)


_KINDS: dict[str, Callable[..., Update]] = {
    "a LoRA": _lora,
    "a LoHa": _loha,
    "a LoKr": _lokr,
    "a full difference": _full,
}


def _misfit(label: str, shape: Shape, held: Mapping[str, Tensor]) -> Unfit:
    told = [f"{role} {list(tensor.shape)}" for role, tensor in held.items()]
    words = f"{', '.join(told[:-1])} and {told[-1]} do not" if len(told) > 1 else f"{told[0]} does not"
    return Unfit(f"of {label} has a weight of shape {list(shape)}, which {words} fit")
