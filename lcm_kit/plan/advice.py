"""What to change where a config does not fit, the smallest change first, each planned and not guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from lcm_kit.config.finetune import Finetune
from lcm_kit.config.schema import Training
from lcm_kit.drawing.batches import at_once
from lcm_kit.plan.encoding import BY_BATCH
from lcm_kit.plan.estimate import CARDS, Estimate, Planner

Overrides = Mapping[str, Any]

ONE_PICTURE: Overrides = {"validation.count": 1}
# The last resort: it shows what is unlearned, and holds the text encoders once more for that, in float32
NO_CONTROL: Overrides = {"validation.control": None}
CHECKPOINTING: Overrides = {"gradient_checkpointing": True}
NF4: Overrides = {"memory.quantize": "nf4"}
ADAM8: Overrides = {"optimizer.name": "adamw8bit"}
HALF: Overrides = {"precision": "bfloat16"}
_WELL_USED = 4  # samples a forward that use a GPU well
# Of the presets, the cheapest first: nothing, a fifth more time, less exact moments, less exact weights
_LEVELS: tuple[Overrides, ...] = (
    {},
    CHECKPOINTING,
    {**CHECKPOINTING, **ADAM8},
    {**CHECKPOINTING, **NF4, **ADAM8},
)


@dataclass(frozen=True)
class Option:
    """A changed config and what it needs."""

    overrides: Overrides
    estimate: Estimate
    fits_unchanged: bool = False  # whether the config fits as it is

    @property
    def typed(self) -> str:
        """The overrides as one types them; "" for none."""
        return " ".join(f"{key}={_yaml(value)}" for key, value in self.overrides.items())


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def changed(config: Training, overrides: Overrides) -> Training:
    """`config` with `overrides`, by dotted key."""
    for key, value in overrides.items():
        block, _, name = key.rpartition(".")
        if block:
            config = replace(config, **{block: replace(getattr(config, block), **{name: value})})
        else:
            config = replace(config, **{name: value})
    return config


def changes(config: Training, device: str = "cuda") -> Iterator[Overrides]:
    """Changes of training worth a try: those that cost no exactness alone and together, then all, then ever
    less; last of all, of a style, what is drawn to see what it unlearns.
    """
    together: dict[str, Any] = {}
    for group in (list(_exact(config)), list(_rounding(config, device))):
        yield from group
        for overrides in group:
            together = {**together, **overrides}
            if together != overrides:
                yield dict(together)
    for overrides in _halvings({**_values(config), **together}):
        together = {**together, **overrides}
        yield dict(together)
    if _controlled(config):
        yield {**together, **NO_CONTROL}


def _controlled(config: Training) -> bool:
    return isinstance(config, Finetune) and config.validation.control is not None


def _values(config: Training) -> dict[str, Any]:
    return {"batch_size": config.batch_size, "accumulation": config.accumulation}


def _exact(config: Training) -> Iterator[Overrides]:
    if config.validation.prompts is not None and config.validation.count > 1:
        yield ONE_PICTURE
    if not config.gradient_checkpointing:
        yield CHECKPOINTING
    yield from list(_halvings(_values(config)))[:1]


def _rounding(config: Training, device: str) -> Iterator[Overrides]:
    if config.optimizer.name != "adamw8bit":
        yield ADAM8
    if config.memory.quantize != "nf4":
        yield NF4
    if config.precision == "float32" or (device == "cpu" and config.precision == "auto"):
        yield HALF


def _halvings(values: Mapping[str, Any]) -> Iterator[Overrides]:
    """Half the batch and twice the accumulation, again and again: the same samples a step."""
    batch, accumulation = values["batch_size"], values["accumulation"]
    while batch % 2 == 0:
        batch, accumulation = batch // 2, accumulation * 2
        yield {"batch_size": batch, "accumulation": accumulation}


def what_to_change(planner: Planner, config: Training, card: float) -> list[Option]:
    """The changes that were tried for a card of `card` GiB; with the last one training fits, or none does.

    What `encode` and `evaluate` need hangs on none of them but on `data.batch_size`, which is tried first.
    """
    smaller = _encoding_less(planner, config, card)
    tried = [Option(smaller, planner(changed(config, smaller)))] if smaller else []
    if tried and tried[-1].estimate.train_fits(card) or planner(config).train_fits(card):
        return tried
    for overrides in changes(config, planner.device):
        wanted = {**smaller, **overrides}
        tried.append(Option(wanted, planner(changed(config, wanted))))
        if tried[-1].estimate.train_fits(card):
            break
    return tried


def _encoding_less(planner: Planner, config: Training, card: float) -> Overrides:
    """`data.batch_size` for `encode` on a card of `card` GiB; none if it fits, or if that helps nothing."""
    of = config.data.resolution
    batch = at_once(config.data.batch_size, of, of, planner.device)
    if not any(stage.phase in BY_BATCH for stage in planner(config).too_large(card)):
        return {}
    while batch > 1:
        batch //= 2
        found = planner(changed(config, {"data.batch_size": batch}))
        if not any(stage.phase in BY_BATCH for stage in found.too_large(card)):
            return {"data.batch_size": batch}
    return {}


def preset(planner: Planner, config: Training, card: float) -> Option | None:
    """The overrides for a card of `card` GiB: the fewest savings with which it fits, the largest batch then.

    Without checkpointing only if a good batch, and the config's own, fits. Overrides that `config` has
    already are left out. The samples of an optimizer step stay the same; validation draws one picture where
    several are too many, and if nothing else helps a style goes without control prompts. None if training
    fits with nothing; another stage can be too large still (`Estimate.too_large`).
    """
    samples, unchanged = config.batch_size * config.accumulation, planner(config).fits(card)
    smaller = _encoding_less(planner, config, card)
    found = _for_training(planner, changed(config, smaller), card, samples)
    if found is None:
        return None
    overrides = {**smaller, **found.overrides}
    new = {key: value for key, value in overrides.items() if _held(config, key) != value}
    return Option(new, found.estimate, unchanged)


def _for_training(planner: Planner, config: Training, card: float, samples: int) -> Option | None:
    plain: Overrides = {"gradient_checkpointing": False, "memory.quantize": "none", "optimizer.name": "adamw"}
    tries: list[tuple[Overrides, tuple[Overrides, ...]]] = [(level, ({}, ONE_PICTURE)) for level in _LEVELS]
    if _controlled(config):
        tries.append((_LEVELS[-1], ({**ONE_PICTURE, **NO_CONTROL},)))
    for level, drawn in tries:
        for batch in sorted((n for n in range(1, samples + 1) if samples % n == 0), reverse=True):
            if not level and batch < max(config.batch_size, min(_WELL_USED, samples)):
                break
            wanted = {"batch_size": batch, "accumulation": samples // batch, **plain, **level}
            for overrides in ({**wanted, **less} for less in drawn):
                estimate = planner(changed(config, overrides))
                if estimate.train_fits(card):
                    return Option(overrides, estimate)
                if estimate.phase != "validation":
                    break
    return None


def _held(config: Training, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def presets(planner: Planner, config: Training) -> dict[int, Option | None]:
    """`preset` for each of `CARDS`."""
    return {card: preset(planner, config, card) for card in CARDS}
