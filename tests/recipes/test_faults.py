"""A disk that refuses at any operation of any verb: one sentence, nothing lost, and the same run goes on.

Each verb runs once undisturbed, and what it does to the disk is counted. Then, from the same folder, it runs
with the k-th operation refused: by a disk that is full (`ENOSPC`) or read-only (`EROFS`) from then on, or
without the right to it that once (`EACCES`). It must end with one sentence that names a path of the run, or
do all of its work; what was finished before must be there and whole, with nothing half-written; and run
again, it must leave the same bits as undisturbed.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lcm_kit.cli.main import app
from lcm_kit.evaluation import result_shapes
from lcm_kit.io import locks, own_files
from lcm_kit.training import checkpoints
from tests.faults import Refusal, disk
from tests.recipes.small import draw_little
from tests.recipes.verbs import build, verbs
from tests.snapshots import litter, snapshot

KINDS = (errno.ENOSPC, errno.EROFS, errno.EACCES)
SOME = 16  # refusals of a verb, of all that there are; FAULTS=all tries each, which takes hours
NAMES = (
    "encode", "again", "train", "longer", "style", "export", "once_more", "quality", "merge", "report",
    "sweep", "brand", "compose", "convert", "sample", "samples", "prior",
)  # fmt: skip


class Bench:
    """A verb with the folder before it and after, to be refused again and again."""

    def __init__(self, kitchen: Kitchen, name: str) -> None:
        """Run what it needs, then itself, and count."""
        self.place, self.name = kitchen.place, name
        self.before = kitchen.after(kitchen.verbs[name].after)
        self.old = snapshot(self.before)
        self.restore()
        with disk(self.place) as seen:
            done = kitchen.run(name)
        assert done.exit_code == 0, done.output
        self.operations, self.wanted = seen.done, snapshot(self.place)
        self._run = kitchen.run

    def restore(self) -> None:
        """The folder as it was before the verb."""
        shutil.rmtree(self.place)
        shutil.copytree(self.before, self.place)

    def all_refusals(self) -> list[Refusal]:
        """Each operation for each reason that it can be refused for."""
        numbered = list(enumerate(self.operations, 1))
        every = [
            (Refusal(k, number, number != errno.EACCES), name) for number in KINDS for k, name in numbered
        ]
        return [each for each, name in every if each.says_no(each.at, name.split()[0])]

    def refusals(self) -> list[Refusal]:
        """Of operations that are alike but for numbers in their names the first and the last.

        Each is refused for another reason, and the reasons take turns from one group to the next.
        """
        groups: dict[str, list[int]] = {}
        for k, name in enumerate(self.operations, 1):
            groups.setdefault(re.sub(r"\d+", "#", name), []).append(k)
        found = []
        for turn, (name, at) in enumerate(groups.items()):
            turns = [Refusal(0, number, number != errno.EACCES) for number in KINDS[turn % 3 :] + KINDS]
            reasons = [each for each in turns if each.says_no(0, name.split()[0])]
            for k, reason in zip(sorted({at[0], at[-1]}), reasons, strict=False):
                found.append(reason._replace(at=k))
        return found

    def refuse(self, refusal: Refusal) -> None:
        """Refuse once, look at what is there, and run again."""
        self.restore()
        with disk(self.place, refusal) as seen:
            done = self._run(self.name)
        assert seen.refused, f"{refusal}: nothing was refused"
        where = f"{refusal} ({seen.refused[0]})"
        self._ended_well(done, where)
        removes = any(operation.startswith(("unlink", "rmdir")) for operation in seen.refused)
        if not removes:  # else the next run does it
            assert litter(self.place) == [], where
        locks.sweep(self.place)
        now = snapshot(self.place)
        if done.exit_code == 0:
            assert now == self.wanted, where
        self._nothing_is_lost(now, where)
        done = self._run(self.name)
        assert done.exit_code == 0, f"{where}, and then: {done.output}"
        assert snapshot(self.place) == self.wanted and litter(self.place) == [], where

    def _ended_well(self, done: Result, where: str) -> None:
        """With all of the work done, or with one sentence that names a path."""
        assert done.exception is None or isinstance(done.exception, SystemExit), (where, done.exc_info)
        assert done.exit_code in (0, 2), where
        sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(sentences) == (done.exit_code == 2), f"{where}: {done.stderr}"
        if sentences:
            assert done.stderr.splitlines()[-1] == sentences[0], f"{where}: {done.stderr}"
            path = f"{re.escape(str(self.place))}[/:]"  # of the folder itself, or below it
            assert re.search(path, sentences[0]), f"{where}: {sentences[0]}"

    def _nothing_is_lost(self, now: dict[str, str], where: str) -> None:
        """What stood there before and is there at the end stands there now, and all of it is whole."""
        assert (self.old.keys() & self.wanted.keys()) <= now.keys(), where
        changed = [name for name in now if now[name] not in (self.old.get(name), self.wanted.get(name))]
        for name in changed:
            if "/state/" not in name:
                _read(self.place / name, where)
        for state in self.place.glob("*/state/*"):
            checkpoints.read(state)  # with its hashes
        new = {name for name in now if "/state/" in name} - self.old.keys()
        if self.name == "longer" and not new:
            assert now["run/config.yaml"] == self.old["run/config.yaml"], where


def _read(file: Path, where: str) -> None:
    """Read a file that is neither as before nor as at the end: it must be whole all the same."""
    if file.suffix == ".json":
        own_files.read_json(file, result_shapes.Version, "")
    elif file.suffix == ".jsonl":
        own_files.read_lines(file, result_shapes.Version, "")
    elif file.suffix == ".png":
        own_files.read_picture(file, "")
    else:
        assert file.suffix == ".safetensors" and own_files.is_whole(file), f"{where}: {file} is another"


class Kitchen:
    """One folder in which all verbs are run, and copies of it as it was after some of them."""

    def __init__(self, place: Path, base: Path) -> None:
        """Pictures, prompts and configs, and nothing that a verb made."""
        self.place, self.copies, self.verbs = place, place.parent, verbs(place, base)
        build(place, base)
        shutil.copytree(place, self.copies / "after")

    def run(self, name: str) -> Result:
        """A verb, as from the command line."""
        return CliRunner().invoke(app, list(self.verbs[name].words))

    def after(self, names: Sequence[str]) -> Path:
        """The folder after these verbs."""
        copy = self.copies / "-".join(("after", *names))
        if not copy.is_dir():
            before = self.after(names[:-1])
            shutil.rmtree(self.place)
            shutil.copytree(before, self.place)
            done = self.run(names[-1])
            assert done.exit_code == 0, done.output
            shutil.copytree(self.place, copy)
        return copy


@pytest.fixture(scope="module")
def bench(
    sd_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Bench]]:
    """`bench(verb)`, made once."""
    with pytest.MonkeyPatch.context() as patch:
        draw_little(patch)
        kitchen = Kitchen(tmp_path_factory.mktemp("faults") / "place", sd_base())
        yield cache(partial(Bench, kitchen))


CHOSEN = [  # a verb, the beginning of an operation's name, which of these it is, and why it is refused
    ("encode", "fsync cache/.shard-00001", 0, errno.ENOSPC),
    ("encode", "replace cache/.manifest", 0, errno.EROFS),
    ("again", "unlink cache/shard-00001", 0, errno.EACCES),
    ("longer", "open run/.train.lock", 0, errno.EROFS),
    ("longer", "replace run/state/.step-000004", 1, errno.EACCES),
    ("longer", "write run/state/.step-000004", 3, errno.ENOSPC),
    ("longer", "replace run/.adapter", -1, errno.EACCES),
]


@pytest.mark.parametrize(("name", "begin", "which", "number"), CHOSEN)
def test_a_disk_that_refuses(
    name: str, begin: str, which: int, number: int, bench: Callable[[str], Bench]
) -> None:
    """Some that something was lost by once, or may be."""
    found = [k for k, done in enumerate(bench(name).operations, 1) if done.startswith(begin)]
    bench(name).refuse(Refusal(found[which], number, stays=number != errno.EACCES))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_of_each_kind(name: str, bench: Callable[[str], Bench]) -> None:
    known, faults = bench(name).refusals(), []
    assert len(bench(name).all_refusals()) > 10 and len(known) > 5
    some = random.Random(name).sample(known, min(len(known), SOME))
    for refusal in bench(name).all_refusals() if os.environ.get("FAULTS") == "all" else some:
        try:
            bench(name).refuse(refusal)
        except AssertionError as fault:
            faults.append(f"{refusal}: {fault}")
    assert not faults, "\n\n".join(faults)
