"""Whatever a file holds as layers of a plain LoRA, which every app reads and which this kit writes.

Exact where thin factors hold the change: LoHa (Khatri-Rao products), LoKr (Kronecker products), PiSSA and
OLoRA (less the start). Full differences and DoRA change a weight in as many directions as it has: by SVD, at
an error that is stated. Norms, biases and embeddings are held by no LoRA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.lora.base_weights import BaseWeights
from lcm_kit.lora.kinds import LoHa, LoKr, Norm, Rebased, exact_rank, needs_base
from lcm_kit.lora.layers import Layer, Lora, Update
from lcm_kit.lora.merge import Truncated, balanced, layer_of, relative_errors, truncate_layer
from lcm_kit.lora.reading import Reading
from lcm_kit.lora.reading_words import bundled, kinds

LEAVE_OUT = ("norms", "biases", "projections", "embeddings")
MOST = 256  # highest rank that is written without being asked for: a LoHa of rank 16 has it
_OPTIONS = "; --leave-out {what} leaves them out"


@dataclass(frozen=True)
class Plain:
    """A file as a plain LoRA."""

    lora: Lora  # layers alone
    made: tuple[str, ...]  # what was not one, in words
    left_out: tuple[str, ...]
    errors: dict[str, float] | None  # of a reduction to a rank, by block; None if nothing was reduced

    def lines(self) -> list[str]:
        """What to tell a user of it."""
        lost = [f"left out: {words}" for words in self.left_out]
        errors = [f"relative error of {group}: {error:.3g}" for group, error in (self.errors or {}).items()]
        return [*self.made, *lost, *errors]


def plain(
    read: Reading,
    base: BaseWeights | None = None,
    *,
    rank: int | None = None,
    reduce_all: bool = False,
    leave_out: Collection[str] = (),
    advice: str = _OPTIONS,
) -> Plain:
    """`read` as layers alone. `base` is needed where a change follows from the base's weights.

    `rank` is what a change is reduced to that no layer of rank `MOST` holds; with `reduce_all` all are.
    Raises `UserError` for what no LoRA holds and `leave_out` does not name (`advice` ends the sentence, with
    `{what}` for its name there), where `base` is missing, and where `rank` is needed.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank} is below 1; choose 1 or more")
    if odd_names := [what for what in leave_out if what not in LEAVE_OUT]:
        raise UserError(f"{odd_names[0]!r} is nothing to leave out; choose among {', '.join(LEAVE_OUT)}")
    lora, left_out = _without(read, leave_out, advice)
    if base is None and (odd := [u for u in lora.others.values() if needs_base(u)]):
        raise UserError(
            f"{read.path}: {len(odd)} modules are {odd[0].kind}, and what they change follows from the "
            "base's weights; give its folder as --base FOLDER"
        )
    _require_rank(read, lora, rank)
    found: dict[str, Truncated] = {}
    layers: dict[str, Layer] = {}
    for name, update in lora.updates.items():
        weight = base.weight(name, update.shape) if base is not None and needs_base(update) else None
        layer = to_layer(name, update, weight)
        if rank is not None and (reduce_all or layer.rank > max(rank, MOST)):
            found[name] = truncate_layer(name, layer, rank)
            layer = found[name].layer
        layers[name] = layer
    ordered = [n for n in (*read.structure.modules, *read.structure.projections) if n in layers]
    return Plain(
        Lora({name: layers[name] for name in ordered}, lora.metadata), tuple(_made(lora, layers)), left_out,
        relative_errors(found) if found else None,
    )  # fmt: skip


def to_layer(name: str, update: Update, weight: Tensor | None = None) -> Layer:
    """A layer of the same change, exact to float32; `weight` is the base's, where `needs_base`."""
    if isinstance(update, Layer):
        return update
    up, down = balanced(name, _factors(update, weight), 1.0)
    return layer_of(up, down, update.shape)


def _factors(update: Update, weight: Tensor | None) -> Layer:
    full = min(update.shape[0], torch.Size(update.shape[1:]).numel())
    if isinstance(update, LoHa | LoKr | Rebased) and exact_rank(update) < full:
        factors = update.factors(weight) if isinstance(update, Rebased) else update.factors()
        return layer_of(*factors, update.shape)
    change = update.delta(weight).flatten(1)
    out, into = change.shape
    if out <= into:
        return layer_of(torch.eye(out), change, update.shape)
    return layer_of(change, torch.eye(into), update.shape)


def unholdable(lora: Lora, embeddings: Collection[str] = ()) -> dict[str, str]:
    """What no LoRA holds, in words, by its name in `--leave-out`."""
    norms = [name for name, update in lora.others.items() if isinstance(update, Norm)]
    found = {}
    if norms:
        found["norms"] = f"the weights of {len(norms)} norms, such as {norms[0]}"
    if lora.biases:
        found["biases"] = f"the biases of {len(lora.biases)} modules, such as {next(iter(lora.biases))}"
    if embeddings:
        found["embeddings"] = f"what the embeddings {bundled(list(embeddings))} stand for"
    return found


def _without(read: Reading, leave_out: Collection[str], advice: str) -> tuple[Lora, tuple[str, ...]]:
    """The LoRA without what is left out, and that in words."""
    lora = read.lora
    beyond = unholdable(lora, read.embeddings)
    for what, words in beyond.items():
        if what not in leave_out:
            raise UserError(f"{read.path} changes {words}, which no LoRA holds{advice.format(what=what)}")
    left = [beyond[what] for what in beyond]
    updates: Mapping[str, Update] = {k: u for k, u in lora.updates.items() if not isinstance(u, Norm)}
    if "projections" in leave_out and (gone := read.structure.projections.keys() & updates.keys()):
        left += sorted(gone)
        updates = {name: update for name, update in updates.items() if name not in gone}
    if not updates:
        raise UserError(f"{read.path} changes nothing else, so nothing of it is left")
    layers = {name: update for name, update in updates.items() if isinstance(update, Layer)}
    others = {name: update for name, update in updates.items() if name not in layers}
    return Lora(layers, lora.metadata, others), tuple(left)


def _require_rank(read: Reading, lora: Lora, rank: int | None) -> None:
    """Raise if a layer would be larger than `MOST` without having been asked for."""
    ranks = {name: exact_rank(update) for name, update in lora.others.items()}
    large = [name for name, needed in ranks.items() if needed > MOST]
    if large and rank is None:
        counts = Counter(lora.others[name].kind for name in large)
        most = max(ranks.values())
        raise UserError(
            f"{read.path}: {len(large)} modules ({', '.join(counts)}) change their weights by up to rank "
            f"{most}; choose the LoRA's rank with --rank: {most} is exact, and the error of less is stated"
        )


def _made(lora: Lora, layers: Mapping[str, Layer]) -> list[str]:
    ranks: dict[str, int] = {}
    for name, update in lora.others.items():
        ranks[update.kind] = max(ranks.get(update.kind, 0), layers[name].rank)
    words = kinds(lora)
    return [
        f"{count} modules of {kind} made into layers of rank up to {rank}"
        for (kind, count), rank in zip(words.items(), ranks.values(), strict=True)
    ]
