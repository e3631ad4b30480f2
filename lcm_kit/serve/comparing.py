"""The same prompt from the same noise, drawn twice: as asked for, and as what that is judged against.

Which of the two is left is drawn by lot, and of a blind comparison nothing tells it but the vote: not the
files, which then do not say how they were made, nor when they come, which is both at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image
from pydantic import Field

from lcm_kit.drawing.made import Source
from lcm_kit.drawing.pictures import png_bytes
from lcm_kit.errors import UserError
from lcm_kit.serve.asked import Guidance, Order, Said, Sampler, Sized, Steps, Wanted, Weight, settled
from lcm_kit.serve.engine import Ticket
from lcm_kit.serve.parts import DATA, Parts
from lcm_kit.serve.reply import Shown
from lcm_kit.serve.store import SIDES, Choice, Side, Store

# As the base alone is drawn wherever the kit judges by it (`evaluation/quality`: `teacher_steps`)
_STEPS, _SAMPLER, _GUIDANCE = 50, "ddim", 5.0
EXAMPLES: dict[str, dict[str, Any]] = {
    "the adapter and the base": {"prompt": "a red circle", "seed": 7},
    "blind, two weights": {
        "prompt": "a red circle", "steps": 2, "adapters": {}, "blind": True,
        "against": {"steps": 4, "sampler": "lcm", "guidance_scale": 1.0},
    },
}  # fmt: skip


class Against(Said):
    """What a picture is judged against; by default the base alone, in 50 steps of DDIM with guidance 5."""

    steps: Steps | None = Field(None, description="Of the sampler.")
    sampler: Sampler | None = Field(None, description="As above.")
    guidance_scale: Guidance | None = Field(None, description="1 is none.")
    adapters: dict[str, Weight | None] = Field(
        {}, description="Adapters by name with their weights; {} is the base alone."
    )


class ToCompare(Sized):
    """A picture to be judged."""

    blind: bool = Field(
        False, description="Whether nothing says which is which before the vote, which takes --data."
    )
    against: Against = Field(Against(), description="What it is judged against: what differs of it.")


class Vote(Said):
    """Which of two pictures is the better one."""

    comparison: int = Field(ge=1, description="Its id.")
    choice: Choice = Field(description="left or right; tie: as good; neither: none is any good.")


@dataclass(frozen=True)
class Comparison:
    """Two orders of a picture each, which are shown when both are drawn. `store`: where votes are kept."""

    orders: Sequence[Order]  # as asked for, and what that is judged against
    source: Source
    blind: bool
    left_is: Side
    store: Store | None
    _drawn: dict[int, Image] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, wanted: ToCompare, parts: Parts) -> Comparison:
        """Of a request; the lot is drawn. Raises `UserError` for what cannot be drawn, or never be told."""
        if wanted.blind and parts.store is None:
            raise UserError(
                "blind: nobody could say afterwards which picture is which, since this server keeps nothing; "
                f"{DATA}, or leave blind out"
            )
        shared = wanted.model_dump(exclude={"blind", "against"})
        asked = settled(Wanted(**shared), parts.served, parts.limits)
        other = wanted.against.model_dump()
        if all(weight == 0 for weight in other["adapters"].values()):
            usual = {
                "steps": min(_STEPS, parts.limits.steps), "sampler": _SAMPLER, "guidance_scale": _GUIDANCE,
            }  # fmt: skip
            other = {key: usual.get(key) if each is None else each for key, each in other.items()}
        try:
            against = settled(Wanted(**{**shared, **other}), parts.served, parts.limits)
        except UserError as error:
            sentence, items = error.args
            raise UserError(f"against: {sentence}", items) from error
        return cls((asked, against), parts.source, wanted.blind, secrets.choice(SIDES), parts.store)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of both, for the log; not which is left."""
        return {**self._settings(), "blind": self.blind}

    def take(self, which: int, index: int, picture: Image) -> list[Shown]:
        """Nothing, then both."""
        self._drawn[which] = picture
        if len(self._drawn) < len(self.orders):
            return []
        left = SIDES.index(self.left_is)
        return [Shown({"side": "left"}, self._file(left)), Shown({"side": "right"}, self._file(1 - left))]

    def done(self, tickets: Sequence[Ticket], seconds: float) -> dict[str, Any]:
        """The id to vote on; which is which, unless that is to be judged blind."""
        told: dict[str, Any] = {"id": None, "blind": self.blind, "seconds": round(seconds, 4)}
        told["notes"] = [note for order in self.orders for note in order.notes]
        if self.store is not None:
            asked, against = (self.source.record(order.settings) for order in self.orders)
            told["id"] = self.store.compared(asked, against, self.left_is, self.blind)
        if not self.blind:
            told |= {"left_is": self.left_is, "settings": self._settings()}
        return told

    def whole(self, pictures: list[dict[str, Any]], done: dict[str, Any]) -> dict[str, Any]:
        """By their sides."""
        sides = {each["side"]: {key: each[key] for key in ("media_type", "base64")} for each in pictures}
        return {**sides, **done}

    def _settings(self) -> dict[str, Any]:
        return {side: dict(order.settings) for side, order in zip(SIDES, self.orders, strict=True)}

    def _file(self, which: int) -> bytes:
        picture, settings = self._drawn[which], self.orders[which].settings
        told = None if self.blind else self.source.told(settings, picture.size)
        return png_bytes(picture, told, quick=True)
