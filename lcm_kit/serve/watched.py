"""Around everything: each request has an id, is counted and logged, and a bug in it is an answer.

An answer goes out piece by piece, so that a client that does not read it waits within its request. What is
left of a body that was refused is taken and thrown away before the answer ends: a client that sends first and
reads then would find its connection broken, and not the sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcm_kit.serve.engine import Closed
from lcm_kit.serve.log import Log
from lcm_kit.serve.metrics import Metrics
from lcm_kit.serve.problems import Problem, refuse

_SAFE = (
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"), (b"x-frame-options", b"DENY"),
)  # fmt: skip
_PIECE = 2**16  # bytes of an answer that are given to the connection at once
_REST = 10.0  # seconds in which the rest of a body that nobody wants may come


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
        began, status, come = time.monotonic(), 0, scope["type"] == "websocket"
        scope["lcm_kit.request"] = number = uuid.uuid4().hex

        async def receiving() -> Message:
            nonlocal come
            message = await receive()
            come = come or not (message["type"] == "http.request" and message.get("more_body"))
            return message

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
            message = await _last_piece(message, send)
            if message["type"] == "http.response.body" and not message.get("more_body") and not come:
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_REST):
                        while not come:
                            await receiving()
                message = {**message, "body": b""}
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        except asyncio.CancelledError:  # by uvicorn, which ends
            come = True
            if not status:
                stopped = Closed("this server was stopped before it had answered; try again")
                await refuse(Problem.of(stopped), scope, receive, sending)
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


async def _last_piece(message: Message, send: Send) -> Message:
    """What is left of a message after all but the last piece of its body were sent."""
    body, first = memoryview(message.get("body", b"")), 0
    while len(body) - first > _PIECE:
        await send({**message, "body": bytes(body[first : first + _PIECE]), "more_body": True})
        first += _PIECE
    return {**message, "body": bytes(body[first:])} if first else message
