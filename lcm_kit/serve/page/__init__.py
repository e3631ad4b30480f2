"""The live page: its sources, which lie here, as one answer that loads nothing from anywhere.

Style and script stand within the page, and its Content-Security-Policy names both by their hashes, so that a
browser runs what was written here and nothing else, whatever a prompt or a file's name holds.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

# In this order in one scope: each makes one name, of which those after it make use.
SCRIPTS = (
    "parts", "server", "latest", "kept", "settings", "copies", "result", "surface", "draw", "sketch", "edit",
    "frames", "compare", "history", "live",
)  # fmt: skip
_STYLE, _SCRIPT = "/* style.css */", "/* scripts */"  # where they go in index.html


@dataclass(frozen=True)
class Page:
    """The page and the headers that it is answered with."""

    html: bytes
    headers: dict[str, str]


@cache
def page() -> Page:
    """Made once for a process."""
    style = _text("style.css")
    script = "\n".join(['"use strict";', *(_text(f"{name}.js") for name in SCRIPTS)])
    html = _text("index.html")
    for mark, text in ((_STYLE, style), (_SCRIPT, script)):
        before, found, after = html.partition(mark)
        assert found and mark not in after and "</s" not in text.lower(), mark
        html = before + text + after
    policy = {
        "default-src": "'none'", "script-src": _hash(script), "style-src": _hash(style),
        "connect-src": "'self'", "img-src": "blob: data:", "frame-ancestors": "'none'", "base-uri": "'none'",
        "form-action": "'none'",
        # no text becomes HTML or a script, in browsers that know these
        "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip
    headers = {
        "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
        "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache",
    }  # fmt: skip
    return Page(html.encode(), headers)


def _text(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a policy names what stands within a page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
