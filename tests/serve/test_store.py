"""The file of a server: what was written is there, whatever happens; what is no such file is a sentence."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lcm_kit.errors import UserError
from lcm_kit.serve import store as tables
from lcm_kit.serve.database import NotKept
from lcm_kit.serve.store import NAME, Pair, Picture, Store, Unknown, Voted
from tests.recipes.small import environment
from tests.serve.small import PATIENCE

CHOICES = ("left", "right", "tie", "neither")
SIDES = ("asked", "against")


def record(prompt: str = "a cat", **more: Any) -> dict[str, Any]:
    return {"base": "tiny", "adapters": {"lumo": "ab"}, "index": 0, "settings": {"prompt": prompt}, **more}


def picture(number: int, size: int = 100) -> Picture:
    """One that nothing else looks like."""
    return Picture("picture", record(f"p{number}"), (64, 48), random.Random(number).randbytes(size))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.opened(tmp_path, 1000) as found:
        yield found


# -- Pictures ------------------------------------------------------------------------------------------------


def test_pictures_come_newest_first_a_page_at_a_time(store: Store) -> None:
    ids = store.keep([picture(k) for k in range(3)]) + store.keep([picture(k) for k in range(3, 7)])
    assert ids == [1, 2, 3, 4, 5, 6, 7]
    seen, before = [], None
    for more in (True, True, False):
        page, there_are_more = store.pictures(before, 3)
        assert there_are_more is more
        seen += page
        before = page[-1].id
    assert [each.id for each in seen] == ids[::-1] and store.pictures(1, 3) == ([], False)
    assert [each.record["settings"]["prompt"] for each in seen] == [f"p{k - 1}" for k in ids[::-1]]
    assert {(each.kind, each.width, each.height) for each in seen} == {("picture", 64, 48)}
    assert [store.png(k) for k in ids] == [picture(k - 1).png for k in ids]
    assert store.pictures(2**80, 1)[0][0].id == 7


def test_the_oldest_pictures_go(tmp_path: Path) -> None:
    with Store.opened(tmp_path, 5) as store:
        for k in range(12):
            assert store.keep([picture(k)]) == [k + 1]
        assert [each.id for each in store.pictures(None, 100)[0]] == [12, 11, 10, 9, 8]
        assert store.keep([picture(k) for k in range(7)]) == [
            15,
            16,
            17,
            18,
            19,
        ]  # of these seven five are left
        with pytest.raises(Unknown, match="^there is no picture 14 in this history; GET /v1/history lists"):
            store.png(14)
    with Store.opened(tmp_path, 2) as store:  # fewer from now on
        assert [each.id for each in store.pictures(None, 100)[0]] == [19, 18]


def test_an_id_is_never_anothers(tmp_path: Path) -> None:
    with Store.opened(tmp_path, 9) as store:
        store.keep([picture(k) for k in range(3)])
        store.forget(3)
        assert store.forget_all() == 2
    with Store.opened(tmp_path, 9) as store:
        assert store.keep([picture(9)]) == [4]


@pytest.mark.parametrize("number", [0, -1, 2, 2**63, 10**30])
def test_what_is_not_there_is_said(store: Store, number: int) -> None:
    store.keep([picture(0)])
    for ask in (store.png, store.forget, lambda k: store.vote(k, "tie")):
        with pytest.raises(Unknown, match=f"there is no (picture|comparison) {number}"):
            ask(number)
    assert len(store.pictures(None, 9)[0]) == 1


def test_of_what_is_deleted_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    def holding(content: bytes) -> list[str]:
        return [file.name for file in tmp_path.iterdir() if content in file.read_bytes()]

    with Store.opened(tmp_path, 9) as store:
        one, other = picture(1, 900), picture(2, 900)
        store.keep([one, other, *[picture(k, 300_000) for k in range(3, 6)]])
        assert holding(one.png) and holding(other.png) and holding(b'"p1"')
        store.forget(1)
        assert not holding(one.png) and not holding(b'"p1"') and holding(other.png)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 900_000
        assert store.forget_all() == 4 and not holding(other.png)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 100_000


# -- Votes ---------------------------------------------------------------------------------------------------


def test_a_comparison_has_one_vote(store: Store) -> None:
    asked, against = record("a", index=3), record("a", adapters={})
    first, second = (
        store.compared(asked, against, "against", True),
        store.compared(asked, against, "asked", False),
    )
    found = store.vote(first, "right")
    assert (
        found[:1] + found[2:7] == (first, True, "against", asked, against, "right")
        and found.chosen == "asked"
    )
    for again in CHOICES:
        with pytest.raises(Voted, match=f"^comparison {first} has its vote, which stays; make another"):
            store.vote(first, again)  # type: ignore[arg-type]
    assert store.votes(0, 9) == [found]
    assert store.vote(second, "left").chosen == "asked"


def test_the_tally_is_what_was_voted(store: Store) -> None:
    """Against the same counted one by one."""
    rng, voted = random.Random(0), []
    for k in range(200):
        drawn_by = rng.choice([{"lumo": "ab"}, {"lumo": "cd"}, {}])
        left_is, choice, blind = rng.choice(SIDES), rng.choice(CHOICES), rng.random() < 0.5
        number = store.compared(record(adapters=drawn_by), record(), left_is, blind)  # type: ignore[arg-type]
        if k % 5:
            voted.append((drawn_by, store.vote(number, choice)))  # type: ignore[arg-type]
    wanted: dict[str, Counter[str]] = {}
    for drawn_by, pair in voted:
        counted = wanted.setdefault(json.dumps(drawn_by), Counter())
        right = "against" if pair.left_is == "asked" else "asked"
        counted[
            pair.left_is if pair.choice == "left" else right if pair.choice == "right" else pair.choice
        ] += 1
        counted.update({"votes": 1, "blind": int(pair.blind)})
    found = store.tally()
    assert {json.dumps(drawn_by["adapters"]): Counter(told) for drawn_by, told in found} == wanted
    assert all(drawn_by["base"] == "tiny" for drawn_by, _ in found) and len(found) == 3
    assert [told["votes"] for _, told in found] == sorted(
        (each["votes"] for each in wanted.values()), reverse=True
    )
    pages, after = [], 0
    while page := store.votes(after, 7):
        pages += page
        after = page[-1].id
    assert pages == [pair for _, pair in voted] == store.votes(0, 1000)


def test_comparisons_that_nobody_votes_on_do_not_pile_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_OPEN", 3)
    ids = [store.compared(record(), record(), "asked", True) for _ in range(2)]
    store.vote(ids[0], "tie")
    ids += [store.compared(record(), record(), "asked", True) for _ in range(4)]
    for number in ids[1:3]:
        with pytest.raises(Unknown):
            store.vote(number, "tie")
    assert [store.vote(number, "tie").id for number in ids[3:]] == ids[3:]
    assert [pair.id for pair in store.votes(0, 9)] == [ids[0], *ids[3:]]


# -- Many at once, and what ends a process -------------------------------------------------------------------


def test_many_threads_lose_nothing_and_one_of_them_votes(store: Store) -> None:
    number = store.compared(record(), record(), "asked", True)
    start = threading.Barrier(8)

    def work(k: int) -> tuple[list[int], int]:
        start.wait()
        ids, won = [], 0
        for j in range(10):
            ids += store.keep([picture(100 * k + j), picture(100 * k + j + 50)])
        try:
            store.vote(number, CHOICES[k % 4])  # type: ignore[arg-type]
            won = 1
        except Voted:
            pass
        return ids, won

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(work, range(8)))
    assert sum(won for _, won in done) == 1 and len(store.votes(0, 9)) == 1
    ids = [number for each, _ in done for number in each]
    assert sorted(ids) == list(range(1, 161))
    for k, (each, _) in enumerate(done):
        wanted = [picture(100 * k + j + more).png for j in range(10) for more in (0, 50)]
        assert [store.png(number) for number in each] == wanted


WRITER = """
import random, sys
from pathlib import Path
from lcm_kit.serve.store import Picture, Store
record = {"base": "tiny", "adapters": {}, "index": 0, "settings": {}}
with Store.opened(Path(sys.argv[1]), 10_000) as store:
    for k in range(100_000):
        (kept,) = store.keep([Picture("picture", record, (64, 48), random.Random(k).randbytes(20_000))])
        number = store.compared(record, record, "asked", True)
        print(k, kept, number, flush=True)
        if k % 2:
            store.vote(number, "left")
            print("voted", number, flush=True)
"""


def test_nothing_that_was_told_is_lost_when_killed(tmp_path: Path) -> None:
    """A real process, killed by SIGKILL between and amid writes, again and again in the same folder."""
    kept: dict[int, int] = {}
    compared: set[int] = set()
    voted: set[int] = set()
    for lines in (1, 7, 20, 33):  # which it is killed after, in the middle of what comes next
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            env=environment(1),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        os.kill(process.pid, signal.SIGKILL)
        said += process.stdout.readlines()  # what it told before it was hit
        process.wait(PATIENCE)
        for words in (line.split() for line in said if line.endswith("\n")):
            if words[0] == "voted":
                voted.add(int(words[1]))
            else:
                kept[int(words[1])] = int(words[0])
                compared.add(int(words[2]))
        with Store.opened(tmp_path, 10_000) as store:
            for number, k in kept.items():
                assert store.png(number) == picture(k, 20_000).png
            found = store.votes(0, 10_000)
            assert {pair.id for pair in found} >= voted and all(pair.choice == "left" for pair in found)
            assert len(store.pictures(None, 10_000)[0]) - len(kept) in range(5)  # one a kill may be untold
    assert len(kept) > 20 and len(voted) > 10
    with closing(sqlite3.connect(tmp_path / NAME)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert {row[0] for row in db.execute("SELECT id FROM comparisons")} >= compared


def test_a_write_that_fails_leaves_nothing_and_the_next_one_works(store: Store) -> None:
    """SQLite's own refusal of a disk that is full."""
    store.keep([picture(0)])
    with store._file.reading() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + 20}")
    with pytest.raises(
        NotKept, match=r"lcm-kit\.sqlite cannot be used \(database or disk is full\); see that"
    ):
        store.keep([picture(1), picture(2, 300_000)])
    assert [each.id for each in store.pictures(None, 9)[0]] == [1]
    assert store.keep([picture(3)]) == [2] and store.png(2) == picture(3).png


def test_all_of_what_is_kept_together_is_there_or_none(store: Store) -> None:
    odd = Picture("picture", {"settings": object()}, (8, 8), b"")
    with pytest.raises(TypeError):
        store.keep([picture(0), odd])
    assert store.pictures(None, 9) == ([], False) and store.keep([picture(1)]) == [1]


# -- What is no such file ------------------------------------------------------------------------------------


def test_one_server_has_a_folder(tmp_path: Path) -> None:
    with (
        Store.opened(tmp_path, 9),
        pytest.raises(UserError, match=r"is at work there \(serve\); wait until it is done, stop it"),
        Store.opened(tmp_path, 9),
    ):
        pass
    with Store.opened(tmp_path, 9) as store:
        assert store.keep([picture(1)]) == [1]
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def another_program(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("CREATE TABLE pictures (x)")


def newer(file: Path) -> None:
    Store(file, 9).close()
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("PRAGMA user_version = 2")


def cut(file: Path) -> None:
    store = Store(file, 9)
    store.keep([picture(k, 5000) for k in range(9)])
    store.close()
    file.write_bytes(file.read_bytes()[:20_000])


def damaged(file: Path) -> None:
    store = Store(file, 9)
    store.keep([picture(k, 100) for k in range(9)])
    store.close()
    content = bytearray(file.read_bytes())
    content[4096:4116] = b"\xff" * 20  # the head of the second page
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: file.write_text("no database, but a text that is long enough for one" * 9),
         r"lcm-kit\.sqlite cannot be used \(file is not a database\); put a copy of it that is whole"),
        (lambda file: file.mkdir(), r"used \(unable to open database file\); see that there is space"),
        (another_program, "is another program's database; give another folder as --data"),
        (newer, "was written by a newer lcm-kit .its tables are of version 2, this one knows 1.; update"),
        (cut, r"cannot be used \(.*\); put a copy of it that is whole in its place"),
        (damaged, r"cannot be used \(.*\); put a copy of it that is whole in its place"),
    ],
)  # fmt: skip
def test_what_is_no_history_is_a_sentence_and_stays_as_it_is(
    tmp_path: Path, make: Callable[[Path], Any], said: str
) -> None:
    file = tmp_path / NAME
    make(file)
    before = None if file.is_dir() else file.read_bytes()
    with pytest.raises(UserError, match=said) as refused, Store.opened(tmp_path, 9):
        pass
    assert "\n" not in str(refused.value)
    assert before is None or file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [NAME]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/lcm-kit")):
        with pytest.raises(UserError, match=r"cannot be written \(.*\); "), Store.opened(folder, 9):
            pass


def test_an_empty_file_is_a_new_one(tmp_path: Path) -> None:
    """As of a process that was killed while it made it."""
    (tmp_path / NAME).touch()
    with Store.opened(tmp_path, 9) as store:
        assert store.keep([picture(1)]) == [1]


def test_the_file_is_its_owners_alone_and_safe(tmp_path: Path) -> None:
    with Store.opened(tmp_path, 9) as store:
        store.keep([picture(1)])
        for file in tmp_path.glob(f"{NAME}*"):
            assert file.stat().st_mode & 0o077 == 0, file
        with store._file.reading() as db:
            found = [db.execute(f"PRAGMA {each}").fetchone()[0] for each in ("journal_mode", "synchronous")]
        assert found == ["wal", 2]


def test_a_pair_without_a_vote_has_chosen_nothing() -> None:
    assert Pair(1, "", True, "asked", {}, {}, None, None).chosen == ""


# -- A file that is gone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_nothing_is_kept_in_a_file_that_is_not_there_any_more(tmp_path: Path, how: str) -> None:
    with Store.opened(tmp_path, 10) as store:
        store.keep([picture(1)])
        if how == "deleted":
            (tmp_path / NAME).unlink()
        else:
            (tmp_path / NAME).rename(tmp_path / "elsewhere")
        if how == "replaced":
            (tmp_path / NAME).write_bytes(b"")
        for work in (lambda: store.keep([picture(2)]), lambda: store.png(1), store.forget_all, store.tally):
            with pytest.raises(NotKept, match="was moved or deleted while it was in use"):
                work()
        if how == "moved":
            (tmp_path / "elsewhere").rename(tmp_path / NAME)
            assert store.keep([picture(2)]) == [2]
