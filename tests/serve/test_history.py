"""Pictures that are kept: by whom they were drawn, as they were drawn, for as long as is said."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from PIL import Image

from lcm_kit import __version__
from lcm_kit.drawing.pictures import png_bytes
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.problems import MEDIA
from lcm_kit.serve.run import App
from lcm_kit.serve.store import NAME
from tests.app_text import a1111, chunks, comfyui, texts
from tests.serve.small import PATIENCE, application, ask, detail, draw, events, get, going

EXACT = Limits(batch=1)  # the same bytes each time


@pytest.fixture
def app(tiny: Served, tmp_path: Path) -> Iterator[App]:
    """With a drawer of colours and a history of five."""
    with application(tiny, going(), data=tmp_path, history=5) as found:
        yield found


def delete(app: App, path: str) -> Any:
    return ask(app, {"method": "DELETE", "url": path})[0]


def ids(app: App) -> list[int]:
    return [each["id"] for each in get(app, "/v1/history").json()["pictures"]]


def test_what_is_kept_is_what_was_answered(tiny: Served, tmp_path: Path) -> None:
    """By the real drawer: the same bytes, and settings that draw the picture again."""
    with application(tiny, limits=EXACT, data=tmp_path) as app:
        assert get(app, "/v1/info").json()["history"] is True
        answer = draw(app, seed=5, steps=2, count=2, keep=True).json()
        assert answer["kept"] == [1, 2] and "keep" not in answer["settings"]
        plain = draw(app, seed=5, steps=1)
        assert plain.status_code == 200 and "kept" not in plain.json()
        found = get(app, "/v1/history").json()
        assert found["more"] is False and [each["id"] for each in found["pictures"]] == [2, 1]
        for each in found["pictures"]:
            png = base64.b64decode(answer["pictures"][each["index"]]["base64"])
            file = get(app, f"/v1/history/{each['id']}")
            assert file.headers["content-type"] == "image/png" and file.content == png
            assert each["settings"] == answer["settings"] and (each["width"], each["height"]) == (64, 64)
            assert (
                each["kind"] == "picture"
                and each["base"] == "asset:tiny-sd"
                and each["id"] == each["index"] + 1
            )
            again = ask(app, {"json": each["settings"]})[0].json()
            assert base64.b64decode(again["pictures"][each["index"]]["base64"]) == png
            own = json.loads(texts(png)["lcm_kit"])
            assert own == {
                "lcm_kit": __version__, "base": "asset:tiny-sd", "index": each["index"],
                "adapters": {"tiny-lcm-lora": tiny.adapters[0].sha256}, "settings": each["settings"],
            }  # fmt: skip


def test_every_png_says_how_it_was_made_to_other_programs(app: App) -> None:
    request = {"json": {"prompt": "a caf\xe9\nSteps: 3", "seed": 9}, "headers": {"Accept": "image/png"}}
    file = ask(app, request)[0].content
    with Image.open(io.BytesIO(file)) as picture:
        assert picture.getpixel((0, 0)) == (9, 0, 7)
    fields = {
        "Steps": "4", "Sampler": "LCM", "Schedule type": "Simple", "CFG scale": "1", "Seed": "9",
        "Size": "8x8", "Model": "tiny-sd",
    }  # fmt: skip
    web, dropped = a1111(texts(file)["parameters"]), comfyui(texts(file, latin="utf-8")["parameters"])
    assert dropped is not None
    assert web.prompt == dropped.prompt == "a caf\xe9 Steps : 3" and web.loras == [("tiny-lcm-lora", 1.0)]
    assert web.fields == fields and dropped.fields == {key.lower(): each for key, each in fields.items()}
    assert json.loads(texts(file)["lcm_kit"])["settings"]["prompt"] == "a caf\xe9 Steps: 3"


def test_an_edit_is_kept_as_one_with_its_pictures_by_hash_alone(tiny: Served, tmp_path: Path) -> None:
    """By the real drawer; sent again with the picture, the settings draw the same."""
    given = png_bytes(Image.new("RGB", (64, 48), "navy"))
    body = {"task": "vary", "prompt": "a red circle", "strength": 0.5, "steps": 2, "seed": 4}
    body["picture"] = base64.b64encode(given).decode()
    with application(tiny, limits=EXACT, data=tmp_path) as app:
        answer = ask(app, {"url": "/v1/edits", "json": {**body, "keep": True}})[0].json()
        (found,) = get(app, "/v1/history").json()["pictures"]
        file = get(app, "/v1/history/1").content
        again = {key: each for key, each in found["settings"].items() if each is not None}
        redrawn = ask(app, {"url": "/v1/edits", "json": {**again, "picture": body["picture"]}})[0].json()
    assert answer["kept"] == [1] and base64.b64decode(answer["pictures"][0]["base64"]) == file
    assert (found["kind"], found["width"], found["height"]) == ("edit", 64, 48)
    assert found["settings"] == answer["settings"] == redrawn["settings"]
    assert redrawn["pictures"] == answer["pictures"]
    assert found["settings"]["picture"] == {"sha256": hashlib.sha256(given).hexdigest()}
    fields = a1111(texts(file)["parameters"]).fields
    assert (fields["Denoising strength"], fields["Size"], fields["Seed"]) == ("0.5", "64x48", "4")
    assert json.loads(texts(file)["lcm_kit"])["settings"] == found["settings"]


def test_all_ways_of_answering_keep(app: App) -> None:
    asked = {"prompt": "a", "seed": 3, "keep": True}
    file = ask(app, {"json": asked, "headers": {"Accept": "image/png"}})[0]
    assert file.headers["lcm-kit-kept"] == "1" and get(app, "/v1/history/1").content == file.content
    told = events(
        ask(app, {"json": {**asked, "count": 2}, "headers": {"Accept": "text/event-stream"}})[0].text
    )
    assert told[-1][0] == "done" and told[-1][1]["kept"] == [2, 3]
    shown = {each["index"]: base64.b64decode(each["base64"]) for name, each in told if name == "picture"}
    assert [get(app, f"/v1/history/{number}").content for number in (2, 3)] == [shown[0], shown[1]]


def test_the_oldest_go(app: App) -> None:
    kept = [draw(app, seed=k, keep=True).json()["kept"] for k in range(4)]
    assert kept == [[1], [2], [3], [4]]
    assert draw(app, seed=9, count=3, keep=True).json()["kept"] == [5, 6, 7] and ids(app) == [7, 6, 5, 4, 3]
    assert "there is no picture 2 in this history" in detail(get(app, "/v1/history/2"), 404)


def test_pages(app: App) -> None:
    draw(app, count=4, keep=True)
    first = get(app, "/v1/history?limit=3").json()
    rest = get(app, f"/v1/history?limit=3&before={first['pictures'][-1]['id']}").json()
    assert [each["id"] for each in first["pictures"]] == [4, 3, 2] and first["more"] is True
    assert [each["id"] for each in rest["pictures"]] == [1] and rest["more"] is False
    assert first["pictures"][0]["index"] == 3


def test_what_is_deleted_is_gone(app: App) -> None:
    draw(app, count=3, keep=True)
    answer = delete(app, "/v1/history/2")
    assert answer.status_code == 204 and not answer.content and ids(app) == [3, 1]
    assert "no picture 2" in detail(delete(app, "/v1/history/2"), 404)
    assert delete(app, "/v1/history").json() == {"deleted": 2} and ids(app) == []
    assert draw(app, keep=True).json()["kept"] == [4]


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/v1/history/0", 404, "there is no picture 0 in this history"),
        ("/v1/history/-1", 404, "there is no picture -1"),
        (f"/v1/history/{2**64}", 404, f"there is no picture {2**64}"),
        ("/v1/history/" + "9" * 5000, 404, "there is nothing at this path"),
        ("/v1/history/first", 404, "there is nothing at this path"),
        ("/v1/history/1%00", 404, "there is nothing at this path"),
        ("/v1/history/1/2", 404, "there is nothing at this path"),
        ("/v1/history?limit=0", 422, "limit: '0' is not allowed; it must be greater than or equal to 1"),
        ("/v1/history?limit=501", 422, "limit: '501' is not allowed; it must be less than or equal to 500"),
        ("/v1/history?before=x", 422, "before: 'x' is not allowed; it must be a valid integer"),
        ("/v1/history?before=x&limit=y", 422, "2 things are wrong with this request"),
        (f"/v1/history?before={2**64}&limit=1", 200, ""),
    ],
)
def test_odd_paths_are_problems(app: App, path: str, status: int, said: str) -> None:
    answer = get(app, path)
    assert answer.status_code == status and (not said or said in detail(answer, status))


def test_without_a_folder_nothing_is_kept_and_that_is_said(tiny: Served) -> None:
    drawer = going()
    with application(tiny, drawer) as app:
        assert get(app, "/v1/info").json()["history"] is False
        said = detail(draw(app, keep=True), 422)
        assert said.startswith(
            "keep: this server keeps no pictures; start it with `lcm-kit serve --data FOLDER`"
        )
        assert not drawer.batches
        for method in ("GET", "DELETE"):
            for path in ("/v1/history", "/v1/history/1"):
                said = detail(ask(app, {"method": method, "url": path})[0], 404)
                assert said.startswith(
                    "this server keeps no pictures and no votes; start it with `lcm-kit serve"
                )
        plain = draw(app).json()
        assert "kept" not in plain and len(chunks(base64.b64decode(plain["pictures"][0]["base64"]))) > 3


def test_a_token_is_needed_for_the_history_too(tiny: Served, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a-token-of-some-length")
    headers = {"Authorization": "Bearer a-token-of-some-length"}
    with application(tiny, going(), tokens=tmp_path / "tokens", data=tmp_path / "data") as app:
        ask(app, {"json": {"prompt": "a", "keep": True}, "headers": headers})
        for path in ("/v1/history", "/v1/history/1", "/v1/votes", "/v1/votes.csv", "/v1/history/../history"):
            assert get(app, path).status_code == 401
        assert delete(app, "/v1/history").status_code == 401
        assert len(get(app, "/v1/history", headers=headers).json()["pictures"]) == 1


def test_a_disk_that_is_full_is_told_and_draws_on(app: App) -> None:
    """SQLite's own refusal. The pictures are not answered with, since they were to be kept."""
    assert app.store is not None
    with app.store._file.reading() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
    while (answer := draw(app, keep=True)).status_code == 200:
        pass
    assert "cannot be used (database or disk is full); see that there is space" in detail(answer, 507)
    streamed = ask(app, {"json": {"prompt": "a", "keep": True}, "headers": {"Accept": "text/event-stream"}})[
        0
    ]
    assert events(streamed.text)[-1][0] == "problem" and events(streamed.text)[-1][1]["status"] == 507
    assert draw(app).status_code == 200 and get(app, "/v1/history").status_code == 200


def test_two_clients_at_once_each_find_theirs(app: App, tmp_path: Path) -> None:
    requests = [{"json": {"prompt": f"p{k}", "seed": k, "keep": True}} for k in range(5)]
    answers = ask(app, *requests, together=True)
    kept = {answer.json()["kept"][0]: k for k, answer in enumerate(answers)}
    assert sorted(kept) == [1, 2, 3, 4, 5]
    for each in get(app, "/v1/history").json()["pictures"]:
        k = kept[each["id"]]
        assert each["settings"]["seed"] == k and each["settings"]["prompt"] == f"p{k}"
        with Image.open(io.BytesIO(get(app, f"/v1/history/{each['id']}").content)) as picture:
            assert picture.getpixel((0, 0)) == (k, 0, 7)
    with closing(sqlite3.connect(tmp_path / NAME)) as db:  # anybody may read along
        assert db.execute("SELECT count(*) FROM pictures").fetchone() == (5,)


def test_a_disk_that_is_slow_keeps_nobody_else_waiting(app: App) -> None:
    """While one request waits for the file, which the test holds, others are answered."""
    store = app.store
    assert store is not None
    busy = store._file._lock

    async def scene() -> tuple[int, bool, int]:
        transport = httpx.ASGITransport(app.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            waiting = asyncio.create_task(client.get("/v1/history"))
            asking = [client.get("/healthz"), client.post("/v1/pictures", json={"prompt": "a"})]
            answers = [await each for each in asking]
            early = waiting.done()
            busy.release()
            return max(each.status_code for each in answers), early, (await waiting).status_code

    busy.acquire()
    late = threading.Timer(PATIENCE, busy.release)  # else a loop that waits would wait for ever
    late.start()
    try:
        assert asyncio.run(scene()) == (200, False, 200)
    finally:
        late.cancel()


def test_openapi_says_what_the_history_answers(app: App) -> None:
    draw(app, keep=True)
    page = get(app, "/openapi.json").json()["paths"]
    schema = page["/v1/history"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(get(app, "/v1/history").json(), schema)
    asked = page["/v1/history"]["get"]["parameters"]
    assert [(each["name"], each["schema"].get("maximum")) for each in asked] == [
        ("before", None),
        ("limit", 500),
    ]
    assert page["/v1/history/{number}"]["get"]["responses"]["200"]["content"].keys() == {"image/png"}
    kept = page["/v1/pictures"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(draw(app, keep=True).json(), kept)
    for way in (
        page["/v1/history"]["get"],
        page["/v1/history"]["delete"],
        page["/v1/history/{number}"]["get"],
    ):
        assert way["responses"]["404"]["content"].keys() == {MEDIA}
