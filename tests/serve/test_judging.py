"""Comparisons and votes: the same noise on both sides, a lot that nothing gives away, every vote counted."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from hypothesis import strategies as st
from PIL import Image

from lcm_kit import __version__
from lcm_kit.drawing.batches import AfterStep
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.asked import Key
from lcm_kit.serve.comparing import EXAMPLES, Comparison, ToCompare
from lcm_kit.serve.drawer import Piece
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.run import App
from lcm_kit.serve.store import Pair
from lcm_kit.serve.votes_csv import COLUMNS, header, plain, rows
from tests.app_text import chunks, texts
from tests.fuzz.doors import fuzz, text
from tests.serve.small import FakeDrawer, application, ask, detail, events, get, logged

ASKED = {
    "prompt": "a red circle", "negative_prompt": None, "seed": 5, "count": 1, "sampler": "lcm", "steps": 4,
    "guidance_scale": 1.0, "width": 64, "height": 64, "adapters": {"tiny-lcm-lora": 1.0},
}  # fmt: skip
AGAINST = {**ASKED, "sampler": "ddim", "steps": 50, "guidance_scale": 5.0, "adapters": {}}
SIDES = ("asked", "against")
CHOICES = ("left", "right", "tie", "neither")


class Steps(FakeDrawer):
    """Draws how many steps it took."""

    def draw(self, key: Key, pieces: Sequence[Piece], after_step: AfterStep) -> list[Image.Image]:
        super().draw(key, pieces, after_step)
        return [Image.new("RGB", (8, 8), (key.steps, 0, 0)) for _ in pieces]


def drawer() -> Steps:
    found = Steps()
    found.may_go.set()
    return found


@pytest.fixture
def app(tiny: Served, tmp_path: Path) -> Iterator[App]:
    with application(tiny, drawer(), data=tmp_path) as found:
        yield found


@pytest.fixture
def lot(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Say what it falls on."""

    def set_lot(left_is: str) -> None:
        monkeypatch.setattr(secrets, "choice", lambda sides: left_is if left_is in sides else 1 / 0)

    return set_lot


def compare(app: App, stream: bool = False, **asked: Any) -> Any:
    headers = {"Accept": "text/event-stream" if stream else "application/json"}
    request = {"prompt": "a red circle", "seed": 5, **asked}
    return ask(app, {"url": "/v1/comparisons", "json": request, "headers": headers})[0]


def vote(app: App, comparison: Any, choice: Any) -> Any:
    return ask(app, {"url": "/v1/votes", "json": {"comparison": comparison, "choice": choice}})[0]


def file(side: Any) -> bytes:
    assert side.keys() == {"media_type", "base64"} and side["media_type"] == "image/png"
    return base64.b64decode(side["base64"])


def steps_of(side: Any) -> int:
    """What `Steps` drew."""
    with Image.open(io.BytesIO(file(side))) as picture:
        pixel = picture.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0])


# -- What is drawn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_is", SIDES)
def test_both_sides_are_what_pictures_of_these_settings_are(
    tiny: Served, tmp_path: Path, lot: Callable[[str], None], left_is: str
) -> None:
    """To the byte, text and all; by the real drawer, so from the same noise."""
    lot(left_is)
    with application(tiny, limits=Limits(batch=1), data=tmp_path) as app:
        found = compare(app).json()
        assert found["settings"] == {"asked": ASKED, "against": AGAINST} and found["left_is"] == left_is
        by_side = {left_is: found["left"], SIDES[1 - SIDES.index(left_is)]: found["right"]}
        for side in SIDES:
            drawn = ask(app, {"json": found["settings"][side], "headers": {"Accept": "image/png"}})[0]
            assert file(by_side[side]) == drawn.content
            assert json.loads(texts(drawn.content)["lcm_kit"])["settings"] == found["settings"][side]
        assert file(found["left"]) != file(found["right"])


def test_what_it_is_judged_against_can_be_chosen(app: App) -> None:
    against = {"steps": 3, "adapters": {"tiny-lcm-lora": 0.5}, "guidance_scale": 3.0}
    found = compare(app, against=against, width=32, steps=2, negative_prompt="b", guidance_scale=2.0).json()
    settings = found["settings"]
    assert {key for key in ASKED if settings["asked"][key] != settings["against"][key]} == {
        "steps", "adapters", "guidance_scale",
    }  # fmt: skip
    assert settings["against"] == {
        **ASKED, "steps": 3, "adapters": {"tiny-lcm-lora": 0.5}, "width": 32, "height": 32,
        "negative_prompt": "b", "guidance_scale": 3.0,
    }  # fmt: skip


def test_the_default_keeps_within_the_limits(tiny: Served) -> None:
    with application(tiny, drawer(), Limits(steps=8)) as app:
        found = compare(app).json()
    assert found["settings"]["against"] == {**AGAINST, "steps": 8} and found["id"] is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"against": {"steps": 51}}, "against: steps 51 is more than this server draws; give 1 to 50"),
        ({"against": {"stepz": 1}}, "against.stepz: unknown key"),
        ({"against": {"adapters": {"x": 1}}}, "against: adapters: this server has no 'x'"),
        ({"steps": 51}, "steps 51 is more than this server draws"),
        ({"count": 2}, "count: unknown key"), ({"keep": True}, "keep: unknown key"),
        ({"blind": 1}, "blind: 1 is not allowed; it must be a valid boolean"),
        ({"against": {"guidance_scale": 1, "steps": 0}}, "against.steps: 0 is not allowed"),
        ({"negative_prompt": "b", "guidance_scale": 2, "against": {"guidance_scale": 1}},
         "against: a negative prompt does nothing at guidance_scale 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_a_sentence(app: App, asked: dict[str, Any], said: str) -> None:
    assert detail(compare(app, **asked), 422).startswith(said)


def test_only_json_and_events_are_answered(app: App) -> None:
    request = {"url": "/v1/comparisons", "json": {"prompt": "a"}, "headers": {"Accept": "image/png"}}
    assert "as application/json or text/event-stream" in detail(ask(app, request)[0], 406)


# -- Blind ---------------------------------------------------------------------------------------------------


def nothing_told(told: str) -> None:
    """Not a word of what was set, in an answer without its pictures."""
    for word in ("lcm", "ddim", "sampler", "guidance", "adapter", "left_is", *SIDES, "settings"):
        assert word not in told, word


def test_a_blind_answer_tells_nothing(app: App, lot: Callable[[str], None]) -> None:
    """All but the pictures is the same whichever is left: body, headers, and the files' own chunks."""
    told, shown = {}, {}
    for left_is in SIDES:
        lot(left_is)
        answer = compare(app, blind=True)
        found = answer.json()
        assert set(found) == {"id", "blind", "left", "right", "notes", "seconds"} and found["blind"] is True
        shown[left_is] = [steps_of(found[side]) for side in ("left", "right")]
        for side in ("left", "right"):
            assert [kind for kind, _ in chunks(file(found[side]))] == ["IHDR", "IDAT", "IEND"]
        own = ("content-length", "x-request-id")
        headers = [(name, value) for name, value in answer.headers.items() if name not in own]
        plain_body = re.sub(r'"(base64|id|seconds)": ?("[^"]*"|[\d.]+)', "", answer.text.replace('":', '": '))
        told[left_is] = headers, plain_body
        nothing_told(f"{headers}{plain_body}".replace("lcm-kit", ""))
    assert told["asked"] == told["against"] and shown == {"asked": [4, 50], "against": [50, 4]}


def test_blind_events_tell_nothing(app: App, lot: Callable[[str], None]) -> None:
    """Both pictures come at once, after all steps, the left one first."""
    told, shown = {}, {}
    for left_is in SIDES:
        lot(left_is)
        found = events(compare(app, stream=True, blind=True).text)
        names = [name for name, _ in found]
        assert names == ["step"] * 54 + ["picture", "picture", "done"]
        assert [each["side"] for name, each in found if name == "picture"] == ["left", "right"]
        shown[left_is] = [
            steps_of({key: each[key] for key in ("media_type", "base64")})
            for name, each in found if name == "picture"
        ]  # fmt: skip
        told[left_is] = [
            (name, {key: value for key, value in each.items() if key not in ("base64", "id", "seconds")})
            for name, each in found
        ]
        nothing_told(json.dumps(told[left_is]))
    assert told["asked"] == told["against"] and shown == {"asked": [4, 50], "against": [50, 4]}


def test_what_is_not_blind_says_which_is_which_in_events_too(app: App, lot: Callable[[str], None]) -> None:
    lot("against")
    (*_, (name, done)) = events(compare(app, stream=True).text)
    assert name == "done" and done["left_is"] == "against" and done["settings"]["against"] == AGAINST
    assert (done["id"], done["blind"]) == (1, False) and "left" not in done


def test_the_log_does_not_say_which_is_left(
    app: App, capsys: pytest.CaptureFixture[str], lot: Callable[[str], None]
) -> None:
    said = []
    for left_is in SIDES:
        lot(left_is)
        compare(app, blind=True)
        (request,) = logged(capsys)
        said.append({key: each for key, each in request.items() if key not in ("time", "request", "seconds")})
    assert said[0] == said[1] and said[0]["blind"] is True and "prompt" not in said[0]["asked"]


def test_the_lot_is_fair(tiny: Served) -> None:
    """600 of them: a fair one leaves these bounds once in some ten billion tries."""
    parts: Any = SimpleNamespace(served=tiny, limits=Limits(), store=None, source=tiny.source)
    wanted = ToCompare(prompt="a")
    left = Counter(Comparison.of(wanted, parts).left_is for _ in range(600))
    assert left.total() == 600 and 220 < left["asked"] < 380


def test_blind_takes_a_folder(tiny: Served) -> None:
    with application(tiny, drawer()) as app:
        said = detail(compare(app, blind=True), 422)
        assert said.startswith("blind: nobody could say afterwards which picture is which")
        assert "lcm-kit serve --data FOLDER" in said
        assert compare(app).json()["id"] is None
        for answer in (vote(app, 1, "left"), get(app, "/v1/votes"), get(app, "/v1/votes.csv")):
            assert detail(answer, 404).startswith("this server keeps no pictures and no votes; start it with")


# -- Votes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_is", SIDES)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_vote_reveals_and_counts(app: App, lot: Callable[[str], None], left_is: str, choice: str) -> None:
    lot(left_is)
    found = compare(app, blind=True).json()
    answer = vote(app, found["id"], choice).json()
    other = SIDES[1 - SIDES.index(left_is)]
    chosen = {"left": left_is, "right": other}.get(choice, choice)
    settings = {"asked": ASKED, "against": AGAINST}
    assert answer == {"choice": choice, "left_is": left_is, "chosen": chosen, "settings": settings}
    sides = {"left": steps_of(found["left"]), "right": steps_of(found["right"])}
    if choice in sides:  # it is the picture that was pointed at
        assert settings[chosen]["steps"] == sides[choice]
    counts = {"votes": 1, "blind": 1, "asked": 0, "against": 0, "tie": 0, "neither": 0, chosen: 1}
    hashes = {each.name: each.sha256 for each in app.served.adapters}
    assert get(app, "/v1/votes").json() == {
        **counts, "by_adapter": [{"base": "asset:tiny-sd", "adapters": hashes, **counts}],
    }  # fmt: skip


def test_one_vote_each(app: App) -> None:
    number = compare(app).json()["id"]
    assert vote(app, number, "tie").status_code == 200
    for choice in CHOICES:
        assert detail(vote(app, number, choice), 409).startswith(
            f"comparison {number} has its vote, which stays"
        )
    assert get(app, "/v1/votes").json()["votes"] == 1 and get(app, "/v1/votes").json()["tie"] == 1


def test_of_two_who_vote_at_once_one_does(app: App) -> None:
    numbers = [compare(app).json()["id"] for _ in range(8)]
    requests = [
        {"url": "/v1/votes", "json": {"comparison": number, "choice": choice}}
        for number in numbers for choice in ("left", "right")
    ]  # fmt: skip
    answers = ask(app, *requests, together=True)
    assert Counter(each.status_code for each in answers) == {200: 8, 409: 8}
    won = {each.json()["choice"] for each in answers if each.status_code == 200}
    assert won <= {"left", "right"} and get(app, "/v1/votes").json()["votes"] == 8


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (
            {"comparison": 7, "choice": "left"},
            404,
            "there is no comparison 7; POST /v1/comparisons makes one",
        ),
        ({"comparison": 10**30, "choice": "left"}, 404, "there is no comparison 1000"),
        ({"comparison": 0, "choice": "left"}, 422, "comparison: 0 is not allowed"),
        (
            {"comparison": "1", "choice": "left"},
            422,
            "comparison: '1' is not allowed; it must be a valid integer",
        ),
        ({"comparison": True, "choice": "left"}, 422, "comparison: true is not allowed"),
        (
            {"comparison": 1, "choice": "best"},
            422,
            "choice: 'best' is not allowed; it must be 'left', 'right'",
        ),
        ({"comparison": 1}, 422, "choice: missing; it must be given"),
        ({"comparison": 1, "choice": "left", "x": 1}, 422, "x: unknown key"),
        ([], 422, "the request is no JSON object"),
    ],
)
def test_what_is_no_vote_is_a_sentence(app: App, body: Any, status: int, said: str) -> None:
    compare(app)
    assert detail(ask(app, {"url": "/v1/votes", "json": body})[0], status).startswith(said)
    assert get(app, "/v1/votes").json()["votes"] == 0


def test_votes_are_counted_by_what_drew(app: App) -> None:
    """Against the same counted one by one."""
    wanted: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for k in range(12):
        adapters = [{"tiny-lcm-lora": 1.0}, {"tiny-lcm-lora": 0.5}, {}][k % 3]
        found = compare(app, adapters=adapters, blind=k % 2 == 0).json()
        chosen = vote(app, found["id"], CHOICES[k % 4]).json()["chosen"]
        counted = Counter({"votes": 1, "blind": int(k % 2 == 0), chosen: 1})
        wanted[str(sorted(adapters))] = wanted.get(str(sorted(adapters)), Counter()) + counted
        total += counted
    compare(app)  # without a vote
    told = get(app, "/v1/votes").json()
    found = {str(sorted(each.pop("adapters"))): each for each in told.pop("by_adapter")}
    assert all(each.pop("base") == "asset:tiny-sd" for each in found.values())
    assert {name: +Counter(each) for name, each in found.items()} == wanted and +Counter(told) == total
    assert (found["['tiny-lcm-lora']"]["votes"], found["[]"]["votes"], told["votes"]) == (8, 4, 12)


# -- As CSV --------------------------------------------------------------------------------------------------

EVIL = (
    '=HYPERLINK("http://evil","x")', "+1", "-1", "@SUM(A1)", " =1+1", "a;=1+1;b", "'=1", "';'=1",
    'a "quoted", b', "\uff1d1", "caf\xe9 \u6f22", "a'b", ";'", "x; -y",
)  # fmt: skip


def test_the_csv_is_what_was_voted(app: App) -> None:
    """Parsed by Python's reader; more than one page of them would be read the same way."""
    told = []
    for k, prompt in enumerate(EVIL):
        found = compare(
            app, prompt=prompt, seed=-k, blind=k % 2 == 0, negative_prompt=prompt, guidance_scale=2
        ).json()
        told.append((found["id"], found["blind"], vote(app, found["id"], CHOICES[k % 4]).json()))
    compare(app)
    answer = get(app, "/v1/votes.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="votes.csv"'
    lines = list(csv.DictReader(io.StringIO(answer.content.decode("utf-8"), newline="")))
    assert [*lines[0]] == list(COLUMNS) and len(lines) == len(EVIL)
    hashes = json.dumps({each.name: each.sha256 for each in app.served.adapters})
    for line, (number, blind, voted) in zip(lines, told, strict=True):
        assert (line["id"], line["blind"]) == (str(number), str(blind).lower())
        assert [line[key] for key in ("choice", "left_is", "chosen")] == [
            voted[key] for key in ("choice", "left_is", "chosen")
        ]
        asked = voted["settings"]["asked"]
        assert {plain(line["prompt"]), plain(line["negative_prompt"])} == {asked["prompt"]}
        for key in ("seed", "width", "height"):
            assert int(line[key]) == asked[key]
        for side, settings in voted["settings"].items():
            assert line[f"{side}_sampler"] == settings["sampler"]
            assert float(line[f"{side}_guidance_scale"]) == settings["guidance_scale"]
            assert int(line[f"{side}_steps"]) == settings["steps"]
            assert json.loads(line[f"{side}_adapters"]) == settings["adapters"]
        assert (line["lcm_kit"], line["base"]) == (__version__, "asset:tiny-sd")
        assert (line["asked_sha256"], line["against_sha256"]) == (hashes, "{}")
        assert line["compared"] < line["voted"] < "9999"
        assert_harmless(line)


def assert_harmless(line: dict[str, str]) -> None:
    """No cell, nor a part of one behind a semicolon, begins as a formula does; numbers may be below 0."""
    for name, cell in line.items():
        if name not in ("seed", "asked_guidance_scale", "against_guidance_scale"):
            for part in cell.split(";"):
                assert not part.lstrip().startswith(
                    ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
                ), cell


@fuzz(
    st.one_of(
        st.lists(st.sampled_from((*EVIL, *"\t\r\n; '=")), max_size=6).map("".join), text,
    ),
    small=300, large=5000, examples=EVIL,
)  # fmt: skip
def test_no_prompt_is_a_formula_and_each_comes_back(_: Path, prompt: str) -> None:
    record = {
        "lcm_kit": "1",
        "base": prompt,
        "adapters": {},
        "index": 0,
        "settings": {**ASKED, "prompt": prompt},
    }
    pair = Pair(1, "2026", False, "asked", record, record, "tie", "2026")
    (line,) = csv.DictReader(io.StringIO(header() + rows([pair]), newline=""))
    assert plain(line["prompt"]) == plain(line["base"]) == prompt
    assert_harmless(line)


def test_every_vote_is_a_row_however_many(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm_kit.serve.judging._PAGE", 3)
    numbers = [compare(app).json()["id"] for _ in range(10)]
    for number in numbers[::-1]:
        vote(app, number, "left")
    lines = list(csv.DictReader(io.StringIO(get(app, "/v1/votes.csv").text, newline="")))
    assert [int(line["id"]) for line in lines] == numbers


# -- OpenAPI -------------------------------------------------------------------------------------------------


def test_what_openapi_says_of_judging_is_so(app: App) -> None:
    page = get(app, "/openapi.json").json()["paths"]

    def schema_of(path: str, method: str) -> Any:
        found = page[path][method]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator.check_schema(found)
        return found

    content = page["/v1/comparisons"]["post"]["requestBody"]["content"]["application/json"]
    jsonschema.Draft202012Validator.check_schema(content["schema"])
    assert content["examples"].keys() == EXAMPLES.keys()
    compared = schema_of("/v1/comparisons", "post")
    for example in content["examples"].values():
        jsonschema.validate(example["value"], content["schema"])
        found = ask(app, {"url": "/v1/comparisons", "json": example["value"]})[0].json()
        jsonschema.validate(found, compared)
        with pytest.raises(jsonschema.ValidationError):  # blind says none of it, what is not says all
            jsonschema.validate({**found, "blind": not found["blind"]}, compared)
    for wrong in (
        {"prompt": "a", "steps": 51},
        {"prompt": "a", "against": {"steps": 51}},
        {"prompt": "a", "count": 1},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, content["schema"])
        assert ask(app, {"url": "/v1/comparisons", "json": wrong})[0].status_code == 422
    example = page["/v1/votes"]["post"]["requestBody"]["content"]["application/json"]["examples"][
        "the left one"
    ]
    jsonschema.validate(
        ask(app, {"url": "/v1/votes", "json": example["value"]})[0].json(), schema_of("/v1/votes", "post")
    )
    jsonschema.validate(get(app, "/v1/votes").json(), schema_of("/v1/votes", "get"))
    assert page["/v1/votes.csv"]["get"]["responses"]["200"]["content"].keys() == {"text/csv"}
