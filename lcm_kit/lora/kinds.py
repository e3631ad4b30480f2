"""Updates of a weight that are not a plain LoRA: LoHa, LoKr, full differences, and DoRA on top of any.

Each gives its `delta`: what a file adds to the weight W of a module at strength 1, float32, in W's shape. At
strength w it is w times that. Sources: LoHa arXiv:2108.06098 (FedPara), LoKr and all scales LyCORIS
`lycoris/modules/{loha,lokr,full,norms}.py` (arXiv:2309.14859), DoRA arXiv:2402.09353 and LyCORIS
`apply_weight_decompose`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.lora.layers import Layer, Update

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoHa:
    """scale * (w1_a w1_b) * (w2_a w2_b), the products multiplied element by element.

    Plain factors are w_a [out, r] and w_b [r, in * kh * kw]. With cores t [r, r, kh, kw] they are
    w_a [r, out] and w_b [r, in].
    """

    kind: ClassVar[str] = "LoHa"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float
    shape: Shape
    t1: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int:
        """r1 r2."""
        cores = self.t1 is not None, self.t2 is not None
        pairs = zip((self.w1_a, self.w2_a), cores, strict=True)
        return math.prod(int(a.shape[0] if core else a.shape[1]) for a, core in pairs)

    def factors(self) -> tuple[Tensor, Tensor]:
        """up [out, r1 r2] and down [r1 r2, in * kh * kw], whose product is the update: exactly a LoRA.

        Row i of up is the Kronecker product of the rows i of both w_a, column j of down that of the columns j
        of both w_b (the Khatri-Rao product).
        """
        (a1, b1), (a2, b2) = (
            _thin(self.w1_a, self.w1_b, self.t1),
            _thin(self.w2_a, self.w2_b, self.t2),
        )
        up = torch.einsum("op,oq->opq", a1, a2).flatten(1)
        down = torch.einsum("pi,qi->pqi", b1, b2).flatten(0, 1)
        return self.scale * up, down

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """As `Update.delta`."""
        (a1, b1), (a2, b2) = (
            _thin(self.w1_a, self.w1_b, self.t1),
            _thin(self.w2_a, self.w2_b, self.t2),
        )
        return (self.scale * (a1 @ b1) * (a2 @ b2)).reshape(self.shape)


@dataclass(frozen=True)
class LoKr:
    """scale * (w1 Kronecker w2); each of the two whole, or as the product of thin factors.

    w1 is [a, b] and w2 [c, d] or [c, d, kh, kw] for a weight [a c, b d] or [a c, b d, kh, kw].
    """

    kind: ClassVar[str] = "LoKr"
    scale: float
    shape: Shape
    w1: Tensor | None = None
    w1_a: Tensor | None = None  # [a, r]
    w1_b: Tensor | None = None  # [r, b]
    w2: Tensor | None = None
    w2_a: Tensor | None = None  # [c, r]; with t2 [r, c]
    w2_b: Tensor | None = None  # [r, d * kh * kw]; with t2 [r, d]
    t2: Tensor | None = None  # [r, r, kh, kw]

    @property
    def rank(self) -> int:
        """r1 r2, where a whole factor has its smaller side."""
        first = min(self.w1.shape) if self.w1 is not None else _length(self.w1_b)
        second = min(self.w2.flatten(1).shape) if self.w2 is not None else _length(self.w2_b)
        return first * second

    def factors(self) -> tuple[Tensor, Tensor]:
        """up [out, r1 r2] and down [r1 r2, in * kh * kw]: (A1 B1) kron (A2 B2) = (A1 kron A2)(B1 kron B2)."""
        a1, b1 = self._pair(self.w1, self.w1_a, self.w1_b, None)
        a2, b2 = self._pair(self.w2, self.w2_a, self.w2_b, self.t2)
        return self.scale * torch.kron(a1, a2), torch.kron(b1, b2)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """As `Update.delta`."""
        (a1, b1), (a2, b2) = (
            self._pair(self.w1, self.w1_a, self.w1_b, None),
            self._pair(self.w2, self.w2_a, self.w2_b, self.t2),
        )
        return (self.scale * torch.kron(a1 @ b1, a2 @ b2)).reshape(self.shape)

    @staticmethod
    def _pair(
        whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if whole is None:
            assert a is not None and b is not None
            return _thin(a, b, core)
        matrix = whole.float().flatten(1)
        rows, columns = matrix.shape
        return (matrix, torch.eye(columns)) if columns < rows else (torch.eye(rows), matrix)


@dataclass(frozen=True)
class _Difference:
    """What is added to a weight as it stands in the file; no alpha counts."""

    difference: Tensor
    shape: Shape
    scale: float = 1.0

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """As `Update.delta`."""
        return self.scale * self.difference.float().reshape(self.shape)


@dataclass(frozen=True)
class Full(_Difference):
    """The difference itself (`.diff`), as large as the weight."""

    kind: ClassVar[str] = "full difference"


@dataclass(frozen=True)
class Norm(_Difference):
    """The difference (`w_norm`, `.diff`) to the weight [n] of a group or layer norm."""

    kind: ClassVar[str] = "norm"


@dataclass(frozen=True)
class Dora:
    """m (W + delta) / ||W + delta||, where `inner` gives delta: W's direction and size apart.

    The norm is taken over all dimensions but `axis`, 0 (a norm for each output) or 1 (for each input), and m
    holds as many numbers.
    """

    kind: ClassVar[str] = "DoRA"
    inner: Layer | LoHa | LoKr | Full
    magnitude: Tensor
    axis: Literal[0, 1]

    @property
    def shape(self) -> Shape:
        """As `Update.shape`."""
        return self.inner.shape

    @property
    def scale(self) -> float:
        """That of `inner`."""
        return self.inner.scale

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """m (W + delta) / ||W + delta|| - W. Raises `UserError` without `weight`, of `shape`."""
        base = _base("DoRA", weight).float().reshape(self.shape)
        moved = base + self.inner.delta()
        over = [k for k in range(moved.ndim) if k != self.axis]
        norm = torch.linalg.vector_norm(moved, dim=over, keepdim=True)
        size = self.magnitude.float().reshape(norm.shape)
        return moved * (size / (norm + torch.finfo(torch.float32).eps)) - base


@dataclass(frozen=True)
class Rebased:
    """A LoRA that was trained on a base whose weights had its start taken out.

    PiSSA (arXiv:2404.02948) or OLoRA (arXiv:2406.01775). The start is a part of W itself, so it follows from
    the base's weight: with W = U S V^T the first r of its singular triples (PiSSA), with W = Q R scale *
    Q[:, :r] R[:r] (OLoRA). What the file adds to the true base is the LoRA's update less that: exactly a LoRA
    of rank 2 r. Source: peft `tuners/lora/layer.py` (`pissa_init`, `olora_init`) and
    `LoraModel.subtract_mutated_init`.
    """

    inner: Layer
    start: Literal["PiSSA", "OLoRA"]

    @property
    def kind(self) -> str:
        """`start`."""
        return self.start

    @property
    def shape(self) -> Shape:
        """As `Update.shape`."""
        return self.inner.shape

    @property
    def scale(self) -> float:
        """That of `inner`."""
        return self.inner.scale

    def factors(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """up [out, 2 r] and down [2 r, in], whose product is the update; `UserError` without `weight`."""
        start = self._start(_base(self.start, weight))
        up = torch.cat([self.scale * self.inner.up.float(), -start[0]], dim=1)
        return up, torch.cat([self.inner.down.float(), start[1]])

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """As `Update.delta`, exact to float32."""
        up, down = self.factors(weight)
        return up @ down

    def _start(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What was taken out of `weight`, as [out, r] and [r, in]."""
        r = self.inner.rank
        if self.start == "PiSSA":
            u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
            return u[:, :r] * s[:r].sqrt(), s[:r].sqrt()[:, None] * v[:r]
        q, upper = torch.linalg.qr(weight.float())
        return self.scale * q[:, :r], upper[:r]


def _base(kind: str, weight: Tensor | None) -> Tensor:
    if weight is None:
        raise UserError(
            f"what a {kind} changes follows from the base's weights; give its folder as --base FOLDER"
        )
    return weight


def _length(factor: Tensor | None) -> int:
    assert factor is not None
    return int(factor.shape[0])


def _thin(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """[out, r] and [r, in * kh * kw] of a pair of factors; a core is folded into the second."""
    if core is None:
        return a.float().flatten(1), b.float().flatten(1)
    folded = torch.einsum("pqhw,qi->pihw", core.float(), b.float().flatten(1))
    return a.float().flatten(1).T.contiguous(), folded.flatten(1)  # torch.kron wants it whole


def exact_rank(update: Update) -> int:
    """The rank at which a plain LoRA certainly holds the update: that of thin factors, else the full one."""
    full = min(update.shape[0], math.prod(update.shape[1:]))
    if isinstance(update, Layer):
        return update.rank
    if isinstance(update, Rebased):
        return min(full, 2 * update.inner.rank)
    if isinstance(update, LoHa | LoKr):
        return min(full, update.rank)
    return full


def needs_base(update: Update) -> bool:
    """Whether its change of a weight depends on what the weight is."""
    return isinstance(update, Dora | Rebased)
