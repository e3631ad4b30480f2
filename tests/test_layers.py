"""Who may import whom, read from the sources.

ground < pure < config < models < disk < runtime < recipes < top.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = ("ground", "pure", "config", "models", "disk", "runtime", "recipes", "top")
LAYERS = {
    "ground": {
        "__init__",
        "errors",
        "files",
        "inert",
        "overtraining",
        "assets",
        "base_families",
        "share",
        "lora_file",
        "own_files",
        "samplers",
        "own_shapes",
        "result_shapes",
        "verified",
        "console",
        "locks",
        "written",
    },  # plain data and paths: for everybody but the pure
    "pure": {"schedule", "prediction", "guidance", "solvers", "losses", "methods", "sharding", "step"},
    "config": {"config", "provenance", "provenance_rules"},  # a config holds the method that it names
    "models": {
        "families",
        "adapted_unet",
        "adapter",
        "memory",
        "roles",
        "sample",
        "text_lora",
        "trained_weights",
    },
    "disk": {
        "bench",
        "data",
        "export",
        "metrics",
        "report",
        "results",
        "run_files",
        "shipped",
        "styles",
        "tiny",
        "verdicts",
    },
    "runtime": {
        "checkpoints",
        "control",
        "held_out",
        "processes",
        "run_folder",
        "run_metrics",
        "runtime",
        "stepping",
        "stopping",
        "sweep",
        "validation",
    },
    "top": {
        "api",
        "cli",
        "cli_errors",
        "cli_finetune",
        "cli_lazy",
        "cli_lora",
        "cli_numbers",
        "cli_plan",
        "cli_sample",
        "cli_sweep",
        "plan",
        "quiet",
        "__main__",
        "story",
        "check",
    },
}
LEVEL_OF = {part: LEVELS.index(level) for level, parts in LAYERS.items() for part in parts}
RECIPE = LEVELS.index("recipes")
MAY_USE_ACCELERATE = {LEVELS.index("runtime"), RECIPE}


def sources() -> list[Path]:
    return sorted(path for top in ("lcm_kit", "train", "evaluation") for path in (ROOT / top).rglob("*.py"))


def level(path: Path) -> int:
    top, part = path.relative_to(ROOT).with_suffix("").parts[:2]
    if top != "lcm_kit":
        return RECIPE
    assert part in LEVEL_OF, f"lcm_kit/{part} is in no layer: add it to LAYERS"
    return LEVEL_OF[part]


def imports(path: Path) -> Iterator[str]:
    """Every module that the file names, wherever in it; `from lcm_kit import a` is lcm_kit.a."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = node.module == "lcm_kit"
            yield from (f"lcm_kit.{alias.name}" for alias in node.names) if whole else (node.module or "",)


def own(module: str) -> str | None:
    """The part of lcm_kit that a module is of; None for a third party's, `__init__` for its own names."""
    top, _, rest = module.partition(".")
    if top != "lcm_kit":
        return None
    part = rest.split(".")[0]
    return (
        part
        if (ROOT / "lcm_kit" / part).is_dir() or (ROOT / "lcm_kit" / f"{part}.py").is_file()
        else "__init__"
    )


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    mine = level(path)
    for module in imports(path):
        assert module.split(".")[0] not in ("train", "evaluation", "tests"), (
            f"{module}: recipes are run, not imported"
        )
        part = own(module)
        if part and part != "__init__":
            assert level(ROOT / "lcm_kit" / f"{part}.py") <= mine, f"{module} is of a layer above"
        if module.split(".")[0] == "accelerate":
            assert mine in MAY_USE_ACCELERATE, "accelerate belongs to runtime.py and the recipes"


@pytest.mark.parametrize(
    "path", [path for path in sources() if level(path) == LEVEL_OF["step"]], ids=lambda path: path.stem
)
def test_pure_files_know_torch_the_standard_library_and_each_other(path: Path) -> None:
    """And `errors`, one small class, so that a bad base is told to the user as any other mistake is.

    And `annotated_types`, which is no code either: names for the bounds of a field, which pydantic reads.
    """
    for module in imports(path):
        part = own(module)
        if part is None:
            assert module.split(".")[0] in {"torch", "annotated_types", *sys.stdlib_module_names}, module
        else:
            assert part in LAYERS["pure"] | {"errors"}, module


@pytest.mark.parametrize("name", ["inert.py", "errors.py", "files.py"])
def test_errors_and_files_cost_nothing_to_import(name: str) -> None:
    for module in imports(ROOT / "lcm_kit" / name):
        assert own(module) in ("errors", "inert") or module.split(".")[0] in sys.stdlib_module_names, module


def test_the_pure_layer_is_all_there() -> None:
    present = {
        path.relative_to(ROOT / "lcm_kit").with_suffix("").parts[0] for path in sources() if level(path) == 1
    }
    assert present == LAYERS["pure"]


# -- Rooms: a package of lcm_kit, or a file beside the packages ----------------------------------------------

# Of `export` these make a run's files and its card; the others know LoRA files, whoever made them
OF_A_RUN = {"run", "card", "trained", "recommended"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """`lcm_kit.data.cache` is in `data`; the package's own `__init__` is a room as well."""
    part, _, rest = module.removeprefix("lcm_kit").removeprefix(".").partition(".")
    if part == "export" and rest.split(".")[0] not in OF_A_RUN:
        return "lora"
    return part or "__init__"


def arrows_between_rooms() -> dict[str, dict[str, set[str]]]:
    """By room the rooms that its files name, and in which imports; those on use and for types count too."""
    modules = {module_of(path): path for path in sources() if path.parts[len(ROOT.parts)] == "lcm_kit"}
    arrows: dict[str, dict[str, set[str]]] = {room(module): {} for module in modules}
    for module, path in modules.items():
        for named in named_modules(path, modules.keys()):
            if room(named) != room(module):
                arrows[room(module)].setdefault(room(named), set()).add(f"{module} -> {named}")
    return arrows


def named_modules(path: Path, modules: Set[str]) -> Iterator[str]:
    """The modules that a file imports; `from lcm_kit.data import cache` names lcm_kit.data.cache."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            yield from below or {node.module} & modules


def circle_in(arrows: Mapping[str, Set[str] | Mapping[str, Set[str]]]) -> list[str]:
    """The rooms of a circle, from one back to itself; none if there is no circle."""
    try:
        TopologicalSorter({at: set(to) for at, to in arrows.items()}).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_rooms_have_no_circles() -> None:
    """Whoever moves a function to another room sees here which way round he made."""
    arrows = arrows_between_rooms()
    found = circle_in(arrows)
    ways = [sorted(arrows[at][to]) for at, to in zip(found, found[1:], strict=False)]
    assert not found, (found, ways)


def test_a_circle_of_rooms_is_seen() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    arrows = arrows_between_rooms()
    assert "errors" in arrows["data"] and "data" not in arrows["errors"]
    arrows["errors"]["data"] = set()
    assert "errors" in circle_in(arrows)
