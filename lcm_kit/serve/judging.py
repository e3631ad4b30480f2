"""The routes of judging: two pictures to compare, a vote on them, and what was voted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lcm_kit.serve import votes_csv
from lcm_kit.serve.answering import answer
from lcm_kit.serve.asked import parsed
from lcm_kit.serve.comparing import EXAMPLES, Comparison, ToCompare, Vote
from lcm_kit.serve.openapi import COMPARED, REVEALED, TALLY, answers, body, said, told
from lcm_kit.serve.parts import Parts
from lcm_kit.serve.problems import CSV, JSON, NEW, STREAM
from lcm_kit.serve.reading import accepted, read
from lcm_kit.serve.store import COUNTS, Pair, Store

_PAGE = 500  # votes that are read at once


def judging_routes(app: FastAPI, parts: Parts) -> None:
    """Put them into `app`."""
    limits = parts.limits

    @app.post(
        "/v1/comparisons", tags=["judging"], summary="Draw a picture and what it is judged against",
        response_class=Response, responses=answers(JSON, STREAM, schema=COMPARED),
        openapi_extra=body(ToCompare, EXAMPLES, limits),
    )  # fmt: skip
    async def comparisons(request: Request) -> Response:
        began = time.monotonic()
        media = accepted(request, (JSON, STREAM))
        wanted = parsed(await read(request, limits.body, limits.seconds), ToCompare)
        return await answer(request, parts, Comparison.of(wanted, parts), media, began)

    @app.post(
        "/v1/votes", tags=["judging"], summary="Vote on a comparison, once",
        response_class=Response, responses=told(REVEALED, 404, 408, 409, 413, 415, 422, 507),
        openapi_extra=body(Vote, {"the left one": {"comparison": 1, "choice": "left"}}, limits),
    )  # fmt: skip
    async def vote(request: Request) -> Response:
        store = parts.require_store()
        wanted = parsed(await read(request, limits.body, limits.seconds), Vote)
        pair = await asyncio.to_thread(store.vote, wanted.comparison, wanted.choice)
        settings = {"asked": pair.asked["settings"], "against": pair.against["settings"]}
        return JSONResponse(
            {"choice": pair.choice, "left_is": pair.left_is, "chosen": pair.chosen, "settings": settings}
        )

    @app.get(
        "/v1/votes", tags=["judging"], summary="How often which side was chosen",
        response_class=Response, responses=told(TALLY, 404, 507),
    )  # fmt: skip
    async def votes() -> Response:
        found = await asyncio.to_thread(parts.require_store().tally)
        return JSONResponse(_tally(found), headers=NEW)

    @app.get(
        "/v1/votes.csv", tags=["judging"], summary="All votes, a row each", response_class=Response,
        responses={200: {"content": {CSV: {"schema": {"type": "string"}}}}, **said(404, 507)},
    )  # fmt: skip
    async def every_vote() -> Response:
        store = parts.require_store()
        first = await asyncio.to_thread(store.votes, 0, _PAGE)  # what is wrong with the file is told so
        headers = {**NEW, "Content-Disposition": 'attachment; filename="votes.csv"'}
        return StreamingResponse(_csv(store, first), headers=headers, media_type=CSV)


def _tally(found: list[tuple[dict[str, Any], dict[str, int]]]) -> dict[str, Any]:
    all_of_them = {name: sum(counted[name] for _, counted in found) for name in COUNTS}
    return {**all_of_them, "by_adapter": [{**drawn_by, **counted} for drawn_by, counted in found]}


async def _csv(store: Store, pairs: list[Pair]) -> AsyncIterator[str]:
    yield votes_csv.header()
    while pairs:
        yield votes_csv.rows(pairs)
        pairs = await asyncio.to_thread(store.votes, pairs[-1].id, _PAGE)
