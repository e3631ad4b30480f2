"""A real browser before a real server: what tests of the page share."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.small import PATIENCE, Process

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra dev)")

NAMES = ("chromium", "chromium-browser", "google-chrome")
SHOWN = """(image) => {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth ?? image.width;
  canvas.height = image.naturalHeight ?? image.height;
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/png").split(",")[1];
}"""
PICTURE = "#drawn .picture"


def chromium() -> str:
    """Its program: LCM_KIT_CHROMIUM, or one on the PATH; the test is skipped where there is none."""
    given = os.environ.get("LCM_KIT_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium: set LCM_KIT_CHROMIUM, or install one of {', '.join(NAMES)}")
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """A headless one. It ends with the module, since others run event loops of their own."""
    program = chromium()
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program)
        yield found
        found.close()


@dataclass
class Visit:
    """Somebody at the page; what the browser complains of meanwhile is an error of the test."""

    server: Process
    context: Any
    page: Any
    complaints: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)  # bodies of what was asked to draw

    @classmethod
    def begin(cls, browser: Any, server: Process, *, go: bool = True, **how: Any) -> Visit:
        how = {"viewport": {"width": 1280, "height": 900}, "accept_downloads": True, **how}
        context = browser.new_context(**how)
        context.set_default_timeout(PATIENCE * 1000)
        found = cls(server, context, context.new_page())
        found.page.on("console", found._heard)
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.page.on("request", found._asked)
        if go:
            found.open()
        return found

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _asked(self, request: Any) -> None:
        if request.method == "POST":
            self.asked.append(json.loads(request.post_data))

    def open(self) -> None:
        self.page.goto(self.server.url + "/")
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_selector("body.ready")

    def end(self, *expected: str) -> None:
        """`expected`: words of complaints that belong to the test."""
        self.context.close()
        found = [each for each in self.complaints if not any(words in each for words in expected)]
        assert found == []

    def type(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)

    def drawn(self, where: str = PICTURE, than: Image.Image | None = None) -> Image.Image:
        """The picture that is shown when nothing is being drawn; `than`: when it is another one."""
        mat = f"#{where.split()[0].removeprefix('#')} .mat"
        found: list[Image.Image] = []

        def there() -> bool:
            if self.page.get_attribute(mat, "aria-busy") == "true" or not self.page.is_visible(where):
                return False
            found[:] = [self.picture(where)]
            return than is None or not same(found[0], than)

        self.page.wait_for_timeout(300)  # what was asked for just now begins within that
        self.wait(there)
        return found[0]

    def picture(self, where: str) -> Image.Image:
        """Of an <img> or a <canvas>, in its own pixels."""
        image = self.page.locator(where).first
        self.wait(lambda: image.evaluate("(it) => it.naturalWidth !== 0"))  # of a canvas there is none
        text = image.evaluate(SHOWN)
        return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")

    def alert(self) -> str:
        """What it says of an error, when it does."""
        self.until("document.getElementById('alert').textContent")
        return str(self.page.inner_text("#alert"))

    def until(self, condition: str) -> None:
        """Until a JavaScript expression is so."""
        self.wait(lambda: self.page.evaluate(condition))

    def wait(self, ready: Callable[[], Any]) -> None:
        """Until it is so, while the page goes on."""
        for _ in range(PATIENCE * 20):
            if ready():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never; the page says {self.page.inner_text('#alert')!r}")

    def until_drawn_of(self, end: str) -> None:
        """Until the picture is one of a prompt that ends so."""
        self.until(f"document.querySelector('#drawn .picture').alt.endsWith({json.dumps(end)})")

    def server_draws(self, path: str = "/v1/pictures", **body: Any) -> Image.Image:
        """What the server itself answers to that."""
        status, text = self.server.answer(path, body)
        assert status == 200, text
        return unpacked(json.loads(text)["pictures"][0]["base64"])


def unpacked(text: str) -> Image.Image:
    """A picture in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def distance(one: Image.Image, other: Image.Image) -> int:
    """The largest, in levels of 255."""
    if one.size != other.size:
        return 256
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def same(one: Image.Image, other: Image.Image) -> bool:
    """To within what rounds otherwise in another batch (docs/serve.md)."""
    return distance(one, other) <= 1
