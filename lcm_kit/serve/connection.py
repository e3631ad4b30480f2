"""Connections of clients: none stays open that says nothing, or takes nothing of what it is told.

uvicorn itself waits without end for a first request's head and for an answer to be read, so that a few
hundred silent clients would take all places.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 1000  # open at once
_HEAD = 15.0  # seconds for the whole head of a request, and between two requests
_READ = 120.0  # seconds for what is left of an answer once it is whole
_LOOKS = 5.0  # seconds between looks at a connection


class Connection(H11Protocol):
    """uvicorn's, which ends one that stands still; of more than `MOST` the one that is idle longest."""

    _since: float  # it has been as it is, by the loop's time
    _known: tuple[Any, ...]
    _look_again: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room and begin to look."""
        if len(self.connections) >= MOST - 1:
            idle = [each for each in self.connections if isinstance(each, Connection) and each.idle]
            if idle:
                min(idle, key=lambda each: each._since).end()
        super().connection_made(transport)
        self._pauses = 0
        self._known, self._since = self._state(), self.loop.time()
        self._look_again = self.loop.call_later(_LOOKS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        self._look_again.cancel()
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Whether no request of it is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def end(self) -> None:
        """Close it now, whatever it has not read."""
        self.transport.abort()
        self.connections.discard(self)

    def pause_writing(self) -> None:
        """More than a little of an answer has not been read."""
        self._pauses += 1
        super().pause_writing()

    def _state(self) -> tuple[Any, ...]:
        """What changes where anything goes on: its latest request, whether it is read, and answered."""
        return self.cycle, self._pauses, self.flow.write_paused, self.idle

    def _look(self) -> None:
        state, now = self._state(), self.loop.time()
        if state != self._known:
            self._known, self._since = state, now
        unread = self.transport.get_write_buffer_size() > 0
        still = self.idle or self.flow.write_paused
        if still and now - self._since > (_READ if unread else _HEAD):
            self.end()
        else:
            self._look_again = self.loop.call_later(_LOOKS, self._look)
