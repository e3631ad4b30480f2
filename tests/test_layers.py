"""Who may import whom, read from the sources: rooms stand in a row, and imports point down it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room is a package of lcm_kit or a file beside the packages. Each may import those that stand before it,
# so that there are no circles; what has to be known of each is in its docstring.
ROOMS = [
    "inert", "errors", "console", "share", "quiet",  # words, errors, the terminal, processes as numbers
    "core",  # the mathematics
    "families", "samplers",  # tables
    "io", "assets", "config", "tiny",  # files, what is shipped, every key of a config, the embedded world
    "bases", "lora", "adapter", "drawing", "sample",  # models: loaded, adapted, drawn with
    "data", "training", "bench", "plan", "evaluation",  # what is done with them
    "report", "export",  # what is told of it
    "edits",  # edits as they are asked for
    "serve",  # pictures over HTTP
    "workflow", "api", "cli", "__main__",  # all of it in one go, from a program, from a terminal
]  # fmt: skip
PLACE = {room: number for number, room in enumerate(ROOMS)}
MAY_USE_ACCELERATE = {"training", "evaluation"}  # and recipes


def sources(*tops: str) -> list[Path]:
    return sorted(path for top in tops for path in (ROOT / top).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sources("lcm_kit")}


def room_of(module: str) -> str:
    """`lcm_kit.data.cache` is in `data`; lcm_kit itself is "", which everybody may know the version of."""
    return module.removeprefix("lcm_kit").removeprefix(".").partition(".")[0]


def named(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it and for types too; of lcm_kit the module itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from below or {node.module}


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "lcm_kit"


def wrong_ways(module: str, imported: Set[str]) -> set[str]:
    """Of what `module` imports, that from rooms which stand behind its own."""
    rooms = {name: room_of(name) for name in imported if is_ours(name)}
    return {name for name, room in rooms.items() if room and PLACE[room] > PLACE[room_of(module)]}


def test_every_room_has_its_place() -> None:
    present = {room_of(module) for module in MODULES} - {""}
    assert present == set(ROOMS) and len(ROOMS) == len(PLACE)


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module)])
def test_imports_point_down_the_row(module: str) -> None:
    imported = set(named(MODULES[module]))
    assert not wrong_ways(module, imported), f"{module} imports what stands behind it in ROOMS"
    tops = {name.split(".")[0] for name in imported}
    assert not tops & {"train", "evaluation", "tests", "tools"}, "recipes are run, not imported"
    if "accelerate" in tops:
        assert room_of(module) in MAY_USE_ACCELERATE


def test_a_wrong_way_is_seen() -> None:
    assert wrong_ways("lcm_kit.io.files", {"lcm_kit.data.cache", "lcm_kit.errors", "os"}) == {
        "lcm_kit.data.cache"
    }


@pytest.mark.parametrize("path", sources("train", "evaluation"), ids=lambda path: path.stem)
def test_recipes_know_the_kit_but_not_its_front(path: Path) -> None:
    """A recipe is a flat file to copy: no other recipe, and nothing that runs recipes."""
    rooms = {room_of(name) for name in named(path) if is_ours(name)}
    assert not rooms & {"serve", "workflow", "api", "cli"}
    assert not {name.split(".")[0] for name in named(path)} & {"train", "evaluation", "tests", "tools"}


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) == "core"])
def test_the_core_knows_torch_and_the_standard_library(module: str) -> None:
    """And `errors`, one small class, so that a bad base is told to the user as any other mistake is.

    And `annotated_types`, which is no code either: names for the bounds of a field, which pydantic reads.
    """
    for name in named(MODULES[module]):
        if is_ours(name):
            assert room_of(name) in ("core", "errors"), name
        else:
            assert name.split(".")[0] in {"torch", "annotated_types", *sys.stdlib_module_names}, name


@pytest.mark.parametrize("module", ["lcm_kit.inert", "lcm_kit.errors", "lcm_kit.io.files"])
def test_errors_and_files_cost_nothing_to_import(module: str) -> None:
    for name in named(MODULES[module]):
        ours = room_of(name) in ("errors", "inert") if is_ours(name) else True
        assert ours and (is_ours(name) or name.split(".")[0] in sys.stdlib_module_names), name
