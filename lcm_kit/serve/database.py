"""One SQLite file of ours, which one server at a time has: opened, known for what it is, and written safely.

What was written is on the disk when `writing` ends (WAL, synchronous=FULL), whatever ends the process. All of
it waits for the disk and for one another: it is for threads.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lcm_kit.errors import UserError

_WAIT = 5.0  # seconds for another program that reads or writes the file
_JOURNAL = 2**26  # bytes that the journal is cut to after it grew


class NotKept(UserError):
    """The file cannot be read or written now."""


class Database:
    """`ours`: SQLite's application_id, and `version` of the `tables`, which are made in a new file."""

    def __init__(self, file: Path, ours: int, version: int, tables: Sequence[str]) -> None:
        """Raises `UserError` for a file that is damaged, another's or newer, or cannot be written."""
        self.file = file
        self._lock = threading.Lock()
        with self._sentences():
            with contextlib.suppress(OSError):  # which SQLite has a reason for
                os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # prompts are nobody else's
            self._db = sqlite3.connect(file, _WAIT, isolation_level=None, check_same_thread=False)
            self._place = _place(file)
            try:
                new = self._is_new(ours, version)
                for each in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                    self._db.execute(f"PRAGMA {each}")
                self._db.execute(f"PRAGMA journal_size_limit = {_JOURNAL}")
                with self.writing():  # of an old file nothing, but that it can be written is known
                    mark = (f"PRAGMA application_id = {ours}", f"PRAGMA user_version = {version}")
                    for each in (*tables, *mark) if new else ():
                        self._db.execute(each)
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Nothing is written any more; what the journal held is in the file."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """While nobody else does. Raises `NotKept` for what SQLite refuses, and for a file that is gone."""
        with self._lock, self._sentences():
            if _place(self.file) != self._place:  # what is written then is in no folder
                raise NotKept(
                    f"{self.file} was moved or deleted while it was in use; put it back, or stop the server "
                    "and start it again"
                )
            yield self._db

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """As `reading`; all of it is on the disk afterwards, or none of it if an exception goes through."""
        with self.reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite may have done so itself
                    db.execute("ROLLBACK")
                raise

    def wipe(self, *, shrink: bool = False) -> None:
        """Leave nothing of what was deleted in the journal; `shrink`: give its space back."""
        with self.reading() as db:
            if shrink:
                db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _is_new(self, ours: int, version: int) -> bool:
        """Whether nothing is in it; looked at before anything is written."""
        whole = str(self._one("PRAGMA quick_check(1)"))
        if whole != "ok":
            raise sqlite3.DatabaseError(whole.splitlines()[-1])
        if not self._one("SELECT count(*) FROM sqlite_master"):
            return True
        found = self._one("PRAGMA user_version")
        if self._one("PRAGMA application_id") != ours or found < 1:
            raise UserError(f"{self.file} is another program's database; give another folder as --data")
        if found > version:
            raise UserError(
                f"{self.file} was written by a newer lcm-kit (its tables are of version {found}, this one "
                f"knows {version}); update lcm-kit, or give another folder as --data"
            )
        return False

    def _one(self, question: str) -> Any:
        return self._db.execute(question).fetchone()[0]

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
                raise  # a bug
            if isinstance(error, sqlite3.OperationalError):
                said = "see that there is space and the right to write, or give another folder as --data"
            else:
                said = "put a copy of it that is whole in its place, or give another folder as --data"
            raise NotKept(f"{self.file} cannot be used ({error}); {said}") from error


def _place(file: Path) -> tuple[int, int] | None:
    """Which file lies there, whatever it is called."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino
