"""What the routes of a server use."""

from __future__ import annotations

from dataclasses import dataclass

from lcm_kit.drawing.how import PLAIN, How
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.engine import Engine
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.log import Log
from lcm_kit.serve.metrics import Metrics


@dataclass(frozen=True)
class Parts:
    """All of one server; what a route needs more of is a field here."""

    served: Served
    engine: Engine
    limits: Limits
    log: Log
    metrics: Metrics
    token: bool  # whether one is needed: for OpenAPI's words
    how: How = PLAIN
