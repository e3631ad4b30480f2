"""Text of anybody's on a terminal and in a page: it is seen as it is, and does nothing."""

from __future__ import annotations

import io
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lcm_kit import console
from lcm_kit.cli.main import app
from lcm_kit.inert import line, plain
from lcm_kit.report import build
from tests.fuzz.doors import check_sentence, fuzz, text
from tests.runs import build_run
from tests.test_report import rows, write_results

MARKUP = st.sampled_from(
    (
        "[bold]",
        "[/]",
        "[/red]",
        "[link=x]y",
        ":smile:",
        "\x1b[2J",
        "\x1b]0;t\x07",
        "\x9b2J",
        "%s",
        "{0}",
        "\\[",
    )
)
SAID = st.one_of(text, st.lists(st.one_of(text, MARKUP), max_size=4).map("".join), st.text(max_size=20))


def _printed(show: Any, page: str = "utf-8") -> str:
    """What `show` writes, on a terminal of that code page."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=page, errors="backslashreplace", newline="\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        show()
    stream.flush()
    return raw.getvalue().decode(page)


@fuzz(st.tuples(SAID, st.booleans()), small=150, large=5000)
def test_what_is_said_is_seen_as_it_is(_: Path, made: tuple[str, bool]) -> None:
    said, err = made[0].replace("\t", " "), made[1]  # rich makes spaces of tabs
    assert _printed(lambda: console.say(said, err=err)) == plain(said) + "\n"
    assert _printed(lambda: console.say(line(said), err=err), "ascii").isascii()
    check_sentence(f"x{line(said)}")
    assert plain(plain(said)) == plain(said) and line(line(said)) == line(said)


@fuzz(st.tuples(SAID, SAID, SAID), small=60, large=2000)
def test_tables_headings_and_bars_show_what_they_are_given(_: Path, made: tuple[str, str, str]) -> None:
    title, heading, cell = made

    def show() -> None:
        table = console.Table(heading, title=title)
        table.add_row(cell)
        console.show(table)
        console.rule(title, heading)
        with console.Progress(console.Words("{task.description}")) as bar:
            bar.add_task(cell, total=1)

    for shown in _printed(show).split("\n"):
        check_sentence(f"x{shown}")


ARGUMENTS = st.one_of(
    SAID, st.sampled_from(("quickstart", "asset:brand", "asset:x", "--", "-h", "--base", "/", "~", "~x/y"))
)
VERBS = st.sampled_from(
    ("show", "check", "cp", "report", "verify", "export", "train", "evaluate", "encode", "merge", "plan")
)


@fuzz(st.tuples(VERBS, SAID, st.lists(SAID, max_size=2)), small=15, large=600)
def test_any_command_line_is_answered_in_a_sentence(_: Path, made: tuple[str, str, list[str]]) -> None:
    """Of a path that is not there; a NUL or half a character cannot be in an argument."""
    verb, first, rest = made
    # typer spells out what it complains of but for these, which do nothing to a terminal's lines
    signs = dict.fromkeys(
        map(ord, "\0\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
    )
    words = [word.translate(signs).encode("utf-8", "ignore").decode() for word in (first, *rest)]
    done = CliRunner().invoke(app, [verb, f"./no/{words[0]}", *(f"{word}=1" for word in words[1:])])
    assert done.exit_code in (0, 2), (done.exit_code, done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    for shown in done.output.split("\n"):
        check_sentence(f"x{shown}")


# -- Pages ---------------------------------------------------------------------------------------------------

MARK = "wordsofauser"


def _with(value: Any, said: str) -> Any:
    """`value` with `said` in place of every `MARK`, all the way down."""
    if isinstance(value, str):
        return value.replace(MARK, said)
    if isinstance(value, dict):
        return {key: _with(item, said) for key, item in value.items()}
    return [_with(item, said) for item in value] if isinstance(value, (list, tuple)) else value


class _Seen(HTMLParser):
    """The tags of a page with the names of their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, sd_base: Any) -> dict[str, Any]:
    """What the template of a run's report is given, `MARK` wherever a user's words are."""
    run = build_run(tmp_path_factory.mktemp("page") / MARK, sd_base("epsilon"))
    write_results(run, rows(), [f"{MARK} {k}" for k in range(2)])
    found = build.context(run)
    found["settings"] = f"base: {MARK}"
    found["results"]["base"]["path"] = MARK
    return found


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_a_page_shows_words_and_obeys_none(shown: dict[str, Any], count: int) -> None:
    def page(said: str) -> _Seen:
        return _Seen(build.filled(_with(shown, said)))

    wanted = page("a fox")
    assert wanted.text.count("a fox") >= 4

    def holds(said: str) -> None:
        found = page(said)
        assert found.tags == wanted.tags
        assert said in found.text

    for said in (
        "<script>alert(1)</script>",
        "</code></pre><img src=x onerror=y>",
        '"><b>',
        "{{ 7 * 7 }}",
        "&lt;",
        "'",
    ):
        holds = example(said)(holds)
    evil = st.sampled_from(("<", ">", '"', "'", "&", "</td>", "<!--", "]]>", "{{", "{%", "<script>", "&amp;"))
    words = st.lists(st.one_of(st.text("abc xyz<>&\"'", max_size=9), evil), min_size=1, max_size=5).map(
        "".join
    )
    settings(max_examples=count, derandomize=count == 12, deadline=None, database=None)(given(words)(holds))()
