"""The application as clients see it: pictures, limits, figures, logs, and OpenAPI that keeps its word."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy
import pytest
from fastapi.openapi.models import OpenAPI
from PIL import Image

from lcm_kit.errors import UserError
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.asked import EXAMPLES
from lcm_kit.serve.asked_edits import EXAMPLES as EDIT_EXAMPLES
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.problems import MEDIA, Problem
from lcm_kit.serve.reading import chosen
from lcm_kit.serve.reply import wordless
from lcm_kit.serve.run import App
from tests.serve.small import (
    PATIENCE,
    FakeDrawer,
    application,
    ask,
    detail,
    draw,
    figure,
    get,
    going,
    logged,
    scope_of,
    wait_for,
)

SECRET = "zanzibar"  # a word of prompts, which stands nowhere else


@pytest.fixture(scope="module")
def real(tiny: Served) -> Iterator[App]:
    """The embedded base with its LoRA, drawn for real."""
    with application(tiny, limits=Limits(batch=4, window=0.05)) as app:
        yield app


def pictures(answer: Any) -> list[bytes]:
    return [base64.b64decode(each["base64"]) for each in answer.json()["pictures"]]


def pixels(png: bytes) -> Any:
    return numpy.asarray(Image.open(io.BytesIO(png))).astype(int)


def test_pictures_as_json_and_as_a_file(real: App) -> None:
    answer = draw(real, seed=3, count=2, steps=1)
    assert answer.status_code == 200
    found = answer.json()
    assert found["settings"] == {
        "prompt": "a red circle", "negative_prompt": None, "seed": 3, "count": 2, "sampler": "lcm",
        "steps": 1, "guidance_scale": 1.0, "width": 64, "height": 64, "adapters": {"tiny-lcm-lora": 1.0},
    }  # fmt: skip
    assert found["batches"] == [2, 2] and [each["index"] for each in found["pictures"]] == [0, 1]
    again = ask(real, {"json": found["settings"]})[0]
    assert pictures(again) == pictures(answer) and len(set(pictures(answer))) == 2
    file = ask(
        real, {"json": {"prompt": "a red circle", "seed": 3, "steps": 1}, "headers": {"Accept": "image/png"}}
    )[0]
    assert file.headers["content-type"] == "image/png"
    assert abs(pixels(file.content) - pixels(pictures(answer)[0])).max() <= 1
    told = json.loads(file.headers["lcm-kit-settings"])
    assert told == {key: each for key, each in found["settings"].items() if "prompt" not in key} | {
        "count": 1
    }


def test_two_clients_with_one_seed_get_one_picture_whatever_else_is_drawn(tiny: Served, real: App) -> None:
    """In a batch to within one level of 255; drawn one by one, the same bytes."""
    mine, other = {"prompt": "a red circle", "seed": 5, "steps": 2}, {"prompt": "a blue house", "steps": 2}
    alone = pixels(pictures(ask(real, {"json": mine})[0])[0])
    together = ask(
        real, *[{"json": each} for each in (other, mine, {**other, "count": 2}, mine)], together=True
    )
    assert max(size for answer in together for size in answer.json()["batches"]) > 1
    for answer in (together[1], together[3]):
        assert abs(pixels(pictures(answer)[0]) - alone).max() <= 1
    assert abs(pixels(pictures(together[0])[0]) - alone).max() > 10
    with application(tiny, limits=Limits(batch=1)) as single:
        answers = ask(single, *[{"json": each} for each in (mine, other, mine)], together=True)
        assert pictures(answers[0]) == pictures(answers[2]) != pictures(answers[1])


def test_what_openapi_says_is_so(real: App, tiny: Served) -> None:
    """The page is OpenAPI, its examples fit its schemas, and are answered as it says."""
    page = get(real, "/openapi.json").json()
    OpenAPI.model_validate(page)
    assert page["openapi"].startswith("3.1") and page["paths"].keys() == {
        "/v1/pictures", "/v1/edits", "/v1/comparisons", "/v1/votes", "/v1/votes.csv", "/v1/history",
        "/v1/history/{number}", "/v1/info", "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    for path, examples in (("/v1/pictures", EXAMPLES), ("/v1/edits", EDIT_EXAMPLES)):
        assert_kept(real, page["paths"][path]["post"], path, examples)
    assert "security" not in page


def assert_kept(app: App, post: Any, path: str, examples: dict[str, Any]) -> None:
    """The word that OpenAPI gives of a path."""
    content = post["requestBody"]["content"]["application/json"]
    drawn = post["responses"]["200"]["content"]["application/json"]["schema"]
    for schema in (content["schema"], drawn):
        jsonschema.Draft202012Validator.check_schema(schema)
    assert content["examples"].keys() == examples.keys()
    for example in content["examples"].values():
        jsonschema.validate(example["value"], content["schema"])
        answer = ask(app, {"json": example["value"], "url": path})[0]
        assert answer.status_code == 200
        jsonschema.validate(answer.json(), drawn)
    known: dict[str, Any] = next(iter(examples.values()))
    wrongs: list[dict[str, Any]] = [{"steps": 51}, {"count": 5}, {"x": 1}]
    if "task" in known:
        wrongs += [{"frames": 17}, {"task": "draw"}, {"grow": [1, 2]}, {"strength": 0}]
    for wrong in ({}, *({**known, **each} for each in wrongs)):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, content["schema"])
        answer = ask(app, {"json": wrong, "url": path})[0]
        assert answer.status_code == 422
        jsonschema.validate(answer.json(), post["responses"]["422"]["content"][MEDIA]["schema"])


def test_openapi_says_of_the_token(tiny: Served, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a-token-of-some-length")
    with application(tiny, going(), tokens=tmp_path / "tokens") as app:
        page = get(app, "/openapi.json", headers={"Authorization": "Bearer a-token-of-some-length"}).json()
    OpenAPI.model_validate(page)
    assert page["security"] == [{"token": []}]
    open_to_all = [
        path for path, each in page["paths"].items() for how in each.values() if how.get("security") == []
    ]
    assert sorted(open_to_all) == ["/healthz", "/readyz"]


def test_info_says_what_there_is(tiny: Served) -> None:
    with application(tiny, going(), Limits(side=512, steps=8)) as app:
        found = get(app, "/v1/info").json()
    assert found["base"]["path"] == "asset:tiny-sd" and found["base"]["side"] == 64
    (adapter,) = found["adapters"]
    assert adapter["name"] == "tiny-lcm-lora" and adapter["weight"] == 1.0
    assert adapter["settings"] == {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0}
    assert (found["limits"]["side"], found["limits"]["steps"], found["state"]) == (512, 8, "ready")
    assert (found["limits"]["upload"], found["limits"]["frames"]) == (8_388_608, 16)
    assert found["edits"] == {
        "inpaint": {"strength": 1.0}, "outpaint": {"strength": 1.0}, "colorize": {"strength": 1.0},
        "upscale": {"strength": 0.5}, "sketch": {"strength": 0.8}, "vary": {"strength": 0.5},
        "interpolate": {"strength": 0.5},
    }  # fmt: skip


# -- Limits --------------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_413_whether_it_says_its_length_or_not(tiny: Served) -> None:
    async def parts() -> Any:
        for _ in range(10):
            yield b" " * 100

    with application(tiny, going(), Limits(body=200)) as app:
        fits = json.dumps({"prompt": "a" * 150})
        headers = {"Content-Type": "application/json"}
        assert ask(app, {"content": fits, "headers": headers})[0].status_code == 200
        for content in (fits + " " * 200, parts()):
            said = detail(ask(app, {"content": content, "headers": headers})[0], 413)
            assert said == "the body of this request is larger than 200 bytes"


@pytest.mark.parametrize("media", ["text/plain", "", "application/jsonp", "multipart/form-data; boundary=x"])
def test_a_body_of_another_media_type_is_415(tiny: Served, media: str) -> None:
    with application(tiny, going()) as app:
        request = {"content": b'{"prompt": "a"}', "headers": {"Content-Type": media}}
        assert "must be application/json" in detail(ask(app, request)[0], 415)
        request["headers"] = {"Content-Type": "Application/JSON; charset=utf-8"}
        assert ask(app, request)[0].status_code == 200


def test_bad_input_is_422_with_what_is_wrong(tiny: Served) -> None:
    drawer = going()
    with application(tiny, drawer) as app:
        assert detail(draw(app, steps=51), 422) == "steps 51 is more than this server draws; give 1 to 50"
        answer = draw(app, steps="4", seed=None)
        assert detail(answer, 422) == "2 things are wrong with this request"
        assert answer.json()["errors"] == [
            "seed: null is not allowed; it must be a valid integer",
            "steps: '4' is not allowed; it must be a valid integer",
        ]
        png = {"json": {"prompt": "a", "count": 2}, "headers": {"Accept": "image/png"}}
        assert "a PNG file holds one picture" in detail(ask(app, png)[0], 422)
    assert not drawer.batches


def test_a_full_queue_is_429_with_retry_after(tiny: Served) -> None:
    drawer = FakeDrawer()

    async def scene(app: App) -> tuple[int, str]:
        """One is drawn, two wait, and the next one is too many."""
        loop = asyncio.get_running_loop()
        first = loop.run_in_executor(None, lambda: draw(app))
        await loop.run_in_executor(None, drawer.began.get)
        more = loop.run_in_executor(None, lambda: draw(app, count=2))
        await loop.run_in_executor(None, wait_for, lambda: app.engine.waiting == 2, "two wait")
        answer = await loop.run_in_executor(None, lambda: draw(app))
        said = detail(answer, 429)
        drawer.may_go.set()
        assert [(await each).status_code for each in (first, more)] == [200, 200]
        return int(answer.headers["retry-after"]), said

    with application(tiny, drawer, Limits(queue=2, count=2)) as app:
        seconds, said = asyncio.run(scene(app))
        assert seconds >= 1 and said.startswith("the queue is full: 2 pictures wait, of 2")
        assert draw(app).status_code == 200


def test_a_request_whose_time_is_over_is_504_and_is_drawn_no_further(tiny: Served) -> None:
    drawer = FakeDrawer()
    with application(tiny, drawer, Limits(seconds=0.2)) as app:
        assert "the time for this request is over" in detail(draw(app), 504)
        wait_for(lambda: app.engine.idle, "idle")
        text = get(app, "/metrics").text
    assert figure(text, 'lcm_kit_batches_total{outcome="stopped"}') == 1.0


def test_while_it_loads_and_when_it_stops_it_is_503(tiny: Served) -> None:
    drawer = going()
    with application(tiny, drawer) as app:
        app.engine.drain()
        answer = draw(app)
        assert "it is being stopped" in detail(answer, 503) and answer.headers["retry-after"]
        assert detail(get(app, "/readyz"), 503) == "this server is stopping"
        assert get(app, "/healthz").json() == {"status": "alive"}


def test_memory_that_ran_out_is_503_and_a_bug_is_500_without_its_words(
    tiny: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    drawer = going()
    with application(tiny, drawer) as app:
        drawer.error = UserError("memory ran out while drawing a picture, one at a time; draw smaller ones")
        assert detail(draw(app), 503).startswith("memory ran out while drawing")
        drawer.error = RuntimeError(f"cannot tokenize {SECRET}")
        assert SECRET not in detail(draw(app), 500)
        drawer.error = None
        assert draw(app).status_code == 200
    said = capsys.readouterr().err
    assert SECRET not in said and '"error": "RuntimeError"' in said and "small.py" in said


def test_unknown_paths_and_methods_are_problems_too(tiny: Served) -> None:
    with application(tiny, going()) as app:
        assert "there is nothing at this path" in detail(get(app, "/v1/pictures/7"), 404)
        answer = get(app, "/v1/pictures")
        assert "does not take this method" in detail(answer, 405) and answer.headers["allow"] == "POST"
        assert get(app, "/docs").status_code == get(app, "/redoc").status_code == 404  # which load a CDN


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        (None, "application/json"), ("*/*", "application/json"), ("image/png", "image/png"),
        ("image/*", "image/png"), ("image/png, */*;q=0.1", "image/png"),
        ("application/json", "application/json"),
        ("image/png;q=0.3, application/json;q=0.2", "image/png"), ("IMAGE/PNG", "image/png"),
        ("image/png;q=0, */*", "application/json"), ("text/html, application/*;q=0.9", "application/json"),
    ],
)  # fmt: skip
def test_the_answer_is_what_the_client_likes_best(accept: str | None, media: str) -> None:
    assert chosen(accept) == media


def test_several_accept_headers_are_one(tiny: Served) -> None:
    with application(tiny, going()) as app:
        headers = [("Accept", "text/html"), ("Accept", "image/png")]
        assert (
            ask(app, {"json": {"prompt": "a"}, "headers": headers})[0].headers["content-type"] == "image/png"
        )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 415), (["application/json"], 200), (["application/json", "application/json"], 415),
        (["text/plain", "application/json"], 415), (["application/json; charset=UTF-8"], 200),
        (['application/json; charset="utf-8"'], 200), (["application/json; charset=utf-16"], 415),
        (["application/json; charset=latin1"], 415), (["application/jsonx"], 415),
        (["Application/JSON "], 200),
    ],
)  # fmt: skip
def test_the_body_is_what_it_is_said_to_be(tiny: Served, headers: list[str], status: int) -> None:
    known = {"content": b'{"prompt": "a"}', "headers": [("Content-Type", each) for each in headers]}
    with application(tiny, going()) as app:
        assert ask(app, known)[0].status_code == status
        known["headers"] = [("Content-Type", "application/json"), ("Content-Encoding", "identity")]
        assert ask(app, known)[0].status_code == 200
        for coding in ("gzip", "br", "identity, gzip", "zstd"):
            answer = ask(app, {**known, "headers": [*known["headers"][:1], ("Content-Encoding", coding)]})[0]
            assert "must not be compressed" in detail(answer, 415)
            assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "accept", ["text/html", "image/jpeg", "image/png;q=0", "*/*;q=0", ",", "image/png;q=x"]
)
def test_a_client_that_likes_neither_gets_406(accept: str) -> None:
    with pytest.raises(Problem) as refused:
        chosen(accept)
    assert refused.value.status == 406


def test_settings_without_words_are_whole_but_for_them() -> None:
    """A LoRA whose name sounds like a prompt is no prompt: without it others would be drawn with them."""
    known = {"seed": 1, "adapters": {"prompt-style": 0.5, "negative_prompt": 1.0}}
    words = {"prompt": "a", "negative_prompt": "b", "prompt_to": "c"}
    assert wordless({**words, **known, "against": {**words, **known}}) == {**known, "against": known}


# -- Figures and logs ----------------------------------------------------------------------------------------


def test_the_figures_count_what_happened(tiny: Served) -> None:
    with application(tiny, going()) as app:
        answers = [
            draw(app),
            draw(app, count=3),
            draw(app, steps=0),
            draw(app, steps=99),
            get(app, "/nothing/" + SECRET),
        ]
        assert [each.status_code for each in answers] == [200, 200, 422, 422, 404]
        ask(app, {"method": "BREW", "url": "/v1/info"})
        answer = get(app, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    text = answer.text
    counted = {
        'lcm_kit_requests_total{method="POST",route="/v1/pictures",status="200"}': 2.0,
        'lcm_kit_requests_total{method="POST",route="/v1/pictures",status="422"}': 2.0,
        'lcm_kit_requests_total{method="GET",route="other",status="404"}': 1.0,
        'lcm_kit_requests_total{method="other",route="/v1/info",status="405"}': 1.0,
        "lcm_kit_pictures_total": 4.0, 'lcm_kit_batches_total{outcome="drawn"}': 2.0,
        "lcm_kit_batch_pictures_sum": 4.0, "lcm_kit_batch_pictures_count": 2.0,
        'lcm_kit_batch_pictures_bucket{le="1.0"}': 1.0, 'lcm_kit_batch_pictures_bucket{le="3.0"}': 2.0,
        'lcm_kit_request_seconds_count{route="/v1/pictures"}': 4.0, "lcm_kit_batch_seconds_count": 2.0,
        "lcm_kit_queue_pictures": 0.0, "lcm_kit_ready": 1.0,
    }  # fmt: skip
    assert {name: figure(text, name) for name in counted} == counted
    assert SECRET not in text


@pytest.mark.parametrize("asked", [False, True])
def test_prompts_stand_in_the_log_only_where_that_was_asked_for(
    tiny: Served, capsys: pytest.CaptureFixture[str], asked: bool
) -> None:
    headers = {"Content-Type": "application/json"}
    with application(tiny, going(), prompts=asked) as app:
        ask(
            app,
            {"json": {"prompt": f"a {SECRET}\n[bold]x", "guidance_scale": 2, "negative_prompt": SECRET,
                      "steps": 2}},
            {"json": {"prompt": SECRET, SECRET: 1}}, {"json": {"prompt": SECRET, "steps": 99}},
            {"content": SECRET, "headers": headers},
            {"json": {"prompt": SECRET}, "url": f"/{SECRET}?q={SECRET}"},
            {"json": {"prompt": SECRET + "\x00"}}, {"json": {"prompt": SECRET, "adapters": {SECRET: 1}}},
        )  # fmt: skip
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [each["status"] for each in requests] == [200, 422, 422, 422, 404, 422, 422]
    assert requests[0]["steps"] == 2 and requests[0]["route"] == "/v1/pictures"
    assert all(re.fullmatch("[0-9a-f]{32}", each["request"]) for each in requests)
    assert (SECRET in json.dumps(lines)) is asked
    if asked:
        assert requests[0]["prompt"] == f"a {SECRET} [bold]x" and requests[0]["negative_prompt"] == SECRET


@pytest.mark.parametrize("whole", [True, False])
def test_a_client_that_leaves_is_drawn_for_no_further(
    tiny: Served, capsys: pytest.CaptureFixture[str], whole: bool
) -> None:
    """Through ASGI: amid its body, or while the drawer, which is never let go, is at it."""
    drawer = FakeDrawer()
    body = json.dumps({"prompt": "a", "count": 2}).encode()

    async def scene(app: App) -> None:
        coming = [{"type": "http.request", "body": body if whole else body[:9], "more_body": not whole}]

        async def receive() -> dict[str, Any]:
            if coming:
                return coming.pop()
            if whole:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(None, lambda: drawer.began.get(timeout=PATIENCE))
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        headers = [(b"content-type", b"application/json")]
        await app.asgi(scope_of("http", "POST", "/v1/pictures", headers), receive, send)

    with application(tiny, drawer) as app:
        asyncio.run(scene(app))
        wait_for(lambda: app.engine.idle, "idle")
        text = get(app, "/metrics").text
    assert [line["status"] for line in logged(capsys)][:1] == [499]
    assert figure(text, 'lcm_kit_batches_total{outcome="stopped"}') == float(whole)
    assert figure(text, 'lcm_kit_requests_total{method="POST",route="/v1/pictures",status="499"}') == 1.0
    assert figure(text, "lcm_kit_pictures_total") == 0.0
