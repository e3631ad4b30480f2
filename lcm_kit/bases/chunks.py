"""Where a text of more tokens than an encoder reads at once is cut, by the rule of the app A1111.

An encoder reads 75 tokens between its start and end. A longer text is read in chunks of as many, each on its
own, whose embeddings are laid one after the other (A1111 1.10, modules/sd_hijack_clip.py). A chunk that is
full ends after the last comma among its last 20 tokens, so that a phrase stays in one chunk; what is left of
it is filled up like the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

NEAR = 20  # tokens in which a comma is looked for; A1111's default
# The numbers of chunks that captions are trained with: their least common multiple is 24, that of 1 to 8 is
# 840 (`condition.joined`). So 5 and 7 get an empty one more, as A1111 gives the shorter of two texts
ROUND = (1, 2, 3, 4, 6, 8)


def slices(tokens: Sequence[int], size: int, comma: int | None, most: int | None = None) -> list[slice]:
    """The chunks of `tokens`, each of at most `size` of them: one at least, `most` at most.

    `comma`: the token of one that stands alone; None: there is none. What does not fit into the last of
    `most` chunks is left out, and that one is filled: there is no next one to begin a phrase in.
    """
    found: list[slice] = []
    start = 0
    while len(tokens) - start > size and (most is None or len(found) < most - 1):
        full = end = start + size
        if tokens[full] != comma:  # which stays where it is and begins the next chunk
            near = range(full - 1, max(start, full - NEAR) - 1, -1)
            end = next((place + 1 for place in near if tokens[place] == comma), full)
        found.append(slice(start, end))
        start = end
    return [*found, slice(start, min(start + size, len(tokens)))]


def rounded(count: int) -> int:
    """How many chunks a caption of `count` is trained with."""
    return next((n for n in ROUND if n >= count), count)
