"""Any LoRA file that is in circulation, as a `Lora`, with what was odd about it in words.

What can be mended without a guess is mended and told in `findings`; what cannot is told in `problems`, and
then the file is not whole.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.export import structure as structures
from lcm_kit.export import untrusted
from lcm_kit.export.diffusers_format import HEADER
from lcm_kit.export.facts import declared_modules
from lcm_kit.export.kinds import Update
from lcm_kit.export.lora import Layer, Lora
from lcm_kit.export.spelling import Key, Place, Speller, other_kind, take_apart
from lcm_kit.export.structure import Structure


@dataclass(frozen=True)
class Reading:
    """A file that was read."""

    path: Path
    lora: Lora  # all layers that are whole
    structure: Structure  # of the base that it fits
    tensors: Mapping[str, Tensor]  # as they stand in the file
    findings: tuple[str, ...]  # mended or harmless
    problems: tuple[str, ...]  # cannot be mended
    lacks_alpha: int  # layers whose alpha the file does not say; taken as the rank unless it was given
    unknown: tuple[str, ...] = ()  # keys that belong to no module of the base
    others: Mapping[str, Update] = field(default_factory=dict)  # updates of a weight that are no plain LoRA
    biases: Mapping[str, Tensor] = field(default_factory=dict)  # what a bias [out] changes by, float32


@dataclass
class _Notes:
    styles: Counter[str] = field(default_factory=Counter)
    spellings: Counter[str] = field(default_factory=Counter)
    wrapped: int = 0
    processor: int = 0
    reshaped: int = 0
    twice: int = 0
    folded: int = 0
    alpha_from: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def read(path: Path, structure: Structure | None = None, *, alpha: float | None = None) -> Reading:
    """Read `path`; the base it fits is found among SD1.x, SD2.x and SDXL if no `structure` is given.

    `alpha` is for layers whose file does not say theirs (no `.alpha`, nothing in the header); without it they
    get alpha = rank, which is what the apps do. Raises `UserError` for what is not a LoRA file of Stable
    Diffusion (`lcm_kit.export.untrusted` says what else).
    """
    tensors, metadata = untrusted.read(path)
    keys = {key: take_apart(key) for key in tensors}
    if not any(keys.values()):
        raise UserError(
            f"{path} holds no LoRA ({_what_else(tensors)}); give a LoRA of an SD1.x, SD2.x or SDXL base"
        )
    fitting = structure or _best_structure(path, tensors, keys, metadata)
    notes = _Notes()
    pieces = _sort(tensors, keys, fitting, notes)
    layers = _layers(pieces, fitting, metadata, alpha, notes)
    if not layers and not notes.problems:
        notes.problems.append(f"none of its {len(tensors)} tensors belongs to {fitting.label}")
    if bad := untrusted.not_finite(tensors):
        notes.problems.append(f"{len(bad)} tensors hold NaN or Inf, such as {bad[0]}")
    if (declared := declared_modules(metadata)) is not None and declared > len(layers):
        notes.problems.append(f"it holds {len(layers)} of the {declared} modules that its header counts")
    unknown = _unknown_words(notes.unknown, fitting)
    problems = [*notes.problems, *([unknown] if unknown else [])]
    return Reading(
        path, Lora(layers, metadata), fitting, tensors, tuple(_findings(notes, metadata)),
        tuple(problems), notes.alpha_from["rank"], tuple(notes.unknown),
    )  # fmt: skip


def _what_else(tensors: Mapping[str, Tensor]) -> str:
    kinds = {kind for key in tensors if (kind := other_kind(key))}
    return (
        f"but {', '.join(sorted(kinds))}" if kinds else f"its first key is {next(iter(tensors), 'missing')!r}"
    )


def _best_structure(
    path: Path, tensors: Mapping[str, Tensor], keys: Mapping[str, Key | None], metadata: Mapping[str, str]
) -> Structure:
    """The published base most of whose modules fit, names and shapes."""

    def fits(candidate: Structure) -> int:
        speller, count = Speller(candidate), 0
        for key, parsed in keys.items():
            if parsed and parsed.role in ("down", "up") and (place := speller.find(parsed.module)):
                wanted = candidate.modules[place.name]
                size = tensors[key].shape
                count += size[:1] == wanted[:1] if parsed.role == "up" else size[1:2] == wanted[1:2]
        return count

    scores = {generation: fits(structures.known(generation)) for generation in ("sd1", "sd2", "sdxl")}
    best = max(scores, key=lambda generation: scores[generation])
    if scores[best] == 0:
        told = metadata.get("lcm_kit.base") or metadata.get("ss_sd_model_name")
        named = f"its header names {told!r}" if told else f"its first key is {next(iter(tensors))!r}"
        raise UserError(
            f"{path} fits none of SD1.x, SD2.x and SDXL ({named}); say which base it is for with --base"
        )
    return structures.known(best)


Pieces = dict[str, dict[str, Tensor]]  # module -> role -> tensor


def _sort(
    tensors: Mapping[str, Tensor], keys: Mapping[str, Key | None], structure: Structure, notes: _Notes
) -> Pieces:
    """The tensors by the module that they mean; notes how they were spelled."""
    speller = Speller(structure)
    pieces: Pieces = defaultdict(dict)
    for key, parsed in keys.items():
        place = speller.find(parsed.module) if parsed else None
        if parsed is None or place is None:
            notes.unknown.append(key)
            continue
        held = pieces[place.name].get(parsed.role)
        if held is not None:
            notes.twice += 1
            if not torch.equal(held, tensors[key]):
                notes.problems.append(f"{place.name} is there twice, with different weights ({key})")
            continue
        pieces[place.name][parsed.role] = tensors[key]
        if parsed.role == "down":
            _note_style(parsed, place, notes)
    return pieces


def _note_style(parsed: Key, place: Place, notes: _Notes) -> None:
    notes.styles[parsed.style] += 1
    if place.name.startswith("unet."):
        notes.spellings[place.spelling] += 1
    notes.wrapped += place.wrapped
    notes.processor += place.processor


def _layers(
    pieces: Pieces, structure: Structure, metadata: Mapping[str, str], given: float | None, notes: _Notes
) -> dict[str, Layer]:
    """The whole layers, in the order of the base's modules."""
    layers = {}
    header = _header_alphas(metadata)
    for name in (module for module in structure.modules if module in pieces):
        piece = pieces[name]
        if "down" not in piece or "up" not in piece:
            has = " and ".join(sorted(piece))
            notes.problems.append(f"{name} has only {has}: the rest of it is missing from the file")
            continue
        down, up = _shaped(name, piece, structure, notes)
        if down is None or up is None:
            continue
        alpha, source = _alpha(name, piece, down, header, metadata, given)
        notes.alpha_from[source] += 1
        layers[name] = Layer(down, up, alpha)
    return layers


def _shaped(
    name: str, piece: Mapping[str, Tensor], structure: Structure, notes: _Notes
) -> tuple[Tensor | None, Tensor | None]:
    """down and up in the shapes of the module; (None, None), and a problem, if they do not fit it."""
    down, up, wanted = piece["down"], piece["up"], structure.modules[name]
    if "mid" in piece:  # LoCon's third factor (a CP decomposition) folds into down exactly
        down = torch.einsum("rshw,si->rihw", piece["mid"].float(), down.float().flatten(1)).to(down.dtype)
        notes.folded += 1
    rank = down.shape[0] if down.ndim else 0
    shapes = (rank, *wanted[1:]), (wanted[0], rank, *(1,) * (len(wanted) - 2))
    if not rank or down.numel() != _size(shapes[0]) or up.numel() != _size(shapes[1]):
        notes.problems.append(
            f"{name} of {structure.label} has a weight of shape {list(wanted)}, which down "
            f"{list(down.shape)} and up {list(up.shape)} do not fit"
        )
        return None, None
    notes.reshaped += tuple(down.shape) != shapes[0]
    return down.reshape(shapes[0]), up.reshape(shapes[1])


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _alpha(
    name: str,
    piece: Mapping[str, Tensor],
    down: Tensor,
    header: Mapping[str, _Header],
    metadata: Mapping[str, str],
    given: float | None,
) -> tuple[float, str]:
    """A layer's alpha and its source: the tensor, peft's header, the user, kohya's header, else the rank."""
    if "alpha" in piece:
        return float(piece["alpha"].float()), "tensor"
    if (told := header.get(name.partition(".")[0])) is not None:
        return told.of(name, down.shape[0]), "header"
    if given is not None:
        return given, "given"
    if (network := _kohya_alpha(metadata, down)) is not None:
        return network, "ss_network_alpha"
    return float(down.shape[0]), "rank"


@dataclass(frozen=True)
class _Header:
    """What diffusers' header says of the strength of one part's layers."""

    alpha: float
    pattern: Mapping[str, float]  # by the ending of a module's name
    rank_stabilised: bool  # strength alpha / sqrt(rank), arXiv:2312.03732

    def of(self, name: str, rank: int) -> float:
        """The alpha that gives `name` its strength in a plain LoRA."""
        words = name.split(".")
        endings = (".".join(words[first:]) for first in range(len(words)))
        told = next((self.pattern[ending] for ending in endings if ending in self.pattern), self.alpha)
        return told * (rank**0.5 if self.rank_stabilised else 1.0)


def _header_alphas(metadata: Mapping[str, str]) -> dict[str, _Header]:
    """By part; {} where there is no such header or it cannot be read."""
    try:
        told = json.loads(metadata.get(HEADER, "{}"))
        return {
            part: _Header(
                float(told[f"{part}.lora_alpha"]),
                {key: float(value) for key, value in (told.get(f"{part}.alpha_pattern") or {}).items()},
                bool(told.get(f"{part}.use_rslora")),
            )
            for part in {key.split(".")[0] for key in told if key.endswith(".lora_alpha")}
        }
    except (ValueError, TypeError, AttributeError):
        return {}


def _kohya_alpha(metadata: Mapping[str, str], down: Tensor) -> float | None:
    """The network's alpha from sd-scripts' metadata; convolutions with a kernel may have one of their own."""
    try:
        if down.ndim == 4 and down.shape[2] > 1:
            arguments = json.loads(metadata.get("ss_network_args", "{}"))
            if "conv_alpha" in arguments:
                return float(arguments["conv_alpha"])
        return float(metadata["ss_network_alpha"])
    except (KeyError, ValueError, TypeError):
        return None


def _findings(notes: _Notes, metadata: Mapping[str, str]) -> list[str]:
    found = []
    if len(notes.styles) > 1:
        counts = ", ".join(f"{count} in {style} style" for style, count in notes.styles.most_common())
        found.append(f"mixed key styles: {counts}; diffusers reads by the first key and drops the others")
    elif style := next(iter(notes.styles), None):
        found.append(f"{notes.styles[style]} modules in {style} style")
    sgm = sum(count for spelling, count in notes.spellings.items() if spelling.startswith("sgm"))
    if others := notes.spellings.total() - sgm if sgm else 0:
        found.append(f"two spellings: {sgm} modules in the original (sgm) one, {others} in diffusers'")
    elif sgm:
        found.append("modules are in the original (sgm) spelling")
    if notes.wrapped:
        found.append(f"{notes.wrapped} modules carry peft's `base_model.model.` in front, which no app knows")
    if notes.processor:
        found.append(f"{notes.processor} modules carry `.processor`, the spelling of diffusers before 0.21")
    if notes.folded:
        found.append(f"{notes.folded} layers have a third factor (lora_mid), folded into down")
    if notes.reshaped:
        found.append(
            f"{notes.reshaped} layers have another shape than their module (linear, not 1x1 convolution)"
        )
    if notes.twice:
        found.append(f"{notes.twice} tensors are there twice")
    if HEADER in metadata and notes.alpha_from["tensor"]:
        found.append(f"alphas and {HEADER} in one file, which diffusers refuses")
    for source, words in _ALPHA_WORDS.items():
        if count := notes.alpha_from[source]:
            found.append(f"{count} layers without alpha: {words}")
    return found


_ALPHA_WORDS = {
    "ss_network_alpha": "taken from ss_network_alpha of the header",
    "given": "taken as given",
    "rank": "taken as their rank, as the apps do (strength 1)",
}


def _unknown_words(unknown: Sequence[str], structure: Structure) -> str | None:
    if not unknown:
        return None
    kinds = sorted({kind for key in unknown if (kind := other_kind(key))})
    means = f" ({', '.join(kinds)})" if kinds else ""
    return f"{len(unknown)} keys{means} belong to no module of {structure.label}, such as {unknown[0]}"


def unknown_problem(read: Reading) -> str | None:
    """The problem that unknown keys are, as `problems` has it; None if there are none."""
    return _unknown_words(read.unknown, read.structure)
