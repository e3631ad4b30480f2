"""The one door to the terminal: whatever is printed goes through here as it is, and cannot do anything.

Paths, captions, names and metadata are a user's or a stranger's. Rich would take `[v2]` for a style and drop
it, a terminal would obey an escape sequence, and a code page lacks most letters: here text is text. Nothing
else in the kit imports rich or calls `print` (tests/test_console.py holds that).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as _Progress
from rich.table import Table as _Table
from rich.text import Text

from lcm_kit.inert import line, plain

__all__ = [
    "BarColumn", "MofNCompleteColumn", "Progress", "ProgressColumn", "Table", "Task", "Text",
    "TimeElapsedColumn", "TimeRemainingColumn", "Words", "cell", "rule", "say", "show",
    "silent", "working",
]  # fmt: skip

SIMPLE = box.SIMPLE

PATIENCE = 2.0  # seconds of silence after which is said what is being done
AGAIN = 30.0  # and after which it is said again, where no bar moves


_SILENT: ContextVar[bool] = ContextVar("silent", default=False)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Print nothing within the block, and show no bar: what a program calls answers by what it returns.

    Of this thread alone: another one may show its own work meanwhile.
    """
    before = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(before)


def _console(err: bool = False) -> Console:
    return Console(stderr=err, soft_wrap=True, markup=False, highlight=False, emoji=False)


def say(text: object = "", *, err: bool = False, style: str = "") -> None:
    """Print `text` and a line end, as it is but for `plain`; on stderr if `err`, in rich's `style`."""
    if _SILENT.get():
        return
    _console(err).print(Text(plain(text), style=style))


def rule(number: str, title: str) -> None:
    """Print a heading on stderr: a number in bold and a title, a line behind them."""
    if _SILENT.get():
        return
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
    if not _SILENT.get():
        Console(markup=False, highlight=False, emoji=False).print(table)


class Words(TextColumn):
    """A column of a progress bar: a format such as `{task.description}`, taken as it is."""

    def __init__(self, form: str) -> None:  # noqa: D107
        super().__init__(form, markup=False)

    def render(self, task: Task) -> Text:
        """The words for `task`."""
        return Text(line(self.text_format.format(task=task)))


class Progress(_Progress):
    """rich's bars; in a file or a pipe, where a bar is drawn when it is over, lines say how far it is."""

    def __init__(self, *columns: ProgressColumn | str, disable: bool = False, **settings: Any) -> None:  # noqa: D107
        super().__init__(*columns, disable=disable or _SILENT.get(), **settings)

    def add_task(self, description: str, *args: Any, **settings: Any) -> TaskID:
        """Add a bar."""
        task = super().add_task(description, *args, **settings)
        self._tell(task, PATIENCE)
        return task

    def update(self, task_id: TaskID, **settings: Any) -> None:
        """Move a bar, or change it."""
        super().update(task_id, **settings)
        self._tell(task_id, AGAIN)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a bar."""
        super().advance(task_id, advance)
        self._tell(task_id, AGAIN)

    def _tell(self, task_id: TaskID, patience: float) -> None:
        """A line, unless there was one not long ago or the bar is over."""
        if self.disable or self.console.is_terminal:
            return
        due = vars(self).setdefault("_due", {})
        task, now = self._tasks[task_id], time.monotonic()
        if task_id not in due:
            due[task_id] = now + patience
        elif now >= due[task_id] and not task.finished:
            due[task_id] = now + AGAIN
            of = "" if task.total is None else f" of {task.total:g}"
            say(f"{task.description.strip() or 'done'}: {task.completed:g}{of}", err=True)


@contextlib.contextmanager
def working(on: str) -> Iterator[None]:
    """Say what is done, `on` as "checking my.safetensors", where it takes longer than one waits gladly.

    Once after `PATIENCE` seconds and then every `AGAIN`, on stderr, until the block ends; of several
    processes the first alone.
    """
    if os.environ.get("RANK", "0") != "0" or _SILENT.get():
        yield
        return
    over, started = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = PATIENCE
        while not over.wait(wait):
            say(f"{on} ... {time.monotonic() - started:.0f} s", err=True)
            wait = AGAIN

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
