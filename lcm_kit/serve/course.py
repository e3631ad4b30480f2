"""Orders on their way, as the event loop hears of them from the thread that draws."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

from fastapi import Request

from lcm_kit.serve.asked import Order
from lcm_kit.serve.engine import Drawn, Engine, Heard, Ticket
from lcm_kit.serve.problems import Left, Problem


class _Gone:
    """What is heard of a client that leaves."""


_Ended = Future[Any]
_Said = tuple[int, Heard] | _Ended | _Gone


class Course:
    """Within `async with` the orders are in the queue, or being drawn; after it nobody waits for them.

    `until`: when the time of the request is over, by `time.monotonic`. Entering raises what
    `Engine.submit_all` does.
    """

    def __init__(self, request: Request, engine: Engine, orders: Sequence[Order], until: float) -> None:  # noqa: D107
        self._request, self._engine, self._orders, self.until = request, engine, orders, until
        self.tickets: list[Ticket] = []
        self._said: asyncio.Queue[_Said] = asyncio.Queue()

    async def __aenter__(self) -> Course:  # noqa: D105
        self._loop = asyncio.get_running_loop()
        self.tickets = self._engine.submit_all(self._orders, lambda which, heard: self._tell((which, heard)))
        for ticket in self.tickets:
            ticket.future.add_done_callback(self._tell)
        self._leaving = asyncio.ensure_future(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:  # noqa: D105
        for ticket in self.tickets:
            self._engine.leave(ticket)
        self._leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._leaving

    def _tell(self, said: _Said) -> None:
        """From any thread; a loop that has ended waits for nothing."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._said.put_nowait, said)

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._said.put_nowait(_Gone())

    async def heard(self, beat: float = float("inf")) -> AsyncIterator[tuple[int, Heard] | None]:
        """What happens to which order, until all are drawn; None where nothing does for `beat` seconds.

        Raises what went wrong with one of them, `Left`, and `Problem` when the time is over.
        """
        drawing = len(self.tickets)
        while drawing:
            said = await self._next(beat)
            if isinstance(said, _Gone):
                raise Left
            if isinstance(said, Future):
                said.result()
                drawing -= 1
            else:
                yield said

    async def drawn(self) -> AsyncIterator[tuple[int, Drawn]]:
        """Of `heard` the pictures."""
        async for happened in self.heard():
            if happened is not None and isinstance(happened[1], Drawn):
                yield happened[0], happened[1]

    async def _next(self, beat: float) -> _Said | None:
        left = max(0.0, self.until - time.monotonic())
        try:
            async with asyncio.timeout(min(beat, left)):
                return await self._said.get()
        except TimeoutError:
            if beat < left:
                return None
        raise Problem(504, "the time for this request is over before its pictures were drawn; ask for less")
