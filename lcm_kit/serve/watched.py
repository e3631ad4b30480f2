"""Around everything: each request has an id, is counted and logged, and a bug in it is an answer."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcm_kit.serve.log import Log
from lcm_kit.serve.metrics import Metrics
from lcm_kit.serve.problems import Problem, refuse

_SAFE = (
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"), (b"x-frame-options", b"DENY"),
)  # fmt: skip


@dataclass
class Watched:
    """An ASGI application around another."""

    app: ASGIApp
    log: Log
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, come what may."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        scope["lcm_kit.request"] = number = uuid.uuid4().hex

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"].endswith("response.start"):
                status = message["status"]
                more = [*_SAFE, (b"x-request-id", number.encode())]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            elif message["type"] == "websocket.close" and not status:
                status = 403  # which uvicorn makes of it
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            self.log.fault("failure", error, request=number)
            if not status:
                await refuse(Problem.of(error), scope, receive, sending)
        finally:
            # of a stream it is known at its end alone how it went
            self._told(scope, number, scope.get("lcm_kit.status", status), time.monotonic() - began)

    def _told(self, scope: Scope, number: str, status: int, seconds: float) -> None:
        """By the route, not by the path, in which anything may stand."""
        route = getattr(scope.get("route"), "path", "other")
        method = scope.get("method", "WEBSOCKET")[:10]
        self.metrics.request(method, route, status, seconds)
        self.log.say(
            "request", request=number, method=method, route=route, status=status,
            seconds=round(seconds, 4), client=scope.get("lcm_kit.client"), **scope.get("lcm_kit.facts", {}),
        )  # fmt: skip
