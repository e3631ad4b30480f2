"""What pydantic finds wrong with a config, as sentences: where, what is wrong, what is allowed, a guess.

The members of a union of blocks are told apart by their `name`. pydantic names the member within an error's
place, which is left out of the sentence; the keys that it says are allowed are those of that member.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import Discriminator, Tag

from lcm_kit.config.choices import OneOf

Key = tuple[str | int, ...]

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
TAG = "name"  # the key that tells the members of a union of blocks apart


def by_name(default: str | None = None) -> Discriminator:
    """What tells the members of a union of blocks apart: their `name`; one without is `default`'s."""

    def name(given: Any) -> str | None:
        found = given.get(TAG, default) if isinstance(given, Mapping) else getattr(given, TAG, None)
        return found if isinstance(found, str) else None

    return Discriminator(name)


def sentence(schema: Any, detail: Any) -> str:
    """One pydantic error as a sentence that begins with its key."""
    key, text = place(schema, detail["loc"]), explain(schema, detail)
    if detail["type"].startswith("union_tag") and isinstance(detail["input"], Mapping):
        key = (*key, TAG)
    return f"{dotted(key)}: {text}" if key else text


def explain(schema: Any, detail: Any) -> str:
    """What is wrong and what is allowed, without the key."""
    key: Key = detail["loc"]
    kind, value = detail["type"], detail["input"]
    if kind == "unexpected_keyword_argument":
        return f"unknown key{_nearest_key(schema, key)}"
    if kind == "value_error":  # a rule of the schema's own, a sentence already
        return str(detail["ctx"]["error"])
    hint = _hint(schema, key)
    if kind.startswith("union_tag") and isinstance(value, Mapping):
        return _wrong_name(value, list(_members(hint)))
    filled = ", and not empty" if kind.endswith("too_short") else ""
    allowed = f"it must be {_describe(hint)}{filled}"
    if kind == "missing":
        return f"missing; {allowed}"
    options = _options(hint)
    guess = did_you_mean(value, options) if isinstance(value, str) else ""
    return f"{short(value)} is not allowed; {allowed}{guess}"


def _wrong_name(given: Mapping[str, Any], names: list[str]) -> str:
    allowed = f"it must be one of {', '.join(names)}"
    if TAG not in given:
        return f"missing; {allowed}"
    guess = did_you_mean(given[TAG], names) if isinstance(given[TAG], str) else ""
    return f"{short(given[TAG])} is not allowed; {allowed}{guess}"


def short(value: Any) -> str:
    """`value` as YAML has it, cut where it is long."""
    as_yaml = value is None or isinstance(value, bool)  # null, true
    return cut(json.dumps(value) if as_yaml else repr(value))


def cut(text: str) -> str:
    """`text`, or its beginning where it is long."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted(key: Key) -> str:
    """A key as people write it: `optimizer.lr`."""
    return ".".join(cut(str(part)) for part in key)


def did_you_mean(word: str, options: Any) -> str:
    """A guess at what was meant, to end a sentence with; empty where nothing is near."""
    close = difflib.get_close_matches(word[:80], list(options), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


# -- The schema at a key -------------------------------------------------------------------------------------


def place(schema: Any, key: Key) -> Key:
    """`key` without the names of members of unions."""
    return tuple(part for part, hint in zip(key, _walk(schema, key), strict=True) if not _members(hint))


def _walk(hint: Any, key: Key) -> Iterator[Any]:
    """The type that each part of `key` is looked up in; None where there is no such key."""
    for part in key:
        yield hint
        if isinstance(part, int):
            items = [item for item in get_args(_bare(hint)) if item is not Ellipsis]
            hint = items[min(part, len(items) - 1)] if items else None
        else:
            hint = (_members(hint) or _fields(hint)).get(part)


def _hint(hint: Any, key: Key) -> Any:
    """The type that the schema gives to `key`; None if there is no such key."""
    return list(_walk(hint, (*key, "")))[-1]


def _members(hint: Any) -> dict[str, Any]:
    """The blocks of a union by their names; empty for anything else."""
    options = get_args(_bare(hint)) if get_origin(_bare(hint)) in (Union, UnionType) else ()
    return {
        meta.tag: get_args(option)[0]
        for option in options
        if get_origin(option) is Annotated
        for meta in get_args(option)[1:]
        if isinstance(meta, Tag)
    }


def _fields(hint: Any) -> dict[str, Any]:
    """The keys of a block (of all members of a union) and their types; empty for anything else."""
    if members := _members(hint):
        return {key: inner for member in members.values() for key, inner in _fields(member).items()}
    hint = _bare(hint)
    return _fields_of(hint) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else {}


@cache
def _fields_of(block: Any) -> dict[str, Any]:
    hints = get_type_hints(block, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(block)}


def _without_null(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
        return next(item for item in get_args(hint) if item is not NoneType)
    return hint


def _bare(hint: Any) -> Any:
    """A type without null and without its limits."""
    hint = _without_null(hint)
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _options(hint: Any) -> list[str]:
    if tables := [each for each in get_args(_without_null(hint)) if isinstance(each, OneOf)]:
        return tables[0].names()
    hint = _bare(hint)
    return [str(option) for option in get_args(hint)] if get_origin(hint) is Literal else []


def _nearest_key(schema: Any, key: Key) -> str:
    """The guess for an unknown key: the nearest name beside it, else anywhere, else all names beside it."""
    beside = list(_fields(_hint(schema, key[:-1])))
    if guess := did_you_mean(str(key[-1]), beside):
        return guess
    everywhere = {path.rpartition(".")[2]: path for path in reversed(list(_paths(schema)))}
    close = difflib.get_close_matches(str(key[-1])[:80], list(everywhere), n=1)
    return f"; did you mean `{everywhere[close[0]]}`?" if close else f"; allowed here: {', '.join(beside)}"


def _paths(hint: Any, prefix: str = "") -> Iterator[str]:
    for name, inner in _fields(hint).items():
        yield f"{prefix}{name}"
        yield from _paths(inner, f"{prefix}{name}.")


# -- A type in words -----------------------------------------------------------------------------------------


def _describe(hint: Any) -> str:
    """What a key takes, in words: `a whole number of at least 1`."""
    if members := _members(hint):
        return f"a block of keys, whose {TAG} is one of {', '.join(members)}"
    origin, items = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [_describe(item) for item in items if item is not NoneType]
        return f"{' or '.join(kinds)}{', or null' if NoneType in items else ''}"
    if tables := [each for each in items if isinstance(each, OneOf)]:
        return f"one of {', '.join(tables[0].names())}"
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
    """The limits in a type's metadata, pydantic's or bare: ` of at least 1 and at most 8`."""
    limits = [limit for info in metadata for limit in (info, *getattr(info, "metadata", ()))]
    words = [
        f"{word} {_digits(getattr(limit, name))}"
        for name, word in _BOUNDS.items()
        for limit in limits
        if hasattr(limit, name)
    ]
    return f" of {' and '.join(words)}" if words else ""


def _digits(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)
