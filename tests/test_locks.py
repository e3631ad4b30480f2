"""One process at a time in a folder, whatever becomes of that process; and no trace of what was refused."""

from __future__ import annotations

import errno
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lcm_kit.config import shipped
from lcm_kit.errors import UserError
from lcm_kit.io import locks
from lcm_kit.io.files import machine
from lcm_kit.io.locks import held
from tests.recipes.small import environment

HOLD = """
import sys
from pathlib import Path
from lcm_kit.io.locks import held
with held(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that trains in `folder` until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=environment(1), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_second_is_told_of_the_first_and_comes_in_when_that_was_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with another(run) as first:
        for _ in range(2):  # being refused takes nothing from the first
            with pytest.raises(UserError, match=rf"^{run}: process {first.pid} is at work there \(train\); "):
                held(run, "train").__enter__()
        with held(run, "evaluation/quality"):  # other work, another lock
            assert sorted(os.listdir(run)) == [".evaluation-quality.lock", ".train.lock"]
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert os.listdir(run) == [".train.lock"]  # nobody holds what lies there
    with held(run, "train"):
        (run / "adapter").mkdir()
    assert os.listdir(run) == ["adapter"]


def test_what_was_refused_leaves_no_folder(tmp_path: Path) -> None:
    run = tmp_path / "a/b"
    with pytest.raises(UserError, match="no"), held(run, "train"):
        assert os.listdir(run) == [".train.lock"]
        raise UserError("no")
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine", "train"):
        pass
    assert os.listdir(tmp_path) == ["mine"]  # it was there before


def test_the_ranks_of_one_run_share_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path, "train"):
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path, "train"):
            assert os.listdir(tmp_path) == [".train.lock"]
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match=rf"process {os.getpid()} is at work"):
            held(tmp_path, "train").__enter__()


def test_what_a_launcher_starts_again_waits_for_its_predecessor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which may be at its last step still, or hold the lock of a machine that has just vanished."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with another(tmp_path) as first:
        threading.Timer(0.5, first.kill).start()
        with held(tmp_path, "train"):
            assert first.wait() == -signal.SIGKILL
    said = capsys.readouterr().err
    assert f"process {first.pid} is at work there (train); waiting up to 120 s for it to end" in said
    monkeypatch.setattr(locks, "_PREDECESSOR", 0.0)
    with another(tmp_path) as first, pytest.raises(UserError, match=rf"process {first.pid} is at work there"):
        held(tmp_path, "train").__enter__()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_where_nothing_can_be_written(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with pytest.raises(UserError, match=rf"^{tmp_path}: cannot be written \({os.strerror(number)}\)"):
        held(tmp_path, "train").__enter__()
    with held(tmp_path, "train", needed=False):
        pass


def test_a_file_system_without_locks_is_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with held(tmp_path / "run", "train"):
        pass
    assert "its file system has no locks; start nothing else there" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    for needed in (True, False):
        with pytest.raises(UserError, match="run is a file, not a folder"):
            held(tmp_path / "run", "train", needed=needed).__enter__()


@pytest.mark.parametrize("name", [n for n in shipped.names() if n.endswith(".py")])
def test_every_recipe_is_alone_in_its_folder(name: str) -> None:
    main = shipped.load_recipe(name.removesuffix(".py")).main
    assert inspect.unwrap(main) is not main, f"{name}: decorate main with lcm_kit.io.locks.alone"


LEAVE = """
import os, sys
from pathlib import Path
from lcm_kit.io import files
with files.atomic_folder(Path(sys.argv[1]) / "state/step-000006") as folder:
    with files.atomic_file(folder.parent / "manifest.json") as file:
        file.write_text("half")
        print(flush=True)
        sys.stdin.read()
"""


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/.step-000004.a user's own.tmp").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVE, str(tmp_path)], env=environment(1), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "\n"
    assert len(os.listdir(tmp_path / "state")) == 3
    with held(tmp_path, "train"):
        assert len(os.listdir(tmp_path / "state")) == 3
    process.kill()
    process.communicate()
    other = tmp_path / "state" / f".x.{'0' * 8}-{process.pid}.tmp"  # of another machine, and of today
    other.touch()
    with held(tmp_path, "train"):
        assert sorted(os.listdir(tmp_path / "state")) == [".step-000004.a user's own.tmp", other.name]
    os.utime(other, (0, 0))
    with held(tmp_path, "train"):
        assert os.listdir(tmp_path / "state") == [".step-000004.a user's own.tmp"]


def test_a_folder_that_a_dead_process_put_aside_comes_back_unless_another_took_its_place(
    tmp_path: Path,
) -> None:
    """Killed between its two renames: the finished adapter is not swept away with what was half-written."""
    for name in ("adapter", "state"):
        aside = tmp_path / f".{name}.{machine()}-{2**30}.abc.old/{name}"
        aside.mkdir(parents=True)
        (aside / "file").write_text("old")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/file").write_text("new")
    with held(tmp_path, "train"):
        found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [".train.lock", "adapter", "state"]
    assert [(tmp_path / name / "file").read_text() for name in ("adapter", "state")] == ["old", "new"]
