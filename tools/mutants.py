"""Do the tests notice? Wrong-on-purpose edits, one at a time, each in a temporary copy of this checkout.

    python tools/mutants.py                     the edits of tools/mutants.yaml: formulas, thresholds, guards
    python tools/mutants.py --only solvers --only "losses.py: l2"
    python tools/mutants.py --generic 200       so many of those that syntax suggests in the pure mathematics
    python tools/mutants.py --list

Each edit runs the tests that the table names for it, up to the first that fails: a line as it comes, and a
score. An edit that they all pass has survived, and the exit code is 1; it is 2 where the table does not fit
the sources any more or the tests fail without an edit. No test takes longer than four times what it took
without an edit: an edit that makes a loop endless is noticed by that.

Heavy libraries are imported once and each run is a fork, so that most edits take seconds. POSIX only.
"""

from __future__ import annotations

import argparse
import compileall
import gc
import importlib
import os
import py_compile
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.mutation import Edit, TableError, curated, generic

ROOT = Path(__file__).parents[1]
LEAST, FACTOR = 20.0, 4.0  # seconds that a run has at least; else so many times those of the tests alone
_ELSEWHERE = 99  # exit code of a run that imported another file than the edited one
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}  # fmt: skip
# Nothing that a fork would do again and again: no rewriting of asserts, no search for garbage at the end
OPTIONS = ("-x", "-q", "--no-header", "--tb=line", "--assert=plain", "-p", "no:cacheprovider",
           "-p", "no:unraisableexception")  # fmt: skip


class Ran(NamedTuple):
    """How a run of pytest ended: its exit code (None: it was stopped), its seconds, and what it printed."""

    code: int | None
    seconds: float
    output: str


@dataclass(frozen=True)
class Copy:
    """A copy of a checkout that edits are made in."""

    folder: Path

    @classmethod
    @contextmanager
    def of(cls, root: Path) -> Iterator[Copy]:
        """All that git tracks or would, at `root`; it is gone after the block."""
        listed = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, check=True, capture_output=True
        )
        with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
            folder = Path(temporary).resolve() / "checkout"
            for name in filter(None, listed.stdout.decode().split("\0")):
                if (root / name).is_file():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(root / name, folder / name)
            # By hash: an edit that keeps a file's length, made within a second, is seen too
            hashed = py_compile.PycInvalidationMode.CHECKED_HASH
            compileall.compile_dir(folder, quiet=1, invalidation_mode=hashed)
            yield cls(folder)

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """Within the block the copy has `edit`."""
        path = self.folder / edit.file
        source = path.read_bytes()
        path.write_bytes(edit.applied(source))
        try:
            yield
        finally:
            path.write_bytes(source)

    def run(self, tests: Sequence[str], limit: float, file: str | None = None) -> Ran:
        """`pytest -x` on `tests` in a fork, for `limit` seconds at most.

        With `file`, a module of it that does not come from this copy is told by the exit code.
        """
        started, log = time.monotonic(), self.folder.parent / "log"
        sys.stdout.flush()
        child = os.fork()
        if not child:
            self._child(tests, log, file)
        code = None
        try:
            while code is None and time.monotonic() - started < limit:
                time.sleep(0.02)
                ended, status = os.waitpid(child, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if ended else None
        finally:
            with suppress(ProcessLookupError):  # the child has a group of its own, of all that it started
                os.killpg(child, signal.SIGKILL)
            if code is None:
                os.waitpid(child, 0)
        return Ran(code, time.monotonic() - started, log.read_text(errors="replace"))

    def _child(self, tests: Sequence[str], log: Path, file: str | None) -> NoReturn:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = 3
        try:
            os.chdir(self.folder)
            os.environ["PYTHONPATH"] = str(self.folder)
            sys.path[:] = [str(self.folder), *(path for path in sys.path if path != str(ROOT))]
            for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
                del sys.modules[name]
            import pytest

            options = [*OPTIONS, f"--basetemp={self.folder.parent / 'scratch'}"]
            code = int(pytest.main([*options, *tests]))
            module = sys.modules.get(file.removesuffix(".py").replace("/", ".")) if file else None
            if module is not None and module.__file__ != str(self.folder / str(file)):
                code = _ELSEWHERE
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def preload(names: Sequence[str]) -> None:
    """Import what tests need of heavy libraries, `module` or `module:attribute`, before the first fork."""
    for name in names:
        module, _, attribute = name.partition(":")
        loaded = importlib.import_module(module)
        if attribute:
            getattr(loaded, attribute)
    gc.freeze()  # what is there now is no fork's garbage


def verdict(edit: Edit, ran: Ran) -> tuple[str, str]:
    """Whether it was noticed, and by which test. Raises `TableError` if something else was tested."""
    if ran.code is None:
        return "noticed", "it took too long"
    if ran.code == _ELSEWHERE:
        raise TableError(f"{edit.name}: the tests import another {edit.file} than the edited one")
    if ran.code == 0:
        return "SURVIVED", " ".join(edit.tests)
    failed = _FAILED.search(ran.output)
    return "noticed", failed[1] if failed else f"pytest ended with {ran.code}"


def try_all(edits: Sequence[Edit], copy: Copy, minutes: float, least: float) -> list[tuple[Edit, str]]:
    """Every edit with its verdict, a line each as it comes, until `minutes` are over.

    Raises `TableError` if the tests fail without an edit.
    """
    limits: dict[tuple[str, ...], float] = {}
    found, until = [], time.monotonic() + 60 * minutes
    for edit in edits:
        if time.monotonic() > until:
            break
        if edit.tests not in limits:
            clean = copy.run(edit.tests, 1800.0)
            if clean.code != 0:
                raise TableError(f"without an edit {' '.join(edit.tests)} fails:\n{clean.output}")
            limits[edit.tests] = max(least, FACTOR * clean.seconds)
            print(f"clean    {clean.seconds:6.1f} s  {' '.join(edit.tests)}", flush=True)
        with copy.edited(edit):
            ran = copy.run(edit.tests, limits[edit.tests], edit.file)
        kind, by = verdict(edit, ran)
        print(f"{kind:8} {ran.seconds:6.1f} s  {edit.name}  [{by}]", flush=True)
        found.append((edit, kind))
    return found


def summary(found: Sequence[tuple[Edit, str]], left: int) -> str:
    """The score, and what survived."""
    counts = Counter(kind for _, kind in found)
    lines = [f"{counts['noticed']} of {len(found)} noticed" + (f", {left} not tried" if left else "")]
    lines += [f"SURVIVED  {edit.name}" for edit, kind in found if kind == "SURVIVED"]
    return "\n".join(lines)


def chosen(arguments: argparse.Namespace) -> tuple[list[Edit], list[str]]:
    """The edits to try, and what to import before. Raises `TableError` as `curated` and `generic` do."""
    table = yaml.safe_load(arguments.table.read_text(encoding="utf-8"))
    edits = curated(table, arguments.root) if arguments.generic is None else generic(table, arguments.root)
    if arguments.only:
        edits = [edit for edit in edits if any(text in edit.name for text in arguments.only)]
    if arguments.generic is not None and arguments.generic < len(edits):
        edits = random.Random(arguments.seed).sample(edits, arguments.generic)
    if not edits:
        raise TableError("there is no edit of that name; --list names them all")
    return edits, table["preload"]


def main(given: Sequence[str] | None = None) -> int:
    """Exit code: 0 all noticed, 1 some survived, 2 the table or the tests are at fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="edits whose name has this; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="name the edits and run nothing")
    parser.add_argument("--generic", type=int, metavar="N", help="N edits from the syntax, not the table's")
    parser.add_argument("--seed", type=int, default=0, help="which N (0)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no edit after so many")
    parser.add_argument("--least", type=float, default=LEAST, help=f"seconds that any run has ({LEAST:g})")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (this one)")
    arguments = parser.parse_args(given)
    try:
        edits, libraries = chosen(arguments)
        if arguments.list:
            print("\n".join(edit.name for edit in edits))
            return 0
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copy is removed then too
        os.environ.update(ENVIRONMENT)
        sys.dont_write_bytecode = True
        preload(libraries)
        with Copy.of(arguments.root) as copy:
            found = try_all(edits, copy, arguments.minutes, arguments.least)
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(found, len(edits) - len(found)))
    return int(any(kind == "SURVIVED" for _, kind in found))


if __name__ == "__main__":
    sys.exit(main())
