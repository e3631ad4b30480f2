"""The routes, and what OpenAPI says of them. Each reads a request, asks the engine and answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL.Image import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lcm_kit import __version__, samplers
from lcm_kit.drawing.how import PLAIN, How
from lcm_kit.drawing.pictures import png_bytes
from lcm_kit.errors import UserError
from lcm_kit.evaluation.recommended import Settings
from lcm_kit.serve.adapters import Adapter, Served
from lcm_kit.serve.asked import Order, parsed, settled
from lcm_kit.serve.engine import Engine, Ticket
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.log import Log
from lcm_kit.serve.metrics import Metrics
from lcm_kit.serve.openapi import answers, body, said, secure
from lcm_kit.serve.page import page
from lcm_kit.serve.problems import JSON, LEFT, PNG, Problem


@dataclass(frozen=True)
class Parts:
    """What the routes use."""

    served: Served
    engine: Engine
    limits: Limits
    log: Log
    metrics: Metrics
    token: bool  # whether one is needed: for OpenAPI's words
    how: How = PLAIN


def application(parts: Parts) -> FastAPI:
    """The routes as an ASGI application, without what guards and watches them."""
    app = FastAPI(
        title="lcm-kit serve", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        description="Pictures in a few steps, over HTTP. Errors are problem+json (RFC 9457).",
    )  # fmt: skip
    app.add_exception_handler(UserError, _problem)
    app.add_exception_handler(Exception, _problem)  # `watched` logs it
    app.add_exception_handler(HTTPException, _http_problem)
    _page_route(app)
    _watch_routes(app, parts)
    _info_route(app, parts)
    _picture_route(app, parts)
    if parts.token:
        secure(app)
    return app


async def _problem(request: Request, error: Exception) -> Response:
    return Problem.of(error).response(request.scope.get("lcm_kit.request"))


async def _http_problem(request: Request, error: Exception) -> Response:
    """Of the router: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this path; /openapi.json lists what there is"}
    words[405] = "this path does not take this method; /openapi.json says which it takes"
    sentence = words.get(error.status_code, "this request cannot be answered")
    found = Problem(error.status_code, sentence, error.headers)
    return found.response(request.scope.get("lcm_kit.request"))


# -- For people ----------------------------------------------------------------------------------------------


def _page_route(app: FastAPI) -> None:
    found = page()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def live() -> Response:
        return Response(found.html, headers=found.headers)


# -- For machines -------------------------------------------------------------------------------------------


def _watch_routes(app: FastAPI, parts: Parts) -> None:
    @app.get("/healthz", tags=["machines"], summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", tags=["machines"], summary="Whether requests are drawn now", responses=said(503))
    async def readyz() -> dict[str, str]:
        if parts.engine.state != "ready":
            raise Problem(503, f"this server is {parts.engine.state}", {"Retry-After": "5"})
        return {"status": "ready"}

    @app.get(
        "/metrics", tags=["machines"], summary="Figures for Prometheus", response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )  # fmt: skip
    async def metrics() -> Response:
        return Response(parts.metrics.text(), headers={"Content-Type": parts.metrics.media})


# -- What there is -------------------------------------------------------------------------------------------


def _info_route(app: FastAPI, parts: Parts) -> None:
    @app.get("/v1/info", tags=["pictures"], summary="The base, its adapters, and the limits")
    async def info() -> dict[str, Any]:
        served, limits = parts.served, parts.limits
        asked = ("side", "steps", "count", "prompt", "body", "seconds", "queue", "rate")
        return {
            "version": __version__,
            "base": {
                "path": served.base.path, "family": served.base.family.name, "side": served.base.resolution,
                "multiple": max(8, served.base.factor),
                "tiling": parts.how.tiling,
                "decoder": None if parts.how.decoder is None else str(parts.how.decoder),
                "settings": _settings(served.settings(None)),
            },
            "adapters": [_adapter(each) for each in served.adapters],
            "samplers": samplers.names(),
            "limits": {name: getattr(limits, name) for name in asked},
            "state": parts.engine.state,
        }  # fmt: skip


def _adapter(adapter: Adapter) -> dict[str, Any]:
    advice = adapter.advice
    return {
        "name": adapter.name, "given": adapter.given, "sha256": adapter.sha256, "weight": adapter.weight,
        "method": adapter.method.title, "settings": _settings(adapter.settings()),
        "measured": advice.sentence if advice and advice.steps else None,
        "warnings": list(advice.warnings) if advice else [],
    }  # fmt: skip


def _settings(use: Settings) -> dict[str, Any]:
    known = use._asdict()
    del known["lora_weight"]  # the adapter's own weight is the server's, which may be another
    return known


# -- Pictures ------------------------------------------------------------------------------------------------


def _picture_route(app: FastAPI, parts: Parts) -> None:
    @app.post(
        "/v1/pictures", tags=["pictures"], summary="Draw pictures of a prompt",
        response_class=Response, responses=answers(), openapi_extra=body(parts.limits),
    )  # fmt: skip
    async def pictures(request: Request) -> Response:
        began = time.monotonic()
        media = chosen(request.headers.get("accept"))
        order = settled(parsed(await _read(request, parts.limits)), parts.served, parts.limits)
        request.scope["lcm_kit.facts"] = _facts(order, parts.log)
        if media == PNG and order.count > 1:
            raise Problem(
                422, f"count {order.count}: a PNG file holds one picture; ask for {JSON}, or count 1"
            )
        ticket = parts.engine.submit(order)
        try:
            left = max(0.0, parts.limits.seconds - (time.monotonic() - began))
            drawn = await _drawn(request, ticket, left)
        finally:
            parts.engine.leave(ticket)
        if drawn is None:
            request.scope["lcm_kit.status"] = LEFT
            return Response(status_code=204)
        files = await asyncio.to_thread(lambda: [png_bytes(each, quick=True) for each in drawn])
        return _answer(order, ticket, files, media, time.monotonic() - began)


def _facts(order: Order, log: Log) -> dict[str, Any]:
    """For the log."""
    return dict(order.settings) if log.prompts else _wordless(order)


def _wordless(order: Order) -> dict[str, Any]:
    """Its settings without what somebody wrote."""
    return {key: each for key, each in order.settings.items() if "prompt" not in key}


async def _read(request: Request, limits: Limits) -> bytes:
    """The body. Raises `Problem` for another media type, one that is too large or that takes too long."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != JSON:
        raise Problem(415, f"the body of this request must be {JSON}, said in its Content-Type")
    too_large = Problem(413, f"the body of this request is larger than {limits.body:,} bytes")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > limits.body:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                found += part
                if len(found) > limits.body:
                    raise too_large
    except TimeoutError:
        raise Problem(408, f"the body of this request did not come within {limits.seconds:g} s") from None
    except ClientDisconnect:
        request.scope["lcm_kit.status"] = LEFT
        raise Problem(400, "the client left before its request was whole") from None
    return bytes(found)


async def _drawn(request: Request, ticket: Ticket, seconds: float) -> list[Image] | None:
    """The pictures; None if the client left first. Raises `Problem` when the time is over."""
    pictures = asyncio.wrap_future(ticket.future)
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


def _answer(order: Order, ticket: Ticket, files: list[bytes], media: str, seconds: float) -> Response:
    if media == PNG:
        settings = json.dumps(_wordless(order))
        return Response(files[0], headers={"Lcm-Kit-Settings": settings}, media_type=PNG)
    return JSONResponse(
        {
            "pictures": [
                {"index": k, "media_type": PNG, "base64": base64.b64encode(each).decode()}
                for k, each in enumerate(files)
            ],
            "settings": dict(order.settings), "notes": list(order.notes), "batches": ticket.batches,
            "seconds": round(seconds, 4),
        }
    )  # fmt: skip


def chosen(accept: str | None) -> str:
    """JSON or PNG, whichever a client likes better; JSON for both. Raises `Problem` for neither."""
    weights = {JSON: -1.0, PNG: -1.0}
    exact: dict[str, int] = {JSON: -1, PNG: -1}
    for part in (accept or "*/*").split(",")[:100]:
        media, *parameters = (each.strip().lower() for each in part.split(";"))
        quality = next((each[2:] for each in parameters if each.startswith("q=")), "1")
        try:
            q = float(quality)
        except ValueError:
            q = 0.0
        for kind in weights:
            rank = {kind: 2, f"{kind.partition('/')[0]}/*": 1, "*/*": 0}.get(media, -1)
            if rank > exact[kind]:
                exact[kind], weights[kind] = rank, q
    best = max(weights, key=lambda kind: (weights[kind], exact[kind], kind == JSON))
    if weights[best] <= 0:
        raise Problem(406, f"pictures come as {JSON} or {PNG}; name one of them in Accept")
    return best
