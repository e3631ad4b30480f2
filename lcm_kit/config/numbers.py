"""Numbers on the command line, each within its range: a NaN passes every other check and draws noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lcm_kit.errors import UserError

SEED = 2**63 - 1  # the largest; as in configs
WEIGHT = 1000.0  # of a LoRA, up or down; as in configs


def within(name: str, low: float, high: float, *, above: bool = False) -> Callable[[float | None], Any]:
    """A callback for the option `name`: its value if that is from `low` (or `above` it) to `high`.

    None, which is no value, passes; NaN and the infinities do not. The callback raises `UserError`.
    """

    def check(value: float | None) -> Any:
        inside = value is None or (low <= value <= high and not (above and value == low))
        if not inside:
            span = f"above {low:g} and at most" if above else f"from {_digits(low)} to"
            raise UserError(f"{name} {value} is out of range; give a number {span} {_digits(high)}")
        return value

    return check


def _digits(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
