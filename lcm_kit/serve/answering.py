"""Pictures as an answer: orders go to the engine, and what comes of them goes out as JSON or as a PNG file.

What is said of the pictures is a `Reply`'s: `Pictures` tells of those of one order.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from PIL.Image import Image

from lcm_kit.drawing.pictures import png_bytes
from lcm_kit.serve.asked import Order
from lcm_kit.serve.engine import Ticket
from lcm_kit.serve.parts import Parts
from lcm_kit.serve.problems import JSON, LEFT, PNG, Problem


class Shown(NamedTuple):
    """A picture that is told of."""

    place: dict[str, Any]  # as {"index": 0}: which one it is
    file: bytes  # PNG


class Reply(Protocol):
    """What is drawn for a request, and how it is told. All but the properties may take their time."""

    @property
    def orders(self) -> Sequence[Order]:
        """All that is drawn; all of it is taken into the queue, or none."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """As JSON, for the log: every key of something that was written has `prompt` in it."""
        ...

    def take(self, which: int, index: int, picture: Image) -> list[Shown]:
        """What is to be shown now that picture `index` of order `which` is drawn."""
        ...

    def done(self, tickets: Sequence[Ticket], seconds: float) -> dict[str, Any]:
        """What is told besides the pictures, once they are all drawn."""
        ...

    def whole(self, pictures: list[dict[str, Any]], done: dict[str, Any]) -> dict[str, Any]:
        """The answer as one JSON object. `pictures`: as they were shown, each with its place."""
        ...


@dataclass(frozen=True)
class Pictures:
    """The pictures of one order, by their index."""

    order: Order

    @property
    def orders(self) -> Sequence[Order]:
        """The one."""
        return (self.order,)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its own."""
        return self.order.settings

    def take(self, which: int, index: int, picture: Image) -> list[Shown]:
        """That picture."""
        return [Shown({"index": index}, png_bytes(picture, quick=True))]

    def done(self, tickets: Sequence[Ticket], seconds: float) -> dict[str, Any]:
        """Settings, which draw the same again, notes, and how it was drawn."""
        return {
            "settings": dict(self.order.settings), "notes": list(self.order.notes),
            "batches": tickets[0].batches, "seconds": round(seconds, 4),
        }  # fmt: skip

    def whole(self, pictures: list[dict[str, Any]], done: dict[str, Any]) -> dict[str, Any]:
        """In their order."""
        return {"pictures": sorted(pictures, key=lambda each: each["index"]), **done}


async def answer(request: Request, parts: Parts, reply: Reply, media: str, began: float) -> Response:
    """Draw and answer as `media`. `began`: when the request came, by `time.monotonic`.

    Raises `Problem` when its time is over, and what `Engine.submit_all` does.
    """
    settings = reply.settings
    request.scope["lcm_kit.facts"] = dict(settings) if parts.log.prompts else wordless(settings)
    if media == PNG and (len(reply.orders) > 1 or reply.orders[0].count > 1):
        raise Problem(
            422,
            f"count {reply.orders[0].count}: a PNG file holds one picture; ask for {JSON}, or count 1",
        )
    tickets = parts.engine.submit_all(reply.orders)
    try:
        left = max(0.0, parts.limits.seconds - (time.monotonic() - began))
        drawn = await _drawn(request, tickets, left)
    finally:
        for ticket in tickets:
            parts.engine.leave(ticket)
    if drawn is None:
        request.scope["lcm_kit.status"] = LEFT
        return Response(status_code=204)

    def told() -> Response:
        shown = [
            each for which, pictures in enumerate(drawn) for index, picture in enumerate(pictures)
            for each in reply.take(which, index, picture)
        ]  # fmt: skip
        done = reply.done(tickets, time.monotonic() - began)
        if media == PNG:
            headers = {"Lcm-Kit-Settings": json.dumps(wordless(settings))}
            return Response(shown[0].file, headers=headers, media_type=PNG)
        return JSONResponse(reply.whole([as_json(each) for each in shown], done))

    return await asyncio.to_thread(told)


def wordless(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without what somebody wrote."""
    return {key: each for key, each in settings.items() if "prompt" not in key}


def as_json(shown: Shown) -> dict[str, Any]:
    """A picture with its place, in base64."""
    return {**shown.place, "media_type": PNG, "base64": base64.b64encode(shown.file).decode()}


async def _drawn(request: Request, tickets: Sequence[Ticket], seconds: float) -> list[list[Image]] | None:
    """The pictures of each; None if the client left first. Raises `Problem` when the time is over."""
    pictures = asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets))
    leaving = asyncio.ensure_future(_left(request))
    try:
        both: set[asyncio.Future[Any]] = {pictures, leaving}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if pictures.done():
            return pictures.result()
        if leaving.done():
            return None
    finally:
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving
        if not pictures.done():
            pictures.cancel()
    raise Problem(504, "the time for this request is over before its pictures were drawn; ask for less")


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
