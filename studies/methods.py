"""The judge of docs/methods.md: which distillation method serves at 1, 2, 4 and 8 steps, and what it costs.

    OMP_NUM_THREADS=1 python -m studies.methods                 # all of studies/methods.yaml that is not done
    OMP_NUM_THREADS=1 python -m studies.methods teacher         # the teacher's pictures alone
    OMP_NUM_THREADS=1 python -m studies.methods lcm pcm-4       # these entries
    python -m studies.methods --tables                          # results.csv, the page's tables and pictures
    python -m studies.methods --entries MY.yaml --output FOLDER ...

A cell is an entry of the list and a seed. It is trained by the recipe of its config in a process of its own,
whose processor time is written down with every state; the states are drawn as the curve, the end with more
prompts. Several processes may work at once (OMP_NUM_THREADS=1 for each): each takes what no other has, and
what is done is not done again. What is measured is measured by `--tables`, from the rows that are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from lcm_kit.config import shipped
from lcm_kit.config.load import load
from lcm_kit.config.schema import Training
from lcm_kit.data import sources
from lcm_kit.errors import UserError
from lcm_kit.io.locks import held
from lcm_kit.lora.diffusers_format import FILE
from lcm_kit.quiet import quiet
from lcm_kit.training import run_files, runtime
from studies.methods_plan import CLOCK, DONE, TEACHER, Plan, cells, read

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = ROOT / "studies" / "methods.yaml"
OUTPUT = ROOT / "runs" / "methods"
FAILED = "failed"  # as DONE
_POLL = 10.0  # seconds until another process's work is looked at again


def config_of(plan: Plan, output: Path, name: str, seed: int) -> Training:
    """The training of a cell: the entry's config with the study's overrides on top.

    Raises `UserError` for an entry that trains nothing, and as `load`.
    """
    entry = plan.entries[name]
    if entry.config is None:
        raise UserError(f"entry {name} is drawn from {entry.drawn_from} and trains nothing")
    path = shipped.config_path(entry.config)
    plain = load(path, _words(entry.set))
    if not isinstance(plain, Training):
        raise UserError(f"entry {name}: {entry.config} trains nothing; give a config of configs/distill")
    ours: dict[str, Any] = {
        "output": str(output / f"{name}-{seed}" / "run"),
        "seed": seed,
        "data.cache": str(output / "cache" / Path(plain.data.cache).name),
        "validation.prompts": None, "validation.every": 0, "validation.diversity": 0,
        "checkpoint.every": plan.every(plain.steps), "checkpoint.keep": 1000,
        "logging.trackers": [],
    }  # fmt: skip
    if entry.start is not None:
        ends = sorted((output / f"{entry.start}-{seed}" / "points").glob(f"step-*/{FILE}"))
        if not ends:
            raise UserError(f"entry {name} starts as {entry.start}-{seed}, which is not done")
        ours["adapter.start"] = [{"path": str(ends[-1])}]
    loaded = load(path, [*_words(entry.set), *_words(ours)])
    assert isinstance(loaded, Training)
    return loaded


def _words(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


# -- Training ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def clocked(file: Path) -> Iterator[None]:
    """Append to `file` with every state: the process, the step, processor seconds, peak memory in MiB.

    Writing states is left out of the seconds: how many there are is the study's affair.
    """
    save, writing = runtime.Saver.save, [0.0]

    def timed(self: runtime.Saver, step: int, window: Sequence[float]) -> None:
        now = time.process_time()
        with file.open("a") as handle:
            line = {
                "process": PROCESS, "step": step, "seconds": now - writing[0],
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }  # fmt: skip
            handle.write(json.dumps(line) + "\n")
        save(self, step, window)
        writing[0] += time.process_time() - now

    with mock.patch.object(runtime.Saver, "save", timed):
        yield


PROCESS = f"{time.time():.6f}"  # of this one: a resumed training has other clocks


def train(plan: Plan, output: Path, name: str, seed: int) -> None:
    """Train a cell in this process; one that was stopped goes on."""
    config = config_of(plan, output, name, seed)
    while True:
        try:
            sources.encode(config, progress=False)
            break
        except UserError as error:  # another process encodes the same pictures
            if "is at work there" not in str(error):
                raise
            time.sleep(_POLL)
    folder = output / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with clocked(folder / CLOCK):
        shipped.load_recipe(config.recipe).main(config)


def _train_apart(args: argparse.Namespace, name: str, seed: int) -> None:
    """`train` in a process of its own, so that its clock and its peak of memory are the training's."""
    words = ["--entries", args.entries, "--output", args.output, "--train", f"{name}-{seed}"]
    subprocess.run([sys.executable, "-m", "studies.methods", *map(str, words)], cwd=ROOT, check=True)


# -- One cell ------------------------------------------------------------------------------------------------


def do(plan: Plan, args: argparse.Namespace, studio: Any, name: str, seed: int) -> None:
    """Everything of one cell: training, and the rows of what it draws."""
    entry, folder = plan.entries[name], args.output / f"{name}-{seed}"
    source = entry.drawn_from or name
    config = config_of(plan, args.output, source, seed)
    run = Path(config.output)
    if entry.drawn_from is None:
        _train_apart(args, name, seed)
    states = run_files.folders(run)
    for state in states:
        step = run_files.step_of(state)
        studio.draw_point(folder, run, state, entry, state == states[-1])
        print(f"== {name}-{seed}: step {step} is drawn", flush=True)
    about = {
        "entry": asdict(entry), "states": [run_files.step_of(state) for state in states],
        "batch": config.batch_size * config.accumulation,
    }  # fmt: skip
    (folder / DONE).write_text(json.dumps(about, indent=1) + "\n")


def _in_the_way(plan: Plan, output: Path, name: str, seed: int) -> str | None:
    """The entry whose cell of that seed must be done before this one, if it is not."""
    before = plan.entries[name].start or plan.entries[name].drawn_from
    return before if before and not (output / f"{before}-{seed}" / DONE).is_file() else None


def _attempt(plan: Plan, args: argparse.Namespace, studio: Any, name: str, seed: int) -> str:
    """Do a job if it can be done now: `done`, `later`, or `failed`, which is said and marked for others."""
    folder = args.output / (TEACHER if name == TEACHER else f"{name}-{seed}")
    if name != TEACHER:
        if (folder / DONE).is_file():
            return DONE
        if before := _in_the_way(plan, args.output, name, seed):
            failed = (args.output / f"{before}-{seed}" / FAILED).is_file()
            return FAILED if failed else "later"
    try:
        with held(folder, f"study-{seed}"):
            if name == TEACHER:
                studio.teacher_jobs()[seed]()
            elif not (folder / DONE).is_file():
                (folder / FAILED).unlink(missing_ok=True)
                do(plan, args, studio, name, seed)
    except subprocess.CalledProcessError:
        print(f"== {name}-{seed}: its training failed, as said above; the others go on", flush=True)
        (folder / FAILED).touch()
        return FAILED
    except UserError as error:
        if "is at work there (study" not in str(error):
            raise
        return DONE if name == TEACHER else "later"
    return DONE


def work(plan: Plan, args: argparse.Namespace) -> int:
    """The teacher's pictures, then the cells, each by the process that gets there first; how many failed."""
    from studies.methods_draw import Studio

    studio = Studio(plan, args.output)
    wanted = args.entry or [TEACHER, *plan.entries]
    jobs = [(TEACHER, k) for k in range(len(studio.teacher_jobs())) if TEACHER in wanted]
    jobs += [(name, seed) for name, seed in cells(plan) if name in wanted]
    for name, seed in jobs:
        before = None if name == TEACHER else _in_the_way(plan, args.output, name, seed)
        if before and before not in wanted:
            raise UserError(f"{name}-{seed} needs {before}-{seed}, which is not done; name {before} too")
    failed = 0
    while jobs:
        found = {job: _attempt(plan, args, studio, *job) for job in jobs}
        failed += sum(each == FAILED for each in found.values())
        jobs = [job for job, each in found.items() if each == "later"]
        if jobs:
            time.sleep(_POLL)
    return failed


def main(words: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("studies.methods", description=__doc__.partition("\n")[0])
    parser.add_argument("entry", nargs="*", help="entries to do, or `teacher`; none: all")
    parser.add_argument("--entries", type=Path, default=ENTRIES, help="the list of entries")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the folder of everything")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="with --tables: where the page is")
    parser.add_argument("--tables", action="store_true", help="measure, and write the tables")
    parser.add_argument("--train", metavar="CELL", help="train one cell in this process, nothing else")
    args = parser.parse_args(words)
    args.output, args.entries = args.output.resolve(), args.entries.resolve()
    plan = read(args.entries)
    unknown = [name for name in args.entry if name not in (*plan.entries, TEACHER)]
    if unknown:
        raise UserError(f"entry {unknown[0]!r} is not in {args.entries}; it has {', '.join(plan.entries)}")
    quiet()
    if args.train:
        name, _, seed = args.train.rpartition("-")
        train(plan, args.output, name, int(seed))
    elif args.tables:
        from studies.methods_measure import measured
        from studies.methods_tables import write

        write(measured(plan, args.output), plan, args.output, args.docs)
    else:
        return min(1, work(plan, args))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
