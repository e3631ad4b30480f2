"""YAML plus `key=value` overrides into a schema object, all mistakes reported at once; and back to YAML."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from lcm_kit.config import yaml_text
from lcm_kit.config.brand import Brand
from lcm_kit.config.evaluation import Quality, Speed
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.pretrain import PretrainTiny
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
Key = tuple[str | int, ...]

_LISTED = 20  # mistakes that a message names; more are counted
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config at `path`, lay `overrides` (`optimizer.lr=3e-4`) over it and validate it.

    Raises one `UserError` that lists every mistake: the key's path, what is allowed, and the nearest name.
    """
    return _checked(path, read(path), overrides)


def of_recipe(recipe: str, overrides: Sequence[str]) -> Config:
    """The config of `recipe` from `overrides` alone, as `load`: what they do not say is at its default."""
    return _checked(Path(recipe), {"recipe": recipe}, overrides)


def _checked(path: Path, raw: dict[str, Any], overrides: Sequence[str]) -> Config:
    problems = [problem for override in overrides if (problem := _override(raw, override))]
    recipe = _recipe(raw)
    if recipe not in RECIPES:
        raise _error(path, [*problems, _recipe_problem(recipe, raw)])
    schema = RECIPES[recipe]
    if next(iter(raw)) != "recipe":
        problems.append(
            "recipe: it must be the first key, so that one look tells what the file is for; move it up"
        )
    config, found = _validate(schema, raw)
    if config is None or problems or found:
        raise _error(path, [*problems, *found])
    return config


def dump(config: Config | Training, *, plain_ascii: bool = False) -> str:
    """The resolved config as YAML text, every key written out; `load` gives the same object back.

    `plain_ascii` escapes every other letter, for a terminal that has no Unicode.
    """
    keys = _plain(dataclasses.asdict(config))
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=not plain_ascii, width=110)


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


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
        return f"{_cut(text)}: an override is written key=value, as optimizer.lr=3e-4"
    try:
        parsed = yaml_text.parse(value)
    except yaml_text.BadYaml:
        return f"{_cut(key)}: the value {_short(value)} is not valid YAML; quote it"
    *blocks, last = key.split(".")
    inside = raw
    for block in blocks:
        inside = inside.setdefault(block, {})
        if not isinstance(inside, dict):
            return (
                f"{_cut(key)}: {_cut(block)} is {_short(inside)}, not a block of keys, so {_cut(last)} "
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
        found = f"{_short(raw['recipe'])} is not text" if "recipe" in raw else "missing"
        return f"recipe: {found}; {allowed}"
    return f"recipe: {_short(recipe)} is unknown; {allowed}{_did_you_mean(recipe, RECIPES)}"


def _error(path: Path, problems: list[str]) -> UserError:
    if len(problems) == 1:
        return UserError(f"config {path}: {problems[0]}")
    more = [f"and {len(problems) - _LISTED:,} more"] if len(problems) > _LISTED else []
    return UserError(f"config {path}: {len(problems)} mistakes", [*problems[:_LISTED], *more])


def _validate(schema: type, raw: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The schema object if `raw` is one, and the problems otherwise, in the order of their places."""
    config: Config | None = None
    problems: dict[Key, str] = {}
    try:
        config = TypeAdapter(schema).validate_python(raw)
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] == "too_short" and detail["input"]:  # its entries are wrong, and told
                continue
            known = len(problems) >= _LISTED  # looking for the nearest of all names takes its time
            problems.setdefault(detail["loc"], _dotted(detail["loc"]) if known else _sentence(schema, detail))
    return config, list(problems.values())


def _sentence(schema: type, detail: Any) -> str:
    """One pydantic error as a sentence: where, what is wrong, what is allowed."""
    key: Key = detail["loc"]
    kind, value = detail["type"], detail["input"]
    if kind == "unexpected_keyword_argument":
        return f"{_dotted(key)}: there is no such key{_nearest_key(schema, key)}"
    if kind == "value_error":  # a rule of the schema's own, a sentence already
        return f"{_dotted(key)}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
    hint = _hint(schema, key)
    filled = ", and not empty" if kind.endswith("too_short") else ""
    allowed = f"it must be {_describe(hint)}{filled}"
    if kind == "missing":
        return f"{_dotted(key)}: missing; {allowed}"
    options = _options(hint)
    guess = _did_you_mean(value, options) if isinstance(value, str) else ""
    return f"{_dotted(key)}: {_short(value)} is not allowed; {allowed}{guess}"


def _short(value: Any) -> str:
    text = (
        json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    )  # null, true as in YAML
    return _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dotted(key: Key) -> str:
    return ".".join(_cut(str(part)) for part in key)


def _fields(hint: Any) -> dict[str, Any]:
    """The keys of a block and their types; empty for anything that is not a block."""
    hint = _bare(hint)
    return get_type_hints(hint, include_extras=True) if dataclasses.is_dataclass(hint) else {}


def _hint(hint: Any, key: Key) -> Any:
    """The type that the schema gives to `key`; None if there is no such key."""
    for part in key:
        if isinstance(part, int):
            items = [item for item in get_args(_bare(hint)) if item is not Ellipsis]
            hint = items[min(part, len(items) - 1)] if items else None
        else:
            hint = _fields(hint).get(part)
    return hint


def _without_null(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return next(item for item in get_args(hint) if item is not NoneType)
    return hint


def _bare(hint: Any) -> Any:
    """A type without null and without its limits."""
    hint = _without_null(hint)
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _options(hint: Any) -> list[str]:
    hint = _bare(hint)
    return [str(option) for option in get_args(hint)] if get_origin(hint) is Literal else []


def _describe(hint: Any) -> str:
    """What a key takes, in words: `a whole number of at least 1`."""
    origin, items = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return f"{_describe(_without_null(hint))}, or null"
    if origin is Literal:
        return f"one of {', '.join(map(str, items))}" if len(items) > 1 else str(items[0])
    if origin is tuple:
        each = f"each {_describe(items[0])}"
        return f"a list, {each}" if Ellipsis in items else f"a list of {len(items)}, {each}"
    if origin is Annotated:
        return f"{_describe(items[0])}{_bounds(items[1:])}"
    if fields := _fields(hint):
        return f"a block of keys ({', '.join(fields)})"
    return _KINDS.get(hint, str(hint))


def _bounds(metadata: tuple[Any, ...]) -> str:
    """The limits in a pydantic field's metadata: ` of at least 1 and at most 8`."""
    limits = [limit for info in metadata for limit in getattr(info, "metadata", ())]
    words = [
        f"{word} {_digits(getattr(limit, name))}"
        for name, word in _BOUNDS.items()
        for limit in limits
        if hasattr(limit, name)
    ]
    return f" of {' and '.join(words)}" if words else ""


def _digits(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _did_you_mean(word: str, options: Any) -> str:
    close = difflib.get_close_matches(word[:80], list(options), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _nearest_key(schema: type, key: Key) -> str:
    """The guess for an unknown key: the nearest name beside it, else anywhere, else all names beside it."""
    beside = list(_fields(_hint(schema, key[:-1])))
    if guess := _did_you_mean(str(key[-1]), beside):
        return guess
    everywhere = {path.rpartition(".")[2]: path for path in reversed(list(_paths(schema)))}
    close = difflib.get_close_matches(str(key[-1])[:80], list(everywhere), n=1)
    return f"; did you mean `{everywhere[close[0]]}`?" if close else f"; allowed here: {', '.join(beside)}"


def _paths(hint: Any, prefix: str = "") -> Iterator[str]:
    for name, inner in _fields(hint).items():
        yield f"{prefix}{name}"
        yield from _paths(inner, f"{prefix}{name}.")
