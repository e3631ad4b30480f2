"""YAML plus `key=value` overrides into a schema object, all mistakes reported at once; and back to YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from lcm_kit.config import yaml_text
from lcm_kit.config.brand import Brand
from lcm_kit.config.evaluation import Quality, Speed
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.methods import IMPORTS
from lcm_kit.config.mistakes import Key, cut, did_you_mean, dotted, place, sentence, short
from lcm_kit.config.pretrain import PretrainTiny
from lcm_kit.config.renamed import rename, renamed_override
from lcm_kit.config.schema import Distill, Training
from lcm_kit.config.sweep import Compose, GuidanceSweep
from lcm_kit.errors import UserError

Config = Distill | Finetune | PretrainTiny | Quality | Speed | GuidanceSweep | Compose | Brand
RECIPES: dict[str, type[Config]] = {
    "train/distill": Distill,
    "train/finetune": Finetune,
    "train/pretrain_tiny": PretrainTiny,
    "evaluation/quality": Quality,
    "evaluation/speed": Speed,
    "evaluation/guidance_sweep": GuidanceSweep,
    "evaluation/compose": Compose,
    "evaluation/brand": Brand,
}

_LISTED = 20  # mistakes that a message names; more are counted


def load(path: Path, overrides: Sequence[str] = (), *, imports: bool = False) -> Config:
    """Read the config at `path`, lay `overrides` (`optimizer.lr=3e-4`) over it and validate it.

    `imports`: it is the user's own, so that a Python file that it names as its method may be run; without it
    such a method is a `methods.Custom`, which tells what the config says and cannot be trained with.
    Raises one `UserError` that lists every mistake: the key's path, what is allowed, and the nearest name.
    """
    return _checked(path, read(path), overrides, imports)


def of_recipe(recipe: str, overrides: Sequence[str], *, imports: bool = False) -> Config:
    """The config of `recipe` from `overrides` alone, as `load`: what they do not say is at its default."""
    return _checked(Path(recipe), {"recipe": recipe}, overrides, imports)


def parse(text: str) -> Config:
    """The config that `dump` wrote, on another machine perhaps; nothing that it names is run.

    Raises `UserError` for what this version of the kit has no keys for.
    """
    return _checked(Path("config.yaml"), yaml_text.parse(text), (), imports=False)


def _checked(path: Path, raw: dict[str, Any], overrides: Sequence[str], imports: bool) -> Config:
    # The file's names first: an override by an old name is of the same key, and so the other way round
    problems = rename(_recipe(raw), raw, path)
    today = [renamed_override(_recipe(raw), override, path) for override in overrides]
    problems += [problem for override in today if (problem := _override(raw, override))]
    recipe = _recipe(raw)
    problems += rename(recipe, raw, path)  # within a block that an override gave
    if recipe not in RECIPES:
        raise _error(path, [*problems, _recipe_problem(recipe, raw)])
    schema = RECIPES[recipe]
    if next(iter(raw)) != "recipe":
        problems.append(
            "recipe: it must be the first key, so that a reader sees at once what the file is for; move it up"
        )
    config, found = _validate(schema, raw, imports)
    if config is None or problems or found:
        raise _error(path, [*problems, *found])
    return config


def dump(config: Config | Training, *, plain_ascii: bool = False) -> str:
    """The resolved config as YAML text, every key written out; `load` gives the same object back.

    `plain_ascii` escapes every other letter, for a terminal that has no Unicode.
    """
    keys = yaml_text.plain(dataclasses.asdict(config))
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=not plain_ascii, width=110)


def read(path: Path) -> dict[str, Any]:
    """The file's mapping, unchecked. Raises `UserError` if it is none."""
    raw = yaml_text.read(path)
    if not isinstance(raw, dict):
        raise UserError(
            f"config {path}: it holds no keys; its first line must be `recipe: {next(iter(RECIPES))}`"
        )
    return raw


def _override(raw: dict[str, Any], text: str) -> str | None:
    """Lay one `key.path=value` over `raw` in place; the problem if it cannot be done."""
    key, equals, value = text.partition("=")
    named = equals and all(key.split(".")) and yaml_text.readable(key)
    if not named or key.count(".") > yaml_text.MOST_DEPTH:
        return f"{cut(text)}: an override is written key=value, as optimizer.lr=3e-4"
    try:
        parsed = yaml_text.parse(value)
    except yaml_text.BadYaml:
        return f"{cut(key)}: the value {short(value)} is not valid YAML; quote it"
    *blocks, last = key.split(".")
    inside = raw
    for block in blocks:
        inside = inside.setdefault(block, {})
        if not isinstance(inside, dict):
            return (
                f"{cut(key)}: {cut(block)} is {short(inside)}, not a block of keys, so {cut(last)} "
                "cannot be set in it"
            )
    inside[last] = parsed
    return None


def _recipe(raw: Mapping[str, Any]) -> str | None:
    recipe = raw.get("recipe")
    return recipe if isinstance(recipe, str) else None


def _recipe_problem(recipe: str | None, raw: Mapping[str, Any]) -> str:
    allowed = f"the first line must name the recipe: one of {', '.join(RECIPES)}"
    if recipe is None:
        found = f"{short(raw['recipe'])} is not text" if "recipe" in raw else "missing"
        return f"recipe: {found}; {allowed}"
    return f"recipe: {short(recipe)} is unknown; {allowed}{did_you_mean(recipe, RECIPES)}"


def _error(path: Path, problems: list[str]) -> UserError:
    if len(problems) == 1:
        return UserError(f"config {path}: {problems[0]}")
    more = [f"and {len(problems) - _LISTED:,} more"] if len(problems) > _LISTED else []
    return UserError(f"config {path}: {len(problems)} mistakes", [*problems[:_LISTED], *more])


def _validate(schema: type, raw: dict[str, Any], imports: bool) -> tuple[Config | None, list[str]]:
    """The schema object if `raw` is one, and the problems otherwise, in the order of their places."""
    config: Config | None = None
    problems: dict[Key, str] = {}
    try:
        config = TypeAdapter(schema).validate_python(raw, context={IMPORTS: imports})
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] == "too_short" and detail["input"]:  # its entries are wrong, and told
                continue
            known = len(problems) >= _LISTED  # looking for the nearest of all names takes its time
            told = dotted(place(schema, detail["loc"])) if known else sentence(schema, detail)
            problems.setdefault(detail["loc"], told)
    return config, list(problems.values())
