"""The page's sheets in a real browser: draw a stroke, paste, take back, inpaint, draw around, play frames."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.recipes.small import environment
from tests.serve.browser import Visit, distance, same, unpacked
from tests.serve.small import PATIENCE, Process
from tests.serve.test_page import AWKWARD, NO, PROMPT, copied, run_curl, run_python

SKETCH, MASK = "#sketch-surface canvas", "#edit-surface canvas"


def stroke(visit: Visit, sheet: str, *places: tuple[float, float]) -> None:
    """With the mouse, through places in shares of the sheet."""
    visit.page.locator(sheet).scroll_into_view_if_needed()
    box = visit.page.locator(sheet).bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    visit.page.mouse.move(*points[0])
    visit.page.mouse.down()
    for point in points[1:]:
        visit.page.mouse.move(*point, steps=4)
    visit.page.mouse.up()


def drawing(visit: Visit) -> Image.Image:
    """A picture in the tab Edit, of the prompt."""
    visit.type(PROMPT)
    found = visit.drawn()
    visit.page.click("#drawn [data-do=edit]")
    visit.until("!document.getElementById('edit-mask').disabled")
    return found


def files(tmp_path: Path, body: dict[str, Any]) -> None:
    """What a request was made from, by the names that the copied texts read."""
    for key in ("picture", "mask", "to"):
        if key in body:
            (tmp_path / f"{key}.png").write_bytes(base64.b64decode(body[key]))


# -- Sketch --------------------------------------------------------------------------------------------------


def test_a_stroke_becomes_a_picture(visit: Visit) -> None:
    """What is sent is what was drawn, in the picture's size; another strength is another picture."""
    page = visit.page
    visit.type(PROMPT)
    page.click("#tab-sketch")
    page.check("#swatches input[value='#cd3e3a']")
    stroke(visit, SKETCH, (0.2, 0.5), (0.8, 0.5))
    first = visit.drawn("#sketched .picture")
    sent = visit.asked[-1]
    sheet = np.asarray(unpacked(sent["picture"]), dtype=int)
    assert sheet.shape == (64, 64, 3) and sent["task"] == "sketch" and sent["strength"] == 0.8
    assert abs(sheet[32, 32] - (205, 62, 58)).max() <= 2 and sheet[4, 4].tolist() == [255, 255, 255]
    assert same(first, visit.server_draws("/v1/edits", **sent))
    page.fill("#sketch-strength", "0.3")
    second = visit.drawn("#sketched .picture", than=first)
    assert visit.asked[-1]["strength"] == 0.3
    small = np.asarray(second, dtype=int)
    near = np.abs(small - sheet).mean()  # less noise: nearer to the sketch
    assert near < np.abs(np.asarray(first, dtype=int) - sheet).mean()


def test_strokes_are_taken_back_done_again_erased_and_wiped(visit: Visit) -> None:
    page = visit.page
    page.click("#tab-sketch")
    empty = visit.picture(SKETCH)
    assert np.asarray(empty).min() == 255
    stroke(visit, SKETCH, (0.2, 0.2), (0.8, 0.2))
    one = visit.picture(SKETCH)
    stroke(visit, SKETCH, (0.2, 0.8), (0.8, 0.8))
    two = visit.picture(SKETCH)
    page.click("#sketch-undo")
    assert distance(visit.picture(SKETCH), one) == 0 and distance(one, two) > 0
    page.click("#sketch-redo")
    assert distance(visit.picture(SKETCH), two) == 0
    page.click("#sketch-erase")
    page.fill("#sketch-size", "60")
    stroke(visit, SKETCH, (0.1, 0.8), (0.9, 0.8))
    assert distance(visit.picture(SKETCH), one) == 0
    page.click("#sketch-clear")
    assert distance(visit.picture(SKETCH), empty) == 0
    page.click("#sketch-undo")
    assert distance(visit.picture(SKETCH), one) == 0


def test_a_sheet_is_drawn_on_by_keys(visit: Visit) -> None:
    page = visit.page
    page.click("#tab-sketch")
    page.focus(SKETCH)
    page.keyboard.press("Space")
    for _ in range(6):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Space")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    drawn = np.asarray(visit.picture(SKETCH)).min(axis=2) < 128
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    middle = drawn.shape[0] // 2
    assert (
        rows[0] < middle < rows[-1] and columns[0] < middle
    )  # a point, then a line to the right, and none down
    assert len(columns) > 2 * len(rows)
    assert page.inner_text("#sketch-surface [role=status]").startswith("Brush up, ")
    page.keyboard.press("Control+z")
    assert np.asarray(visit.picture(SKETCH)).min() == 255


def red(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 40)).save(file, "PNG")
    return file.getvalue()


def test_pictures_are_opened_dropped_and_pasted_and_what_is_none_is_said(visit: Visit) -> None:
    page, name = visit.page, "<b>red & co</b>.png"
    page.click("#tab-sketch")
    page.set_input_files("#sketch-file", {"name": name, "mimeType": "image/png", "buffer": red((90, 30))})

    def filled() -> bool:
        return np.asarray(visit.picture(SKETCH))[9, 9].tolist() == [200, 30, 40]

    visit.wait(filled)
    assert np.asarray(visit.picture(SKETCH)).reshape(-1, 3).max(axis=0).tolist() == [200, 30, 40]
    broken = {"name": name, "mimeType": "image/png", "buffer": b"no picture"}
    page.set_input_files("#sketch-file", broken)
    assert visit.alert() == f"{name} is no picture that this browser reads; try PNG or JPEG"
    assert page.locator("#alert b").count() == 0
    for event, kind, key in (
        ("drop", "DragEvent", "dataTransfer"),
        ("paste", "ClipboardEvent", "clipboardData"),
    ):
        page.click("#sketch-clear")
        assert not filled()
        page.evaluate(
            """([event, kind, key, text]) => {
              const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
              const data = new DataTransfer();
              data.items.add(new File([bytes], "red.png", { type: "image/png" }));
              const target = document.querySelector("#sketch-surface canvas");
              target.dispatchEvent(new window[kind](event, { [key]: data, bubbles: true, cancelable: true }));
            }""",
            [event, kind, key, base64.b64encode(red((30, 30))).decode()],
        )
        visit.wait(filled)


def test_the_sketch_is_there_after_a_reload(visit: Visit) -> None:
    page = visit.page
    page.click("#tab-sketch")
    stroke(visit, SKETCH, (0.2, 0.5), (0.8, 0.5))
    before = visit.picture(SKETCH)
    visit.until("(localStorage.getItem('lcm-kit live') ?? '').includes('data:image/png')")
    page.reload()
    visit.ready()
    visit.wait(lambda: distance(visit.picture(SKETCH), before) == 0)


# -- Edit ----------------------------------------------------------------------------------------------------


def test_a_painted_part_is_drawn_anew_and_every_pixel_outside_stays(visit: Visit, tmp_path: Path) -> None:
    before = drawing(visit)
    stroke(visit, MASK, (0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7))
    visit.type("a large blue star in the middle")
    visit.page.click("#inpaint")
    after = visit.drawn("#edited .picture")
    sent = visit.asked[-1]
    mask = np.asarray(unpacked(sent["mask"]).convert("L"))
    assert mask.shape == (64, 64) and set(np.unique(mask)) == {0, 255} and 300 < (mask == 255).sum() < 3000
    assert distance(unpacked(sent["picture"]), before) == 0
    change = np.abs(np.asarray(after, dtype=int) - np.asarray(before, dtype=int)).max(axis=2)
    assert change[mask == 0].max() == 0 and change[mask == 255].max() > 30
    files(tmp_path, sent)
    shown = [copied(visit, kind, "#edited [data-do=copy]") for kind in ("curl", "python")]
    assert same(run_curl(shown[0], tmp_path), after) and same(run_python(shown[1], tmp_path), after)


def test_a_mask_that_is_empty_is_said_by_the_server_and_invert_is_all(chrome: Any, live: Process) -> None:
    visit = Visit.begin(chrome, live)
    drawing(visit)
    visit.page.click("#inpaint")
    assert visit.alert().startswith("the mask is black all over, so that there is nothing to draw")
    visit.page.click("#mask-invert")
    visit.drawn("#edited .picture")
    assert np.asarray(unpacked(visit.asked[-1]["mask"])).min() == 255
    visit.end(f"{NO}422")


def test_what_lies_around_is_drawn_and_the_picture_stays(visit: Visit) -> None:
    before = drawing(visit)
    visit.page.fill("#grow-left", "16")
    for side in ("top", "right", "bottom"):
        visit.page.fill(f"#grow-{side}", "0")
    visit.page.click("#outpaint")
    after = visit.drawn("#edited .picture")
    assert visit.asked[-1]["grow"] == [16, 0, 0, 0] and after.size == (80, 64)
    assert distance(after.crop((16, 0, 80, 64)), before) == 0
    visit.page.click("#edited [data-do=edit]")  # and on from there, and back
    visit.until("document.querySelector('#edit-surface canvas').width === 80")
    visit.page.click("#edit-back")
    visit.until("document.querySelector('#edit-surface canvas').width === 64")


@pytest.mark.parametrize(("task", "size"), [("vary", 64), ("colorize", 64), ("upscale", 128)])
def test_the_whole_picture_is_edited(visit: Visit, task: str, size: int, tmp_path: Path) -> None:
    before = drawing(visit)
    visit.page.click(f"#{task}")
    after = visit.drawn("#edited .picture")
    assert after.size == (size, size) and visit.asked[-1]["task"] == task
    if task == "colorize":  # its greys stay
        assert distance(after.convert("L"), before.convert("L")) <= 2
    assert same(after, visit.server_draws("/v1/edits", **visit.asked[-1]))
    visit.page.uncheck("#edit-auto")
    visit.page.fill("#edit-strength", "0.3")
    visit.drawn("#edited .picture", than=after)
    assert visit.asked[-1]["strength"] == 0.3 and visit.asked[-1]["task"] == task


def test_a_picture_of_ones_own_is_edited_at_a_size_that_is_drawn(visit: Visit) -> None:
    visit.page.click("#tab-edit")
    visit.page.set_input_files(
        "#edit-file", {"name": "a.png", "mimeType": "image/png", "buffer": red((2048, 64))}
    )
    visit.until("document.querySelector('#edit-surface canvas').width === 1024")
    assert visit.picture(MASK).size == (1024, 32)


# -- Frames --------------------------------------------------------------------------------------------------


def test_frames_between_two_prompts_are_played(chrome: Any, live: Process, tmp_path: Path) -> None:
    """Played where motion is wanted, and by hand where it is not; the first frame is the picture itself."""
    visit = Visit.begin(chrome, live, reduced_motion="reduce")
    page = visit.page
    page.uncheck("#live")
    visit.type(PROMPT)
    page.click("#tab-frames")
    page.fill("#prompt-to", AWKWARD)
    page.fill("#frames-count", "5")
    page.click("#frames-draw")
    page.wait_for_selector("#player:not([hidden])")
    assert page.inner_text("#frame-said") == "1 of 5" and page.inner_text("#play") == "Play"
    first = visit.picture("#frame")
    assert same(first, visit.server_draws(prompt=PROMPT))
    page.focus("#frame-number")
    page.keyboard.press("End")
    assert page.inner_text("#frame-said") == "5 of 5"
    assert same(visit.picture("#frame"), visit.server_draws(prompt=AWKWARD))
    page.click("#play")
    visit.until("document.getElementById('frame-said').textContent === '3 of 5'")
    page.click("#play")
    assert page.inner_text("#play") == "Play"
    (tmp_path / "again.py").write_text(copied(visit, "python", "#frames-copy"))
    env = {**environment(1), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "again.py"], cwd=tmp_path, env=env, check=True, timeout=PATIENCE)
    frames = [Image.open(each).convert("RGB") for each in sorted(tmp_path.glob("frame-*.png"))]
    assert len(frames) == 5 and same(frames[0], first) and not same(frames[2], first)
    visit.end()
