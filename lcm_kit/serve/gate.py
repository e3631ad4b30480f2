"""Who may come in: the right host, no page of elsewhere, a token, and not too often.

Everything needs the token but three paths, which are compared as they are: what is spelled in another way is
another path, and needs it. So no trick with dots, slashes, case, methods or WebSockets leads past.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from lcm_kit.errors import UserError
from lcm_kit.io.files import refusal_of
from lcm_kit.serve.problems import Problem, refuse

WATCHED = {"/healthz", "/readyz"}  # for what watches over processes
OPEN = {*WATCHED, "/"}  # without a token; the page asks for one, and can do nothing before it has it
UNCOUNTED = {*WATCHED, "/metrics"}  # asked again and again by machines
LOCAL = ("localhost", "127.0.0.1", "::1")
SHORTEST = 16  # characters of a token
_CLIENTS = 4096  # whose tokens of the bucket are remembered
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/?#]*)(:[0-9]*)?")  # with or without a port (RFC 9110, 7.2)


class Tokens:
    """The tokens of a file, one a line. None of them is kept, their hashes are."""

    def __init__(self, tokens: Sequence[str]) -> None:  # noqa: D107
        self._hashes = [hashlib.sha256(token.encode()).digest() for token in tokens]

    @classmethod
    def of(cls, file: Path) -> Tokens:
        """Raises `UserError` for a file that cannot be read, has no token, or one that is easily guessed."""
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise refusal_of(error) or error from error
        except UnicodeDecodeError as error:
            raise UserError(f"--token-file {file} is no text; write a token a line") from error
        tokens = [each.strip() for each in lines if each.strip() and not each.startswith("#")]
        if not tokens:
            raise UserError(f"--token-file {file} holds no token; write one, as of `openssl rand -hex 32`")
        for number, token in enumerate(tokens, 1):
            if len(token) < SHORTEST or not (token.isascii() and token.isprintable()) or " " in token:
                raise UserError(
                    f"--token-file {file}: token {number} is not {SHORTEST} or more ASCII characters without "
                    "spaces; make one with `openssl rand -hex 32`"
                )
        return cls(tokens)

    def place(self, given: bytes) -> int | None:
        """Which token this is; None: none of them. Takes the same time whichever it is."""
        asked = hashlib.sha256(given).digest()
        found = None
        for number, each in enumerate(self._hashes):
            if hmac.compare_digest(asked, each):
                found = number
        return found


@dataclass
class Rate:
    """A bucket a client: `burst` requests at once, then `a_minute`. Remembers a bounded number of clients."""

    a_minute: float
    clock: Callable[[], float] = time.monotonic
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict, init=False)

    @property
    def burst(self) -> float:
        """Requests at once: those of six seconds, at least one."""
        return max(1.0, self.a_minute / 10)

    def wait(self, client: str) -> float:
        """Take one; 0, or if there is none the seconds until there is."""
        now = self.clock()
        left, then = self._buckets.pop(client, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.a_minute / 60)
        short = max(0.0, 1 - left)
        self._buckets[client] = (left if short else left - 1, now)
        while len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)  # the longest unseen, whose bucket is likely full again
        return short * 60 / self.a_minute


@dataclass
class Gate:
    """An ASGI application around another.

    `hosts`: those that a request may name; empty: any. `most`: requests of a client that are answered at
    the same time.
    """

    app: ASGIApp
    tokens: Tokens | None
    hosts: frozenset[str]
    rate: Rate
    most: int
    _answering: Counter[str] = field(default_factory=Counter, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or say why not."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            counted = "" if scope["path"] in UNCOUNTED else scope["lcm_kit.client"]
            if counted and self._answering[counted] >= self.most:
                raise Problem(
                    429, f"too many requests at once: {self.most} of this client are being answered; wait "
                    "for some of them", {"Retry-After": "1"},
                )  # fmt: skip
        except Problem as problem:
            await refuse(problem, scope, receive, send)
            return
        self._answering[counted] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._answering[counted] -= 1
            if not self._answering[counted]:
                del self._answering[counted]

    def _check(self, scope: Scope) -> None:
        """Raise `Problem` for what does not come in; the scope has the client then, too."""
        host, path = _one(scope, b"host"), scope["path"]
        scope["lcm_kit.client"] = client = _address(scope)
        self._require_host(host)
        self._require_own_page(scope, host)
        if self.tokens is not None and path not in OPEN:
            try:
                scope["lcm_kit.client"] = client = f"token {self._require_token(scope)}"
            except Problem:
                self._require_seldom(f"without token, {client}")  # whose bucket is no token's
                raise
        if path not in UNCOUNTED:
            self._require_seldom(client)

    def _require_seldom(self, client: str) -> None:
        if seconds := self.rate.wait(client):
            raise Problem(
                429, f"too many requests: this server takes {self.rate.a_minute:g} a minute of each client",
                {"Retry-After": str(math.ceil(seconds))},
            )  # fmt: skip

    def _require_host(self, host: bytes | None) -> None:
        """Against a page whose name was made to lead to this machine (DNS rebinding)."""
        if self.hosts and (host is None or _name(host) not in self.hosts):
            raise Problem(
                421, "the Host of this request is not this server; ask for it by the name it is served under "
                "(--allowed-host adds one)",
            )  # fmt: skip

    def _require_own_page(self, scope: Scope, host: bytes | None) -> None:
        """Against a page of elsewhere that has a browser send requests here, WebSockets included."""
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        for origin in origins:
            own = _place(origin)
            if host is None or own != host.decode("latin-1").lower():
                raise Problem(403, "this server answers no pages of other origins")

    def _require_token(self, scope: Scope) -> int:
        given = _one(scope, b"authorization")
        scheme, _, token = (given or b"").partition(b" ")
        if self.tokens is not None and scheme.lower() == b"bearer":
            found = self.tokens.place(token.strip())
            if found is not None:
                return found
        said = "needs a token" if given is None else "does not know this token"
        raise Problem(
            401, f"this server {said}; send `Authorization: Bearer TOKEN` with one of its --token-file",
            {"WWW-Authenticate": 'Bearer realm="lcm-kit"'},
        )  # fmt: skip


def is_local(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _one(scope: Scope, header: bytes) -> bytes | None:
    """The header's value; None if it is not there, or there twice, which is nobody's."""
    values = [value for name, value in scope["headers"] if name == header]
    return values[0] if len(values) == 1 else None


def _name(host: bytes) -> str:
    """A Host without its port, in lower case; nothing for what is none."""
    found = _HOST.fullmatch(host.decode("latin-1").lower())
    return found[1].strip("[]") if found else ""


def _place(origin: bytes) -> str:
    """Name and port of an Origin; nothing for what is none."""
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower()
    except ValueError:
        return ""


def _address(scope: Scope) -> str:
    """Of the client; of IPv6 the network, of which a client has as many addresses as it likes."""
    text = (scope.get("client") or ("unknown",))[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else text
