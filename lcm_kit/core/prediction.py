"""The one border between what a UNet outputs and (x0, eps), which everything behind it speaks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lcm_kit.core.schedule import Schedule
from lcm_kit.errors import UserError

Model = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, h, w], t int64 [B]) -> raw output [B, C, h, w], in any dtype."""
Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x_t [B, C, h, w], t int64 [B]) -> (x0, eps), float32, with x_t = alpha_t x0 + sigma_t eps."""

KINDS = ("epsilon", "v_prediction", "sample")


def check(schedule: Schedule, kind: str) -> None:
    """Raise UserError for an unknown `kind`, and for "epsilon" on a schedule with zero terminal SNR."""
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(f"the base's scheduler config has prediction_type {kind!r}; lcm-kit knows {known}")
    if kind == "epsilon" and schedule.zero_terminal_snr:
        raise UserError(
            "the base's scheduler config predicts epsilon on a schedule with zero terminal SNR "
            "(rescale_betas_zero_snr, or betas too large): its last timestep is pure noise, of which epsilon "
            "cannot tell x0; use a v_prediction or sample base or switch the rescaling off"
        )


def to_x0_eps(schedule: Schedule, kind: str, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x0, eps), float32 [B, C, h, w], that a model's `output` at latents x, t int64 [B] stands for.

    `kind` is diffusers' prediction_type: "epsilon" outputs eps, "sample" x0, and "v_prediction"
    v = alpha eps - sigma x0 (arXiv:2202.00512, appendix D). Raises UserError for another kind, and for
    "epsilon" on a schedule with zero terminal SNR, where x0 = (x - sigma eps) / alpha divides by zero.
    """
    check(schedule, kind)
    alpha, sigma = schedule.at(t)
    output, x = output.float(), x.float()
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    if kind == "sample":
        return output, (x - alpha * output) / sigma
    return alpha * x - sigma * output, sigma * x + alpha * output


def from_x0_eps(schedule: Schedule, kind: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return the raw output of `kind`, float32 [B, C, h, w], that stands for (x0, eps) at t int64 [B].

    The inverse of `to_x0_eps`, and with the true x0 and noise the target of the denoising loss. Raises as
    `to_x0_eps`.
    """
    check(schedule, kind)
    alpha, sigma = schedule.at(t)
    if kind == "epsilon":
        return eps.float()
    return x0.float() if kind == "sample" else alpha * eps.float() - sigma * x0.float()


def predictor(model: Model, schedule: Schedule, kind: str) -> Predict:
    """Wrap a raw model as Predict. Raises as `to_x0_eps` does, before the first call."""
    check(schedule, kind)

    def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return to_x0_eps(schedule, kind, model(x, t), x, t)

    return predict
