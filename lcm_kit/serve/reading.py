"""What a request says: its body, within bounds, and which media type it likes best."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import Request
from starlette.requests import ClientDisconnect

from lcm_kit.serve.problems import JSON, PNG, STREAM, Left, Problem

DRAWN_AS = JSON, PNG, STREAM  # what pictures may come as; the first one where a client likes several as much


async def read(request: Request, most: int, seconds: float) -> bytes:
    """The JSON of a body of `most` bytes.

    Raises `Problem` for another media type, one that is larger or that takes longer than `seconds`, and
    `Left` if the client is gone before it is whole.
    """
    _require_json(request)
    too_large = Problem(413, f"the body of this request is larger than {most:,} bytes")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > most:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                found += part
                if len(found) > most:
                    raise too_large
    except TimeoutError:
        raise Problem(408, f"the body of this request did not come within {seconds:g} s") from None
    except ClientDisconnect:
        raise Left from None
    return bytes(found)


def _require_json(request: Request) -> None:
    """Of what the headers say of the body; one that says two things says nothing."""
    kinds, codings = (request.headers.getlist(f"content-{name}") for name in ("type", "encoding"))
    media, *parameters = (each.strip().lower() for each in ",".join(kinds).split(";"))
    if media != JSON:
        raise Problem(415, f"the body of this request must be {JSON}, said in its Content-Type")
    for each in parameters:
        name, _, value = each.partition("=")
        if name == "charset" and value.strip('"') not in ("utf-8", "utf8"):
            raise Problem(415, "the body of this request must be in UTF-8, as JSON is")
    if any(each.strip().lower() not in ("", "identity") for each in ",".join(codings).split(",")):
        raise Problem(
            415, "the body of this request must not be compressed; leave out Content-Encoding",
            {"Accept-Encoding": "identity"},
        )  # fmt: skip


def accepted(request: Request, kinds: Sequence[str] = DRAWN_AS) -> str:
    """`chosen` of all the Accept headers of a request."""
    return chosen(",".join(request.headers.getlist("accept")), kinds)


def chosen(accept: str | None, kinds: Sequence[str] = DRAWN_AS) -> str:
    """The one of `kinds` that a client likes best; the first for all alike. Raises `Problem` for none."""
    weights = dict.fromkeys(kinds, -1.0)
    exact = dict.fromkeys(kinds, -1)
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
    best = max(weights, key=lambda kind: (weights[kind], exact[kind]))  # the first of several
    if weights[best] <= 0:
        names = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        raise Problem(406, f"pictures come as {names}; name one of them in Accept")
    return best
