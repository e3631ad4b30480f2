"""The one door to the terminal: whatever is printed goes through here as it is, and cannot do anything.

Paths, captions, names and metadata are a user's or a stranger's. Rich would take `[v2]` for a style and drop
it, a terminal would obey an escape sequence, and a code page lacks most letters: here text is text. Nothing
else in the kit imports rich or calls `print` (tests/test_console.py holds that).
"""

from __future__ import annotations

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as _Table
from rich.text import Text

from lcm_kit.inert import line, plain

__all__ = [
    "BarColumn", "MofNCompleteColumn", "Progress", "ProgressColumn", "Table", "Task", "Text",
    "TimeElapsedColumn", "TimeRemainingColumn", "Words", "cell", "encodable", "rule", "say", "show",
]  # fmt: skip

SIMPLE = box.SIMPLE


def encodable() -> None:
    """From now on spell out what the terminal's code page lacks instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a notebook's streams have none, and no code page
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _console(err: bool = False) -> Console:
    return Console(stderr=err, soft_wrap=True, markup=False, highlight=False, emoji=False)


def say(text: object = "", *, err: bool = False, style: str = "") -> None:
    """Print `text` and a line end, as it is but for `plain`; on stderr if `err`, in rich's `style`."""
    _console(err).print(Text(plain(text), style=style))


def rule(number: str, title: str) -> None:
    """Print a heading on stderr: a number in bold and a title, a line behind them."""
    heading = Text.assemble((line(number), "bold"), " ", line(title))
    _console(err=True).rule(heading, align="left")


class Table(_Table):
    """rich's table, whose headings, title and cells are text as it is."""

    def __init__(self, *headings: str, title: str | None = None, **settings: Any) -> None:  # noqa: D107
        super().__init__(title=None if title is None else Text(line(title)), **settings)
        for heading in headings:
            self.add_column(heading)

    def add_column(self, header: Any = "", *args: Any, **settings: Any) -> None:
        """Add a column; a heading of text is taken as it is."""
        super().add_column(cell(header), *args, **settings)

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Add a row; cells of text are taken as they are."""
        super().add_row(*map(cell, cells), **settings)


def cell(content: Any, style: str = "") -> Any:
    """What a table shows of `content`: text as it is, in rich's `style`; rich's own things unchanged."""
    return Text(line(content), style=style) if isinstance(content, str) else content


def show(table: Table) -> None:
    """Print a table."""
    Console(markup=False, highlight=False, emoji=False).print(table)


class Words(TextColumn):
    """A column of a progress bar: a format such as `{task.description}`, taken as it is."""

    def __init__(self, form: str) -> None:  # noqa: D107
        super().__init__(form, markup=False)

    def render(self, task: Task) -> Text:
        """The words for `task`."""
        return Text(line(self.text_format.format(task=task)))
