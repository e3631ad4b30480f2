"""A client of `lcm-kit serve`, with the standard library alone."""

from __future__ import annotations

import base64
import binascii
import io
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPMessage
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lcm_kit.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST = 2**30  # bytes of an answer


class Client:
    """A server of pictures at `url`, as http://127.0.0.1:8000, with the token that it may need.

    `timeout`: seconds without a word from it. Every method raises `UserError` with the server's own sentence
    where it refuses, and with one of ours where it cannot be reached or is no such server.

        client = lcm_kit.Client("http://127.0.0.1:8000")
        client.draw("a fox in a boat", seed=7)[0].save("fox.png")
    """

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 300.0) -> None:  # noqa: D107
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UserError(f"{url!r} is no server's address; give one as http://127.0.0.1:8000")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._token = token
        self._opener = urllib.request.build_opener(_NoRedirects)

    def draw(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        count: int = 1,
        sampler: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        adapters: Mapping[str, float | None] | None = None,
    ) -> list[Image]:
        """Draw `count` pictures of `prompt`, 8-bit RGB; what is None is what the server finds best.

        `adapters`: weights by the names that `info` lists, None for an adapter's own; {} is the base alone.
        The other settings are those of `sample_images`.
        """
        from PIL import Image, UnidentifiedImageError

        asked = {
            "prompt": prompt, "negative_prompt": negative_prompt, "seed": seed, "count": count,
            "sampler": sampler, "steps": steps, "guidance_scale": guidance_scale, "width": width,
            "height": height, "adapters": None if adapters is None else dict(adapters),
        }  # fmt: skip
        answer = self._json("/v1/pictures", {key: each for key, each in asked.items() if each is not None})
        try:
            files = [base64.b64decode(each["base64"], validate=True) for each in answer["pictures"]]
            return [Image.open(io.BytesIO(each), formats=["PNG"]).convert("RGB") for each in files]
        except (LookupError, TypeError, binascii.Error, UnidentifiedImageError, OSError, ValueError) as error:
            raise self._odd(error) from error

    def info(self) -> dict[str, Any]:
        """The server's base, adapters with what serves them best, and limits."""
        return self._json("/v1/info")

    def _json(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Accept": "application/json, application/problem+json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                found = json.loads(_read(answer))
        except urllib.error.HTTPError as error:
            with error:
                raise UserError(self._said(error)) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            said = first_line(reason) if isinstance(reason, BaseException) else str(reason)
            raise UserError(
                f"{self.url} cannot be reached ({said}); does `lcm-kit serve` run there?"
            ) from error
        except ValueError as error:
            raise self._odd(error) from error
        if not isinstance(found, dict):
            raise self._odd(TypeError("no JSON object"))
        return found

    def _said(self, error: urllib.error.HTTPError) -> str:
        """The sentence of a problem, with what follows from its headers."""
        try:
            problem = json.loads(_read(error))
            said = "; ".join([str(problem["detail"]), *map(str, problem.get("errors", ()))])
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError):
            how = f"{self.url} answers {error.code} {error.reason}"
            return f"{how}, not as `lcm-kit serve` does; check the address"
        wait = error.headers.get("Retry-After")
        return said if wait is None else f"{said} (in {wait} s)"

    def _odd(self, error: BaseException) -> UserError:
        return UserError(
            f"{self.url} does not answer as `lcm-kit serve` does ({first_line(error)}); check the address"
        )


def _read(answer: Any) -> bytes:
    found: bytes = answer.read(_MOST + 1)
    if len(found) > _MOST:
        raise ValueError("its answer is too large")
    return found


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token is for one server."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        """Follow nothing: the answer is told as an error."""
