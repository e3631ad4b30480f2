"""How a training, a converted file and a merged one were made, by what they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar, cast

from lcm_kit import __version__
from lcm_kit.config import objective
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.schema import Distill, Training
from lcm_kit.families import Family
from lcm_kit.io import licenses, own_shapes
from lcm_kit.lora.provenance import (
    Base,
    Data,
    Grid,
    Guidance,
    Layers,
    Lora,
    Loss,
    Method,
    Part,
    Prior,
    Provenance,
    Rights,
    Teacher,
    TextEncoder,
)

T = TypeVar("T")

# -- By training ---------------------------------------------------------------------------------------------


class InspectedBase(Protocol):
    """Of `bases.BaseInfo`."""

    @property
    def base_hash(self) -> str:
        """Of all of it."""

    @property
    def prediction_type(self) -> str:
        """epsilon, v_prediction or sample."""

    @property
    def family(self) -> Family:
        """What its UNet is."""

    @property
    def license(self) -> str | None:
        """That it declares."""


def of_training(
    config: Training,
    base: InspectedBase,
    data: str,
    steps: int,
    *,
    teacher: Sequence[Lora] = (),
    start: Sequence[Lora] = (),
    rights: own_shapes.Rights | None = None,
    runs: Iterable[tuple[int, Sequence[int], int]] = (),
) -> Provenance:
    """What `train/distill` or `train/finetune` makes in `steps` steps of `config`.

    `data`: the fingerprint of what it sees; `rights`: what metadata says of it; `runs`: how many pictures it
    has of which shape and how often (`data.order.Run`); `teacher` and `start`: the files of
    `teacher.adapters` and `adapter.start` (`lcm_kit.adapter.styles`).
    """
    declared = config.base.license
    license = licenses.normal(declared) if declared else base.license
    common = Provenance(
        base=_same(Base, config.base, hash=base.base_hash, family=base.family.name, license=license),
        kit_version=__version__,
        recipe=config.recipe,
        prediction_type=base.prediction_type,
        steps=steps,
        adapter=_same(Layers, config.adapter),
        data=_same(
            Data,
            config.data,
            fingerprint=data,
            rights=rights and Rights(**rights),
            shapes=_shapes(runs, config.data.resolution),
        ),
    )
    if isinstance(config, Distill):
        return replace(
            common,
            method=Method.of(config.method),
            solver=config.solver if config.teacher.weight else None,
            grid=None if config.stages else _grid(config.grid),  # each stage has one of its own
            loss=_same(
                Loss, config.loss, min_snr_gamma=None, snr_floor=None, noise_offset=None,
                adaptive=config.loss.adaptive or None,
            ),
            guidance=_same(Guidance, config.baked_guidance()),
            guidance_scale=config.student_guidance,
            caption_dropout=config.caption_dropout or None,
            teacher=_same(Teacher, config.teacher, adapters=tuple(teacher)),
            start=tuple(start),
        )  # fmt: skip
    if isinstance(config, Finetune):
        return replace(
            common,
            loss=_same(Loss, config.loss, name=None, c=None, weighting=None, adaptive=None),
            text_encoder=_same(TextEncoder, config.text_encoder),
            prior=_same(Prior, config.prior),
            caption_dropout=config.caption_dropout,
        )
    return common


def _shapes(runs: Iterable[tuple[int, Sequence[int], int]], side: int) -> dict[str, int]:
    """How many pictures an epoch has of each shape, by its width; none where all are squares of `side`."""
    found: dict[tuple[int, ...], int] = {}
    for rows, shape, times in runs:
        size = tuple(shape) or (side, side)
        found[size] = found.get(size, 0) + rows * times
    if found.keys() <= {(side, side)}:
        return {}
    return {f"{size[0]}x{size[1]}": found[size] for size in sorted(found)}


def _grid(grid: objective.Grid) -> Grid:
    """With the keys of its sampling alone; of the uniform one nothing, as in files from before the others."""
    own = objective.SAMPLING_KEYS.get(grid.sampling, ())
    told = {
        name: getattr(grid, name) if name in own else None
        for name in sum(objective.SAMPLING_KEYS.values(), ())
    }
    return _same(Grid, grid, sampling=grid.sampling if own else None, **told)


def _same(kind: type[T], settings: Any, **known: Any) -> T:
    """A section with the settings of the same names, but for those `known`."""
    names = [each.name for each in fields(cast(Any, kind)) if each.name not in known]
    return kind(**{name: getattr(settings, name) for name in names}, **known)


# -- By what is made of files --------------------------------------------------------------------------------


def converted(made: Provenance, file: str, base: str | None, *, changed: bool) -> Provenance:
    """Of a file that was made of `file` alone: everything is kept.

    `base`: for a file that names none. `changed`: it has other weights, so that what was measured is said to
    be of `file` alone.
    """
    file, use = _as_text(file), made.recommended
    if use and changed:
        use = replace(use, part=use.part or file)
    base = made.base.path or base
    return replace(made, base=replace(made.base, path=base), parents=(*made.parents, file), recommended=use)


def part_of(file: str, weight: float, made: Provenance) -> Part:
    """A file of a merged one, whose title is its name."""
    return Part(_as_text(file), weight, replace(made, title=""))


def _as_text(file: str) -> str:
    """A file name need not be text, and JSON must: what cannot be encoded is shown as `?`."""
    return file.encode("utf-8", "replace").decode()


def merged(parts: Sequence[Part], title: str) -> Provenance:
    """Of the weighted sum of `parts`, all of which are listed with everything that is known of them.

    It draws in few steps if one of them makes it: of that part, or else of the first, are what tells how to
    use the file, and by which training: base, method, guidance, steps, data, date, kit. What was measured of
    it is told of it alone, and holds at weight 1, since the file has the weight in it. The triggers are those
    of all parts.
    """
    lead = next((part for part in parts if part.made.method.name is not None), parts[0])
    made, use = lead.made, lead.made.recommended
    if use:
        weight = None if use.steps is None else 1.0
        use = replace(use, lora_weight=weight, part=use.part or lead.file)
    triggers = dict.fromkeys(part.made.data.trigger for part in parts if part.made.data.trigger)
    return Provenance(
        title,
        **{name: getattr(made, name) for name in _OF_THE_LEAD},
        step=made.optimizer_steps,
        method=made.method,
        data=replace(made.data, trigger=", ".join(triggers) or None, rights=None),  # each part has its own
        recommended=use,
        parents=tuple(f"{part.file}:{part.weight:g}" for part in parts),
        parts=tuple(parts),
    )


_OF_THE_LEAD = ("base", "kit_version", "date", "prediction_type", "guidance", "guidance_scale")
