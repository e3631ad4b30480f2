"""Bases with one thing wrong: a field of a configuration of another type or gone, or a spoiled file."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_kit.bases import configs

_HUGE = 10**30
# What a field may become; `GONE` takes it away. `nested` is deep enough for a recursive library to mind.
GONE = object()
_NESTED: Any = "x"
for _ in range(50):
    _NESTED = [_NESTED]
VALUES: dict[str, Any] = {
    "gone": GONE, "null": None, "text": "x", "empty text": "", "list": [], "list of text": ["x"],
    "object": {}, "true": True, "negative": -1, "zero": 0, "half": 0.5, "huge": _HUGE, "large": 10**7,
    "1e308": 1e308, "nan": float("nan"), "nested": _NESTED,
}  # fmt: skip
FILES: dict[str, bytes | None] = {
    "missing": None, "empty": b"", "null": b"null", "list": b"[]", "object": b"{}", "number": b"7",
    "text": b"no JSON at all", "latin-1": b'{"a": "\xe9"}', "nested": b"[" * 100_000,
    "cut": GONE,  # type: ignore[dict-item]  # the first half of what is there
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One spoiled base."""

    file: str  # within the base
    field: str  # "" where the whole file is spoiled; `a.b` for a field within one
    how: str  # a key of VALUES, or of FILES

    @property
    def name(self) -> str:
        """To tell it by."""
        return f"{self.file} {self.field or '(file)'}: {self.how}"


def cases(base: Path) -> list[Case]:
    """Every way in which one of the JSON files of `base` is spoiled here, in a fixed order."""
    return list(_cases(base))


def _cases(base: Path) -> Iterator[Case]:
    for path in sorted(base.rglob("*.json")) + sorted(base.rglob("merges.txt")):
        file = path.relative_to(base).as_posix()
        if path.parent == base and path.name != "model_index.json":
            continue  # of the shipped base's story, no part of a base
        yield from (Case(file, "", how) for how in FILES)
        if path.suffix == ".json" and path.name != "vocab.json":
            content = json.loads(path.read_text(encoding="utf-8"))
            fields = [key for key in content if key[0] != "_" or key == "_class_name"]
            inner = [
                f"{key}.{below}" for key in fields if isinstance(content[key], dict) and key != "vocab"
                for below in content[key] if below not in ("vocab", "merges")
            ]  # fmt: skip
            yield from (Case(file, field, how) for field in (*fields, *inner) for how in VALUES)


def some(base: Path, count: int, seed: int = 0) -> list[Case]:
    """`count` of the cases: each field has its turn, then each again; the same for the same seed."""
    drawn = random.Random(seed)
    by_field: dict[tuple[str, str], list[Case]] = {}
    for case in cases(base):
        by_field.setdefault((case.file, case.field), []).append(case)
    for each in by_field.values():
        drawn.shuffle(each)
    rounds = max(map(len, by_field.values()))
    turns = [each[k] for k in range(rounds) for each in by_field.values() if k < len(each)]
    return turns[:count]


def spoil(base: Path, case: Case, folder: Path) -> Path:
    """A copy of `base` in `folder`, by links but for the spoiled file."""
    for path in sorted(base.rglob("*")):
        target = folder / path.relative_to(base)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.relative_to(base).as_posix() != case.file:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path, target)
    content = _spoiled((base / case.file).read_bytes(), case)
    if content is not None:
        (folder / case.file).write_bytes(content)
    return folder


def _spoiled(content: bytes, case: Case) -> bytes | None:
    if not case.field:
        return content[: len(content) // 2] if case.how == "cut" else FILES[case.how]
    whole = json.loads(content)
    outer, dot, inner = case.field.partition(".")
    place, key = (whole[outer], inner) if dot else (whole, outer)
    if VALUES[case.how] is GONE:
        del place[key]
    else:
        place[key] = VALUES[case.how]
    return json.dumps(whole).encode()


def listed(case: Case) -> bool:
    """Whether the kit reads the field, typed and bounded, so that a value it takes means what it says."""
    part = case.file.partition("/")[0]
    kind = _KINDS.get("tokenizer" if "token" in case.file else part)
    if kind is None or case.file.endswith("tokenizer.json"):
        return False
    fields = kind.model_fields
    return case.field in {*fields, *(field.alias for field in fields.values())}


_KINDS: dict[str, Any] = {
    "model_index.json": configs.Index, "unet": configs.Teacher, "vae": configs.Vae,
    "text_encoder": configs.Text, "text_encoder_2": configs.Text, "tokenizer": configs.Tokenizer,
    "scheduler": configs.Scheduler,
}  # fmt: skip
