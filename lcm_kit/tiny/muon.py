"""Muon, and AdamW for what is no matrix: the optimizer that the embedded models are trained with.

The momentum of a weight matrix is replaced by the nearest matrix with equal singular values (Jordan et al.
2024, kellerjordan.github.io/posts/muon), at the size of AdamW's updates (Liu et al. 2025, arXiv:2502.16982),
so that one learning rate serves both. torch's own takes two-dimensional weights only; those of convolutions
are matrices of output channels by everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5: brings singular values in (0, 1] near 1
_ROUNDS = 4


def orthogonal(matrix: Tensor) -> Tensor:
    """[R, C] -> [R, C] with the same singular vectors and singular values about 1 (0.7 to 1.2)."""
    a, b, c = _QUINTIC
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(_ROUNDS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for weights of linear layers and convolutions, AdamW for everything else.

    Embeddings and the first and last convolution of a model are AdamW's: their rows are no directions of one
    space.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        """Parameters by the rule above; `betas` are AdamW's, `momentum` Muon's (Nesterov)."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            outer = "embedding" in name or "conv_in." in name or "conv_out." in name
            (others if parameter.ndim < 2 or outer else matrices).append(parameter)
        groups: Iterable[dict[str, Any]] = [
            {"params": matrices, "muon": True},
            {"params": others, "muon": False},
        ]
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update = (self._muon if group["muon"] else self._adam)(parameter, group)
                    parameter.add_(update, alpha=-group["lr"])

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, grad, decay = self.state[parameter], parameter.grad, group["momentum"]
        assert grad is not None
        mean = state.setdefault("momentum", torch.zeros_like(parameter))
        mean.lerp_(grad, 1 - decay)
        flat = grad.lerp(mean, decay).flatten(1)
        return (orthogonal(flat) * 0.2 * max(flat.shape) ** 0.5).view_as(parameter)

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, grad, (first, second) = self.state[parameter], parameter.grad, group["betas"]
        assert grad is not None
        if not state:
            state |= {
                "step": torch.zeros(()), "mean": torch.zeros_like(grad), "square": torch.zeros_like(grad),
            }  # fmt: skip
        state["step"] += 1
        state["mean"].lerp_(grad, 1 - first)
        state["square"].lerp_(grad.square(), 1 - second)
        k = state["step"].item()
        deviation = (state["square"] / (1 - second**k)).sqrt() + 1e-8
        return state["mean"] / (1 - first**k) / deviation
