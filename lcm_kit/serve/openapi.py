"""What OpenAPI says of the routes, besides what FastAPI reads from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI

from lcm_kit.serve.asked import Said
from lcm_kit.serve.gate import WATCHED
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.problems import JSON, MEDIA, PNG, STREAM
from lcm_kit.serve.store import COUNTS, SIDES

_WORDS = {
    401: "No token, or an unknown one",
    404: "There is no such thing, or this server keeps nothing", 409: "There is a vote already",
    406: "None of JSON, PNG and events is accepted",
    408: "The body came too slowly", 413: "The body is too large", 415: "The body is not said to be JSON",
    422: "What was asked for cannot be drawn; the detail says what and why",
    429: "The queue is full, or the client asks too often; Retry-After says when to try again",
    500: "A bug", 503: "Nothing is drawn now: loading, stopping, or memory ran out", 504: "The time is over",
    507: "What is to be kept cannot be written",
}  # fmt: skip
_PROBLEM = {
    "type": "object", "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"}, "title": {"type": "string"}, "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One sentence: the thing, what is wrong, what to do."},
        "errors": {"type": "array", "items": {"type": "string"}}, "request": {"type": "string"},
    },
}  # fmt: skip
FILE = {"schema": {"type": "string", "contentMediaType": PNG}}
_SHOWN = {"media_type": {"type": "string"}, "base64": {"type": "string", "contentEncoding": "base64"}}
PICTURES = {
    "type": "object", "required": ["pictures", "settings", "notes", "batches", "seconds"],
    "properties": {
        "pictures": {"type": "array", "items": {
            "type": "object", "required": ["index", *_SHOWN],
            "properties": {"index": {"type": "integer"}, **_SHOWN},
        }},
        "settings": {"type": "object", "description": "Every setting; sent again, it draws the same."},
        "notes": {"type": "array", "items": {"type": "string"}},
        "batches": {"type": "array", "items": {"type": "integer"},
                    "description": "For each picture, how many were drawn together."},
        "seconds": {"type": "number"},
        "kept": {"type": "array", "items": {"type": "integer"},
                 "description": "With keep: the ids of the pictures in the history."},
    },
}  # fmt: skip

_SETTINGS = {
    "type": "object", "required": list(SIDES), "description": "Of both, each as of pictures.",
}  # fmt: skip
_SIDE = {"type": "object", "required": [*_SHOWN], "properties": _SHOWN}
_LEFT_IS = {"enum": list(SIDES), "description": "Which of the two stands on the left."}
COMPARED = {
    "type": "object", "required": ["id", "blind", "left", "right", "notes", "seconds"],
    "properties": {
        "id": {"type": ["integer", "null"], "description": "To vote by; null without --data."},
        "blind": {"type": "boolean"}, "left": _SIDE, "right": _SIDE, "left_is": _LEFT_IS,
        "settings": _SETTINGS, "notes": {"type": "array", "items": {"type": "string"}},
        "seconds": {"type": "number"},
    },
    "if": {"properties": {"blind": {"const": False}}}, "then": {"required": ["left_is", "settings"]},
    "else": {"properties": {"left_is": False, "settings": False}},
}  # fmt: skip
REVEALED = {
    "required": ["choice", "left_is", "chosen", "settings"],
    "properties": {
        "choice": {"enum": ["left", "right", "tie", "neither"]}, "left_is": _LEFT_IS, "settings": _SETTINGS,
        "chosen": {"enum": [*SIDES, "tie", "neither"]},
    },
}  # fmt: skip
_COUNTS: dict[str, Any] = {name: {"type": "integer"} for name in COUNTS}
TALLY = {
    "required": [*_COUNTS, "by_adapter"],
    "properties": {
        **_COUNTS,
        "by_adapter": {"type": "array", "items": {
            "type": "object", "required": ["base", "adapters", *_COUNTS],
            "properties": {
                "base": {"type": "string"}, **_COUNTS,
                "adapters": {
                    "type": "object", "additionalProperties": {"type": "string"},
                    "description": "SHA-256 by name, of those that the side asked for was drawn with.",
                },
            },
        }},
    },
}  # fmt: skip
HISTORY = {
    "required": ["pictures", "more"],
    "properties": {
        "more": {"type": "boolean"},
        "pictures": {"type": "array", "items": {
            "type": "object",
            "required": ["id", "created", "kind", "base", "index", "settings", "width", "height"],
            "properties": {
                "id": {"type": "integer"}, "created": {"type": "string", "format": "date-time"},
                "kind": {"enum": ["picture", "edit"]}, "base": {"type": "string"},
                "index": {"type": "integer", "description": "Which picture of its request it is."},
                "settings": {"type": "object"}, "width": {"type": "integer"}, "height": {"type": "integer"},
            },
        }},
    },
}  # fmt: skip
_EVENTS = {
    "schema": {"type": "string", "description":
        "Server-sent events, the data of each one JSON object: `step` after each step of drawing, "
        "`picture` for each picture, and as the last one `done` with all that the JSON answer has besides "
        "its pictures, or `problem` with what is else answered as problem+json. Lines that begin with a "
        "colon say nothing."},
    "example":
        'event: step\ndata: {"step": 1, "steps": 1}\n\n'
        'event: picture\ndata: {"index": 0, "media_type": "image/png", "base64": "iVBORw0KGgo="}\n\n'
        'event: done\ndata: {"settings": {}, "notes": [], "batches": [1], "seconds": 0.04}\n\n',
}  # fmt: skip


def said(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of these statuses, which are problems."""
    return {
        each: {"description": _WORDS[each], "content": {MEDIA: {"schema": _PROBLEM}}} for each in statuses
    }


def told(schema: dict[str, Any], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """An answer of JSON, and the problems that may be in its place."""
    return {200: {"content": {JSON: {"schema": {"type": "object", **schema}}}}, **said(401, 429, *statuses)}


def answers(*kinds: str, schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What a request for pictures is answered with: one of these media types, or a problem."""
    known = {JSON: {"schema": schema}, PNG: FILE, STREAM: _EVENTS}
    drawn = {"description": "The pictures", "content": {kind: known[kind] for kind in kinds}}
    return {200: drawn, **said(*(each for each in _WORDS if each not in (404, 409)))}


def body(kind: type[Said], examples: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """A request's schema with this server's limits in it, whole in itself, and examples of it by name."""
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})
    for part in (schema, *parts.values()):
        _limit(part["properties"], limits)
    shown = {name: {"value": value} for name, value in examples.items()}
    content = {"schema": _without_references(schema, parts), "examples": shown}
    return {"requestBody": {"required": True, "content": {JSON: content}}}


_LIMITED = {"count": "count", "steps": "steps", "width": "side", "height": "side", "frames": "frames"}


def _limit(keys: dict[str, Any], limits: Limits) -> None:
    for name, most in _LIMITED.items():
        known = keys.get(name, {})
        for option in known.get("anyOf", [known]):
            if option.get("type") == "integer":
                option["maximum"] = getattr(limits, most)
    if "prompt" in keys:
        keys["prompt"]["maxLength"] = limits.prompt


def _without_references(schema: Any, parts: Mapping[str, Any]) -> Any:
    """Parts of it in their places: where it stands in the page, `#/$defs` would lead elsewhere."""
    if isinstance(schema, list):
        return [_without_references(each, parts) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        own = {key: each for key, each in schema.items() if key != "$ref"}
        return {**_without_references(parts[schema["$ref"].rpartition("/")[2]], parts), **own}
    return {key: _without_references(each, parts) for key, each in schema.items()}


def secure(app: FastAPI) -> None:
    """Say of the token that all but two of the paths that are described need."""
    plain: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain()
        parts = schema.setdefault("components", {})
        parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"token": []}]
        for path in WATCHED:
            schema["paths"][path]["get"]["security"] = []
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
