"""What ends a verb: one sentence on stderr and exit code 2, whatever the arguments are."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from lcm_kit import console
from lcm_kit.cli.main import app


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["check", ""], "an argument of check"),
        (["report", ""], "an argument of report"),
        (["finetune", "asset:brand", "--base", ""], "--base"),
        (["finetune", "asset:brand", "--base="], "--base"),
        (["sample", "--prompt", "a", "--output", ""], "--output"),
        ([""], "an argument of lcm-kit"),
    ],
)
def test_an_empty_argument_is_no_path(args: list[str], what: str) -> None:
    """As of a shell's variable that is not set: as a path it would be where the command runs."""
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr == f"error: {what} is empty (''); give its value, or leave it out\n"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["show", "a\nb"], "config 'a\\nb': there is no such file and no shipped config of that name; "),
        (
            ["check", "~no-such-user/x"],
            "config '~no-such-user/x': there is no such file and no shipped config",
        ),
        (["check", "quickstart", "data.path=~no-such-user"], "data.path '~no-such-user' is neither a folder"),
        (["merge", ":1", "a:1"], "':1' names no file; write FILE:WEIGHT"),
        (["sample", "--prompt", "a\x1b[2J"], "--prompt 'a\\x1b[2J': prompt holds a control character"),
        (["report", "r\x1b[2J\n[/red]"], "run 'r\\x1b[2J\\n[/red]' has no results.json"),
        (["cp", "nothing", "x"], "'nothing' is not shipped with lcm-kit; "),
    ],
)
def test_what_a_user_wrote_is_shown_as_it_is(
    args: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 3600.0)  # on a busy machine it would say what it does first
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2, done.output
    assert sentence in done.stderr and "\x1b" not in done.output and done.stderr.startswith("error: ")


def test_a_wrong_path_of_pictures_is_said_to_be_no_path_here() -> None:
    done = CliRunner().invoke(app, ["check", "finetune/tiny_brand", "data.path=brnd"])
    assert "data: brnd is not on this machine; " in done.stdout
