"""What the routes of a server use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from lcm_kit.drawing.how import How
from lcm_kit.drawing.made import Source
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.engine import Engine
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.log import Log
from lcm_kit.serve.metrics import Metrics
from lcm_kit.serve.problems import Problem
from lcm_kit.serve.store import Store

DATA = "start it with `lcm-kit serve --data FOLDER`"


@dataclass(frozen=True)
class Parts:
    """All of one server; what a route needs more of is a field here."""

    served: Served
    engine: Engine
    limits: Limits
    log: Log
    metrics: Metrics
    token: bool  # whether one is needed: for OpenAPI's words
    how: How
    store: Store | None  # what is kept; None: nothing

    @cached_property
    def source(self) -> Source:
        """What its pictures say of what drew them."""
        decoder = None if self.how.decoder is None else str(self.how.decoder)
        return replace(self.served.source, decoder=decoder)

    def require_store(self) -> Store:
        """The store. Raises `Problem` where nothing is kept."""
        if self.store is None:
            raise Problem(404, f"this server keeps no pictures and no votes; {DATA} to have them kept")
        return self.store
