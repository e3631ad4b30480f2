"""What is drawn for a request and how it is told: `Pictures` is that of one order."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from PIL.Image import Image

from lcm_kit.drawing.made import Source
from lcm_kit.drawing.pictures import png_bytes
from lcm_kit.errors import UserError
from lcm_kit.serve.asked import Order
from lcm_kit.serve.engine import Ticket
from lcm_kit.serve.parts import DATA, Parts
from lcm_kit.serve.problems import PNG
from lcm_kit.serve.store import Kind, Picture, Store


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
    """The pictures of one order, by their index; each says how it was made. `store`: where they are kept."""

    order: Order
    source: Source
    kind: Kind
    store: Store | None
    _kept: dict[int, Picture] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, order: Order, parts: Parts, *, keep: bool, kind: Kind = "picture") -> Pictures:
        """As a server has them drawn. Raises `UserError` if they are to be kept and nothing is."""
        if keep and parts.store is None:
            raise UserError(f"keep: this server keeps no pictures; {DATA}, or leave keep out")
        # edits are drawn by the base's own VAE, whatever decodes others
        source = parts.served.source if kind == "edit" else parts.source
        return cls(order, source, kind, parts.store if keep else None)

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
        file = png_bytes(picture, self.source.told(self.settings, picture.size, index), quick=True)
        if self.store is not None:
            record = self.source.record(self.settings, index)
            self._kept[index] = Picture(self.kind, record, picture.size, file)
        return [Shown({"index": index}, file)]

    def done(self, tickets: Sequence[Ticket], seconds: float) -> dict[str, Any]:
        """Settings, which draw the same again, notes, and how it was drawn; the ids of what is kept now."""
        told = {
            "settings": dict(self.order.settings), "notes": list(self.order.notes),
            "batches": tickets[0].batches, "seconds": round(seconds, 4),
        }  # fmt: skip
        if self.store is not None:
            told["kept"] = self.store.keep([self._kept[index] for index in sorted(self._kept)])
        return told

    def whole(self, pictures: list[dict[str, Any]], done: dict[str, Any]) -> dict[str, Any]:
        """In their order."""
        return {"pictures": sorted(pictures, key=lambda each: each["index"]), **done}


def wordless(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without what somebody wrote, however deep; adapters may be called as they like."""
    return {
        key: wordless(each) if isinstance(each, Mapping) and key != "adapters" else each
        for key, each in settings.items() if "prompt" not in key
    }  # fmt: skip


def as_json(shown: Shown) -> dict[str, Any]:
    """A picture with its place, in base64."""
    return {**shown.place, "media_type": PNG, "base64": base64.b64encode(shown.file).decode()}
