"""Captions on their way to tokens: quotes as CLIP learned them, and the tokens that a caption takes.

CLIP was trained on text whose curly quotes had been straightened (ftfy, in its own tokenizer and in that of
transformers 4). transformers 5 leaves them curly, and each costs two tokens that CLIP hardly knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lcm_kit.bases.base import BaseInfo
from lcm_kit.bases.chunks import slices
from lcm_kit.bases.source import read_json
from lcm_kit.bases.texts import comma_of
from lcm_kit.errors import UserError, first_line

_QUOTES = {"'": "\u02bc\u2018\u2019\u201a\u201b", '"': "\u201c\u201d\u201e\u201f"}
_TABLE = str.maketrans({curly: plain for plain, all_ in _QUOTES.items() for curly in all_})


def straightened(caption: str) -> str:
    """The caption with straight quotes: what every tokenizer of `load_tokenizer` makes of it first."""
    return caption.translate(_TABLE)


def load_tokenizer(base: BaseInfo, part: str) -> Any:
    """The CLIP tokenizer in folder `part` of a base, for training and for pipelines; it straightens quotes.

    Raises `UserError` if it cannot be loaded.
    """
    from tokenizers import Regex, normalizers
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(base.folder / part, local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself
        reason = first_line(error)
        raise UserError(
            f"base {base.path!r}: {part} cannot be loaded ({reason}); save the base again"
        ) from error
    encoder = read_json(base.folder / part.replace("tokenizer", "text_encoder") / "config.json", base.path)
    # pipelines pad to this, and without a number of its own a tokenizer has 10**30
    tokenizer.model_max_length = int(
        min(tokenizer.model_max_length, encoder.get("max_position_embeddings", 77))
    )
    inner = tokenizer.backend_tokenizer
    straight = [normalizers.Replace(Regex(f"[{curly}]"), plain) for plain, curly in _QUOTES.items()]
    inner.normalizer = normalizers.Sequence([*straight, *([inner.normalizer] if inner.normalizer else [])])
    return tokenizer


def too_long(
    tokenizers: Sequence[Any], captions: Mapping[str, str], chunks: int = 1
) -> tuple[dict[str, int], int]:
    """The captions that do not fit into `chunks` chunks, by id with all their tokens; and the tokens of one.

    By every tokenizer of a base, as `load_tokenizers` gives them.
    """
    cut: dict[str, int] = {}
    sizes = []
    for size, comma, rows in _rows(tokenizers, list(captions.values())):
        sizes.append(size)
        for id, row in zip(captions, rows, strict=True):
            if len(slices(row, size, comma, chunks + 1)) > chunks:
                cut[id] = max(len(row), cut.get(id, 0))
    return cut, min(sizes)


def load_tokenizers(base: BaseInfo) -> list[Any]:
    """Every tokenizer of a base. Raises `UserError` as `load_tokenizer`."""
    return [load_tokenizer(base, part) for part in base.family.tokenizers]


def counts(tokenizers: Sequence[Any], captions: Sequence[str], chunks: int) -> list[int]:
    """In how many chunks each caption is read, at most `chunks`, by `load_tokenizers`.

    What encoders make of a caption hangs on this number besides its text, and on nothing else of `chunks`;
    it is then stored as `chunks.rounded` of it.
    """
    found = [
        [len(slices(row, size, comma, chunks)) for row in rows]
        for size, comma, rows in _rows(tokenizers, captions)
    ]
    return [max(each) for each in zip(*found, strict=True)]


def _rows(
    tokenizers: Sequence[Any], captions: Sequence[str]
) -> Iterator[tuple[int, int | None, list[list[int]]]]:
    """Of each tokenizer: the tokens of a chunk, a comma, and all tokens of each caption."""
    for tokenizer in tokenizers:
        # by what is behind it: the tokenizer itself would warn of every long one
        rows = tokenizer.backend_tokenizer.encode_batch(list(captions)) if captions else []
        # without its start and end
        yield tokenizer.model_max_length - 2, comma_of(tokenizer), [row.ids[1:-1] for row in rows]


def room(tokens: int, chunks: int = 1) -> str:
    """What `too_long` captions have more tokens than, in words: `tokens` is that of a chunk."""
    if chunks == 1:
        return f"the {tokens} that the base reads"
    return f"fit into {chunks} chunks of {tokens} (data.chunks)"
