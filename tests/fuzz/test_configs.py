"""Configs of any text and overrides of any text: a config that comes back as it is, or a sentence."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hypothesis import strategies as st

from lcm_kit.config import shipped
from lcm_kit.config.load import RECIPES, dump, load
from lcm_kit.errors import UserError
from tests.fuzz.doors import answer, anything, fuzz, mutations, numbers, text

SHIPPED = [shipped.find(name).read_text(encoding="utf-8") for name in shipped.configs()]
SMALL = "recipe: train/distill\noutput: runs/x\n"
# YAML that has a meaning of its own, which random text seldom has
SPELLED = st.sampled_from(
    (
        "&a",
        "*a",
        "&a [*a]",
        "!!int 9",
        "!!python/name:os.system",
        "!!binary aGk=",
        "!!float .inf",
        "1_000",
        "0x1f",
        "0o17",
        "1:30",
        "2024-99-99",
        "2024-01-01",
        "~",
        "yes",
        "NO",
        ".nan",
        "-.inf",
        "<<: {a: 1}",
        "{<<: 3}",
        "|\n  a",
        ">-\n  b",
        '"\\x1b[2J"',
        '"\\ud800"',
        "'",
        '"',
        "[",
        "{",
        "? a",
        "- - a",
        "%YAML 1.1",
        "---",
        "...",
        "@",
        "`",
        "\t",
        "9" * 50,
        "9" * 5000,
        "1e999",
        "=",
        "!!timestamp 2001-01-01",
        "!!set {a}",
        "!!omap [a: 1]",
        "!x y",
    )
)
VALUES = st.one_of(
    SPELLED, text, anything.map(lambda value: yaml.dump(value, default_flow_style=True, width=10**9))
)


def keys_of(block: Any, prefix: str = "") -> list[str]:
    """The dotted keys of a schema."""
    found = []
    for name, hint in get_type_hints(block).items():
        found.append(f"{prefix}{name}")
        for part in (hint, *get_args(hint)):
            found += keys_of(part, f"{prefix}{name}.") if is_dataclass(part) else []
    return found


NEEDED: dict[str, dict[str, Any]] = {
    "train/distill": {"output": "x"},
    "train/finetune": {"output": "x"},
    "train/pretrain_tiny": {"output": "x"},
    "evaluation/quality": {"run": "x"},
    "evaluation/speed": {},
    "evaluation/guidance_sweep": {"adapters": ["x"]},
    "evaluation/compose": {"style": "x", "speed": "y"},
    "evaluation/brand": {"run": "x"},
}
KEYS = sorted({key for recipe in RECIPES.values() for key in keys_of(recipe)})


def checked(folder: Path, content: str | bytes, overrides: list[str]) -> Any:
    """What `load` makes of the file and the overrides; a config must come back through its own YAML."""
    file = folder / "config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    found = answer(lambda: load(file, overrides), str(file))
    if not isinstance(found, UserError):
        file.write_text(dump(found), encoding="utf-8")
        assert load(file) == found
        file.write_text(dump(found, plain_ascii=True), encoding="ascii")
        assert load(file) == found
    return found


@fuzz(st.one_of(st.binary(max_size=200), text, st.one_of(*map(mutations, SHIPPED))), small=80, large=4000)
def test_any_file_is_a_config_or_a_sentence(folder: Path, content: str | bytes) -> None:
    checked(folder, content, [])


def _nested(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        *blocks, last = key.split(".")
        inside = made
        for block in blocks:
            inside = inside.setdefault(block, {})
            if not isinstance(inside, dict):
                break
        else:
            inside[last] = value
    return made


PAIRS = st.lists(st.tuples(st.sampled_from(KEYS), st.one_of(numbers, anything)), max_size=5)


@fuzz(st.tuples(st.sampled_from(list(RECIPES)), PAIRS), small=80, large=4000)
def test_known_keys_with_any_value(folder: Path, given: tuple[str, list[tuple[str, Any]]]) -> None:
    recipe, pairs = given
    keys = {"recipe": recipe} | NEEDED[recipe] | _nested(pairs) | {"recipe": recipe}
    checked(folder, yaml.dump(keys, sort_keys=False, allow_unicode=True), [])


OVERRIDES = st.one_of(text, st.tuples(st.one_of(st.sampled_from(KEYS), text), VALUES).map("=".join))


@fuzz(
    st.lists(OVERRIDES, min_size=1, max_size=3),
    small=120,
    large=6000,
    examples=(
        ["a\nb=3"],
        ["\x1b[2J=1"],
        ["\udce9=1"],
        ["output=\udce9"],
        ["x" * 3000],
        ["x" * 3000 + "=1"],
        ["a." * 3000 + "b=1"],
        ["output='\\x1b'"],
        ["=", "=1", "a.=1", ".a=1"],
        ["output=|\n  a\n  b"],
    ),
)
def test_any_override_is_laid_over_or_named(folder: Path, overrides: list[str]) -> None:
    checked(folder, SMALL, overrides)
