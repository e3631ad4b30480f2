"""YAML from anybody's hand into plain values, in bounded time and memory, or one sentence.

PyYAML's safe loader runs no code, but it keeps the last of two equal keys, follows aliases into themselves,
and ends in whatever error Python has for a number of thousands of digits or a date that there is not. The
limits are far above any config of this kit: the longest that it ships has 4,000 characters.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lcm_kit.errors import UserError

MOST_BYTES = 2**16  # of a file
MOST_DEPTH = 16  # blocks and lists within each other
MOST_VALUES = 10_000  # with every alias written out
MOST_DIGITS = 100  # characters of what is not text
# within quotes YAML takes these raw for line ends, or not at all; halves of a character stay errors
_TO_ESCAPE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_TEXT = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_SEVERAL = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


class BadYaml(ValueError):
    """What is wrong, and in which line (from 1) if that can be said."""

    def __init__(self, problem: str, line: int | None = None) -> None:  # noqa: D107
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Safe YAML without dates (they are text), of bounded depth, and with every key once and as text."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _marked(f"more than {MOST_DEPTH} blocks within each other", self.peek_event())  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in _TEXT or not isinstance(key, yaml.ScalarNode):
                named = f" `{key.value[:60]}`" if isinstance(key, yaml.ScalarNode) else ""
                raise _marked(f"key{named} is not text; quote it", key)
            if key.value in seen:
                raise _marked(f"key `{key.value[:60]}` is there twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _marked(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def parse(text: str) -> Any:
    """The value that `text` stands for. Raises `BadYaml` for everything else."""
    loader = _Loader(text) if readable(text) else None
    if loader is None:
        raise BadYaml("characters that no text has")
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadYaml(error.problem or str(error.context), mark.line + 1 if mark else None) from error
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise BadYaml("a value is not what its tag says") from error
    finally:
        loader.dispose()


def overrides(values: Mapping[str, Any], block: str = "") -> list[str]:
    """`values` as overrides, `key.path=value`, that give them back: those of a block by its keys, one by one.

    `block` stands before the keys, if given. Paths are text and tuples lists. Raises `UserError` for a value
    that no config holds.
    """
    found: list[str] = []
    for name, value in values.items():
        key = f"{block}.{name}" if block else name
        found += overrides(value, key) if isinstance(value, Mapping) else [f"{key}={_written(key, value)}"]
    return found


def _written(key: str, value: Any) -> str:
    def other(odd: Any) -> Any:
        if isinstance(odd, os.PathLike):
            return os.fspath(odd)
        if callable(number := getattr(odd, "item", None)):  # a number of numpy or torch
            return number()
        kind = type(odd).__name__
        raise UserError(f"{key}: a {kind} is no value of a config; give text, numbers, lists or mappings")

    text = json.dumps(value, ensure_ascii=False, default=other)
    return _TO_ESCAPE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def readable(text: str) -> bool:
    """Whether YAML allows all of the characters."""
    return yaml.reader.Reader.NON_PRINTABLE.search(text) is None


def _size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """How many values `node` stands for; raises where they are too many, and for scalars out of bounds."""
    if node in sizes:
        if not sizes[node]:  # it is being counted
            raise _marked("an alias of what it stands in", node)
        return sizes[node]
    sizes[node], size = 0, 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    elif node.tag not in _SEVERAL:
        raise _marked(f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')}; leave it out", node)
    else:
        for part in node.value:
            size += sum(_size(each, sizes) for each in (part if isinstance(part, tuple) else (part,)))
        if size > MOST_VALUES:
            raise _marked(f"more than {MOST_VALUES:,} values", node)
    sizes[node] = size
    return size


def _check_scalar(node: yaml.ScalarNode) -> None:
    if node.tag not in _TEXT and len(node.value) > MOST_DIGITS:
        raise _marked(f"a value of {len(node.value):,} characters that is not text", node)
    if "\0" in node.value or any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise _marked("a text with a NUL character, or half of a character", node)


def read(path: Path) -> Any:
    """The value that the file at `path` stands for. Raises `UserError` with the line that is wrong."""
    try:
        with path.open("rb") as handle:
            content = handle.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(
                f"config {path}: more than {MOST_BYTES:,} bytes, which no config has; name a config, as "
                "`lcm-kit ls` lists them"
            )
        text = content.decode("utf-8-sig")
        if not readable(text):
            raise UnicodeError
        return parse(text)
    except BadYaml as error:
        place = f", line {error.line}" if error.line else ""
        raise UserError(f"config {path}{place}: not valid YAML ({error}); correct that line") from error
    except UnicodeError as error:
        raise UserError(
            f"config {path}: not a text file in YAML; name a config, as `lcm-kit ls` lists them"
        ) from error
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror}); check the path") from error


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
