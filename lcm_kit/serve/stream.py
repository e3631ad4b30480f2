"""Drawing as it happens: an answer of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lcm_kit.serve.course import Course
from lcm_kit.serve.engine import Drawn, Step
from lcm_kit.serve.log import Log
from lcm_kit.serve.problems import LEFT, NEW, STREAM, Left, Problem
from lcm_kit.serve.reply import Reply, as_json

BEAT = 15.0  # seconds after which a stream says something, so that nothing between here and there closes it
_LAST = 10.0  # seconds beyond a request's time in which a client may still read what it was told


class Stream(Response):
    """Events of drawing (HTML, server-sent events): `step`, `picture`, and `done` or `problem` as the last.

    What is refused before anything is queued is raised, before this answer has begun. The log has the
    outcome: done, left (by its client), problem.
    """

    def __init__(self, course: Course, reply: Reply, log: Log, began: float) -> None:  # noqa: D107
        super().__init__(headers={**NEW, "X-Accel-Buffering": "no"}, media_type=STREAM)
        del self.headers["content-length"]
        self._course, self._reply, self._log, self._began = course, reply, log, began

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Draw and tell."""
        outcome = "left"
        async with self._course:
            sending = partial(_sent, send, self._course.until + _LAST)
            try:
                await sending({
                    "type": "http.response.start", "status": 200, "headers": self.raw_headers
                })  # fmt: skip
                try:
                    async for frame in self._frames():
                        await sending({"type": "http.response.body", "body": frame, "more_body": True})
                    outcome = "done"
                except Left:
                    raise
                except Exception as error:
                    outcome, frame = "problem", self._problem(scope, error)
                    await sending({"type": "http.response.body", "body": frame, "more_body": True})
                await sending({"type": "http.response.body", "body": b"", "more_body": False})
            except Left:
                outcome = "left"
            finally:
                if outcome == "left":
                    scope["lcm_kit.status"] = LEFT
                scope["lcm_kit.facts"]["outcome"] = outcome

    async def _frames(self) -> AsyncIterator[bytes]:
        async for happened in self._course.heard(BEAT):
            if happened is None:
                yield b": it is still being drawn\n\n"
                continue
            which, heard = happened
            if isinstance(heard, Step):
                yield _frame("step", heard._asdict())
            else:
                yield await asyncio.to_thread(self._shown, which, heard)
        yield await asyncio.to_thread(self._done)

    def _shown(self, which: int, drawn: Drawn) -> bytes:
        return b"".join(_frame("picture", as_json(each)) for each in self._reply.take(which, *drawn))

    def _done(self) -> bytes:
        return _frame("done", self._reply.done(self._course.tickets, time.monotonic() - self._began))

    def _problem(self, scope: Scope, error: Exception) -> bytes:
        problem, request = Problem.of(error), scope.get("lcm_kit.request")
        scope["lcm_kit.status"] = problem.status
        if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:  # nobody outside will see it
            self._log.fault("failure", error, request=request)
        return _frame("problem", problem.body(request))


def _frame(event: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()


async def _sent(send: Send, until: float, message: Message) -> None:
    """Send to a client that reads; raises `Left` where it does not."""
    try:
        async with asyncio.timeout(max(0.0, until - time.monotonic())):
            await send(message)
    except TimeoutError:
        raise Left from None
