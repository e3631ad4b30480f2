"""What `encode` shows while it works, and says when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lcm_kit.console import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    Text,
    TimeRemainingColumn,
    Words,
)
from lcm_kit.data.caption_files import Bad

_LISTED = 100  # bad records that a message names; more are counted


@dataclass(frozen=True)
class EncodeReport:
    """What a run of `encode` did."""

    folder: Path | str  # text: an address
    rows: int  # of the whole cache: images, twice as many with data.flip, or samples
    encoded: int  # of them in this run
    seconds: float
    changes: list[str] = field(default_factory=list)  # against the cache that was there before, in words
    skipped: list[Bad] = field(default_factory=list)
    what: str = "images"  # its rows
    done: str = "encoded"  # and what was done to them
    remarks: list[str] = field(default_factory=list)  # what became of the pictures: shapes, crops, scales

    @property
    def message(self) -> str:
        """The report for a person: a sentence or two, then the records that were left out."""
        lines = (
            [f"{self.folder} was made from other inputs: {'; '.join(self.changes)}"] if self.changes else []
        )
        if self.encoded:
            made = f"{self.encoded} of {self.rows} {self.what} {self.done}"
            there = self.rows - self.encoded
            rest = f"; the other {there} {'was' if there == 1 else 'were'} there already" if there else ""
            lines.append(f"{self.folder}: {made} in {self.seconds:.1f} s{rest}")
        else:
            lines.append(f"{self.folder}: {self.rows} {self.what}, up to date, nothing to encode")
        if self.encoded or self.changes:
            lines += [f"  {remark}" for remark in self.remarks]
        if self.skipped:
            lines += [f"{len(self.skipped)} left out:", *(f"  {each}" for each in listing(self.skipped))]
        return "\n".join(lines)


class _Speed(ProgressColumn):
    """Images, or other things, a second."""

    def __init__(self, things: str) -> None:
        super().__init__()
        self.things = things

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        number = f"{speed:.1f}" if speed else "-"
        return Text(f"{number} {self.things}/s", style="progress.data.speed")


def progress_bar(progress: bool, things: str = "images") -> Progress:
    """A bar with the speed in `things` a second; it shows nothing unless `progress`."""
    columns = (
        Words("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(things),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not progress)


def listing(bad: Sequence[Bad]) -> list[str]:
    """The first records and why each cannot be used, and how many more there are."""
    more = [f"and {len(bad) - _LISTED} more"] if len(bad) > _LISTED else []
    return [f"{id}: {reason}" for id, reason in bad[:_LISTED]] + more
