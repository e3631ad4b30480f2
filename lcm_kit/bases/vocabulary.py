"""Whether a tokenizer's files are CLIP's and hold its vocabulary, read before a library sees them.

transformers makes an empty tokenizer of a folder that has none, and then every caption is the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_kit.bases.configs import Tokenizer, parse
from lcm_kit.bases.source import read_json
from lcm_kit.errors import UserError
from lcm_kit.families import listed

_END = "</w>"  # of a word, in CLIP's vocabularies
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_REMEDY = "copy the tokenizer files of the base that it was made from there"


def require_vocabulary(folder: Path, part: str, path: str, entry: Any, size: int) -> None:
    """Raise `UserError` unless `folder/part` is a CLIP tokenizer whose tokens a text encoder has places for.

    `path`: the base as a user calls it; `entry`: the part's in model_index.json; `size`: how many tokens the
    encoder embeds.
    """
    name = f"base {path!r}: {part}"
    own = folder / part
    settings = {file: _settings(own / file, path) for file in _SETTINGS if (own / file).is_file()}
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    for kind in (*(found.tokenizer_class for found in settings.values()), named):
        if kind is not None and (not isinstance(kind, str) or kind.removesuffix("Fast") != "CLIPTokenizer"):
            raise UserError(f"{name} is a {kind}, not CLIP's tokenizer; give an {listed()} base")
    vocabulary = _vocabulary(own, name, path)
    ids = [number for number in vocabulary.values() if type(number) is int]
    if not any(token.endswith(_END) for token in vocabulary) or len(ids) < len(vocabulary):
        raise UserError(f"{name} has no vocabulary of CLIP's kind ({len(vocabulary)} tokens); {_REMEDY}")
    if min(ids) < 0 or max(ids) >= size:
        raise UserError(
            f"{name} has tokens up to {max(ids)}, its text encoder embeds {size}: they are of two models; "
            f"{_REMEDY}"
        )
    for file, found in settings.items():
        for field, token in found.tokens().items():
            if token not in vocabulary:  # a library would add it, with a number that no encoder knows
                raise UserError(f"{name}/{file}: {field} {token!r} is not in the vocabulary; {_REMEDY}")


def _settings(file: Path, path: str) -> Tokenizer:
    return parse(Tokenizer, read_json(file, path), f"base {path!r}: {file.parent.name}/{file.name}")


def _vocabulary(own: Path, name: str, path: str) -> Mapping[str, Any]:
    """Of tokenizer.json, which transformers prefers, else of vocab.json."""
    if (own / "tokenizer.json").is_file():
        model = read_json(own / "tokenizer.json", path).get("model")
        found = model.get("vocab") if isinstance(model, dict) and model.get("type", "BPE") == "BPE" else None
    elif missing := [file for file in ("vocab.json", "merges.txt") if not (own / file).is_file()]:
        raise UserError(
            f"{name} lacks {' and '.join(missing)}, so it would read every caption alike; {_REMEDY}"
        )
    else:
        found = read_json(own / "vocab.json", path)
    if not isinstance(found, dict):
        raise UserError(f"{name} has no vocabulary of CLIP's kind; {_REMEDY}")
    return found
