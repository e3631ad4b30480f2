"""The application and its routes of pictures; each reads a request, asks for what is drawn and answers."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from lcm_kit import __version__, samplers
from lcm_kit.edits.options import TASKS
from lcm_kit.errors import UserError
from lcm_kit.evaluation.recommended import Settings
from lcm_kit.serve.adapters import Adapter
from lcm_kit.serve.answering import answer
from lcm_kit.serve.asked import EXAMPLES, Wanted, mistaken, parsed, settled
from lcm_kit.serve.asked_edits import EXAMPLES as EDIT_EXAMPLES
from lcm_kit.serve.asked_edits import WantedEdit, settled_edit
from lcm_kit.serve.engine import Closed
from lcm_kit.serve.history import history_routes
from lcm_kit.serve.judging import judging_routes
from lcm_kit.serve.openapi import PICTURES, answers, body, said, secure
from lcm_kit.serve.page import page
from lcm_kit.serve.parts import Parts
from lcm_kit.serve.problems import JSON, LEFT, PNG, STREAM, Left, Problem
from lcm_kit.serve.reading import accepted, read
from lcm_kit.serve.reply import Pictures

_DECODED = 2  # uploads at once: the other threads are for the answers of others
_NOTHING = "there is nothing at this path; /openapi.json lists what there is"


def application(parts: Parts) -> FastAPI:
    """The routes as an ASGI application, without what guards and watches them."""
    app = FastAPI(
        title="lcm-kit serve", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        description="Pictures in a few steps, over HTTP. Errors are problem+json (RFC 9457).",
    )  # fmt: skip
    app.add_exception_handler(UserError, _problem)
    app.add_exception_handler(Exception, _problem)  # `watched` logs it
    app.add_exception_handler(Left, _left)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _odd_problem)
    _page_route(app)
    _watch_routes(app, parts)
    _info_route(app, parts)
    _picture_route(app, parts)
    _edit_route(app, parts)
    judging_routes(app, parts)
    history_routes(app, parts)
    if parts.token:
        secure(app)
    return app


async def _problem(request: Request, error: Exception) -> Response:
    return Problem.of(error).response(request.scope.get("lcm_kit.request"))


async def _left(request: Request, error: Exception) -> Response:
    """Of nothing, which nobody reads."""
    request.scope["lcm_kit.status"] = LEFT
    return Response(status_code=204)


async def _odd_problem(request: Request, error: Exception) -> Response:
    """Of a path or a query that is not as it should be."""
    assert isinstance(error, RequestValidationError)
    found = [{**each, "loc": each["loc"][1:]} for each in error.errors() if each["loc"][0] != "path"]
    return await _problem(request, mistaken(found) if found else Problem(404, _NOTHING))


async def _http_problem(request: Request, error: Exception) -> Response:
    """Of the router: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    words = {404: _NOTHING, 405: "this path does not take this method; /openapi.json says which it takes"}
    sentence = words.get(error.status_code, "this request cannot be answered")
    return await _problem(request, Problem(error.status_code, sentence, error.headers))


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
            raise Closed(f"this server is {parts.engine.state}")
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
        asked = (
            "side", "steps", "count", "frames", "prompt", "body", "upload", "seconds", "queue", "rate",
        )  # fmt: skip
        return {
            "version": __version__,
            "base": {
                "path": served.base.path, "family": served.base.family.name, "side": served.base.resolution,
                "multiple": max(8, served.base.factor),
                "tiling": parts.how.tiling,
                "decoder": parts.source.decoder,
                "settings": _settings(served.settings(None)),
            },
            "adapters": [_adapter(each) for each in served.adapters],
            "samplers": samplers.names(),
            "edits": {task: {"strength": kind.strength} for task, kind in TASKS.items()},
            "limits": {name: getattr(limits, name) for name in asked},
            "history": parts.store is not None,
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
    limits = parts.limits

    @app.post(
        "/v1/pictures", tags=["pictures"], summary="Draw pictures of a prompt",
        response_class=Response, responses=answers(JSON, PNG, STREAM, schema=PICTURES),
        openapi_extra=body(Wanted, EXAMPLES, limits),
    )  # fmt: skip
    async def pictures(request: Request) -> Response:
        began = time.monotonic()
        media = accepted(request)
        wanted = parsed(await read(request, limits.body, limits.seconds), Wanted)
        order = settled(wanted, parts.served, limits)
        return await answer(request, parts, Pictures.of(order, parts, keep=wanted.keep), media, began)


def _edit_route(app: FastAPI, parts: Parts) -> None:
    limits = parts.limits
    decoding = asyncio.Semaphore(_DECODED)

    @app.post(
        "/v1/edits", tags=["pictures"], summary="Edit a picture",
        response_class=Response, responses=answers(JSON, PNG, STREAM, schema=PICTURES),
        openapi_extra=body(WantedEdit, EDIT_EXAMPLES, limits),
    )  # fmt: skip
    async def edits(request: Request) -> Response:
        began = time.monotonic()
        media = accepted(request)
        content = await read(request, limits.upload, limits.seconds)

        def decoded() -> Pictures:  # which takes its time, in which others are answered
            wanted = parsed(content, WantedEdit)
            order = settled_edit(wanted, parts.served, limits)
            return Pictures.of(order, parts, keep=wanted.keep, kind="edit")

        async with decoding:
            reply = await asyncio.to_thread(decoded)
        return await answer(request, parts, reply, media, began)
