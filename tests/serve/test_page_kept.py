"""What outlives a visit, in a real browser: votes, also blind ones, and kept pictures with their settings."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serve.browser import Visit, same
from tests.serve.small import Process
from tests.serve.test_page import HTML, PROMPT

ASKED, BASE = "your settings", "the base alone at 50 steps"


@pytest.fixture(autouse=True)
def _nothing_kept(visit: Visit) -> None:
    """No pictures of other tests."""
    visit.page.evaluate("Server.call('/v1/history', { method: 'DELETE' }, () => null)")
    visit.open()


def both(visit: Visit) -> dict[str, Image.Image]:
    visit.page.click("#compare")
    visit.until("!document.getElementById('vote').hidden")
    return {side: visit.picture(f"#{side}") for side in ("left", "right")}


def test_two_are_compared_blind_voted_for_and_counted(visit: Visit, live: Process, tmp_path: Path) -> None:
    """What the page tells after the vote is what the pictures are; before it, it holds no word of it."""
    page = visit.page
    before = json.loads(live.answer("/v1/votes")[1])
    page.uncheck("#live")
    visit.type(PROMPT)
    page.fill("#seed", "3")
    against = json.loads(live.answer("/v1/comparisons", {"prompt": PROMPT, "seed": 3})[1])["settings"][
        "against"
    ]
    assert against["steps"] == 50 and against["adapters"] == {} and against["seed"] == 3
    truth = {ASKED: visit.server_draws(prompt=PROMPT, seed=3), BASE: visit.server_draws(**against)}
    page.click("#tab-compare")
    page.check("#blind")
    answers: list[str] = []

    def overheard(route: Any) -> None:
        answer = route.fetch()
        answers.append(answer.text())
        route.fulfill(response=answer)

    page.route("**/v1/comparisons", overheard)
    shown = both(visit)
    (said,) = answers
    assert '"left"' in said and "left_is" not in said and '"against"' not in said
    assert page.inner_text("#left-said") == "Left" and page.inner_text("#right-said") == "Right"
    assert visit.asked[-1]["blind"] is True
    page.click("#vote [data-choice=left]")
    visit.until("document.getElementById('verdict').textContent")
    for side, picture in shown.items():
        who = page.inner_text(f"#{side}-said").partition(": ")[2]
        assert same(picture, truth[who]), side
    left = page.inner_text("#left-said").partition(": ")[2]
    assert page.inner_text("#verdict") == f"Your vote: left ({left})."
    assert page.is_disabled("#vote [data-choice=right]")
    tally = json.loads(visit.server.answer("/v1/votes")[1])
    more = {key: tally[key] - before[key] for key in ("votes", "asked", "against")}
    assert more == {"votes": 1, "asked": int(left == ASKED), "against": int(left == BASE)}
    visit.wait(lambda: page.inner_text("#tally-list dd >> nth=0") == str(before["votes"] + 1))

    page.unroute("**/v1/comparisons")
    page.uncheck("#blind")
    both(visit)
    assert {page.inner_text(f"#{side}-said").partition(": ")[2] for side in ("left", "right")} == {
        ASKED,
        BASE,
    }
    page.click("#vote [data-choice=tie]")
    visit.wait(lambda: page.inner_text("#tally-list dd >> nth=0") == str(before["votes"] + 2))
    with page.expect_download() as download:
        page.click("#csv")
    download.value.save_as(tmp_path / "votes.csv")
    rows = list(csv.DictReader((tmp_path / "votes.csv").open(encoding="utf-8-sig")))
    assert len(rows) == before["votes"] + 2 and any(PROMPT in value for value in rows[-1].values())
    page.reload()
    visit.ready()
    page.wait_for_selector("#tally:not([hidden])")
    visit.wait(lambda: page.inner_text("#tally-list dd >> nth=0") == str(before["votes"] + 2))


def test_kept_pictures_are_there_after_a_reload_with_their_settings(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    visit.type(f"{PROMPT} {HTML}")
    page.fill("#seed", "21")
    page.fill("#steps-number", "2")
    visit.until("document.querySelector('#drawn .how').textContent.includes('2 steps')")
    first = visit.drawn()
    page.click("#drawn [data-do=keep]")
    page.wait_for_selector("#history button img:not([hidden])")
    assert page.inner_text("#drawn [data-do=keep]") == "Kept"
    assert same(visit.picture("#history img"), first)
    page.click("#reset")
    visit.type("a small yellow banana")
    other = visit.drawn(than=first)
    page.click("#drawn [data-do=keep]")
    visit.until("document.querySelectorAll('#history button').length === 2")

    page.reload()
    visit.ready()
    visit.until("document.querySelectorAll('#history img[src]').length === 2")
    page.locator("#history button").last.click()
    page.wait_for_selector("#kept[open]")
    facts = dict(
        zip(
            page.locator("#kept dt").all_inner_texts(),
            page.locator("#kept dd").all_inner_texts(),
            strict=True,
        )
    )
    assert facts["prompt"] == f"{PROMPT} {HTML}" and facts["seed"] == "21" and facts["steps"] == "2"
    assert page.locator("#kept b, #history b").count() == 0 and page.evaluate("window.hacked") is None
    with page.expect_download() as download:
        page.click("#kept-save")
    download.value.save_as(tmp_path / "kept.png")
    kept = Image.open(tmp_path / "kept.png")
    assert "parameters" in kept.info and same(kept.convert("RGB"), first)
    page.click("#kept-restore")
    restored = visit.drawn(than=other)
    assert same(restored, first) and page.input_value("#seed") == "21"

    page.locator("#history button").last.click()
    page.click("#kept-delete")
    visit.until("document.querySelectorAll('#history button').length === 1")
    page.click("#history-clear")
    page.click("#sure-yes")
    visit.until("!document.getElementById('history-empty').hidden")
    assert json.loads(visit.server.answer("/v1/history")[1])["pictures"] == []


def test_an_edit_is_kept_with_what_it_was_made_from(visit: Visit) -> None:
    page = visit.page
    visit.type(PROMPT)
    visit.drawn()
    page.click("#drawn [data-do=edit]")
    page.click("#vary")
    varied = visit.drawn("#edited .picture")
    page.click("#edited [data-do=keep]")
    page.wait_for_selector("#history button img:not([hidden])")
    assert same(visit.picture("#edited .picture"), varied)
    page.click("#history button")
    page.click("#kept-copy")
    page.check("#copy input[value=curl]")
    assert "picture.png" in page.input_value("#copy-text")
    assert "which the server did not keep: sha256 " in page.inner_text("#copy-note")
