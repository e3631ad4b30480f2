"""What is printed is what was meant: no markup in names, no escape sequences, no code page in the way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from lcm_kit import console
from tests.recipes.small import environment
from tests.test_layers import ROOT, named, sources

NASTY = "[v2] [bold]a[/] [/red] :smile: 50%"


def test_text_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(NASTY)
    console.say("a\x1b[2Jb\x07\r\x9b\u202ec\ud800\td\ne", err=True)
    done = capsys.readouterr()
    assert done.out == NASTY + "\n"
    assert done.err.replace(" ", "").replace("\t", "") == ("a\\x1b[2Jb\\x07\\r\\x9b\\u202ec\\ud800d\ne\n")


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("word " * 100)
    assert capsys.readouterr().out == "word " * 100 + "\n"


def test_tables_and_headings_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = console.Table("[h]", title="[t]")
    table.add_column("[i]")
    table.add_row(NASTY, "line\nend\x1b[0m")
    console.show(table)
    console.rule("1/7", "[v2]\x1b[0m")
    done = capsys.readouterr()
    for text in ("[h]", "[t]", "[i]", NASTY, "line\\nend\\x1b[0m"):
        assert text in done.out
    assert "1/7 [v2]\\x1b[0m" in done.err


def test_bars_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress(console.Words("{task.description}")) as bar:
        bar.add_task("[v2]\x1b[2J", total=1)
    assert "[v2]\\x1b[2J" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["ascii", "cp1252", "utf-8"])
def test_a_code_page_is_no_obstacle(page: str) -> None:
    """Through the command line, as Windows has it: what the page lacks is spelled out."""
    program = (
        "import sys; from lcm_kit.cli import main as cli\n"
        "sys.argv = ['lcm-kit', 'show', 'quickstart', *sys.argv[1:]]\n"
        "try: cli.main()\nfinally: print('Fr\\u00e9chet \\u2192 \\U0001f994')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "output=r\u00fcns/\u30d6[v2]"], capture_output=True,
        env={**environment(1), "PYTHONIOENCODING": page, "PYTHONUTF8": "0"},
    )  # fmt: skip
    text = done.stdout.decode(page)
    assert done.returncode == 0, done.stderr
    shown, _, rest = text.partition("Fr")
    assert yaml.safe_load(shown)["output"] == "r\u00fcns/\u30d6[v2]"
    assert rest.strip() == "Fr\u00e9chet \u2192 \U0001f994"[2:].encode(page, "backslashreplace").decode(page)
    failed = subprocess.run(
        [sys.executable, "-m", "lcm_kit", "show", "\u30d6[v2]"], capture_output=True,
        env={**environment(1), "PYTHONIOENCODING": page, "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert failed.returncode == 2 and failed.stderr.decode(page).startswith("error: config '")
    assert b"[v2]'" in failed.stderr


def calls(path: Path) -> set[str]:
    """`print`, `typer.echo`, `accelerator.print`, `Console(...)`: what writes to the terminal by itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("print", "typer.echo", "typer.secho", "click.echo") or name.endswith(".print"):
                found.add(name)
    return found


@pytest.mark.parametrize(
    "path", sources("lcm_kit", "train", "evaluation"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_else_writes_to_the_terminal(path: Path) -> None:
    if path.name == "console.py":
        return
    assert calls(path) == set(), "print through lcm_kit.console"
    assert not any(module.split(".")[0] == "rich" for module in named(path)), "take it from lcm_kit.console"


def test_what_takes_long_says_so_and_what_does_not_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.working("quick"):
        pass
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    told = threading.Event()
    monkeypatch.setattr(console, "say", lambda text, err: (sys.stderr.write(f"{text}\n"), told.set()))
    with console.working("checking [v2].safetensors"):
        assert told.wait(30)
    assert re.fullmatch(r"checking \[v2\]\.safetensors \.\.\. \d+ s\n", capsys.readouterr().err)


def test_only_the_first_of_several_processes_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(threading, "Thread", None)  # none is started
    with console.working("checking"):
        pass


def test_a_bar_in_a_log_is_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    monkeypatch.setattr(console, "AGAIN", 0.0)
    with console.Progress() as bar:
        task = bar.add_task("encoding", total=3)
        for _ in range(3):
            bar.advance(task)
    assert capsys.readouterr().err == "encoding: 1 of 3\nencoding: 2 of 3\n"
