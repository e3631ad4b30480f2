"""The page in a real browser: type and see, move and see, reload, tokens, errors, keys, telephones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.recipes.small import environment
from tests.serve.browser import PICTURE, Visit, same
from tests.serve.small import PATIENCE, Process, wait_for

PROMPT = "a large red apple in the middle"
HTML = '<img src=x onerror="window.hacked = 1"><b>bold</b>'
AWKWARD = """it's a "red" $HOME `id` \\ apple; <b>&amp;</b> %s! ünï 🍎 (large:1.2)"""
NO = "Failed to load resource: the server responded with a status of "
TOKEN = "a-token-of-some-length"
MODES = ("draw", "sketch", "edit", "frames", "compare")


# -- Type, move, reload --------------------------------------------------------------------------------------


def test_who_types_sees_the_picture_of_it_and_who_moves_another(visit: Visit) -> None:
    page = visit.page
    page.locator("#prompt").press_sequentially(PROMPT, delay=20)
    visit.until_drawn_of(PROMPT)
    first = visit.drawn()
    assert same(first, visit.server_draws(prompt=PROMPT)) and first.size == (64, 64)
    page.focus("#steps")
    page.keyboard.press("Home")
    second = visit.drawn(than=first)
    assert page.input_value("#steps-number") == "1" and "1 step " in page.inner_text("#drawn .how")
    assert same(second, visit.server_draws(prompt=PROMPT, steps=1))
    page.fill("#adapter-list input[type=number]", "0.5")
    third = visit.drawn(than=second)
    assert same(third, visit.server_draws(prompt=PROMPT, steps=1, adapters={"tiny-lcm-lora": 0.5}))
    page.select_option("#shape", "4:3")
    visit.until("document.querySelector('#drawn .picture').naturalWidth > 64")
    assert visit.drawn().size == (72, 56)
    page.click("#steps-reset")
    visit.until("document.querySelector('#drawn .how').textContent.includes('4 steps')")


def test_the_negative_prompt_is_there_where_guidance_keeps_it(visit: Visit) -> None:
    page = visit.page
    assert not page.is_visible("#negative")
    visit.type(PROMPT)
    first = visit.drawn()
    page.fill("#guidance-number", "2")
    second = visit.drawn(than=first)
    page.fill("#negative", "red")
    third = visit.drawn(than=second)
    assert same(third, visit.server_draws(prompt=PROMPT, guidance_scale=2.0, negative_prompt="red"))
    page.fill("#guidance-number", "1")
    assert same(visit.drawn(than=third), first) and not page.is_visible("#negative")
    assert "negative_prompt" not in visit.asked[-1]


def test_a_seed_is_kept_or_rolled(visit: Visit) -> None:
    page = visit.page
    page.uncheck("#live")
    visit.type(PROMPT)
    page.fill("#seed", "7")
    page.click("#draw")
    first = visit.drawn()
    assert same(first, visit.server_draws(prompt=PROMPT, seed=7)) and len(visit.asked) == 1
    page.click("#lock")
    assert page.get_attribute("#lock", "aria-pressed") == "false"
    page.click("#draw")
    second = visit.drawn(than=first)
    seed = int(page.input_value("#seed"))
    assert seed != 7 and same(second, visit.server_draws(prompt=PROMPT, seed=seed))


def test_settings_and_picture_are_there_after_a_reload(visit: Visit) -> None:
    page = visit.page
    visit.type(PROMPT)
    page.fill("#seed", "11")
    page.fill("#steps-number", "2")
    page.fill("#adapter-list input[type=number]", "0.75")
    visit.until("document.querySelector('#drawn .how').textContent.includes('2 steps')")
    before = visit.drawn()
    page.reload()
    visit.ready()
    assert same(visit.drawn(), before)
    assert page.input_value("#prompt") == PROMPT and page.input_value("#seed") == "11"
    assert visit.asked[-1]["steps"] == 2 and visit.asked[-1]["adapters"] == {"tiny-lcm-lora": 0.75}
    page.click("#tab-compare")
    page.reload()
    visit.ready()
    assert page.get_attribute("#tab-compare", "aria-selected") == "true"


def test_the_latest_wins(visit: Visit) -> None:
    """The first request is held back: the second takes its place, and nothing of the first is shown later."""
    page, held = visit.page, []
    given_up: list[str] = []
    page.on("requestfailed", lambda request: given_up.append(json.loads(request.post_data)["prompt"]))

    def hold(route: Any) -> None:
        held.append(route)
        if len(held) > 1:
            route.continue_()

    page.route("**/v1/pictures", hold)
    visit.type("a small blue star")
    visit.wait(lambda: held)
    visit.type(PROMPT)
    assert same(visit.drawn(), visit.server_draws(prompt=PROMPT))
    assert given_up[0] == "a small blue star" and len(held) == 2
    assert page.get_attribute(PICTURE, "alt") == f"Picture of: {PROMPT}"


def test_the_server_stops_drawing_what_nobody_waits_for(chrome: Any, live: Process) -> None:
    visit = Visit.begin(chrome, live)
    left = 'lcm_kit_requests_total{method="POST",route="/v1/pictures",status="499"}'
    before = live.figure(left)
    visit.page.fill("#width", "256")
    visit.page.fill("#height", "256")
    visit.page.fill("#steps-number", "50")
    visit.type("a small blue star")
    visit.until("document.querySelector('#drawn .bar').ariaValueNow > 0")
    visit.page.click("#reset")
    assert same(visit.drawn(), visit.server_draws(prompt="a small blue star"))
    wait_for(lambda: live.figure(left) > before, "the first was left")
    visit.end()


# -- What is wrong is said -----------------------------------------------------------------------------------


def test_errors_are_said_in_the_servers_own_words(chrome: Any, live: Process) -> None:
    visit = Visit.begin(chrome, live)
    visit.type(PROMPT)
    visit.drawn()
    visit.page.fill("#width", "65")
    assert visit.alert() == "width 65 is no multiple of 8 pixels; try 64"
    assert visit.page.get_attribute("#alert", "role") == "alert"
    visit.page.fill("#width", "64")
    visit.until("!document.getElementById('alert').textContent")
    visit.end(f"{NO}422")


def test_it_waits_as_long_as_the_server_says(chrome: Any, live: Process) -> None:
    visit, times = Visit.begin(chrome, live), []

    def full(route: Any) -> None:
        times.append(visit.page.evaluate("performance.now()"))
        if len(times) > 1:
            return route.continue_()
        body = json.dumps({"status": 429, "detail": "the queue is full"})
        headers = {"Retry-After": "2", "Content-Type": "application/problem+json"}
        return route.fulfill(status=429, headers=headers, body=body)

    visit.page.route("**/v1/pictures", full)
    visit.type(PROMPT)
    visit.until("document.getElementById('wait').textContent")
    assert visit.page.inner_text("#wait").startswith("the queue is full; it is asked again in ")
    assert same(visit.drawn(), visit.server_draws(prompt=PROMPT))
    assert times[1] - times[0] >= 2000 and visit.page.inner_text("#wait") == ""
    visit.end(f"{NO}429")


def test_a_lost_connection_is_said_and_tried_again(chrome: Any, live: Process) -> None:
    visit = Visit.begin(chrome, live)
    visit.context.set_offline(True)
    visit.type(PROMPT)
    visit.until("document.getElementById('state').textContent.startsWith('Connection lost')")
    visit.context.set_offline(False)
    assert same(visit.drawn(), visit.server_draws(prompt=PROMPT))
    assert visit.page.inner_text("#state") == "Connected again"
    visit.end("ERR_INTERNET_DISCONNECTED")


def test_html_in_words_of_any_origin_is_text(chrome: Any, live: Process) -> None:
    """In prompts, adapters' names and words, and the server's sentences, which may quote what was asked."""
    visit = Visit.begin(chrome, live, go=False)
    page = visit.page
    info = json.loads(live.answer("/v1/info")[1])
    info["adapters"].append({**info["adapters"][0], "name": HTML, "method": HTML, "warnings": [HTML]})
    info["base"]["path"] = HTML
    page.route("**/v1/info", lambda route: route.fulfill(json=info))
    visit.open()
    visit.type(HTML)
    visit.drawn()
    assert page.get_attribute(PICTURE, "alt") == f"Picture of: {HTML}"
    assert page.locator("#adapter-list label").all_inner_texts() == ["tiny-lcm-lora", HTML]
    assert HTML in page.inner_text("#what") and HTML in page.locator("#adapter-list .hint").last.inner_text()
    page.locator("#adapter-list input[type=number]").last.fill("1")
    assert HTML[:20] in visit.alert()
    assert page.locator("b, img[src=x]").count() == 0 and page.evaluate("window.hacked") is None
    visit.end(f"{NO}422")


# -- The token -----------------------------------------------------------------------------------------------


def test_the_token_is_asked_for_and_kept_for_the_tab_alone(
    chrome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").write_text(TOKEN + "\n")
    server = Process.start("--token-file", str(tmp_path / "tokens"))
    try:
        visit = Visit.begin(chrome, server, go=False)
        page = visit.page
        page.goto(server.url + "/")
        page.wait_for_selector("#token[open]")
        assert page.evaluate("document.activeElement.id") == "token-field"
        page.fill("#token-field", "another-token-of-length")
        page.keyboard.press("Enter")
        visit.until("document.getElementById('token-said').textContent")
        assert "does not know this token" in page.inner_text("#token-said")
        page.fill("#token-field", TOKEN)
        page.keyboard.press("Enter")
        visit.ready()
        visit.type(PROMPT)
        visit.drawn()
        assert page.inner_text("#history-missing").endswith("lcm-kit serve --data FOLDER.")
        assert not page.is_visible("#drawn [data-do=keep]")
        page.reload()
        visit.ready()
        visit.drawn()
        assert TOKEN not in page.evaluate("JSON.stringify(localStorage)")
        texts = [copied(visit, kind) for kind in ("curl", "python")]
        assert all(TOKEN not in text and "LCM_KIT_TOKEN" in text for text in texts)
        monkeypatch.setenv("LCM_KIT_TOKEN", TOKEN)
        assert same(run_curl(texts[0], tmp_path), visit.picture(PICTURE))
        page.click("#forget")
        page.wait_for_selector("#token[open]")
        visit.end(f"{NO}401")
    finally:
        server.end()


# -- The same again ------------------------------------------------------------------------------------------


def copied(visit: Visit, kind: str, button: str = "#drawn [data-do=copy]") -> str:
    """What the page gives to copy."""
    visit.page.click(button)
    visit.page.check(f"#copy input[value={kind}]")
    text = str(visit.page.input_value("#copy-text"))
    visit.page.click("#copy [data-close]")
    return text


def run_curl(text: str, folder: Path) -> Image.Image:
    """The picture that it writes, which is taken away again."""
    before = set(folder.iterdir())
    subprocess.run(["bash", "-euc", text], cwd=folder, check=True, timeout=PATIENCE)
    return taken(folder, before)


def run_python(text: str, folder: Path) -> Image.Image:
    """As `run_curl`."""
    (folder / "again.py").write_text(text)
    before = set(folder.iterdir())
    env = {**environment(1), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "again.py"], cwd=folder, env=env, check=True, timeout=PATIENCE)
    return taken(folder, before)


def taken(folder: Path, before: set[Path]) -> Image.Image:
    (found,) = set(folder.iterdir()) - before
    picture = Image.open(found).convert("RGB")
    found.unlink()
    return picture


def test_copied_curl_and_python_draw_the_same_picture(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.fill("#seed", "5")
    page.fill("#guidance-number", "1.5")
    page.fill("#negative", "a 'grey' $(ls) banana")
    visit.type(AWKWARD)
    visit.until_drawn_of(AWKWARD)
    shown = visit.drawn()
    for kind, run in (("curl", run_curl), ("python", run_python)):
        (tmp_path / kind).mkdir()
        assert same(run(copied(visit, kind), tmp_path / kind), shown), kind


@pytest.mark.slow  # it loads the library and the base once more
def test_the_copied_command_draws_the_same_picture(visit: Visit, tmp_path: Path) -> None:
    visit.type(AWKWARD)
    visit.until_drawn_of(AWKWARD)
    shown, text = visit.drawn(), copied(visit, "command")
    function = f'lcm-kit() {{ "{sys.executable}" -m lcm_kit "$@"; }}\n'
    env = {**environment(1), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(["bash", "-euc", function + text], cwd=tmp_path, env=env, check=True, timeout=PATIENCE)
    drawn = [Image.open(each).convert("RGB") for each in (tmp_path / "samples").rglob("*.png")]
    assert any(same(each, shown) for each in drawn)


# -- Keys, telephones, files ---------------------------------------------------------------------------------


def test_everything_is_reached_by_keys_and_has_a_name(visit: Visit) -> None:
    """By Tab alone from the top: each stop has a name and a focus that is seen; and back to the start."""
    page = visit.page
    seen: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
              const at = document.activeElement, style = getComputedStyle(at);
              if (at === document.body) return null;
              return { id: at.id || at.type || at.tagName, outline: parseFloat(style.outlineWidth) };
            }"""
        )
        if stop is None:
            break
        assert stop["outline"] >= 2 or stop["id"].endswith("file"), stop
        seen.append(stop["id"])
    wanted = ["prompt", "draw", "live", "seed", "dice", "lock", "steps", "steps-number", "guidance"]
    assert [each for each in seen if each in wanted] == wanted and "tab-draw" in seen
    page.focus("#prompt")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    visit.drawn()
    page.focus("#tab-draw")
    for mode in (*MODES[1:], MODES[0]):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == f"tab-{mode}"
        assert page.is_visible(f"#panel-{mode}")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, canvas")].filter((each) => {
          const text = [...(each.labels ?? [])].map((label) => label.textContent).join("") + each.textContent;
          return !text.trim() && !each.getAttribute("aria-label") && !each.closest("li");
        }).map((each) => each.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_needs_no_sideways_scrolling(chrome: Any, live: Process, scheme: str) -> None:
    size = {"width": 360, "height": 740}
    visit = Visit.begin(chrome, live, viewport=size, color_scheme=scheme, has_touch=True)
    page = visit.page
    visit.type("a" * 300 + " " + PROMPT)
    visit.drawn()
    page.click("#more summary")
    page.fill("#width", "65")
    visit.alert()
    for mode in MODES:
        page.click(f"#tab-{mode}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, mode
    page.click("#tab-draw")
    page.click("#drawn [data-do=copy]")
    box = page.locator("#copy").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    visit.end(f"{NO}422")


def test_a_picture_is_downloaded_as_the_server_made_it(visit: Visit, tmp_path: Path) -> None:
    visit.type(PROMPT)
    shown = visit.drawn()
    with visit.page.expect_download() as download:
        visit.page.click("#drawn [data-do=save]")
    assert download.value.suggested_filename == "a-large-red-apple-in-the-middle-0.png"
    download.value.save_as(tmp_path / "picture.png")
    assert same(Image.open(tmp_path / "picture.png").convert("RGB"), shown)
