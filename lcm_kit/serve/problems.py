"""Errors over HTTP: RFC 9457, with the kit's sentence as the detail."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lcm_kit.errors import UserError
from lcm_kit.inert import line
from lcm_kit.serve.database import NotKept
from lcm_kit.serve.engine import Closed, Full, NoRoom
from lcm_kit.serve.store import Unknown, Voted

MEDIA, JSON, PNG = "application/problem+json", "application/json", "image/png"
STREAM = "text/event-stream"
CSV = "text/csv"
NEW = {"Cache-Control": "no-store"}  # headers of what may be another the next time, or be deleted
LEFT = 499  # nobody reads it: the client had left. In figures and logs alone, as proxies have it


class Left(Exception):  # noqa: N818 - nothing is wrong
    """The client is gone; nobody waits for an answer."""


class Problem(UserError):
    """An answer that is an error: its status, its sentence and what headers go with it."""

    def __init__(  # noqa: D107
        self,
        status: int,
        sentence: str,
        headers: Mapping[str, str] | None = None,
        found: list[str] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status, self.headers, self.found = status, dict(headers or {}), found

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        """What an exception means for a client; a bug's own words stay here."""
        match error:
            case Problem():
                return error
            case Full():
                return cls(429, str(error), {"Retry-After": str(error.seconds)})
            case Closed():
                return cls(503, str(error), {"Retry-After": "5"})
            case NoRoom():
                return cls(503, str(error), {"Retry-After": "30"})
            case NotKept():
                return cls(507, str(error))
            case Unknown():
                return cls(404, str(error))
            case Voted():
                return cls(409, str(error))
            case UserError():
                sentence, items = error.args
                return cls(422, line(sentence), found=[line(item) for item in items] or None)
        return cls(500, "something is wrong within this server; its log says more by the request's id")

    def body(self, request: str | None = None) -> dict[str, Any]:
        """The JSON of it; `request`: the id that the log has."""
        known = {
            "type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status,
            "detail": line(self.args[0]), "errors": self.found, "request": request,
        }  # fmt: skip
        return {key: value for key, value in known.items() if value is not None}

    def response(self, request: str | None = None) -> Response:
        """As an answer."""
        return Response(json.dumps(self.body(request)), self.status, {**NEW, **self.headers}, MEDIA)


async def refuse(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or a WebSocket before it is accepted, with a problem."""
    answer = problem.response(scope.get("lcm_kit.request"))
    if scope["type"] == "http":
        await answer(scope, receive, send)
    elif "websocket.http.response" in scope.get("extensions", {}):

        async def as_websocket(message: Message) -> None:
            await send({**message, "type": message["type"].replace("http.", "websocket.http.", 1)})

        await answer({**scope, "type": "http", "method": "GET"}, receive, as_websocket)
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": problem.body()["detail"][:100]})
