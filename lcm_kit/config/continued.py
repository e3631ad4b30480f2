"""What of a training's config may change when its run is continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lcm_kit.config import schema
from lcm_kit.config.yaml_text import plain

FREE = (  # keys, or blocks of keys, that may change
    "output", "steps", "validation", "checkpoint", "logging", "non_finite", "gradient_checkpointing",
    "memory.compile", "memory.channels_last", "memory.tf32", "data.batch_size", "data.trigger",
    "data.vae_precision",  # states have a hash of what was encoded
    "data.local_cache", "data.local_cache_gb", "base.license", "data.require_license",
)  # fmt: skip
FIXED = ("validation.held_out",)  # in such a block, but it says what is trained on
IN_STAGES = ("steps",)  # but in a run of stages, whose edges its length moves
# Where the data lie and how they are read: states have a hash of what was read (`checkpoints.Origin`)
DATA = (
    "data.path", "data.cache", "data.regularization", "data.kind", "data.streaming", "data.split",
    "data.image_column", "data.caption_column", "data.skip_bad", "data.shard_size", "data.samples.prompts",
    "prior.prompts",
    "data.captions.layout", "data.captions.lines", "data.captions.shuffle_tags", "data.captions.keep_tokens",
    "data.captions.keep_separator", "data.captions.trigger_in_front",
)  # fmt: skip
BASE = ("base.path", "base.revision", "base.variant")  # states of this kit have a hash of all of it
CODE = ("method.path",)  # of a method of the user's own: method.sha256 stays, and which class of the file
LORAS = ("teacher.adapters", "adapter.start")  # states have hashes of their files, not of their weights
BATCH = ("batch_size", "accumulation")  # a step sees their product, and its randomness knows no other
# May change too, and that it does is told: what helps a run that diverged
TOLD = ("optimizer.lr", "optimizer.warmup_steps", "optimizer.schedule", "optimizer.grad_clip", "precision")


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """A config (or its dictionary) as {"optimizer.lr": 1e-4, ...}, values as YAML would hold them."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if not isinstance(value, Mapping):
        return {path: plain(value)}
    return {
        k: v
        for name, part in value.items()
        for k, v in flat(part, f"{path}.{name}" if path else name).items()
    }


def bound(config: schema.Training) -> dict[str, Any]:
    """By dotted key what of `config` must stay, or is told of where it does not."""
    staged = bool(config.stages)
    return {key: value for key, value in flat(config).items() if not is_free(key, staged=staged)}


def is_free(key: str, *, staged: bool = False) -> bool:
    """Whether a key may have another value than the run was started with, which may have stages."""
    held = FIXED + (IN_STAGES if staged else ())
    return key not in held and any(key == name or key.startswith(f"{name}.") for name in FREE)


def fixed(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Of `bound` what no continuation writes in another way: no places, no sizes, nothing that is told."""
    others = (*DATA, *BASE, *CODE, *LORAS, *BATCH, *TOLD, "data.leave_out")
    return {key: value for key, value in keys.items() if not is_free(key) and key not in others}


def common(config: schema.Training) -> dict[str, Any]:
    """By dotted key what all processes of a run must have the same value of: all but where things lie."""
    places = (*DATA, *BASE, *CODE, *LORAS, "data.leave_out", "data.local_cache", "data.local_cache_gb")
    return {key: value for key, value in flat(config).items() if key not in places}
