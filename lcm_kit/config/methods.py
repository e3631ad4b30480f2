"""The block `method` of a config: a method of the kit's by name, or one in a Python file of the user's.

Such a file is run, so it is imported only where `load` is told that the config is the user's own. Where a
run's config.yaml is read (export, evaluation, report) its method is a `Custom` alone: a record of its keys.
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Optional

from pydantic import ConfigDict, PlainValidator, Tag, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from lcm_kit.config.data import STRICT, Place
from lcm_kit.config.mistakes import by_name, explain
from lcm_kit.core.methods import DEFAULT, DMD, LCM, METHODS, PCM, TCD, Method, MethodInfo, Progressive
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.files import sha256_bytes
from lcm_kit.samplers import for_adapter, serves_adapter

IMPORTS = "imports"  # of a validation's context: whether a file that the config names may be imported
_MOST_STEPS = 50  # that diffusers' LCMScheduler takes
_FUNCTIONS = ("times", "endpoint")
# JSON is what YAML holds; with it pydantic takes no text or truth value for a number, and a list for a tuple
_STRICT = ConfigDict(**STRICT, strict=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Custom:
    """A method in a file of the user's own. Its other keys are the fields of the class that `path` names."""

    name: Literal["custom"] = "custom"
    path: Place  # FILE.py:CLASS
    # of the file, as a run's config.yaml has it; null: whatever the file holds now
    sha256: str | None = None


def imported(method: Method | Custom) -> Method:
    """`method`, to train with. Raises `UserError` if its file was not imported."""
    if isinstance(method, Custom) and not _is_method(method):
        raise UserError(
            f"method {method.path} was read without importing its file; load the config with imports=True"
        )
    return method  # type: ignore[return-value]  # what has both functions


def info_of(method: Method | Custom) -> MethodInfo:
    """What files say of `method`. Raises `UserError` as `imported` does."""
    return MethodInfo.of(imported(method), getattr(method, "name", DEFAULT.name))


def needs_pictures(method: Method | Custom) -> bool:
    """Whether `method` learns from pictures; false where that is in a file that was not imported."""
    return _is_method(method) and getattr(method, "needs_pictures", Method.needs_pictures)


def _is_method(given: Any) -> bool:
    """Whether it has both functions, written by somebody."""
    return all(
        callable(getattr(given, name, None)) and getattr(type(given), name, None) is not getattr(Method, name)
        for name in _FUNCTIONS
    )


# -- Keys into an object -------------------------------------------------------------------------------------


def _strictly(kind: type) -> Callable[[Any], Any]:
    """A validator of the keys of `kind`, a frozen dataclass of the standard library."""
    optional: Any = Optional[kind]  # noqa: UP045 - alone it would take no config
    adapter = TypeAdapter[Any](optional, config=_STRICT)
    return lambda given: given if isinstance(given, kind) else adapter.validate_json(json.dumps(given))


def _custom(given: Any, info: ValidationInfo) -> Custom:
    """The user's class with the keys of `given`, or, where nothing may be imported, a record of them."""
    if isinstance(given, Custom):
        return given
    own = {field.name for field in dataclasses.fields(Custom)}
    if odd := [key for key in given if not key.isidentifier() or keyword.iskeyword(key) or key[0] == "_"]:
        raise _mistake((odd[0],), "it is no name of a key; a key of a method is a name in Python")
    about: Custom = _strictly(Custom)({key: value for key, value in given.items() if key in own})
    if not (info.context or {}).get(IMPORTS):
        return _record(tuple(key for key in given if key not in own))(**{**given, "path": about.path})
    kind, sha256 = _class(about.path)
    if about.sha256 not in (None, sha256):
        why = f"{about.path.rpartition(':')[0]} has changed since; put it back, or remove this key"
        raise _mistake(("sha256",), why)
    return _made(kind, {**given, "path": about.path, "sha256": sha256})


@cache
def _record(keys: tuple[str, ...]) -> type[Custom]:
    fields = [(key, object, dataclasses.field(kw_only=True)) for key in keys]
    return dataclasses.make_dataclass("Custom", fields, bases=(Custom,), frozen=True)


def _made(kind: type[Custom], keys: Mapping[str, Any]) -> Custom:
    """An object of the user's class. Its mistakes are sentences already: only here its keys are known."""
    path = keys["path"]
    try:
        made: Custom = _strictly(kind)(keys)
    except ValidationError as error:
        raise _mistakes([(detail["loc"], explain(kind, detail)) for detail in error.errors()]) from error
    except Exception as error:
        raise _mistake((), f"{path} raised {_words(error)}") from error
    if lacking := _lacking(made):
        raise _mistake(("path",), f"{path} {lacking}")
    return made


def _lacking(made: Any) -> str | None:
    """What a class does not say that a method must; None if it is one."""
    keys = ("title", "samplers", "steps", "tags")
    title, samplers, steps, tags = (getattr(made, key, None) for key in keys)
    if not _is_method(made):
        return "has not both functions of a method, times and endpoint (docs/extending/method.md)"
    if not _text(title) or title in [kind.title for kind in METHODS.values()]:
        return "has no title of its own, which cards and reports call it by; give it one, in words"
    if not _listed(samplers, lambda each: isinstance(each, str) and serves_adapter(each)):
        return f"must say its samplers, one or more of {', '.join(for_adapter())}, as {DEFAULT.samplers}"
    if not _listed(steps, lambda each: type(each) is int and 0 < each <= _MOST_STEPS):
        return f"must say the steps that it serves, whole numbers from 1 to {_MOST_STEPS}, as {DEFAULT.steps}"
    if not isinstance(needed := getattr(made, "needs_pictures", True), bool):
        return f"must say with true or false whether it needs_pictures, not with {needed!r:.50}"
    if not isinstance(tags, tuple) or not all(map(_text, tags)):
        return f"must say its tags, a tuple of texts, as {DEFAULT.tags} or ()"
    return None


def _listed(values: Any, fine: Callable[[Any], bool]) -> bool:
    return isinstance(values, tuple) and bool(values) and all(map(fine, values))


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= 200 and value.isprintable()


# -- The user's file -----------------------------------------------------------------------------------------


def _class(path: str) -> tuple[type[Custom], str]:
    """The class that `path` names, as a `Custom`, and the hash of its file, which is imported."""
    file, colon, name = path.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise _mistake(("path",), f"{path} is not FILE.py:CLASS, as my_methods.py:Mine")
    try:
        source = Path(file).read_bytes()
    except OSError as error:
        why = f"{error.strerror or type(error).__name__}; it is looked for from {os.getcwd()}"
        raise _mistake(("path",), f"{file} cannot be read ({why})") from error
    sha256 = sha256_bytes(source)
    return _joined(os.path.abspath(file), sha256, source, name, file), sha256


@cache
def _joined(place: str, sha256: str, source: bytes, name: str, file: str) -> type[Custom]:
    """The user's class with the keys of `Custom`: one type, so that equal configs are equal."""
    kind = getattr(_module(place, sha256, source, file), name, None)
    if not isinstance(kind, type):
        raise _mistake(("path",), f"{file} has no class {name}")
    parameters = kind.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        why = "is no frozen dataclass; write @dataclass(frozen=True) above it"
        raise _mistake(("path",), f"{file}:{name} {why}")
    for taken in ("path", "sha256"):
        if taken in (field.name for field in dataclasses.fields(kind)):
            raise _mistake(("path",), f"{file}:{name} has a field {taken}, a key of the kit's; rename it")
    field = ("name", Literal["custom"], dataclasses.field(default="custom", kw_only=True))
    try:
        return dataclasses.make_dataclass(
            name, [field], bases=(kind, Custom), frozen=True, namespace={"__module__": kind.__module__}
        )
    except Exception as error:
        raise _mistake(("path",), f"{file}:{name} cannot be a method: {_words(error)}") from error


def _module(place: str, sha256: str, source: bytes, file: str) -> ModuleType:
    """What was read is what is run: nothing is looked for beside it, and nothing is written there."""
    module = ModuleType(f"_lcm_kit_method_{sha256_bytes(f'{place}:{sha256}'.encode())[:16]}")
    if known := sys.modules.get(module.__name__):
        return known
    module.__file__ = place
    sys.modules[module.__name__] = module  # before it runs: dataclasses look their module up here
    try:
        exec(compile(source, place, "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[module.__name__]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _mistake(("path",), f"{file} cannot be imported: {_words(error)}") from error
    return module


def _words(error: BaseException) -> str:
    """`NameError: name 'x' is not defined`."""
    return f"{type(error).__name__}: {first_line(error)}"


def _mistake(key: tuple[str | int, ...], text: str) -> ValidationError:
    return _mistakes([(key, text)])


def _mistakes(found: list[tuple[tuple[str | int, ...], str]]) -> ValidationError:
    """An error of pydantic's whose texts are for `mistakes.sentence`."""
    kinds = [(key, PydanticCustomError("value_error", "{error}", {"error": text})) for key, text in found]
    details = [InitErrorDetails(type=kind, loc=key, input=None) for key, kind in kinds]
    return ValidationError.from_exception_data("method", details)


AnyMethod = Annotated[
    Annotated[LCM, PlainValidator(_strictly(LCM)), Tag("lcm")]
    | Annotated[TCD, PlainValidator(_strictly(TCD)), Tag("tcd")]
    | Annotated[PCM, PlainValidator(_strictly(PCM)), Tag("pcm")]
    | Annotated[Progressive, PlainValidator(_strictly(Progressive)), Tag("progressive")]
    | Annotated[DMD, PlainValidator(_strictly(DMD)), Tag("dmd")]
    | Annotated[Custom, PlainValidator(_custom), Tag("custom")],
    by_name(LCM.name),
]
"""What `method` may be: a member for each of `METHODS`, then the user's own."""
