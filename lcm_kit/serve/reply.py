"""What is drawn for a request and how it is told: `Pictures` is that of one order."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from PIL.Image import Image

from lcm_kit.drawing.pictures import png_bytes
from lcm_kit.serve.asked import Order
from lcm_kit.serve.engine import Ticket
from lcm_kit.serve.problems import PNG


class Shown(NamedTuple):
    """A picture that is told of."""

    place: dict[str, Any]  # as {"index": 0}: which one it is
    file: bytes  # PNG


class Reply(Protocol):
    """What is drawn for a request, and how it is told. All but the properties may take their time."""

    @property
    def orders(self) -> Sequence[Order]:
        """All that is drawn; all of it is taken into the queue, or none."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """As JSON, for the log: every key of something that was written has `prompt` in it."""
        ...

    def take(self, which: int, index: int, picture: Image) -> list[Shown]:
        """What is to be shown now that picture `index` of order `which` is drawn."""
        ...

    def done(self, tickets: Sequence[Ticket], seconds: float) -> dict[str, Any]:
        """What is told besides the pictures, once they are all drawn."""
        ...

    def whole(self, pictures: list[dict[str, Any]], done: dict[str, Any]) -> dict[str, Any]:
        """The answer as one JSON object. `pictures`: as they were shown, each with its place."""
        ...


@dataclass(frozen=True)
class Pictures:
    """The pictures of one order, by their index."""

    order: Order

    @property
    def orders(self) -> Sequence[Order]:
        """The one."""
        return (self.order,)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its own."""
        return self.order.settings

    def take(self, which: int, index: int, picture: Image) -> list[Shown]:
        """That picture."""
        return [Shown({"index": index}, png_bytes(picture, quick=True))]

    def done(self, tickets: Sequence[Ticket], seconds: float) -> dict[str, Any]:
        """Settings, which draw the same again, notes, and how it was drawn."""
        return {
            "settings": dict(self.order.settings), "notes": list(self.order.notes),
            "batches": tickets[0].batches, "seconds": round(seconds, 4),
        }  # fmt: skip

    def whole(self, pictures: list[dict[str, Any]], done: dict[str, Any]) -> dict[str, Any]:
        """In their order."""
        return {"pictures": sorted(pictures, key=lambda each: each["index"]), **done}


def wordless(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without what somebody wrote, however deep."""
    return {
        key: wordless(each) if isinstance(each, Mapping) else each
        for key, each in settings.items() if "prompt" not in key
    }  # fmt: skip


def as_json(shown: Shown) -> dict[str, Any]:
    """A picture with its place, in base64."""
    return {**shown.place, "media_type": PNG, "base64": base64.b64encode(shown.file).decode()}
