"""Wrong-on-purpose edits of sources: those of a table, and those that syntax suggests.

An edit is a span of a file and what stands there instead. Those of the table give the exact old text, which
must be in the file once; the others are made from the syntax tree: another operator, a comparison with its
other boundary, the opposite condition, another constant, a statement left out.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.MatMult: ast.Add, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip
_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_BUILTINS = {"max": "min", "min": "max", "all": "any", "any": "all"}
_METHODS = {
    **_BUILTINS, "amax": "amin", "amin": "amax", "maximum": "minimum", "minimum": "maximum", "sum": "mean",
    "mean": "sum", "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "ones_like": "zeros_like",
    "sin": "cos", "cos": "sin", "floor": "ceil", "ceil": "floor", "log": "exp", "exp": "log",
}  # fmt: skip
_PLAIN = (
    ast.Name,
    ast.Attribute,
    ast.Call,
    ast.NamedExpr,
    ast.Subscript,
)  # conditions that no other edit turns


class TableError(Exception):
    """The table does not fit the sources; the message has a line a fault."""


@dataclass(frozen=True)
class Edit:
    """`new` in place of what stands at `span` (bytes of the source) in `file`; `tests` should notice."""

    name: str
    file: str
    span: tuple[int, int]
    new: str
    tests: tuple[str, ...]

    def applied(self, source: bytes) -> bytes:
        """The source with the edit."""
        start, end = self.span
        return source[:start] + self.new.encode() + source[end:]


# -- The table -----------------------------------------------------------------------------------------------


def curated(table: Mapping[str, Any], root: Path) -> list[Edit]:
    """The edits of `table["edits"]`: by file its tests, and by name old text, new text, and tests of its own.

    Raises `TableError` if a file or test is missing, an old text is not in its file exactly once, or an edit
    changes nothing or, of a Python file, gives no Python.
    """
    edits, faults = [], []
    for file, group in table["edits"].items():
        path = root / file
        if not path.is_file():
            faults.append(f"{file}: the table edits this file, and it is gone")
            continue
        source = path.read_bytes()
        for name, (old, new, *own) in group["wrong"].items():
            full, tests = f"{file}: {name}", tuple(own[0] if own else group["tests"])
            faults += [
                f"{full}: there is no {test}"
                for test in tests
                if not (root / test.partition("::")[0]).is_file()
            ]
            if (count := source.count(old.encode())) != 1:
                what = "is gone" if not count else f"is there {count} times"
                faults.append(f"{full}: its old text {what}, and must be there once: {old!r}")
                continue
            start = source.index(old.encode())
            edit = Edit(full, file, (start, start + len(old.encode())), new, tests)
            edits.append(edit)
            if fault := _fault(edit, source):
                faults.append(f"{full}: {fault}")
    if faults:
        raise TableError("\n".join(faults))
    return edits


def _fault(edit: Edit, source: bytes) -> str:
    changed = edit.applied(source)
    if not edit.file.endswith(".py"):
        return "" if changed != source else "the edit changes nothing"
    try:
        compile(changed, edit.file, "exec", dont_inherit=True)
    except SyntaxError as error:
        return f"the edit gives no Python ({error})"
    return "the edit changes nothing" if changed == source else ""


# -- From the syntax -----------------------------------------------------------------------------------------


def generic(table: Mapping[str, Any], root: Path) -> list[Edit]:
    """The edits that syntax suggests in files of `table["generic"]`, but for those of `table["equivalent"]`.

    Names hold no line numbers, so that they stay as code moves. Raises `TableError` if an equivalent edit is
    none of them.
    """
    every = [
        edit
        for file, tests in table["generic"].items()
        for edit in edits_of(file, (root / file).read_bytes(), tests)
    ]
    known = {edit.name for edit in every}
    if gone := sorted(set(table["equivalent"]) - known):
        raise TableError("\n".join(f"an equivalent edit is gone: {name}" for name in gone))
    return [edit for edit in every if edit.name not in table["equivalent"]]


def edits_of(file: str, source: bytes, tests: Sequence[str] = ()) -> list[Edit]:
    """All edits that the syntax of `source` suggests, in its order."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen: Counter[str] = Counter()
    edits = []
    for where, node, new in _changes(ast.parse(source), ""):
        old = ast.unparse(node)
        name = f"{file}: {where}: {old} -> {new}"
        seen[name] += 1
        count = f" ({seen[name]})" if seen[name] > 1 else ""
        assert node.end_lineno is not None and node.end_col_offset is not None
        span = (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
        text = new if isinstance(node, ast.stmt) else f"({new})"
        edits.append(Edit(name + count, file, span, text, tuple(tests)))
    return edits


def _changes(node: ast.AST, where: str) -> Iterator[tuple[str, Any, str]]:
    """(function or class, node, what stands there instead) in `node` and below it."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        where = f"{where}.{node.name}".lstrip(".")
    yield from ((where, node, new) for new in _instead(node))
    conditions = [*getattr(node, "ifs", []), *([node.test] if isinstance(node, (ast.If, ast.While)) else [])]
    for condition in conditions:
        if isinstance(condition, _PLAIN):
            yield where, condition, f"not ({ast.unparse(condition)})"
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params") or isinstance(
            node, ast.JoinedStr
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changes(child, where)


def _instead(node: ast.AST) -> Iterator[str]:
    """What a wrong hand could have written for `node` itself."""
    match node:
        case ast.BinOp() if type(node.op) in _BINARY and not _joins(node):
            yield _with(node, op=_BINARY[type(node.op)]())
        case ast.Compare(ops=[op]):
            yield _with(node, ops=[_COMPARED[type(op)]()])
        case ast.Compare(ops=ops):
            for k, op in enumerate(ops):
                yield _with(node, ops=[*ops[:k], _COMPARED[type(op)](), *ops[k + 1 :]])
        case ast.BoolOp():
            yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield ast.unparse(node.operand)
        case ast.Constant(value=bool()):
            yield repr(not node.value)
        case ast.Constant(value=int() | float()):
            yield repr(node.value + 1 if isinstance(node.value, int) else node.value * 2 or 1.0)
        case ast.Call(func=ast.Name(id=name)) if name in _BUILTINS:
            yield _with(node, func=ast.Name(_BUILTINS[name]))
        case ast.Call(func=ast.Attribute(attr=name) as called) if name in _METHODS:
            yield _with(node, func=_changed(called, attr=_METHODS[name]))
        case ast.IfExp():
            yield _with(node, body=node.orelse, orelse=node.body)
        case ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Break():
            yield "pass"
        case ast.Expr(value=ast.Call()):
            yield "pass"


def _changed(node: Any, **changes: Any) -> Any:
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _with(node: Any, **changes: Any) -> str:
    return ast.unparse(_changed(node, **changes))


def _joins(node: ast.BinOp) -> bool:
    """Whether it joins texts, which no other operator does."""
    sides = (node.left, node.right)
    return any(isinstance(each, ast.JoinedStr) for each in sides) or any(
        isinstance(each, ast.Constant) and isinstance(each.value, str) for each in sides
    )
