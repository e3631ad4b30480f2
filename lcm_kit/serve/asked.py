"""A request for pictures: its JSON, and what is to be drawn by it, with every setting settled."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lcm_kit import samplers
from lcm_kit.bases.emphasis import Prompt, read
from lcm_kit.config.mistakes import cut, did_you_mean
from lcm_kit.config.numbers import RANGES, SEED, WEIGHT, require_in_range
from lcm_kit.drawing.schedulers import require_possible
from lcm_kit.edits.plan import Plan
from lcm_kit.errors import UserError
from lcm_kit.evaluation.recommended import Settings, misfit, no_negative
from lcm_kit.io.written import tidied
from lcm_kit.serve.adapters import Adapter, Served
from lcm_kit.serve.limits import Limits

_SHOULD = re.compile(r"^\w+ should ")
EXAMPLES: dict[str, dict[str, Any]] = {
    "the least": {"prompt": "a red circle"},
    "two of one size": {
        "prompt": "a red circle", "seed": 7, "count": 2, "steps": 2, "width": 64, "height": 64,
    },
    "guided away, by the base alone": {
        "prompt": "a red circle", "negative_prompt": "blue", "guidance_scale": 2.0, "adapters": {},
        "steps": 2,
    },
}  # fmt: skip


def highest(number: str) -> int:
    """What no server draws more of; each has limits of its own below."""
    return int(RANGES[number].high)


Weight = Annotated[float, Field(ge=-WEIGHT, le=WEIGHT, allow_inf_nan=False)]
Sampler = Annotated[str, Field(max_length=40)]
Steps = Annotated[int, Field(ge=1, le=highest("steps"))]
Guidance = Annotated[float, Field(ge=1, le=highest("guidance_scale"), allow_inf_nan=False)]


class Said(BaseModel):
    """The JSON of a request: of no other keys and of the types that it says, which nothing is turned into."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Body = TypeVar("Body", bound=Said)


class Asked(Said):
    """What every request for pictures may say. What is left out is what serves the adapter that is on."""

    prompt: str = Field(description="What to draw; (word:1.2) weighs a word.")
    negative_prompt: str | None = Field(
        None, description="What guidance leads away from; it takes a guidance_scale above 1."
    )
    seed: int = Field(
        0, ge=-SEED - 1, le=SEED, description="Picture i of a request is a function of (seed, i)."
    )
    sampler: Sampler | None = Field(None, description=f"One of {', '.join(samplers.names())}.")
    steps: Steps | None = Field(None, description="Of the sampler.")
    guidance_scale: Guidance | None = Field(None, description="1 is none.")
    adapters: dict[str, Weight | None] | None = Field(
        None,
        description="Adapters by name with their weights, null for an adapter's own; {} is the base alone, "
        "and null the first adapter.",
    )


class Sized(Asked):
    """That of a picture which nothing is given of."""

    width: int | None = Field(
        None, ge=8, le=highest("width"), description="Pixels; the base's own, or a square if one is given."
    )
    height: int | None = Field(None, ge=8, le=highest("height"), description="Pixels.")


class Counted(Asked):
    """That of several pictures, which may be kept."""

    count: int = Field(1, ge=1, le=highest("count"), description="Pictures.")
    keep: bool = Field(False, description="Whether the server's history keeps them, which takes --data.")


class Wanted(Sized, Counted):
    """Pictures of one prompt."""


Weights = tuple[tuple[str, float], ...]
"""Of the adapters that are on, in the server's order; without those of 0."""


class Key(NamedTuple):
    """What pictures of one batch have in common."""

    height: int
    width: int
    sampler: str
    steps: int
    guidance_scale: float
    negative: Prompt | None
    weights: Weights


@dataclass(frozen=True, eq=False)
class EditKey:
    """An edit: its pictures are drawn together, and with no others."""

    plan: Plan
    prompts: tuple[Prompt, ...]  # one, or two that its pictures go between
    steps: int
    guidance_scale: float
    negative: Prompt | None
    weights: Weights

    @property
    def height(self) -> int:
        """Pixels that the UNet draws."""
        return self.plan.size[0]

    @property
    def width(self) -> int:
        """Pixels that the UNet draws."""
        return self.plan.size[1]


@dataclass(frozen=True)
class Order:
    """What is to be drawn."""

    key: Key | EditKey
    prompt: Prompt
    seed: int
    count: int
    settings: Mapping[str, Any]  # every one of them, as JSON: the same request again draws the same
    notes: tuple[str, ...] = ()  # sentences on what was asked


def parsed(body: bytes, kind: type[Body]) -> Body:
    """The request in `body`. Raises `UserError`, with all that is wrong, for JSON that is none."""
    try:
        found = kind.model_validate_json(body)
    except ValidationError as error:
        raise mistaken(error.errors(include_url=False), kind.model_fields) from None
    json.loads(body, object_pairs_hook=_once)
    return found


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Raise `UserError` for a key that is there twice: JSON does not say which of the two is meant."""
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise UserError(f"{cut(name)}: given {times} times; give it once")


def mistaken(errors: Sequence[Any], names: Iterable[str] = ()) -> UserError:
    """What pydantic finds wrong with a request, of which `names` are the keys."""
    found = [_sentence(each, names) for each in errors[:10]]
    if len(found) == 1:
        return UserError(found[0])
    more = len(errors) - len(found)
    told = f", of which these are the first {len(found)}" if more else ""
    return UserError(f"{len(errors)} things are wrong with this request{told}", found)


def _sentence(error: Any, names: Iterable[str]) -> str:
    kind, place = error["type"], [cut(str(part)) for part in error["loc"]]
    key = ".".join(place)
    if kind == "json_invalid":
        return f"the request is not JSON ({error['ctx']['error']}); send an object as in /openapi.json"
    if not place:
        return "the request is no JSON object; send one as in /openapi.json"
    if kind == "extra_forbidden":
        return f"{key}: unknown key{did_you_mean(key, names)}"
    if kind == "missing":
        return f"{key}: missing; it must be given"
    must = _SHOULD.sub("it must ", error["msg"]).rstrip(".")  # of an input, a list, a string
    return f"{key}: {_shown(error['input'])} is not allowed; {must}"


def _shown(value: Any) -> str:
    return cut(json.dumps(value) if isinstance(value, dict | list | bool | None) else repr(value))


class Alike(NamedTuple):
    """What every request settles in the same way."""

    use: Settings
    on: dict[str, Adapter]  # the adapters that are on, in the server's order
    weights: Weights
    negative: Prompt | None
    facts: dict[str, Any]  # of it, as JSON
    notes: tuple[str, ...]


def alike(wanted: Counted, served: Served, limits: Limits) -> Alike:
    """What a request says or leaves out of what all may say. Raises `UserError` as `settled`."""
    prompt = text(wanted.prompt, "prompt", limits)
    weights = _weights(wanted.adapters, served)
    first = next((served.named(name) for name, weight in weights.items() if weight), None)
    use = served.settings(
        first, sampler=None if wanted.sampler is None else samplers.spelled(wanted.sampler),
        steps=wanted.steps, guidance_scale=wanted.guidance_scale,
    )  # fmt: skip
    require_at_most("count", wanted.count, limits.count)
    require_at_most("steps", use.steps, limits.steps)
    require_possible(use.sampler, use.steps, use.guidance_scale)
    negative = None
    if wanted.negative_prompt is not None:
        negative = text(wanted.negative_prompt, "negative_prompt", limits)
        if use.guidance_scale <= 1:
            raise UserError(_no_negative(first))
    said = None if first is None else misfit(use, first.method)
    on = {each.name: each for each in served.adapters if weights.get(each.name)}
    facts = {
        "prompt": prompt, "negative_prompt": negative, "seed": wanted.seed, "count": wanted.count,
        "sampler": use.sampler, "steps": use.steps, "guidance_scale": use.guidance_scale,
        "adapters": {name: weights[name] for name in on},
    }  # fmt: skip
    return Alike(
        use, on, tuple((name, weights[name]) for name in on),
        None if negative is None else read(negative, None), facts, () if said is None else (said,),
    )  # fmt: skip


def settled(wanted: Wanted, served: Served, limits: Limits) -> Order:
    """What is drawn by a request. Raises `UserError` for what cannot be, or is over a limit."""
    same = alike(wanted, served, limits)
    height, width = _size(wanted, served, limits)
    use, facts = same.use, {**same.facts, "width": width, "height": height}
    key = Key(height, width, use.sampler, use.steps, use.guidance_scale, same.negative, same.weights)
    return Order(key, read(facts["prompt"], None), wanted.seed, wanted.count, facts, same.notes)


def text(given: str, name: str, limits: Limits) -> str:
    """A prompt, tidied. Raises `UserError` for what nobody writes, and for one that is too long."""
    if len(given) > limits.prompt:
        raise UserError(f"{name} has {len(given):,} characters; this server takes {limits.prompt:,}")
    found, reason = tidied(given, name)
    if reason and given.strip():
        raise UserError(f"{reason}; write it without")
    return found


def require_at_most(name: str, value: int, most: int, least: int = 1) -> None:
    """Raise `UserError` for a number over a limit."""
    if value > most:
        raise UserError(f"{name} {value} is more than this server draws; give {least} to {most}")


def _weights(asked: Mapping[str, float | None] | None, served: Served) -> dict[str, float]:
    """Of each adapter that was asked for; of the first one where nothing was said."""
    if asked is None:
        return {each.name: each.weight for each in served.adapters[:1]}
    weights = {}
    for name, weight in asked.items():
        adapter = served.named(name)
        if adapter is None:
            names = [each.name for each in served.adapters]
            there = f"choose of {', '.join(names)}" if names else "it has none"
            raise UserError(
                f"adapters: this server has no {cut(repr(name))}; {there}{did_you_mean(name, names)}"
            )
        weights[name] = adapter.weight if weight is None else weight
    return weights


def _size(wanted: Wanted, served: Served, limits: Limits) -> tuple[int, int]:
    side = wanted.width or wanted.height or served.base.resolution
    width, height = wanted.width or side, wanted.height or side
    for name, value in (("width", width), ("height", height)):
        if value > limits.side:
            raise UserError(f"{name} {value} is more than this server draws; give at most {limits.side}")
        if value % 8:
            raise UserError(f"{name} {value} is no multiple of 8 pixels; try {max(value // 8, 1) * 8}")
    require_in_range(width=width, height=height)
    served.base.require_resolution((width, height), "size")
    return height, width


def _no_negative(first: Adapter | None) -> str:
    if first is not None:
        return no_negative(first.name, first.method.guidance_scale)
    return "a negative prompt does nothing at guidance_scale 1; give one above 1, or leave it out"
