"""Finds, lists, copies and loads the recipes and configs, in a checkout or in an installed wheel.

In a wheel `train/`, `evaluation/` and `configs/` travel as `lcm_kit/_shipped/`; in a checkout they stand
beside the package. Names are their paths, with or without ending: `train/distill`,
`configs/distill/tiny_lcm.yaml`; a config's may leave out `configs/` as well: `distill/tiny_lcm`,
`quickstart`. What lies in `configs/launch/` is no config of the kit's but a job for a cluster, to be copied.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import os
import re
import sys
from pathlib import Path
from types import ModuleType

from lcm_kit import assets
from lcm_kit.errors import UserError
from lcm_kit.io.files import atomic_write

_PACKAGE = Path(__file__).resolve().parents[1]  # lcm_kit
_FOLDERS = {"train": (".py",), "evaluation": (".py",), "configs": (".yaml", ".sh")}
_LAUNCH = "configs/launch/"


def root() -> Path:
    """The folder that holds `train/`, `evaluation/` and `configs/`."""
    wheel = _PACKAGE / "_shipped"
    return wheel if wheel.is_dir() else _PACKAGE.parent


def names() -> list[str]:
    """Every shipped file by its path under `root()`: recipes first, then configs, each in order."""
    found = (
        path
        for folder, endings in _FOLDERS.items()
        for path in sorted((root() / folder).rglob("*"))
        if path.suffix in endings
    )
    return [path.relative_to(root()).as_posix() for path in found if not path.name.startswith("_")]


def configs() -> list[str]:
    """Those of `names` that are configs of recipes."""
    return [name for name in names() if name.startswith("configs/") and not name.startswith(_LAUNCH)]


def find(name: str) -> Path:
    """The shipped file of that name. Raises `UserError` with the nearest name if there is none."""
    wanted = name.replace("\\", "/").removeprefix("./")
    for known in names():
        if wanted in _spellings(known):
            return root() / known
    raise UserError(f"{name!r} is not shipped with lcm-kit; {_guess(wanted, names())}")


def config_path(text: str) -> Path:
    """A config from a path on disk or, where there is no such file, from the shipped configs by name."""
    path = assets.place(text)
    if path.is_file():
        return path
    there = configs()
    for known in there:
        if text in _spellings(known):
            return root() / known
    if path.is_dir():
        raise UserError(f"config {text!r} is a folder; give a config, a YAML file that names it as data.path")
    guess = _guess(text, there)
    raise UserError(f"config {text!r}: there is no such file and no shipped config of that name; {guess}")


def copy(name: str, target: Path) -> Path:
    """Copy a shipped file to `target` (a file, or a folder to put it in) and return where it is now.

    Raises `UserError` if the name is not known or something stands there already.
    """
    source = find(name)
    target = target / source.name if target.is_dir() else target
    if os.path.lexists(target):  # a link to nothing is there, too
        raise UserError(f"{target} is there already; choose another name or remove it first")
    atomic_write(target, source.read_bytes())
    return target


def describe(name: str) -> str:
    """What a shipped file is for: a recipe's first docstring line, or another's first comment.

    Of a comment that goes on the first line, with what is left of its last sentence.
    """
    text = (root() / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        return text.removeprefix('"""').partition("\n")[0] if text.startswith('"""') else ""
    lines = itertools.dropwhile(lambda line: line[:1] != "#" or line[:2] == "#!", text.splitlines())
    comment = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line[:1] == "#", lines)]
    first, more = "".join(comment[:1]), " ".join(comment[1:])
    if first.endswith("."):
        return first
    return f"{first} {re.split(r'(?<=[.])(?: |$)', more, maxsplit=1)[0]}".strip()


def load_recipe(name: str) -> ModuleType:
    """The module of a recipe (`train/distill`), loaded from its file. Its `main(config)` runs it."""
    path = find(name)
    module_name = f"_lcm_kit_recipe_{path.parent.name}_{path.stem}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before it runs: dataclasses look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _spellings(known: str) -> tuple[str, ...]:
    bare = known.rpartition(".")[0]
    short = [form.removeprefix("configs/") for form in (known, bare)]
    return (known, bare, *short)


def _guess(wanted: str, known: list[str]) -> str:
    spellings = {form: name for name in known for form in _spellings(name)}
    spellings |= {Path(name).stem: name for name in known}
    close = difflib.get_close_matches(wanted[:80], spellings, n=1)
    return f"did you mean `{spellings[close[0]]}`?" if close else "see `lcm-kit ls`"
