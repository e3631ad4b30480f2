"""What a server keeps: pictures, comparisons and votes, in one SQLite file of a folder. It knows no HTTP.

What a method wrote is on the disk when it returns: whoever was told of it finds it again, whatever ends the
process. Methods wait for the disk and for one another: they are for threads.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lcm_kit.errors import UserError
from lcm_kit.io.locks import held
from lcm_kit.serve.database import Database

Side = Literal["asked", "against"]
Choice = Literal["left", "right", "tie", "neither"]
Kind = Literal["picture", "edit"]
SIDES: tuple[Side, Side] = ("asked", "against")
COUNTS = ("votes", "blind", *SIDES, "tie", "neither")  # what a tally has of votes
NAME = "lcm-kit.sqlite"
VERSION = 1  # of the tables below; a change of them is a new one, with a way there from those before
_OURS = 0x6C636D6B
_OPEN = 10_000  # comparisons without a vote that are kept, the latest; with a vote all are
_LARGEST = 2**63 - 1  # of SQLite's whole numbers
_TABLES = (
    "CREATE TABLE pictures (id INTEGER PRIMARY KEY AUTOINCREMENT, created TEXT NOT NULL, kind TEXT NOT NULL,"
    " record TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, png BLOB NOT NULL)",
    "CREATE TABLE comparisons (id INTEGER PRIMARY KEY AUTOINCREMENT, created TEXT NOT NULL,"
    " blind INTEGER NOT NULL, left_is TEXT NOT NULL CHECK (left_is IN ('asked', 'against')),"
    " asked TEXT NOT NULL, against TEXT NOT NULL, drawn_by TEXT NOT NULL,"
    " choice TEXT CHECK (choice IN ('left', 'right', 'tie', 'neither')), voted TEXT,"
    " CHECK ((choice IS NULL) = (voted IS NULL)))",
    "CREATE INDEX open_comparisons ON comparisons (id) WHERE choice IS NULL",
)
_PAIR = "id, created, blind, left_is, asked, against, choice, voted"


class Unknown(UserError):
    """There is no such picture or comparison."""


class Voted(UserError):
    """There is a vote on this comparison already."""


class Picture(NamedTuple):
    """One to keep."""

    kind: Kind
    record: Mapping[str, Any]  # `drawing.made.Source.record`: base, adapters, index, settings
    size: tuple[int, int]  # (width, height)
    png: bytes


class Entry(NamedTuple):
    """A picture that is kept, without its file."""

    id: int
    created: str
    kind: str
    record: dict[str, Any]
    width: int
    height: int


class Pair(NamedTuple):
    """A comparison: what was asked for, what it stands against, which of them is left, and the vote."""

    id: int
    created: str
    blind: bool
    left_is: Side
    asked: dict[str, Any]  # a record, as of a picture
    against: dict[str, Any]
    choice: Choice | None
    voted: str | None

    @property
    def chosen(self) -> str:
        """asked, against, tie or neither; of one without a vote nothing."""
        return _chosen(self.choice, self.left_is)


class Store:
    """`most`: pictures that are kept; where there are more the oldest go, when it is opened and later."""

    def __init__(self, file: Path, most: int) -> None:
        """Raises `UserError` for a file that is no whole history of ours, or cannot be written."""
        self._most = most
        self._file = Database(file, _OURS, VERSION, _TABLES)
        with self._file.writing() as db:
            self._prune(db)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, most: int) -> Iterator[Store]:
        """That in `folder`, made if it is not there. Raises `UserError` as above, and for a second server."""
        with held(folder, "serve"):
            store = cls(folder / NAME, most)
            try:
                yield store
            finally:
                store.close()

    def close(self) -> None:
        """Nothing is read or written any more."""
        self._file.close()

    # -- Pictures --------------------------------------------------------------------------------------------

    def keep(self, pictures: Sequence[Picture]) -> list[int]:
        """Keep pictures, all or none of them; returns the ids of those that are kept then, in their order."""
        columns = "created, kind, record, width, height, png"
        with self._file.writing() as db:
            ids = [
                _inserted(
                    db, "pictures", columns, _now(), each.kind, json.dumps(each.record), *each.size, each.png
                )
                for each in pictures
            ]
            self._prune(db)
        return ids[-self._most :]

    def pictures(self, before: int | None, limit: int) -> tuple[list[Entry], bool]:
        """The newest `limit`, or those with smaller ids than `before`; and whether there are more."""
        asked = (
            "SELECT id, created, kind, record, width, height FROM pictures WHERE id < ?"
            " ORDER BY id DESC LIMIT ?"
        )
        below = _LARGEST if before is None else min(before, _LARGEST)
        with self._file.reading() as db:
            rows = db.execute(asked, (below, limit + 1)).fetchall()
        found = [Entry(row[0], row[1], row[2], json.loads(row[3]), *row[4:]) for row in rows[:limit]]
        return found, len(rows) > limit

    def png(self, number: int) -> bytes:
        """The file of a picture. Raises `Unknown`."""
        with self._file.reading() as db:
            row = db.execute("SELECT png FROM pictures WHERE id = ?", (_id(number),)).fetchone()
        if row is None:
            raise _no_picture(number)
        content: bytes = row[0]
        return content

    def forget(self, number: int) -> None:
        """Delete a picture, so that nothing of it is left in the file. Raises `Unknown`."""
        with self._file.writing() as db:
            if not db.execute("DELETE FROM pictures WHERE id = ?", (_id(number),)).rowcount:
                raise _no_picture(number)
        self._file.wipe()

    def forget_all(self) -> int:
        """Delete all pictures, as `forget`, and give their space back; returns how many there were."""
        with self._file.writing() as db:
            count = db.execute("DELETE FROM pictures").rowcount
        self._file.wipe(shrink=True)
        return int(count)

    def _prune(self, db: Any) -> None:
        oldest = "SELECT id FROM pictures ORDER BY id DESC LIMIT 1 OFFSET ?"
        db.execute(f"DELETE FROM pictures WHERE id <= ({oldest})", (self._most,))

    # -- Comparisons and votes -------------------------------------------------------------------------------

    def compared(
        self, asked: Mapping[str, Any], against: Mapping[str, Any], left_is: Side, blind: bool
    ) -> int:
        """Keep a comparison of two records, of which one is shown on the left; returns its id."""
        drawn_by = json.dumps({key: asked[key] for key in ("base", "adapters")}, sort_keys=True)
        columns = "created, blind, left_is, asked, against, drawn_by"
        with self._file.writing() as db:
            number = _inserted(
                db, "comparisons", columns, _now(), blind, left_is, json.dumps(asked), json.dumps(against),
                drawn_by,
            )  # fmt: skip
            db.execute("DELETE FROM comparisons WHERE choice IS NULL AND id <= ?", (number - _OPEN,))
        return number

    def vote(self, number: int, choice: Choice) -> Pair:
        """Vote on a comparison, once. Raises `Unknown`, and `Voted` if there is a vote."""
        with self._file.writing() as db:
            done = db.execute(
                "UPDATE comparisons SET choice = ?, voted = ? WHERE id = ? AND choice IS NULL",
                (choice, _now(), _id(number)),
            )
            row = db.execute(f"SELECT {_PAIR} FROM comparisons WHERE id = ?", (_id(number),)).fetchone()
        if row is None:
            raise Unknown(f"there is no comparison {number}; POST /v1/comparisons makes one")
        if not done.rowcount:
            raise Voted(f"comparison {number} has its vote, which stays; make another one to vote again")
        return _pair(row)

    def votes(self, after: int, limit: int) -> list[Pair]:
        """The first `limit` comparisons with a vote, of those with a larger id than `after`."""
        asked = f"SELECT {_PAIR} FROM comparisons WHERE choice IS NOT NULL AND id > ? ORDER BY id LIMIT ?"
        with self._file.reading() as db:
            return [_pair(row) for row in db.execute(asked, (after, limit))]

    def tally(self) -> list[tuple[dict[str, Any], dict[str, int]]]:
        """By what drew the side that was asked for (`base`, `adapters`), how often which side was chosen.

        Of each `COUNTS`; `blind` is how many of the votes were. Those with most votes first.
        """
        asked = (
            "SELECT drawn_by, choice, left_is, sum(blind), count(*) FROM comparisons WHERE choice IS NOT NULL"
            " GROUP BY drawn_by, choice, left_is"
        )
        with self._file.reading() as db:
            rows = db.execute(asked).fetchall()
        found: dict[str, dict[str, int]] = {}
        for drawn_by, choice, left_is, blind, count in rows:
            told = found.setdefault(drawn_by, dict.fromkeys(COUNTS, 0))
            told[_chosen(choice, left_is)] += count
            told["votes"] += count
            told["blind"] += blind
        most_first = sorted(found.items(), key=lambda each: (-each[1]["votes"], each[0]))
        return [(json.loads(drawn_by), told) for drawn_by, told in most_first]


def _inserted(db: Any, table: str, columns: str, *values: Any) -> int:
    """The id of a new row."""
    places = ", ".join("?" * len(values))
    return int(db.execute(f"INSERT INTO {table} ({columns}) VALUES ({places})", values).lastrowid)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _id(number: int) -> int:
    """For a question; 0, which nothing has, for what SQLite cannot be asked for."""
    return number if 0 < number <= _LARGEST else 0


def _chosen(choice: Choice | None, left_is: Side) -> str:
    other = "against" if left_is == "asked" else "asked"
    return {"left": left_is, "right": other}.get(choice or "", choice or "")


def _pair(row: Sequence[Any]) -> Pair:
    number, created, blind, left_is, asked, against, choice, voted = row
    return Pair(number, created, bool(blind), left_is, json.loads(asked), json.loads(against), choice, voted)


def _no_picture(number: int) -> Unknown:
    return Unknown(
        f"there is no picture {number} in this history; GET /v1/history lists those that there are"
    )
