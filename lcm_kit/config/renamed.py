"""Keys of configs that have another name now: the old one works for one version, with a warning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcm_kit import console

# by the recipes whose configs have the key: old path, new path
_OF_DATA = {
    "data.regularisation": "data.regularization",
    "data.regularisation_share": "data.regularization_share",
    "data.samples.solver": "data.samples.sampler",
}
RENAMED: Mapping[str, Mapping[str, str]] = {
    "train/distill": {**_OF_DATA, "teacher.regularisation": "teacher.regularization"},
    "train/finetune": _OF_DATA,
    "evaluation/quality": {"solvers": "samplers"},
}


def rename(recipe: str | None, raw: dict[str, Any], name: object) -> list[str]:
    """Put values of old keys under the new ones, in place, and say so; the problems where both are given.

    `name`: of the config, for the warning.
    """
    problems = []
    for old, new in RENAMED.get(recipe or "", {}).items():
        block, _, key = old.rpartition(".")
        inside = _block(raw, block)
        if inside is None or key not in inside:
            continue
        if (now := new.rpartition(".")[2]) in inside:
            problems.append(f"{old}: it is called {new} now, which is given too; remove {old}")
            del inside[key]
            continue
        inside[now] = inside.pop(key)
        _warn(name, old, new)
    return problems


def renamed_override(recipe: str | None, text: str, name: object) -> str:
    """An override `key=value` under the name of today, with the warning."""
    key, equals, value = text.partition("=")
    if (new := RENAMED.get(recipe or "", {}).get(key)) is None:
        return text
    _warn(name, key, new)
    return f"{new}{equals}{value}"


def _warn(name: object, old: str, new: str) -> None:
    console.say(
        f"warning: config {name}: {old} is called {new} now; the old name works in this version only",
        err=True,
    )


def current(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted keys, as a state has them, under the names of today."""
    today = {old: new for names in RENAMED.values() for old, new in names.items()}
    return {today.get(key, key): value for key, value in keys.items()}


def _block(raw: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """The mapping at a dotted path; None if there is none."""
    inside: Any = raw
    for part in filter(None, path.split(".")):
        inside = inside.get(part) if isinstance(inside, dict) else None
    return inside if isinstance(inside, dict) else None
