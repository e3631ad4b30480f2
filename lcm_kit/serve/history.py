"""The routes of the history: the pictures that were kept, with what each was made by."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import JSONResponse, Response

from lcm_kit.serve.openapi import FILE, HISTORY, said, told
from lcm_kit.serve.parts import Parts
from lcm_kit.serve.problems import NEW, PNG
from lcm_kit.serve.store import Entry

_Before = Annotated[int | None, Query(ge=1, description="Only those with a smaller id.")]
_Limit = Annotated[int, Query(ge=1, le=500, description="Pictures of an answer.")]


def history_routes(app: FastAPI, parts: Parts) -> None:
    """Put them into `app`."""

    @app.get(
        "/v1/history", tags=["history"], summary="Pictures that were kept, the newest first",
        response_class=Response, responses=told(HISTORY, 404, 422, 507),
    )  # fmt: skip
    async def history(before: _Before = None, limit: _Limit = 100) -> Response:
        found, more = await asyncio.to_thread(parts.require_store().pictures, before, limit)
        return JSONResponse({"pictures": [_item(each) for each in found], "more": more}, headers=NEW)

    @app.get(
        "/v1/history/{number}", tags=["history"], summary="The file of one", response_class=Response,
        responses={200: {"content": {PNG: FILE}}, **said(404, 507)},
    )  # fmt: skip
    async def picture(number: int) -> Response:
        content = await asyncio.to_thread(parts.require_store().png, number)
        return Response(content, headers=NEW, media_type=PNG)

    @app.delete(
        "/v1/history/{number}", tags=["history"], summary="Delete one for good", status_code=204,
        response_class=Response, responses=said(404, 507),
    )  # fmt: skip
    async def forget(number: int) -> Response:
        await asyncio.to_thread(parts.require_store().forget, number)
        return Response(status_code=204)

    @app.delete(
        "/v1/history", tags=["history"], summary="Delete all for good", response_class=Response,
        responses=told({"properties": {"deleted": {"type": "integer"}}}, 404, 507),
    )  # fmt: skip
    async def forget_all() -> Response:
        return JSONResponse({"deleted": await asyncio.to_thread(parts.require_store().forget_all)})


def _item(entry: Entry) -> dict[str, Any]:
    known = entry._asdict()
    record = known.pop("record")
    return {**known, "base": record["base"], "index": record["index"], "settings": record["settings"]}
