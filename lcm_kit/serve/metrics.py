"""Figures of a server, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from lcm_kit.serve.engine import Batch

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "WEBSOCKET"}


class Metrics:
    """Of one server: a registry of its own, so that several in a process do not meet."""

    media = CONTENT_TYPE_LATEST

    def __init__(self, waiting: Callable[[], float], ready: Callable[[], float]) -> None:  # noqa: D107
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("lcm_kit_requests", "Requests", ["method", "route", "status"], **own)
        self._latency = Histogram(
            "lcm_kit_request_seconds", "From a request's headers to its answer's end", ["route"],
            buckets=_SECONDS, **own,
        )  # fmt: skip
        self._batches = Counter("lcm_kit_batches", "Batches by how they ended", ["outcome"], **own)
        self._sizes = Histogram("lcm_kit_batch_pictures", "Pictures drawn together", buckets=_SIZES, **own)
        self._drawing = Histogram("lcm_kit_batch_seconds", "Of a batch", buckets=_SECONDS, **own)
        self._pictures = Counter("lcm_kit_pictures", "Pictures drawn", **own)
        Gauge("lcm_kit_queue_pictures", "Pictures that wait", **own).set_function(waiting)
        Gauge("lcm_kit_ready", "1 where requests are drawn", **own).set_function(ready)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer. Of methods and routes there is a bounded number, whatever is asked for."""
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def batch(self, batch: Batch) -> None:
        """Count a batch."""
        self._batches.labels(batch.outcome).inc()
        if batch.outcome == "drawn":
            self._sizes.observe(batch.size)
            self._drawing.observe(batch.seconds)
            self._pictures.inc(batch.size)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
