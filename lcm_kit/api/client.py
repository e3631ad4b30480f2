"""A client of `lcm-kit serve`, with the standard library alone."""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlencode, urlsplit

from lcm_kit.edits.tasks import Task
from lcm_kit.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
_MOST = 2**30  # bytes of an answer
Place = str | os.PathLike[str]  # a file


class Comparison(NamedTuple):
    """Two pictures from the same noise; `left_is` and `settings` are None where it is judged blind."""

    id: int | None  # to vote by; None where the server keeps nothing
    left: Image
    right: Image
    left_is: str | None  # asked or against
    settings: dict[str, Any] | None  # of both


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
        keep: bool = False,
    ) -> list[Image]:
        """Draw `count` pictures of `prompt`, 8-bit RGB; what is None is what the server finds best.

        `adapters`: weights by the names that `info` lists, None for an adapter's own; {} is the base alone.
        `keep`: whether the server's history keeps them. The other settings are those of `sample_images`.
        """
        answer = self._asked(
            "/v1/pictures", prompt=prompt, negative_prompt=negative_prompt, seed=seed, count=count,
            sampler=sampler, steps=steps, guidance_scale=guidance_scale, width=width, height=height,
            adapters=adapters, keep=keep or None,
        )  # fmt: skip
        return self._pictures(answer)

    def edit(
        self,
        task: Task,
        picture: Place | Image | None = None,
        prompt: str = "",
        *,
        mask: Place | Image | None = None,
        feather: int | None = None,
        grow: tuple[int, int, int, int] | None = None,
        scale: int | None = None,
        strength: float | None = None,
        to: Place | Image | None = None,
        prompt_to: str | None = None,
        frames: int | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        count: int = 1,
        sampler: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        adapters: Mapping[str, float | None] | None = None,
        keep: bool = False,
    ) -> list[Image]:
        """Edit a picture, a PNG, JPEG or WebP file or PIL's; tasks and options are those of `lcm_kit.edit`.

        All else is as in `draw`.

            client.edit("inpaint", "room.png", "a red sofa", mask="hole.png")[0].save("room-with-sofa.png")
        """
        given = {"picture": picture, "mask": mask, "to": to}
        files = {name: None if each is None else _file(name, each) for name, each in given.items()}
        answer = self._asked(
            "/v1/edits", task=task, prompt=prompt, **files, feather=feather,
            grow=None if grow is None else list(grow), scale=scale, strength=strength, prompt_to=prompt_to,
            frames=frames, negative_prompt=negative_prompt, seed=seed, count=count, sampler=sampler,
            steps=steps, guidance_scale=guidance_scale, adapters=adapters, keep=keep or None,
        )  # fmt: skip
        return self._pictures(answer)

    def compare(
        self,
        prompt: str,
        *,
        against: Mapping[str, Any] | None = None,
        blind: bool = False,
        negative_prompt: str | None = None,
        seed: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        adapters: Mapping[str, float | None] | None = None,
    ) -> Comparison:
        """Draw a picture as `draw`, and from the same noise what it is to be judged `against`.

        That is `steps`, `sampler`, `guidance_scale` and `adapters`; what is not said of it is the base alone
        in 50 steps. `blind`: which of the two is which is said by `vote` alone.
        """
        found = self._asked(
            "/v1/comparisons", prompt=prompt, negative_prompt=negative_prompt, seed=seed, sampler=sampler,
            steps=steps, guidance_scale=guidance_scale, width=width, height=height, adapters=adapters,
            blind=blind or None, against=against,
        )  # fmt: skip
        left, right = (self._picture(self._part(found, side, dict)) for side in ("left", "right"))
        return Comparison(found.get("id"), left, right, found.get("left_is"), found.get("settings"))

    def vote(
        self, comparison: Comparison | int, choice: Literal["left", "right", "tie", "neither"]
    ) -> dict[str, Any]:
        """Vote on a comparison, or on that with this id, once; says what it was: `left_is`, `settings`.

        `chosen` is what was chosen by it, asked or against.
        """
        number = comparison.id if isinstance(comparison, Comparison) else comparison
        if number is None:
            raise UserError(f"{self.url} keeps no votes; start it with `lcm-kit serve --data FOLDER`")
        return self._json("/v1/votes", {"comparison": number, "choice": choice})

    def votes(self) -> dict[str, Any]:
        """How often which side was chosen, in all and by adapters."""
        return self._json("/v1/votes")

    def votes_csv(self) -> str:
        """All votes, a line each, with all settings."""
        try:
            return self._bytes("/v1/votes.csv").decode()
        except UnicodeDecodeError as error:
            raise self._odd(error) from error

    def history(self, limit: int = 100) -> list[dict[str, Any]]:
        """The newest pictures that were drawn with `keep`: `id`, `created`, `kind`, `settings` and more."""
        found: list[dict[str, Any]] = []
        more = True
        while more and len(found) < limit:
            query = {"limit": min(limit - len(found), 500)}
            if found:
                query["before"] = self._part(found[-1], "id", int)
            answer = self._json(f"/v1/history?{urlencode(query)}")
            page = self._part(answer, "pictures", list)
            found += page
            more = bool(page) and self._part(answer, "more", bool)
        return found

    def kept(self, number: int) -> Image:
        """The picture of the history that has this id, with what its file says of it in `info`."""
        return self._opened(self._bytes(f"/v1/history/{number:d}"))

    def forget(self, number: int | None = None) -> None:
        """Delete that picture of the history for good, or all of them."""
        self._bytes("/v1/history" if number is None else f"/v1/history/{number:d}", method="DELETE")

    def info(self) -> dict[str, Any]:
        """The server's base, adapters with what serves them best, and limits."""
        return self._json("/v1/info")

    def _asked(self, path: str, **asked: Any) -> dict[str, Any]:
        """What is answered to what is asked and not None."""
        said = {
            key: dict(each) if isinstance(each, Mapping) else each
            for key, each in asked.items() if each is not None
        }  # fmt: skip
        return self._json(path, said)

    def _json(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            found = json.loads(self._bytes(path, body))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise self._odd(error) from error
        if not isinstance(found, dict):
            raise self._odd(TypeError("no JSON object"))
        return found

    def _bytes(self, path: str, body: Mapping[str, Any] | None = None, method: str | None = None) -> bytes:
        headers = {"Accept": "application/json, application/problem+json, */*;q=0.1"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, headers, method=method)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return _read(answer)
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

    def _part(self, answer: Any, key: str, kind: type[T]) -> T:
        found = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(found, kind):
            raise self._odd(TypeError(f"no {key}"))
        return found

    def _pictures(self, answer: Any) -> list[Image]:
        """Those that stand in an answer."""
        return [self._picture(each) for each in self._part(answer, "pictures", list)]

    def _picture(self, told: Any) -> Image:
        """That which stands in an answer."""
        try:
            content = base64.b64decode(self._part(told, "base64", str), validate=True)
        except binascii.Error as error:
            raise self._odd(error) from error
        return self._opened(content)

    def _opened(self, content: bytes) -> Image:
        from PIL import Image, UnidentifiedImageError

        try:
            return Image.open(io.BytesIO(content), formats=["PNG"]).convert("RGB")
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise self._odd(error) from error

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


def _file(name: str, given: Place | Image) -> str:
    """A file's content, or PIL's picture as a PNG, in base64."""
    if isinstance(given, str | os.PathLike):
        try:
            return base64.b64encode(Path(given).expanduser().read_bytes()).decode()
        except OSError as error:
            raise UserError(f"{name} {os.fspath(given)} cannot be read ({first_line(error)})") from error
    content = io.BytesIO()
    try:
        given.save(content, "PNG", exif=given.getexif())
    except OSError as error:
        raise UserError(f"{name}: {first_line(error)}; convert it to RGB") from error
    return base64.b64encode(content.getvalue()).decode()


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
