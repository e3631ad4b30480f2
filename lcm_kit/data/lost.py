"""What encoding took from some pictures and captions, counted: of a folder's, or of a part's among many.

An account is small whatever it is of: counts, and the worst few by name. Two of them make one, so that a
stream is told of like a folder without anybody having seen all of its pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lcm_kit import bases
from lcm_kit.data.buckets import Cut, Size
from lcm_kit.data.findings import few, number
from lcm_kit.io import own_shapes

MUCH = 0.1  # share of a picture that is cut away from where it is said
SHOWN = 12  # the worst pictures, which are named and shown
_LITTLE = 0.005  # harm from which a picture is among the worst
Named = list[tuple[str, float]]  # ids, with a number each, the largest first


@dataclass(frozen=True)
class Lost:
    """The account of some pictures."""

    shapes: Counter[Size] = field(default_factory=Counter)  # pictures of each
    cropped: int = 0  # pictures that lose more than `MUCH`
    most_cropped: Named = field(default_factory=list)  # with the share that is cut away
    enlarged: int = 0
    most_enlarged: Named = field(default_factory=list)  # with how many times as large they become
    worst: Named = field(default_factory=list)  # with `harm`
    cut_captions: int = 0
    longest: Named = field(default_factory=list)  # of these the one with the most tokens, and how many
    room: int = 0  # tokens that one chunk has room for

    @classmethod
    def of(
        cls, cuts: Mapping[str, Cut], cut_captions: Mapping[str, int] | None = None, room: int = 0
    ) -> Lost:
        """Of pictures by id, and of those captions that are cut with all their tokens."""
        lost = {id: cut.lost for id, cut in cuts.items() if cut.lost > MUCH}
        scaled = {id: cut.scale for id, cut in cuts.items() if cut.scale > 1}
        harms = {id: harm(cut) for id, cut in cuts.items() if harm(cut) > _LITTLE}
        long = dict(cut_captions or {})
        return cls(
            Counter(cut.target for cut in cuts.values()), len(lost), _top(lost.items()), len(scaled),
            _top(scaled.items()), _top(harms.items()), len(long), _top(long.items(), 1), room,
        )  # fmt: skip

    def __add__(self, other: Lost) -> Lost:
        """Of the pictures of both; of equally bad ones the first's come first."""
        return Lost(
            self.shapes + other.shapes,
            self.cropped + other.cropped,
            _top([*self.most_cropped, *other.most_cropped]),
            self.enlarged + other.enlarged,
            _top([*self.most_enlarged, *other.most_enlarged]),
            _top([*self.worst, *other.worst]),
            self.cut_captions + other.cut_captions,
            _top([*self.longest, *other.longest], 1),
            self.room or other.room,
        )

    def sentences(self, chunks: int = 1) -> Iterator[str]:
        """What there is to say: shapes, what is cut away most, what is scaled up, which captions are cut."""
        by_count = sorted(self.shapes.items(), key=lambda each: (-each[1], each[0]))
        named = [f"{width} x {height} ({count})" for (width, height), count in by_count]
        if named:
            yield f"shapes: {few(named, 8)}"
        if self.cropped:
            what = number(self.cropped, "picture", after=("loses", "lose"))
            worst = few([f"{id} ({share:.0%})" for id, share in self.most_cropped], of=self.cropped)
            yield f"{what} more than {MUCH:.0%} to the crop: {worst}"
        if self.enlarged:
            what = number(self.enlarged, "picture", after=("is", "are"))
            worst = few([f"{id} ({times:.2f} times)" for id, times in self.most_enlarged], of=self.enlarged)
            yield f"{what} scaled up, which teaches blur: {worst} (data.shapes.small)"
        if self.cut_captions:
            id, tokens = self.longest[0]
            yield captions_sentence(self.cut_captions, id, int(tokens), self.room, chunks)

    @property
    def plain(self) -> own_shapes.Lost:
        """As a part keeps it."""
        return {
            "shapes": [[*shape, count] for shape, count in sorted(self.shapes.items())],
            "cropped": self.cropped,
            "most_cropped": [[id, share] for id, share in self.most_cropped],
            "enlarged": self.enlarged,
            "most_enlarged": [[id, times] for id, times in self.most_enlarged],
            "worst": [[id, harm] for id, harm in self.worst],
            "cut_captions": self.cut_captions,
            "longest": [[id, tokens] for id, tokens in self.longest],
            "room": self.room,
        }

    @classmethod
    def read(cls, kept: own_shapes.Lost) -> Lost:
        """What `plain` gave."""

        def named(given: list[list[Any]]) -> Named:
            return [(str(id), float(value)) for id, value in given]

        return cls(
            Counter({(width, height): count for width, height, count in kept["shapes"]}),
            kept["cropped"], named(kept["most_cropped"]), kept["enlarged"], named(kept["most_enlarged"]),
            named(kept["worst"]), kept["cut_captions"], named(kept["longest"]), kept["room"],
        )  # fmt: skip


def harm(cut: Cut) -> float:
    """What a picture loses: the share that is cut away or, if that is more, by which it is enlarged."""
    return max(cut.lost, 1 - 1 / max(cut.scale, 1.0))


def captions_sentence(count: int, longest: str, tokens: int, room: int, chunks: int) -> str:
    """Of so many captions that are cut, more than `chunks` chunks have room for; the longest is named."""
    has = number(count, "caption", after=("has", "have"))
    named = few([f"{longest} ({tokens})"], 1, of=count)
    return f"{has} more tokens than {bases.room(room, chunks)}, and the rest is cut off: {named}"


def captions_by_name(captions: Iterable[tuple[str, Sequence[tuple[str, float]]]]) -> dict[str, str]:
    """The texts of pictures by id, those of several captions as `ID (caption 2)`."""
    return {
        f"{id} (caption {k})" if k > 1 else id: text
        for id, several in captions
        for k, (text, _) in enumerate(several, 1)
    }


def _top(named: Iterable[tuple[str, float]], most: int = SHOWN) -> Named:
    return sorted(named, key=lambda each: -each[1])[:most]
