"""Write the pages of the docs site that follow from the code: every config key, every command.

    python tools/reference_pages.py [FOLDER]

Into docs/reference/, which git does not keep: `make docs` writes it anew. A key's words are the comment
beside its field in the schema, a command's are those of its `--help`.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic.fields import FieldInfo
from typer.main import get_command

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lcm_kit.cli.main import app
from lcm_kit.config.load import RECIPES

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
PAGES = ("config.md", "cli.md")
_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_CONFIG = """\
# Config keys

Every key that a YAML file may have, by recipe: its default, what it may be, and what it does. `lcm-kit show
CONFIG` prints a config with all its keys, `lcm-kit check CONFIG` names every mistake in one, and any key can
be overridden on the command line: `lcm-kit train my.yaml optimizer.lr=3e-4`.
"""
_CLI = """\
# Command line

`lcm-kit COMMAND --help` prints the same. A mistake is one sentence and exit code 2; a stopped command (exit
code 130) continues when it is run again.
"""


# -- Config keys ---------------------------------------------------------------------------------------------


def comments(kind: type) -> dict[str, str]:
    """The comment of each field that the body of `kind` declares: above it, or behind it."""
    lines = textwrap.dedent(inspect.getsource(kind))
    found: dict[str, str] = {}
    above: list[str] = []
    name, depth = None, 0
    for token in tokenize.generate_tokens(io.StringIO(lines).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if token.line.strip().startswith("#"):
                above.append(text)
            elif name:
                found[name] = f"{found.get(name, '')} {text}".strip()
        elif token.type == tokenize.NAME and name is None and token.start[1] == 4 and ":" in token.line:
            name, found[token.string] = token.string, " ".join(above)
        elif token.type == tokenize.NEWLINE:
            name, above = None, []
        elif token.type == tokenize.INDENT:
            depth += 1
        elif token.type == tokenize.DEDENT:
            depth -= 1
        if depth > 1:  # a method's body: no fields behind it
            break
    return found


def documented(kind: type) -> dict[str, str]:
    """The comments of all fields of `kind`, those of its bases included."""
    written: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if dataclasses.is_dataclass(each):
            written |= {name: text for name, text in comments(each).items() if text}
    return written


def members(hint: Any) -> Iterator[type]:
    """The blocks that a field may hold: dataclasses, also in a union or in a list."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for inner in get_args(hint) if get_origin(hint) is not Literal else ():
        yield from members(inner)


def words(hint: Any) -> str:
    """What a value may be: `whole number, at least 1, or null`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [limit for each in inner[1:] for limit in _limits(each)]
        return ", ".join([words(inner[0]), *limits])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        texts = [words(each) for each in inner if each is not NoneType]
        return ", or ".join([*dict.fromkeys(texts), *(["null"] if NoneType in inner else [])])
    if origin is tuple:
        listed = [each for each in inner if each is not Ellipsis]
        return "a list of: " + "; ".join(dict.fromkeys(map(words, listed)))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "a block of keys"
    return _KINDS.get(hint, "any value")


def _limits(given: Any) -> Iterator[str]:
    for each in given.metadata if isinstance(given, FieldInfo) else [given]:
        for bound, text in _BOUNDS.items():
            limit = getattr(each, bound, None)
            if limit is not None and abs(limit) < 2**62:  # beyond, it is what a computer's integer holds
                yield f"{text} {limit:,}" if isinstance(limit, int) else f"{text} {limit:g}"
        if (longest := getattr(each, "max_length", None)) is not None:
            yield f"at most {longest} long"


def default(field: dataclasses.Field[Any]) -> str:
    """The default as YAML has it, or that there is none."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = value.default if isinstance(value, FieldInfo) else value
    if value is dataclasses.MISSING or value is Ellipsis or repr(value) == "PydanticUndefined":
        return "required"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"default `{text}`"


def blocks(kind: type, above: str = "") -> Iterator[tuple[str, type]]:
    """(dotted key, dataclass) of the block `kind` and of those in it; an entry of a list is `key[]`."""
    yield above, kind
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        for inner in dict.fromkeys(members(hints[field.name])):
            yield from blocks(inner, _below(above, field.name, hints[field.name]))


def _below(above: str, name: str, hint: Any) -> str:
    listed = "[]" if "tuple[" in str(hint) else ""
    return f"{above}.{name}{listed}" if above else f"{name}{listed}"


def entry(recipe: str, above: str, field: dataclasses.Field[Any], hint: Any, comment: str) -> str:
    """The line of one key: its default and what it may be, or where its block is; then its comment."""
    name = f"{above}.{field.name}" if above else field.name
    if inner := list(dict.fromkeys(members(hint))):
        below = _below(above, field.name, hint)
        about = "; ".join(f"[{each.__name__}](#{_anchor(recipe, below, each)})" for each in inner)
    else:
        about = f"{default(field)}; {words(hint)}"
    return f"- **`{name}`** ({about})" + (f": {comment}" if comment else "")


def config_page() -> str:
    """The page of all keys: a section a recipe, a list of keys a block."""
    parts = [_CONFIG]
    for recipe, whole in RECIPES.items():
        parts.append(f"## {recipe}\n")
        for above, kind in blocks(whole):
            if above:
                parts.append(f"### {above} {{ #{_anchor(recipe, above, kind)} }}\n")
            parts.append(inspect.cleandoc(kind.__doc__ or "") + "\n")
            hints, written = get_type_hints(kind, include_extras=True), documented(kind)
            for field in dataclasses.fields(kind):
                comment = written.get(field.name, "")
                parts.append(entry(recipe, above, field, hints[field.name], comment))
            parts.append("")
    return "\n".join(parts)


def _anchor(recipe: str, where: str, owner: type) -> str:
    return f"{recipe}-{where}-{owner.__name__}".replace("/", "-").replace(".", "-").replace("[]", "").lower()


# -- Commands ------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """The page of all commands, with their arguments and options."""
    parts = [_CLI]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        context = command.context_class(command, info_name=f"lcm-kit {name}")
        usage = " ".join(command.get_usage(context).removeprefix("Usage:").split())
        parts += [f"## {name}\n", f"```text\n{usage}\n```\n", inspect.cleandoc(command.help or ""), ""]
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if record and "--help" not in parameter.opts:
                parts.append(f"- **`{record[0]}`**: {' '.join(record[1].split())}")
        parts.append("")
    return "\n".join(parts)


def main(folder: Path) -> None:
    """Write both pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(PAGES, (config_page(), cli_page()), strict=True):
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
