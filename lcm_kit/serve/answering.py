"""Pictures as an answer: orders go to the engine, and what comes of them out as JSON, as a PNG, as events."""

from __future__ import annotations

import asyncio
import json
import time

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lcm_kit.serve.course import Course
from lcm_kit.serve.parts import Parts
from lcm_kit.serve.problems import JSON, PNG, STREAM, Problem
from lcm_kit.serve.reply import Reply, Shown, as_json, wordless
from lcm_kit.serve.stream import Stream


async def answer(request: Request, parts: Parts, reply: Reply, media: str, began: float) -> Response:
    """Draw and answer as `media`. `began`: when the request came, by `time.monotonic`.

    Raises `Problem` when its time is over, `Left` if its client is gone, and what `Engine.submit_all` does.
    """
    settings = reply.settings
    request.scope["lcm_kit.facts"] = dict(settings) if parts.log.prompts else wordless(settings)
    count = sum(order.count for order in reply.orders)
    if media == PNG and count > 1:
        raise Problem(422, f"count {count}: a PNG file holds one picture; ask for {JSON}, or count 1")
    course = Course(request, parts.engine, reply.orders, began + parts.limits.seconds)
    if media == STREAM:
        return Stream(course, reply, parts.log, began)
    shown: list[Shown] = []
    async with course:
        async for which, drawn in course.drawn():
            shown += await asyncio.to_thread(reply.take, which, *drawn)

    def told() -> Response:
        done = reply.done(course.tickets, time.monotonic() - began)
        if media == PNG:
            headers = {"Lcm-Kit-Settings": json.dumps(wordless(settings))}
            if "kept" in done:
                headers["Lcm-Kit-Kept"] = ", ".join(map(str, done["kept"]))
            return Response(shown[0].file, headers=headers, media_type=PNG)
        return JSONResponse(reply.whole([as_json(each) for each in shown], done))

    return await asyncio.to_thread(told)
