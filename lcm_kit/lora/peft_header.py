"""What peft's config says of a file's layers: in diffusers' header, or in `adapter_config.json` beside it.

Rules as in peft 0.21 `tuners/lora/model.py` (`_create_and_replace`), `utils/other.py` (`get_pattern_key`) and
`tuners/lora/config.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_kit.lora.diffusers_format import HEADER
from lcm_kit.lora.layers import PARTS

_BESIDE = {"adapter_model.safetensors": "adapter_config.json"}  # `PeftModel.save_pretrained`
_DEFAULT = 8  # peft's lora_alpha, and its r, where a config leaves them out
_MOST = 1000  # characters of a pattern
_STEPS = 100_000  # of matching all patterns with one name, at worst: a millisecond
_SEVERAL = ("alpha_pattern", "rank_pattern")  # whose keys are patterns
_ONE = ("target_modules", "exclude_modules")  # a pattern where it is text, else names
# Starts of a LoRA that are taken out of the base's weight, so that the file is no update of the base
_TAKEN_OUT = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Config:
    """Of one part's layers."""

    alpha: float
    rank: int
    pattern: tuple[
        tuple[re.Pattern[str], float], ...
    ]  # of a module's name -> alpha; the first that fits counts
    rank_stabilised: bool  # strength alpha / sqrt(rank), arXiv:2312.03732
    start: str | None  # `init_lora_weights` of `_TAKEN_OUT`

    def alpha_of(self, name: str, rank: int) -> float:
        """The alpha that gives `name` (with its part) its strength in a plain LoRA of `rank`."""
        module = name.partition(".")[2]
        # transformers 5 dropped `text_model.` from one class of two
        forms = {module, module.removeprefix("text_model.")}
        fitting = (alpha for pattern, alpha in self.pattern if any(map(pattern.match, forms)))
        return next(fitting, self.alpha) * (rank**0.5 if self.rank_stabilised else 1.0)


def read(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Config], list[str]]:
    """The config of each part that has one, and what is wrong with it in words.

    Nothing where there is no such header, or it cannot be read as one.
    """
    beside = path.with_name(_BESIDE.get(path.name, path.name))
    try:
        if beside != path and beside.is_file():
            told = {
                f"{part}.{k}": v for part in PARTS for k, v in json.loads(beside.read_text("utf-8")).items()
            }
        else:
            told = dict(json.loads(metadata.get(HEADER, "{}")))
        parts = {part: _section(told, part) for part in PARTS}
        problems = [problem for section in parts.values() for problem in _unfit(section)]
        found = {} if problems else {part: _config(section) for part, section in parts.items() if section}
    except (ValueError, TypeError, AttributeError, OSError, RecursionError, OverflowError):
        return {}, []
    return found, problems


def _section(told: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {k.removeprefix(f"{part}."): v for k, v in told.items() if k.startswith(f"{part}.")}


def _config(section: Mapping[str, Any]) -> Config:
    start = str(section.get("init_lora_weights")).lower()
    alphas = _alphas(section)
    config = Config(
        # of LoRA, of LoHa and LoKr
        alpha=float(section.get("lora_alpha", section.get("alpha", _DEFAULT))),
        rank=max(1, int(section.get("r", _DEFAULT))),
        pattern=tuple((re.compile(_pattern(key)), alpha) for key, alpha in alphas.items()),
        rank_stabilised=bool(section.get("use_rslora")),
        start=start if start.startswith(_TAKEN_OUT) else None,
    )
    if not all(map(math.isfinite, (config.alpha, *alphas.values()))):
        raise ValueError("an alpha is not finite")
    return config


def _alphas(section: Mapping[str, Any]) -> dict[str, float]:
    """By pattern, in the header's order: a file of diffusers' has them sorted."""
    return {str(key): float(alpha) for key, alpha in (section.get("alpha_pattern") or {}).items()}


def _pattern(key: str) -> str:
    """What peft matches with a module's name from its start."""
    return rf"(.*\.)?({key})$"


def _unfit(section: Mapping[str, Any]) -> list[str]:
    """Why patterns are not tried, here or by peft: some could take for ever on a name that nearly fits."""
    patterns = [(where, str(key)) for where in _SEVERAL for key in section.get(where) or {}]
    patterns += [(where, section[where]) for where in _ONE if isinstance(section.get(where), str)]
    problems = [problem for where, key in patterns if (problem := _fault(where, key))]
    if not problems and sum(_steps(key) for _, key in patterns) > _STEPS:
        where, key = max(patterns, key=lambda pattern: _steps(pattern[1]))
        problems.append(f"its header's {where} has {key[:60]!r}, which repeats too much: it is not read")
    return problems


def _fault(where: str, key: str) -> str | None:
    """What is wrong with one pattern."""
    try:
        re.compile(_pattern(key))
    except (re.error, RecursionError, OverflowError):
        return f"its header's {where} has {key[:60]!r}, which is not a regular expression"
    if len(key) > _MOST or re.search(r"\)\s*[*+{]", key):
        return f"its header's {where} has {key[:60]!r}, which repeats a group: it is not read"
    return None


def _steps(key: str) -> int:
    """About the most ways in which a pattern without repeated groups is tried with one name."""
    repeats, choices = len(re.findall("[*+{]", key)), len(re.findall("[?|]", key))
    return 10 * 40 ** min(repeats, 9) * 2 ** min(choices, 40)
