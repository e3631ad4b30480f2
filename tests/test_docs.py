"""What README and docs tell the reader to type exists: verbs, options, configs, overrides, files."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from click import Command
from typer.main import get_command

from lcm_kit.cli.main import app
from lcm_kit.config import shipped
from lcm_kit.config.load import RECIPES, dump, load

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "docs" / "reference"  # written by `make docs`
PAGES = sorted(
    page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if GENERATED not in page.parents
)
NOTES = sorted(path for name in ("lcm_kit", "findings") for path in (ROOT / name).rglob("*.md"))
LONGEST = 120
TAKE_A_CONFIG = ("encode", "train", "evaluate", "bench", "show", "check")


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `lcm-kit ...` line in a code block; docs/extending has tests that follow it."""
    found = []
    for page in (page for page in PAGES if page.parent.name != "extending"):
        blocks = re.findall(
            r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
        for block in (text for language, text in blocks if language in ("", "bash", "sh")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "lcm-kit" in words and "git" not in words:
                    found.append((page.name, words[words.index("lcm-kit") + 1 :]))
    return found


@cache
def reference() -> ModuleType:
    """tools/reference_pages.py."""
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "tools" / "reference_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        place = (page.parent / target).resolve()
        assert place.exists() or (place.parent == GENERATED and place.name in reference().PAGES), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_still_to_be_filled_in(page: Path) -> None:
    assert "@@" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, *NOTES], ids=lambda page: str(page.relative_to(ROOT)))
def test_no_line_is_too_long_to_read(page: Path) -> None:
    """Code blocks included; a line that is nothing but an address cannot be broken."""
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [line for line in lines if len(line) > LONGEST and not re.fullmatch(r"\s*<?https?://\S+>?", line)]
    assert not long, f"{len(long)} lines of more than {LONGEST} characters, the first: {long[0]}"


# -- The pages that follow from the code ---------------------------------------------------------------------


def test_every_config_key_is_on_its_page() -> None:
    """Each key that a resolved config of the recipe has, as `lcm-kit show` prints it."""
    page = reference().config_page()
    sections = dict(
        zip(re.findall(r"^## (.+)$", page, re.M), re.split(r"^## .+$", page, flags=re.M)[1:], strict=True)
    )
    assert sections.keys() == RECIPES.keys()
    for name in shipped.configs():
        config = yaml.safe_load(dump(load(shipped.config_path(name))))
        written = set(re.findall(r"^- \*\*`([^`]+)`\*\*", sections[config["recipe"]], re.M))
        assert len(written) > 8 and set(dotted(config)) <= written, name


def dotted(value: object, above: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            name = f"{above}.{key}" if above else key
            yield name
            yield from dotted(inner, name)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict):
                yield from dotted(inner, f"{above}[]")


@pytest.mark.parametrize(
    "line",
    [
        "- **`optimizer.lr`** (default `0.0001`; number, more than 0, at most 1e+09)",
        "- **`seed`** (default `0`; whole number)",
        "- **`output`** (required; text): the run's folder",
        "- **`data.regularization_share`** (default `null`; number, more than 0, less than 1, or null): "
        "share of the batches that these have; null: in proportion to their number",
        "- **`data.samples`** ([Samples](#train-distill-data-samples-samples)): cached in `cache`/teacher, "
        "prompts in `cache`/prompts",
        "- **`adapter.start[].weight`** (default `1.0`; number, at least -1,000, at most 1,000)",
        "- **`precision`** (default `auto`; `auto` or `float32` or `float16` or `bfloat16`): "
        "of the UNet; auto: float32 on CPU, else float16",
    ],
)
def test_a_key_has_its_default_its_range_and_its_comment(line: str) -> None:
    assert line in reference().config_page().splitlines()


def test_every_command_and_option_is_on_its_page() -> None:
    page = reference().cli_page()
    sections = dict(
        zip(re.findall(r"^## (.+)$", page, re.M), re.split(r"^## .+$", page, flags=re.M)[1:], strict=True)
    )
    verbs: dict[str, Command] = get_command(app).commands  # type: ignore[attr-defined]
    assert sections.keys() == verbs.keys()
    for verb, command in verbs.items():
        words = " ".join(sections[verb].split())
        for parameter in command.params:
            for option in (each for each in parameter.opts if each.startswith("--") and each != "--help"):
                assert re.search(rf"[`,/ ]{option}\b", words), (verb, option)
            help_text = " ".join((getattr(parameter, "help", None) or "").split())
            assert help_text in words or parameter.name == "help", (verb, help_text)


def test_every_page_has_its_place_in_the_site() -> None:
    """That every place has its page, `make docs` holds."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = set(re.findall(r"[\w./-]+\.md", nav))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents}
    assert len(pages) > 15
    assert pages | {f"reference/{name}" for name in reference().PAGES} <= named
