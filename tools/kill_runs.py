"""Kills runs at random times, starts them again, and asserts that nothing was lost and all bits are equal.

    python tools/kill_runs.py --kills 100 --seed 1             all verbs in turn
    python tools/kill_runs.py --kills 50 --verbs train,ranks   some of them
    python tools/kill_runs.py --table                          the results so far

A verb runs once undisturbed. Then, from the same folder as before it, it is started and killed (SIGKILL), at
a random time or at a random one of its file operations (a write: after half of it), once or several times,
and started again until it is done: that must succeed, leave no temporary file behind, and give the same
files, but for times, dates and speeds. `ranks` is a distillation in two processes, one of which is killed;
the other is then ended as torchrun would. Every child is forked from one process that has imported all there
is, so that a run costs seconds. Results are appended to --log, which a later call goes on with.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from lcm_kit.cli import main as cli  # noqa: E402
from tests.bases import build_sd  # noqa: E402
from tests.faults import disk  # noqa: E402
from tests.recipes.small import draw_little  # noqa: E402
from tests.recipes.verbs import Verb, build, verbs  # noqa: E402
from tests.snapshots import litter, snapshot  # noqa: E402

LONGEST = 240.0  # seconds of one run


# -- Children ------------------------------------------------------------------------------------------------


def start(verb: Verb, log: Path, at_operation: int | None = None, count: Path | None = None) -> list[int]:
    """Fork the verb's processes, each the leader of a group; returns their ids, rank 0 first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(verb.ranks):
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            _child(verb, rank, port, log, at_operation, count)
        ids.append(child)
    return ids


def _child(verb: Verb, rank: int, port: int, log: Path, at_operation: int | None, count: Path | None) -> None:
    code = 70
    try:
        os.setsid()
        with log.open("ab", buffering=0) as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        if verb.ranks > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(verb.ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(verb.ranks),
            }  # fmt: skip
        torch.set_num_threads(1)
        tempfile.tempdir = str(log.parent / "tmp")
        with disk(log.parent, kill=at_operation if rank == 0 else None) as seen:
            try:
                cli.app(list(verb.words), prog_name="lcm-kit", standalone_mode=True)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
        if count and rank == 0:
            count.write_text(json.dumps([len(seen.done), sorted(sys.modules)]))
    except BaseException as error:  # a bug: its text is what the log is for
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def wait(ids: Sequence[int], until: float) -> list[int | None]:
    """The exit codes of children, -9 for one that was killed; None for one that still runs at `until`."""
    codes: dict[int, int | None] = dict.fromkeys(ids)
    while time.monotonic() < until and None in codes.values():
        for child in ids:
            if codes[child] is None:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if len(ids) > 1 and any(code not in (None, 0) for code in codes.values()):
            break  # one of several died: the others wait for it in vain
        time.sleep(0.002)
    return [codes[child] for child in ids]


def kill(child: int) -> None:
    """Kill a child with its group, or alone where it had no time to become the group's leader."""
    for strike in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            strike(child, signal.SIGKILL)


def end(ids: Sequence[int]) -> None:
    """Kill what runs still."""
    for child in ids:
        kill(child)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def whole(verb: Verb, log: Path, count: Path | None = None) -> list[int | None]:
    """Run undisturbed; the exit codes."""
    ids = start(verb, log, count=count)
    codes = wait(ids, time.monotonic() + LONGEST)
    end([child for child, code in zip(ids, codes, strict=True) if code is None])
    return codes


# -- Trials --------------------------------------------------------------------------------------------------


class Bench:
    """One verb with its folder before and after, to be killed again and again."""

    def __init__(self, place: Path, name: str) -> None:
        """Run what `name` needs, then itself, and keep both folders."""
        known = verbs(place, place / "base")
        self.place, self.name, self.verb = place, name, known[name]
        self.log, self.count = place.parent / "log.txt", place.parent / "count.json"
        self.temporary = place.parent / "tmp"
        self.before, self.seconds, self.operations = place.parent / f"before-{name}", 0.0, 0
        for folder in (place, self.temporary):
            folder.mkdir(parents=True)
        build(place, build_sd(place / "base"))
        for each in self.verb.after:
            self._insist(whole(known[each], self.log, self.count), each)
            _import(self.count)
        shutil.copytree(place, self.before)
        self._insist(whole(self.verb, self.log, self.count), name)
        _import(self.count)
        self.wanted = snapshot(place, self.verb.dated)
        self.restore()
        started = time.monotonic()
        self._insist(whole(self.verb, self.log, self.count), name)
        self.seconds, self.operations = time.monotonic() - started, json.loads(self.count.read_text())[0]
        if uneven := self._differs():
            raise SystemExit(f"{name} undisturbed is not the same twice: {', '.join(uneven)}")

    def _insist(self, codes: Sequence[int | None], name: str) -> None:
        if any(codes):
            raise SystemExit(f"{name} undisturbed ended with {codes}:\n{self.log.read_text()[-3000:]}")

    def restore(self) -> None:
        """The folder as it was before the verb, and nothing in that of temporary files."""
        for folder in (self.place, self.temporary):
            shutil.rmtree(folder)
        shutil.copytree(self.before, self.place)
        self.temporary.mkdir()

    def _differs(self) -> list[str]:
        after = snapshot(self.place, self.verb.dated)
        names = self.wanted.keys() | after.keys()
        return sorted(name for name in names if self.wanted.get(name) != after.get(name))

    def trial(self, chance: random.Random) -> dict[str, Any]:
        """Kill at least once, then run to the end; says what differed."""
        self.restore()
        self.log.write_text("")
        kills, where, ended = 0, [], False
        while not ended and (not kills or chance.random() < 0.4):
            killed, ended = self._kill(chance, where)
            kills += killed
        codes = [0] if ended else whole(self.verb, self.log)
        left = litter(self.place) + sorted(each.name for each in self.temporary.iterdir())
        found = {"verb": self.name, "kills": kills, "where": where, "codes": codes}
        if codes == [2] and self.verb.done and self.verb.done in self.log.read_text():
            found["codes"] = [0]
        found |= {"differs": self._differs(), "left": left}
        return found if is_fine(found) else {**found, "log": self.log.read_text()[-2000:]}

    def _kill(self, chance: random.Random, where: list[str]) -> tuple[int, bool]:
        """Start and kill; whether a process was killed, and whether the run was done before that."""
        at = chance.randint(1, self.operations) if chance.random() < 0.5 else None
        delay = chance.uniform(0.0, self.seconds)
        ids = start(self.verb, self.log, at_operation=at)
        if at is not None:
            where.append(f"operation {at} of {self.operations}")
            codes = wait(ids, time.monotonic() + LONGEST)
        else:
            where.append(f"{delay:.3f} of {self.seconds:.3f} s")
            codes = wait(ids, time.monotonic() + delay)
            victim = chance.choice(ids)
            if None in codes:
                kill(victim)
        running = [child for child, code in zip(ids, codes, strict=True) if code is None]
        end(running)
        return int(bool(running) or -signal.SIGKILL in codes), all(code == 0 for code in codes)


def _import(count: Path) -> None:
    """Import what the last undisturbed child had to: the next ones are forked with it."""
    for name in json.loads(count.read_text())[1]:
        if name not in sys.modules and not name.startswith(("__", "lcm_kit_")):
            with contextlib.suppress(Exception):  # of a module that its parent makes
                importlib.import_module(name)


def is_fine(found: dict[str, Any]) -> bool:
    """Whether nothing was lost."""
    return not any(found["codes"]) and not found["differs"] and not found.get("left")


def table(log: Path) -> str:
    """Kills, runs and faults by verb."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    names = dict.fromkeys(row["verb"] for row in rows)
    kills: Counter[str] = Counter()
    for row in rows:
        kills[row["verb"]] += row["kills"]
    lines = [f"{'verb':14}{'runs':>6}{'kills':>7}{'lost':>6}{'other bits':>12}{'litter':>8}"]
    for name in [*names, None]:
        mine = [row for row in rows if name in (None, row["verb"])]
        lost, other, left = (
            sum(bool(test(row)) for row in mine)
            for test in (
                lambda row: any(row["codes"]), lambda row: row["differs"], lambda row: row.get("left")
            )
        )  # fmt: skip
        total = sum(kills.values()) if name is None else kills[name]
        lines.append(f"{name or 'all':14}{len(mine):>6}{total:>7}{lost:>6}{other:>12}{left:>8}")
    return "\n".join(lines)


def main() -> int:
    """Kill as many as asked for; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default=",".join(verbs(Path(), Path())))
    parser.add_argument("--log", type=Path, default=Path("kill_runs.jsonl"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for all verbs together")
    parser.add_argument("--table", action="store_true", help="print the results so far, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.log))
        return 0
    draw_little(pytest.MonkeyPatch())
    chance, fine, wanted = random.Random(arguments.seed), True, arguments.verbs.split(",")
    for number, name in enumerate(wanted):
        until = time.monotonic() + 60 * arguments.minutes / len(wanted)
        with tempfile.TemporaryDirectory(prefix="kill-runs-") as temporary:
            bench, done = Bench(Path(temporary) / "place", name), 0
            share = arguments.kills // len(wanted) + (number < arguments.kills % len(wanted))
            print(f"{name}: {bench.seconds:.1f} s, {bench.operations} file operations", flush=True)
            while done < share and time.monotonic() < until:
                found = bench.trial(chance)
                done += found["kills"]
                fine &= is_fine(found)
                with arguments.log.open("a") as handle:
                    handle.write(json.dumps(found) + "\n")
                if not is_fine(found):
                    print(json.dumps(found, indent=1), flush=True)
    print(table(arguments.log))
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
