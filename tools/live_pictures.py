"""Pictures of the live page, each of its tabs in use, to look at and for docs/live.md.

    python -m tools.live_pictures FOLDER

writes FOLDER/TAB-WIDTH-SCHEME.png: a real `lcm-kit serve` of the embedded base before a headless Chromium.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.serve.browser import browser
from tests.serve.small import Process

PROMPTS = (
    "a large banana on a dotted blue background, in the middle", "a large owl on a striped green background",
    "a small house on a plain orange background", "a large penguin on a checkered yellow background",
    "a large cactus on a striped purple background", "a small strawberry on a dotted pink background",
)  # fmt: skip
PROMPT, OTHER = "a large apple on a striped blue background, in the middle", PROMPTS[0]
SIZES = ((1280, 900), (360, 740))


@contextmanager
def server(data: Path) -> Iterator[str]:
    """The address of one that is ready."""
    adapter = "--base", "asset:tiny-sd", "--adapter", "asset:tiny-lcm-lora"
    process = Process.start(*adapter, "--data", str(data))
    try:
        yield process.url
    finally:
        process.end()


def stroke(page: Any, sheet: str, *places: tuple[float, float]) -> None:
    """With the mouse, through places in shares of the sheet."""
    page.locator(sheet).scroll_into_view_if_needed()
    box = page.locator(sheet).bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=6)
    page.mouse.up()


def settle(page: Any) -> None:
    """Until nothing is being drawn."""
    page.wait_for_timeout(500)
    while page.locator("[aria-busy=true], .bar.on").count():
        page.wait_for_timeout(100)
    page.wait_for_timeout(300)


def use(page: Any, keep: bool) -> Iterator[str]:
    """Use each tab, and name it when there is something to see."""
    if keep:
        for number, prompt in enumerate(PROMPTS):
            page.fill("#seed", str(number))
            page.fill("#prompt", prompt)
            settle(page)
            page.click("#drawn [data-do=keep]")
            settle(page)
    page.fill("#prompt", PROMPT)
    settle(page)
    yield "draw"
    page.click("#drawn [data-do=edit]")
    settle(page)
    stroke(page, "#edit-surface canvas", (0.35, 0.35), (0.65, 0.35), (0.65, 0.6), (0.35, 0.6), (0.5, 0.45))
    page.fill("#prompt", "a large owl on a striped blue background, in the middle")
    page.click("#inpaint")
    settle(page)
    yield "edit"
    page.fill("#prompt", "a large strawberry on a plain yellow background")
    page.click("#tab-sketch")
    for colour, places in (
        ("blue", ((0.1, 0.15), (0.9, 0.15))),
        ("red", ((0.4, 0.5), (0.6, 0.5), (0.5, 0.62))),
    ):
        page.check(f"#swatches input[aria-label={colour}]")
        page.fill("#sketch-size", "90")
        stroke(page, "#sketch-surface canvas", *places)
    settle(page)
    yield "sketch"
    page.click("#tab-frames")
    page.fill("#prompt-to", OTHER)
    page.click("#frames-draw")
    settle(page)
    page.click("#play")
    yield "frames"
    page.click("#tab-compare")
    page.check("#blind")
    page.click("#compare")
    settle(page)
    yield "compare"
    page.click("#vote [data-choice=left]")
    settle(page)
    yield "voted"
    page.click("#tab-draw")
    page.click("#drawn [data-do=copy]")
    yield "copy"
    page.click("#copy [data-close]")
    page.locator("#history button").first.click()
    page.wait_for_timeout(300)
    yield "kept"


def main() -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data, server(Path(data)) as url, browser() as chromium:
        first = True
        for scheme in ("light", "dark"):
            for width, height in SIZES:
                size: Any = {"width": width, "height": height}
                context = chromium.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
                page = context.new_page()
                page.on("console", lambda message: print(message.type, message.text))
                page.goto(url)
                page.wait_for_selector("body.ready")
                for tab in use(page, first):
                    page.screenshot(path=folder / f"{tab}-{width}-{scheme}.png", full_page=True)
                    wide = page.evaluate("document.documentElement.scrollWidth")
                    assert wide <= width, (tab, wide)
                context.close()
                first = False


if __name__ == "__main__":
    main()
