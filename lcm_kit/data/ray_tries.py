"""How often each shard was tried on a Ray cluster.

Ray gives the shard of a worker that died to another, for ever. This is an actor, a process of its own beside
the driver, which imports nothing large and outlives the workers.
"""

from __future__ import annotations

from collections import Counter

MOST = 4  # of a shard: one may kill every worker, another only met nodes that were taken away


class Tries:
    """The tries of one encode."""

    def __init__(self) -> None:  # noqa: D107
        self._of: Counter[str] = Counter()

    def begin(self, source: str) -> bool:
        """Count a try of this shard; returns whether it may be made."""
        self._of[source] += 1
        return self._of[source] <= MOST
