"""Any LoRA file that is in circulation, as a `Lora`, with what was odd about it in words.

What can be repaired without a guess is repaired and told in `findings`; what cannot is told in `problems`,
and then the file is not whole.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.families import listed, unpruned
from lcm_kit.lora import assembling, foreign, peft_header, reading_words, untrusted
from lcm_kit.lora import structure as structures
from lcm_kit.lora.assembling import Unfit
from lcm_kit.lora.kinds import Rebased
from lcm_kit.lora.layers import Layer, Lora, Update
from lcm_kit.lora.metadata_reading import declared_modules
from lcm_kit.lora.reading_words import Notes
from lcm_kit.lora.spelling import BUNDLED, STRENGTHS, Key, Place, Speller, take_apart
from lcm_kit.lora.structure import Structure

_STARTS = {"pissa": "PiSSA", "olora": "OLoRA"}  # that follow from the base's weights alone


@dataclass(frozen=True)
class Reading:
    """A file that was read."""

    path: Path
    lora: Lora  # all that is whole
    structure: Structure  # of the base that it fits
    tensors: Mapping[str, Tensor]  # as they stand in the file
    findings: tuple[str, ...]  # repaired or harmless
    problems: tuple[str, ...]  # cannot be repaired
    lacks_alpha: int  # layers whose alpha the file does not say; taken as the rank unless it was given
    unknown: tuple[str, ...] = ()  # keys that belong to no module of the base
    embeddings: tuple[str, ...] = ()  # keys of textual inversions that are bundled with the LoRA
    weightless: tuple[str, ...] = ()  # those of `unknown` that change nothing: no weights, or zeros

    @property
    def others(self) -> Mapping[str, Update]:
        """Updates of a weight that are no plain LoRA, by module."""
        return self.lora.others

    @property
    def biases(self) -> Mapping[str, Tensor]:
        """What a module's bias [out] changes by, float32."""
        return self.lora.biases


def read(path: Path, structure: Structure | None = None, *, alpha: float | None = None) -> Reading:
    """Read `path`; the base it fits is found among SD1.x, SD2.x and SDXL if no `structure` is given.

    `alpha` is for layers whose file does not say theirs (no `.alpha`, nothing in the header); without it they
    get alpha = rank, which is what the apps do. Raises `UserError` for what is not a LoRA file of Stable
    Diffusion (`lcm_kit.lora.untrusted` says what else).
    """
    tensors, metadata = untrusted.read(path)
    embeddings = tuple(key for key in tensors if key.startswith(BUNDLED))
    keys = {key: take_apart(key) for key in tensors if not key.startswith(BUNDLED)}
    _require_ours(path, tensors, keys, metadata)
    fitting = structure or _best_structure(path, tensors, keys, metadata)
    notes = Notes()
    pieces = _sort(tensors, keys, fitting, notes)
    lora = _assemble(pieces, fitting, _Strengths(path, metadata, alpha, notes), notes)
    count = len({*lora.layers, *lora.others, *lora.biases})
    if not count and not notes.problems:
        notes.problems.append(f"none of its {len(tensors)} tensors belongs to {fitting.label}")
    if bad := untrusted.not_finite(tensors):
        notes.problems.append(f"{len(bad)} tensors hold NaN or Inf, such as {bad[0]}")
    if (declared := declared_modules(metadata)) is not None and declared > count:
        notes.problems.append(f"it holds {count} of the {declared} modules that its header counts")
    unknown = reading_words.of_unknown(notes.unknown, fitting)
    problems = [*notes.problems, *([unknown] if unknown else [])]
    found = reading_words.findings(notes, lora, embeddings)
    return Reading(
        path, lora, fitting, tensors, tuple(found), tuple(problems), notes.alpha_from["rank"],
        tuple(notes.unknown), embeddings, _weightless(notes.unknown, keys),
    )  # fmt: skip


def _weightless(unknown: Mapping[str, Tensor], keys: Mapping[str, Key | None]) -> tuple[str, ...]:
    """The keys whose loss changes nothing: strengths, zeros, and what is multiplied by zeros."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for key in unknown:
        parsed = keys[key]
        groups[parsed.module if parsed else key][parsed.role if parsed else ""] = key

    def still(key: str) -> bool:
        return not bool(unknown[key].float().any())

    found: list[str] = []
    for roles in groups.values():
        weights = {role: key for role, key in roles.items() if role not in STRENGTHS}
        product = weights.keys() <= {"down", "up", "mid"} and any(map(still, weights.values()))
        if product or all(map(still, weights.values())):
            found += roles.values()
    return tuple(found)


def _require_ours(
    path: Path, tensors: Mapping[str, Tensor], keys: Mapping[str, Key | None], metadata: Mapping[str, str]
) -> None:
    """Raise `UserError` for a file that is no LoRA, or one of another model."""
    if not any(parsed and parsed.role not in STRENGTHS for parsed in keys.values()):
        raise UserError(
            f"{path} holds no LoRA ({reading_words.what_else(tensors)}); give a LoRA of an {listed()} base"
        )
    if model := foreign.model_of(keys, metadata):
        raise UserError(
            f"{path} is a LoRA of {model}, which fits none of {listed('and')}; give one of such a base"
        )


def _best_structure(
    path: Path, tensors: Mapping[str, Tensor], keys: Mapping[str, Key | None], metadata: Mapping[str, str]
) -> Structure:
    """The published base most of whose modules fit, names and shapes; names alone for what says no shape."""
    scores = {each.name: _fit(structures.known(each.name), tensors, keys) for each in unpruned()}
    best = max(scores, key=lambda name: scores[name])
    if scores[best] == 0:
        told = metadata.get("lcm_kit.base") or metadata.get("ss_sd_model_name")
        named = f"its header names {told[:80]!r}" if told else f"its first key is {next(iter(tensors))!r}"
        raise UserError(
            f"{path} fits none of {listed('and')} ({named}); say which base it is for with --base"
        )
    return structures.known(best)


def _fit(candidate: Structure, tensors: Mapping[str, Tensor], keys: Mapping[str, Key | None]) -> int:
    """How many keys name a module and have its size."""
    speller, count = Speller(candidate), 0
    sizes = candidate.sizes
    products: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, parsed in keys.items():
        if parsed and parsed.role not in STRENGTHS and (place := speller.find(parsed.module)):
            if parsed.role.startswith("lokr_"):
                products[place.name][parsed.role] = tensors[key]
            else:
                count += _same_size(parsed.role, tensors[key].shape, sizes[place.name])
    fitting = (assembling.lokr_fits(piece, sizes[name]) for name, piece in products.items())
    return count + sum(fitting)


def _same_size(role: str, held: torch.Size, wanted: tuple[int, ...]) -> bool:
    """Whether a tensor of this role can be of a module of this weight, as far as its shape tells."""
    if role in ("up", "hada_w1_a", "hada_w2_a"):
        return held[:1] == wanted[:1] or held[1:2] == wanted[:1]
    if role in ("down", "hada_w1_b", "hada_w2_b"):
        return held[1:2] == wanted[1:2] or held[1:].numel() == torch.Size(wanted[1:]).numel()
    return held[:1] == wanted[:1] or held[1:2] == wanted[1:2]


Pieces = dict[str, dict[str, Tensor]]  # module -> role -> tensor


def _sort(
    tensors: Mapping[str, Tensor], keys: Mapping[str, Key | None], structure: Structure, notes: Notes
) -> Pieces:
    """The tensors by the module that they mean; notes how they were spelled."""
    speller = Speller(structure)
    pieces: Pieces = defaultdict(dict)
    for key, parsed in keys.items():
        place = speller.find(parsed.module) if parsed else None
        if parsed is None or place is None:
            notes.unknown[key] = tensors[key]
            continue
        held = pieces[place.name].get(parsed.role)
        if held is not None:
            notes.twice += 1
            if held.shape != tensors[key].shape or not torch.equal(held.float(), tensors[key].float()):
                notes.problems.append(f"{place.name} is there twice, with different weights ({key})")
            continue
        pieces[place.name][parsed.role] = tensors[key]
        if parsed.role in ("down", "hada_w1_a", "diff", "w_norm") or parsed.role.startswith("lokr_w1"):
            _note_style(parsed, place, notes)
    return pieces


def _note_style(parsed: Key, place: Place, notes: Notes) -> None:
    notes.styles[parsed.style] += 1
    if place.name.startswith("unet."):
        notes.spellings[place.spelling] += 1
    notes.wrapped += place.wrapped
    notes.processor += place.processor


class _Strengths:
    """How strong a layer is: by tensors beside it, peft's config, the user, kohya's header, else its rank."""

    def __init__(self, path: Path, metadata: Mapping[str, str], given: float | None, notes: Notes) -> None:
        self._configs, problems = peft_header.read(path, metadata)
        self.metadata, self._given, self._notes = metadata, given, notes
        notes.problems += problems
        notes.header = peft_header.HEADER in metadata

    def start_of(self, name: str) -> str | None:
        """How a layer began that is no update of its base: peft's `init_lora_weights`, or None."""
        config = self._configs.get(name.partition(".")[0])
        return config.start if config else None

    def of(self, name: str, piece: assembling.Piece, rank: int | None) -> float:
        """The alpha of `name`, or without a rank its strength. Raises `Unfit` where the file says two."""
        if "scale" in piece:
            return self._scale(name, piece, rank)
        told = self._configs.get(name.partition(".")[0])
        if rank is None:  # nothing to divide by: the apps take such a kind at strength 1; peft knows its r
            whole = told is not None and any(role.startswith("lokr") for role in piece)
            return told.alpha / told.rank if told is not None and whole else 1.0
        if "alpha" in piece:
            alpha, source = float(piece["alpha"].float()), "tensor"
        elif told is not None:
            alpha, source = told.alpha_of(name, rank), "header"
        elif self._given is not None:
            alpha, source = self._given, "given"
        elif (network := _kohya_alpha(self.metadata, piece.get("down"))) is not None:
            alpha, source = network, "ss_network_alpha"
        else:
            alpha, source = float(rank), "rank"
        self._notes.alpha_from[source] += 1
        self._notes.silent += alpha == 0
        return alpha

    def _scale(self, name: str, piece: assembling.Piece, rank: int | None) -> float:
        """By a `.scale`, which A1111, SD.Next and stable-diffusion.cpp take before alpha, others never."""
        scale = float(piece["scale"].float())
        alpha = scale if rank is None else scale * rank
        if "alpha" in piece and rank is not None:
            told = float(piece["alpha"].float())
            if abs(told - alpha) > 1e-3 * abs(alpha):  # more than halves round
                if self._given is None:
                    raise Unfit(
                        f"has a scale of {scale:g} and an alpha of {told:g} at rank {rank}, and apps differ "
                        "in which they take; `lcm-kit convert --alpha` writes the one that you give"
                    )
                alpha = self._given
        self._notes.alpha_from["scale"] += 1
        self._notes.silent += alpha == 0
        return alpha


def _kohya_alpha(metadata: Mapping[str, str], down: Tensor | None) -> float | None:
    """The network's alpha from sd-scripts' metadata; convolutions with a kernel may have one of their own."""
    try:
        if down is not None and down.ndim == 4 and down.shape[2] > 1:
            arguments = json.loads(metadata.get("ss_network_args", "{}"))
            if "conv_alpha" in arguments:
                return _finite(arguments["conv_alpha"])
        return _finite(metadata["ss_network_alpha"])
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return None


def _finite(value: Any) -> float | None:
    return number if math.isfinite(number := float(value)) else None


def _assemble(pieces: Pieces, structure: Structure, strengths: _Strengths, notes: Notes) -> Lora:
    """All that is whole, in the order of the base's modules."""
    layers: dict[str, Layer] = {}
    others: dict[str, Update] = {}
    biases: dict[str, Tensor] = {}
    sizes = structure.sizes
    for name in (module for module in sizes if module in pieces):
        piece = pieces[name]
        if piece.keys() <= set(STRENGTHS):
            notes.lone += 1
            continue

        def alpha(rank: int | None, name: str = name, piece: assembling.Piece = piece) -> float:
            return strengths.of(name, piece, rank)

        try:
            assembling.check(piece)
            found = assembling.update(piece, sizes[name], structure.label, alpha, notes.shapes)
            moved = assembling.bias(piece, sizes[name], alpha)
            found = _rebased(found, strengths.start_of(name))
        except Unfit as unfit:
            notes.problems.append(f"{name} {unfit}")
            continue
        if isinstance(found, Layer):
            layers[name] = found
        elif found is not None:
            others[name] = found
        if moved is not None:
            biases[name] = moved
    return Lora(layers, strengths.metadata, others, biases)


def _rebased(update: Update | None, start: str | None) -> Update | None:
    """What a layer is whose start was taken out of the base. Raises `Unfit` where that cannot be known."""
    if update is None or start is None:
        return update
    if start in _STARTS and isinstance(update, Layer) and len(update.shape) == 2:
        return Rebased(update, "PiSSA" if start == "pissa" else "OLoRA")
    raise Unfit(
        f"was trained from a start ({start}) that was taken out of the base's weights, and the file does not "
        "hold it: this is no LoRA of the base; save the difference in peft, by save_pretrained(FOLDER, "
        "path_initial_model_for_weight_conversion=FOLDER OF THE START)"
    )


def unknown_problem(read: Reading) -> str | None:
    """The problem that unknown keys are, as `problems` has it; None if there are none."""
    return reading_words.of_unknown(read.unknown, read.structure)
