"""How large a file, a function and a recipe may be, and that no files import each other: from the sources."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE, FUNCTION, MEDIAN = 350, 80, 12  # lines
RECIPE, MAIN = 220, 140
SOURCES = sorted(path for top in ("lcm_kit", "train", "evaluation") for path in (ROOT / top).rglob("*.py"))


def is_recipe(path: Path) -> bool:
    return path.relative_to(ROOT).parts[0] != "lcm_kit"


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Every function with the lines of its body: a signature of many options is no arithmetic."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node.name, (node.end_lineno or 0) - node.body[0].lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_fit_on_some_screens(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= (RECIPE if path.parts[-2] == "train" else FILE), lines
    for name, length in functions(path):
        assert length <= (MAIN if is_recipe(path) and name == "main" else FUNCTION), (name, length)


def test_most_functions_are_short() -> None:
    found = [length for path in SOURCES for _, length in functions(path)]
    assert len(found) > 1000 and statistics.median(found) <= MEDIAN


def named(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_files_import_each_other() -> None:
    """Not on use either: what hides in a function is a circle all the same."""
    modules = {named(path): path for path in SOURCES}
    arrows: dict[str, set[str]] = {}
    for name, path in modules.items():
        arrows[name] = found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (whole & modules.keys()) or {node.module}
        found &= modules.keys() - {name}
    while free := [name for name, found in arrows.items() if not found & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert sorted(arrows) == []
