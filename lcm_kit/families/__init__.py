"""The families of bases and the published models of each: one entry from which all about them follows.

A family is what one pipeline of diffusers draws with: parts, conditions, names in files. Its code (text to
condition) is a module, named here and imported by `lcm_kit.bases`. A generation is a published model of a
family: its sizes, its names in formats, the marks that it is recognised by. Each family has a file here; what
one app alone calls them stands with that app (`lcm_kit.lora.apps`). It is data: nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lcm_kit.errors import UserError
from lcm_kit.families.kinds import PARTS, Family, Generation, Part
from lcm_kit.families.sd import SD, SD1, SD2
from lcm_kit.families.sdxl import SDXL, SSD1B, XL

__all__ = [
    "FAMILIES", "GENERATIONS", "PARTS", "Family", "Generation", "Part", "by_checkpoint", "by_pipeline",
    "by_repository", "by_unet", "generation_of", "listed", "names", "unpruned",
]  # fmt: skip

FAMILIES = {family.name: family for family in (SD, XL)}
# The plainest first: of several whose marks something bears, the last one is meant
GENERATIONS = {generation.name: generation for generation in (SD1, SD2, SDXL, SSD1B)}


# -- Looking up and recognising ------------------------------------------------------------------------------


def names() -> list[str]:
    """Of all published models."""
    return list(GENERATIONS)


def unpruned() -> list[Generation]:
    """The generations that are not pruned from another: what a LoRA file can be for."""
    return [generation for generation in GENERATIONS.values() if generation.pruned_from is None]


def generation_of(name: str) -> Generation:
    """The published model called `name`. Raises `UserError` for another name."""
    if name not in GENERATIONS:
        raise UserError(f"structure {name!r} is unknown; choose one of {', '.join(names())}")
    return GENERATIONS[name]


def listed(last: str = "or") -> str:
    """What is supported, in a sentence: `SD1.x, SD2.x or SDXL`."""
    *some, end = (generation.short for generation in unpruned())
    return f"{', '.join(some)} {last} {end}"


def by_pipeline(class_name: Any, parts: Collection[str]) -> Family:
    """The family of a model_index.json: by its class, where one is named so; else by the pipeline's parts.

    By parts it is the last of the table all of whose marks are there.
    """
    for family in FAMILIES.values():
        if class_name in family.class_names:
            return family
    told = (family for family in FAMILIES.values() if not family.class_names)
    return next(f for f in reversed([*told]) if set(f.recognised_by) <= set(parts))


def by_unet(config: Mapping[str, Any]) -> Generation:
    """The generation of a UNet: by the width of its text embeddings; one in small by its marks."""
    width = config.get("cross_attention_dim")
    alike = [generation for generation in unpruned() if generation.width == width] or unpruned()
    marked = [g for g in alike if all(config.get(key) == value for key, value in g.unet_marks.items())]
    return (marked or alike)[-1]


def by_checkpoint(tensors: Collection[str], linear: bool) -> Generation:
    """The generation of a checkpoint in one file with these names, in the original layout's spelling.

    A UNet alone, without marks, is told by its projections: `linear` layers, or convolutions.
    """

    def any_begins(prefixes: tuple[str, ...]) -> bool:
        return any(name.startswith(prefixes) for name in tensors)

    for generation in reversed(GENERATIONS.values()):
        lacking = generation.checkpoint_lacks
        if any_begins(generation.checkpoint_marks) and not (lacking and any_begins(lacking)):
            return generation
    plain = [generation for generation in unpruned() if generation.family.added_condition is None]
    return next(g for g in plain if bool(g.unet.get("use_linear_projection")) == linear)


def by_repository(path: str) -> Generation:
    """What a hub id is taken for by its name alone; the first of the table where that says nothing."""
    hinted = (g for g in reversed(GENERATIONS.values()) if any(hint in path.lower() for hint in g.hub_hints))
    return next(hinted, next(iter(GENERATIONS.values())))
