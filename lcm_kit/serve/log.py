"""What a server says: one JSON object a line on stderr, without what people asked for."""

from __future__ import annotations

import json
import logging
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lcm_kit import console
from lcm_kit.errors import UserError

# uvicorn's, of every answer that its client left, and of every WebSocket that was asked for
_USUAL = "ASGI callable returned without", "Unsupported upgrade", "No supported WebSocket library"


@dataclass(frozen=True)
class Log:
    """`prompts`: whether prompts, and what libraries say of a failure, which may hold them, are written."""

    prompts: bool = False

    def say(self, event: str, **facts: Any) -> None:
        """A line: when, what, and the facts that are not None."""
        known = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        told = {key: value for key, value in facts.items() if value is not None}
        console.say(json.dumps({**known, **told}, default=str), err=True)

    def fault(self, event: str, error: BaseException, **facts: Any) -> None:
        """A failure: its type and where it was raised; its own words only where prompts may be written."""
        words = str(error) if self.prompts or isinstance(error, UserError) else None
        where = [
            f"{each.filename}:{each.lineno} {each.name}" for each in traceback.extract_tb(error.__traceback__)
        ]
        self.say(event, error=type(error).__name__, words=words, where=where[-20:], **facts)


class Uvicorn(logging.Handler):
    """uvicorn's own words as lines of `Log`: without arguments of a failure, which may be a request's."""

    def __init__(self, log: Log) -> None:  # noqa: D107
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            self._log.fault("uvicorn", error, level=record.levelname)
        elif record.levelno >= logging.WARNING and not record.getMessage().startswith(_USUAL):
            self._log.say("uvicorn", level=record.levelname, words=record.getMessage())
