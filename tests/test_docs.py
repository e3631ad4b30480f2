"""What README and docs tell the reader to type exists: verbs, options, configs, overrides, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click import Command
from typer.main import get_command

from lcm_kit import shipped
from lcm_kit.cli import app
from lcm_kit.config.load import load

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TAKE_A_CONFIG = ("encode", "train", "evaluate", "bench", "show", "check")


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `lcm-kit ...` line in a code block."""
    found = []
    for page in PAGES:
        blocks = re.findall(
            r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
        for block in (text for language, text in blocks if language in ("", "bash", "sh")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "lcm-kit" in words and "git" not in words:
                    found.append((page.name, words[words.index("lcm-kit") + 1 :]))
    return found


def ids(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 8


@pytest.mark.parametrize(("page", "words"), commands(), ids=ids)
def test_commands_exist(page: str, words: list[str]) -> None:
    verbs: dict[str, Command] = get_command(app).commands  # type: ignore[attr-defined]
    verb = words[0]
    assert verb in verbs or verb.startswith("--")
    if verb in verbs:
        options = {name for parameter in verbs[verb].params for name in parameter.opts}
        assert {word for word in words[1:] if word.startswith("--")} <= options | {"--help"}


@pytest.mark.parametrize(("page", "words"), commands(), ids=ids)
def test_configs_load_with_their_overrides(page: str, words: list[str]) -> None:
    if words[0] in TAKE_A_CONFIG and words[1] != "my.yaml" and not words[1].endswith("/"):
        load(shipped.config_path(words[1]), words[2:])
    if words[0] == "cp":
        shipped.find(words[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_still_to_be_filled_in(page: Path) -> None:
    assert "@@" not in page.read_text(encoding="utf-8")
