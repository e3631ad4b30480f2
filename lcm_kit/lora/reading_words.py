"""What was odd about a file, in words: the findings and problems of a `lcm_kit.lora.reading.Reading`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lcm_kit.lora.diffusers_format import HEADER
from lcm_kit.lora.layers import Lora
from lcm_kit.lora.metadata_reading import not_read
from lcm_kit.lora.spelling import BUNDLED, other_kind
from lcm_kit.lora.structure import Structure


@dataclass
class Notes:
    """What is counted and met while a file is read."""

    styles: Counter[str] = field(default_factory=Counter)
    spellings: Counter[str] = field(default_factory=Counter)
    wrapped: int = 0
    processor: int = 0
    twice: int = 0
    silent: int = 0  # layers of alpha 0
    lone: int = 0  # modules that have an alpha and nothing else
    header: bool = False  # peft's config is there
    shapes: Counter[str] = field(default_factory=Counter)  # "folded", "reshaped"
    alpha_from: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    unknown: dict[str, Tensor] = field(default_factory=dict)


_NAMED = 10  # embeddings that a sentence names; more are counted
_ALPHA_WORDS = {
    "scale": "their strength is a `.scale`, which A1111, SD.Next and stable-diffusion.cpp alone read",
    "ss_network_alpha": "without alpha: taken from ss_network_alpha of the header",
    "given": "without alpha: taken as given",
    "rank": "without alpha: taken as their rank, as the apps do (strength 1)",
}


def findings(notes: Notes, lora: Lora, embeddings: Sequence[str]) -> list[str]:
    """What was repaired, or is harmless and worth a word."""
    found = [*_spellings(notes), *_shapes(notes)]
    if notes.twice:
        found.append(f"{notes.twice} tensors are there twice")
    if notes.header and notes.alpha_from["tensor"]:
        found.append(f"alphas and {HEADER} in one file, which diffusers refuses")
    for source, words in _ALPHA_WORDS.items():
        if count := notes.alpha_from[source]:
            found.append(f"{count} layers {words}")
    if notes.lone:
        found.append(f"{notes.lone} modules have an alpha and no weights, which changes nothing")
    if notes.silent:
        found.append(f"{notes.silent} layers of strength 0 (alpha 0), which change nothing")
    found += [f"{count} modules are {kind}" for kind, count in kinds(lora).items()]
    if lora.biases:
        found.append(f"{len(lora.biases)} modules change their bias")
    if embeddings:
        found.append(f"{len(_names(embeddings))} embeddings are bundled with it: {bundled(embeddings)}")
    if unread := not_read(lora.metadata):
        found.append(unread)
    return found


def kinds(lora: Lora) -> dict[str, int]:
    """How many modules are of each kind that is no plain LoRA, as the words of a sentence."""
    counts = Counter(update.kind for update in lora.others.values())
    words = {"full difference": "full differences", "norm": "norms"}
    return {words.get(kind, kind): count for kind, count in counts.items()}


def bundled(embeddings: Sequence[str]) -> str:
    """The names of the embeddings that keys belong to, as the words of a sentence."""
    names = _names(embeddings)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _names(embeddings: Sequence[str]) -> list[str]:
    return sorted({key.removeprefix(BUNDLED).partition(".")[0] for key in embeddings})


def _spellings(notes: Notes) -> Iterable[str]:
    if len(notes.styles) > 1:
        counts = ", ".join(f"{count} in {style} style" for style, count in notes.styles.most_common())
        yield f"mixed key styles: {counts}; diffusers reads by the first key and drops the others"
    elif style := next(iter(notes.styles), None):
        yield f"{notes.styles[style]} modules in {style} style"
    sgm = sum(count for spelling, count in notes.spellings.items() if spelling.startswith("sgm"))
    if others := notes.spellings.total() - sgm if sgm else 0:
        yield f"two spellings: {sgm} modules in the original (sgm) one, {others} in diffusers'"
    elif sgm:
        yield "modules are in the original (sgm) spelling"
    if notes.wrapped:
        yield f"{notes.wrapped} modules carry peft's `base_model.model.` in front, which no app knows"
    if notes.processor:
        yield f"{notes.processor} modules carry `.processor`, the spelling of diffusers before 0.21"


def _shapes(notes: Notes) -> Iterable[str]:
    if folded := notes.shapes["folded"]:
        yield f"{folded} layers have a third factor (lora_mid), folded into down"
    if reshaped := notes.shapes["reshaped"]:
        yield f"{reshaped} layers have another shape than their module (linear, not 1x1 convolution)"


def of_unknown(unknown: Iterable[str], structure: Structure) -> str | None:
    """The problem that keys of no module are; None if there are none."""
    unknown = list(unknown)
    if not unknown:
        return None
    means = sorted({kind for key in unknown if (kind := other_kind(key))})
    told = f" ({', '.join(means)})" if means else ""
    return f"{len(unknown)} keys{told} belong to no module of {structure.label}, such as {unknown[0]}"


def what_else(tensors: Mapping[str, Tensor]) -> str:
    """What a file without a LoRA holds."""
    means = {kind for key in tensors if (kind := other_kind(key))}
    first = f"its first key is {next(iter(tensors), 'missing')!r}"
    return f"but {', '.join(sorted(means))}" if means else first
