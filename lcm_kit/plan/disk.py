"""What `encode` and `train` write, and how many pictures there are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lcm_kit.config.finetune import Finetune
from lcm_kit.config.schema import Data, Training
from lcm_kit.data.shards import GENERAL
from lcm_kit.plan.estimate import Planner
from lcm_kit.plan.sizes import FLOAT, moment_bytes


@dataclass(frozen=True)
class Disk:
    """Bytes on disk."""

    record: int  # of the cache
    records: int | None  # of all caches; None: cannot be counted here
    state: int  # a training state
    keep: int  # of them
    adapters: int  # the result, and where it is chosen the best weights so far
    held: int | None  # pictures that are held out of training

    @property
    def cache(self) -> int | None:
        """The whole cache."""
        return None if self.records is None else self.record * self.records


def disk(config: Training, planner: Planner) -> Disk:
    """What `encode` and `train` will write."""
    subject = planner.stage.subject
    numbers = subject.latent(config.data.resolution) + subject.tokens * subject.structure.width
    numbers += subject.pooled + 6 if subject.pooled else 0
    weights = planner.weights(config)
    lora = FLOAT * sum(weights.lora)
    trained = 2 if config.matching else 1  # LoRAs, each with its moments
    state = trained * (lora + moment_bytes(config, weights)) + (lora if config.second_set else 0)
    found = _pictures(config.data)
    share = config.validation.held_out
    chosen = share or config.validation.control
    held = max(1, round(share * found[0])) if found and share else None  # as `data.split`
    return Disk(
        FLOAT * numbers, _records(config, found), state, config.checkpoint.keep,
        lora * (2 if chosen else 1), held,
    )  # fmt: skip


def _records(config: Training, pictures: tuple[int, int] | None) -> int | None:
    """Rows of all caches: pictures, mirror images, the teacher's samples, the prior's pictures, prompts."""
    data, drawn = config.data, 0
    if data.source == "prompts":
        return _prompts(data)
    if data.has_samples:
        drawn += data.samples.count
    if isinstance(config, Finetune) and config.prior.prompts is not None:
        drawn += config.prior.count
    if not data.has_images:
        return drawn
    return None if pictures is None else drawn + sum(pictures) * (2 if data.flip else 1)


def _prompts(data: Data) -> int | None:
    """Prompts of `data.samples.prompts`; None where they are not here."""
    from lcm_kit.data.records import prompts
    from lcm_kit.errors import UserError

    try:
        return len(prompts(data.samples.prompts))
    except UserError:
        return None


def _pictures(data: Data) -> tuple[int, int] | None:
    """Pictures of `data.path` and of `data.regularization`; None where they are not here, or a stream."""
    from lcm_kit.data.records import open_records
    from lcm_kit.data.stream_kinds import is_stream
    from lcm_kit.errors import UserError

    if not data.has_images or is_stream(data):
        return None
    local = data.path.startswith(("asset:", "/", ".", "~")) or data.kind == "folder"
    try:
        found = open_records(data if local else replace(data, kind="folder"))[0]
    except UserError:
        return None
    general = sum(record.id.startswith(GENERAL) for record in found)
    return len(found) - general, general
