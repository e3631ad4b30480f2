"""Kills runs at random times, starts them again, and asserts that nothing was lost and all bits are equal.

    python tools/kill_runs.py --kills 100 --seed 1             all verbs in turn
    python tools/kill_runs.py --kills 50 --verbs train,ranks   some of them
    python tools/kill_runs.py --table                          the results so far

A verb runs once undisturbed. Then, from the same folder as before it, it is started and killed (SIGKILL), at
a random time or at a random one of its file operations, once or several times, and started again until it is
done: that must succeed, leave no temporary file behind, and give the same files, but for times, dates and
speeds. `ranks` is a distillation in two processes, one of which is killed; the other is then ended as
torchrun would. Every child is forked from one process that has imported all there is, so that a run costs
seconds. Results are appended to --log, which a later call goes on with.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lcm_kit import cli  # noqa: E402
from lcm_kit.config.load import dump  # noqa: E402
from lcm_kit.config.schema import Training  # noqa: E402
from tests.bases import build_sd  # noqa: E402
from tests.recipes.small import configure, prepare  # noqa: E402
from tests.snapshots import litter, snapshot  # noqa: E402

LONGEST = 240.0  # seconds of one run
OPERATIONS = ("replace", "fsync", "rename", "mkdir", "unlink", "rmdir")  # of os, which pathlib calls
STORY = [
    f"{stage}.{key}"
    for stage, keys in {
        "style": ["validation.control=null"],
        "distill": ["data.samples.count=4", "data.samples.steps=1"],
    }.items()
    for key in [
        "steps=2", "batch_size=2", "adapter.rank=4", "optimizer.warmup_steps=0", "checkpoint.every=1",
        "logging.trackers=[]", "validation.every=0", "validation.prompts=null", "data.regularisation=null",
        "data.regularisation_share=null", *keys,
    ]
] + [
    "evaluation.control=null", "evaluation.count=3", "evaluation.teacher_steps=2", "evaluation.steps=[1]",
    "evaluation.resamples=100", "evaluation.pictures=1",
]  # fmt: skip


class Verb(NamedTuple):
    """What is run, what must have run before, and what of the folder it makes."""

    words: Sequence[str]
    after: Sequence[str] = ()
    ranks: int = 1
    dated: bool = False  # files that it reads again have the date in them: of tensors and pictures then
    done: str = ""  # what it says where it was done already, and exit code 2 is right


def verbs(place: Path) -> dict[str, Verb]:
    """All verbs, on the configs that `build` writes into `place`."""
    run, style, prompts = place / "run", place / "style", f"prompts={place}/prompts.txt"
    few = ["count=2", "batch_size=2", prompts]
    swept = ["count=3", "batch_size=6", "images_per_prompt=2", "resamples=100", "pictures=1", prompts]
    return {
        "encode": Verb(["encode", f"{place}/distill.yaml"]),
        "train": Verb(["train", f"{place}/distill.yaml"], ["encode"]),
        "ranks": Verb(["train", f"{place}/distill.yaml"], ["encode"], ranks=2),
        "style": Verb(["train", f"{place}/style.yaml"], ["encode"]),
        "export": Verb(["export", f"{run}"], ["encode", "train"]),
        "quality": Verb(
            ["evaluate", "evaluation/quality", f"run={run}", *few, "teacher_steps=2", "student_steps=[1,2]",
             "unet_calls=[2]", "pictures=2"],
            ["encode", "train", "export"],
        ),
        "brand": Verb(
            ["evaluate", "evaluation/brand", f"adapter={run}", f"brand={place}/images", "control=null",
             *few, "teacher_steps=2", "steps=[1,2]", "resamples=20", "pictures=1"],
            ["encode", "train", "export"],
        ),
        "merge": Verb(
            ["merge", f"{run}", f"{style}:0.5", "--output", f"{place}/merged", "--base", f"{place}/base"],
            ["encode", "train", "export", "style", "export_style"],
        ),
        "export_style": Verb(["export", f"{style}"], ["encode", "style"]),
        "convert": Verb(
            ["convert", f"{run}/export/run.safetensors", "--output", f"{place}/out", "--format", "both",
             "--base", f"{place}/base"],
            ["encode", "train", "export"],
        ),
        "report": Verb(["report", f"{run}"], ["encode", "train", "export", "quality"]),
        "samples": Verb(["encode", f"{place}/samples.yaml"]),
        "prior": Verb(["encode", f"{place}/prior.yaml"]),
        "sample": Verb(
            ["sample", "--prompt", "a cat", "--prompt", "a dog", "--adapter", f"{run}", "--steps", "2",
             "--output", f"{place}/drawn"],
            ["encode", "train", "export"],
        ),
        "sweep": Verb(
            ["evaluate", "evaluation/guidance_sweep", f"adapters=[{run}]", f"brand={place}/images",
             f"control={place}/images", *swept, "teacher.steps=2", "teacher.guidance_scales=[1,5]",
             "student=[{samplers: [lcm], steps: [1, 2], guidance_scales: [1.0]}]",
             "plain={samplers: [ddim], unet_calls: [2], guidance_scales: [1.0]}"],
            ["encode", "train", "export"],
        ),
        "compose": Verb(
            ["evaluate", "evaluation/compose", f"style={style}", f"speed={run}", f"output={place}/composed",
             *swept, "teacher_steps=2", "steps=1", "style_weights=[1.0]", "speed_weights=[0.5,1.0]"],
            ["encode", "train", "export", "style", "export_style"],
        ),
        "fuse": Verb(["merge", f"{run}:0.8", "--output", f"{place}/fused", "--fuse-into", f"{place}/base"],
                     ["encode", "train", "export"], done="exists already; choose another output"),
        "story": Verb(
            ["finetune", f"{place}/images", "--base", f"{place}/base", "--output", f"{place}/story", *STORY],
            dated=True,
        ),
    }  # fmt: skip


def build(place: Path) -> None:
    """A base, pictures, prompts and configs: a distillation and a style, small, with all that is kept on."""
    base = build_sd(place / "base")
    keys = prepare(place, base)
    shutil.rmtree(place / "cache")
    (place / "prompts.txt").write_text("a cat\na dog\na bird\n")
    more: dict[str, Any] = {
        "validation": {"prompts": f"{place}/prompts.txt", "count": 2, "every": 2, "held_out": 0.25},
        "checkpoint": {"every": 1, "keep": 2}, "data": {"shard_size": 2}, "steps": 5,
    }  # fmt: skip
    write(configure(keys, place / "run", ema=0.5, **more), place / "distill.yaml")
    plain = {key: keys[key] for key in keys.keys() - {"guidance"}}
    write(configure({**plain, "recipe": "train/finetune"}, place / "style", **more), place / "style.yaml")
    drawn = {"prompts": f"{place}/prompts.txt", "count": 9, "steps": 2}
    samples = {"source": "teacher", "samples": drawn, "shard_size": 2}
    write(configure(keys, place / "sampled", data=samples), place / "samples.yaml")
    prior = {**plain, "recipe": "train/finetune", "prior": drawn, "data": {**plain["data"], "shard_size": 2}}
    write(configure(prior, place / "with_prior"), place / "prior.yaml")


def write(config: Training, file: Path) -> None:
    """Write a config."""
    file.write_text(dump(config))


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
        counted = _count(at_operation) if rank == 0 else [0]
        try:
            cli.app(list(verb.words), prog_name="lcm-kit", standalone_mode=True)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        if count:
            count.write_text(json.dumps([counted[0], sorted(sys.modules)]))
    except BaseException as error:  # a bug: its text is what the log is for
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _count(at: int | None) -> list[int]:
    """Count the file operations of this process from now on, and end it at number `at` of them."""
    seen = [0]

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            seen[0] += 1
            if seen[0] == at:
                os.killpg(0, signal.SIGKILL)
            return real(*arguments, **named)

        return operation

    for name in OPERATIONS:
        setattr(os, name, counting(getattr(os, name)))
    real = io.open

    def opening(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        opened = counting(real) if set(mode) & set("wax+") else real
        return opened(file, mode, *arguments, **named)

    io.open = opening
    return seen


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


def end(ids: Sequence[int]) -> None:
    """Kill what runs still."""
    for child in ids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
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
        self.place, self.name, self.verb = place, name, verbs(place)[name]
        self.log, self.count = place.parent / "log.txt", place.parent / "count.json"
        self.temporary = place.parent / "tmp"
        self.before, self.seconds, self.operations = place.parent / f"before-{name}", 0.0, 0
        for folder in (place, self.temporary):
            folder.mkdir(parents=True)
        build(place)
        for each in self.verb.after:
            self._insist(whole(verbs(place)[each], self.log, self.count), each)
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
                os.killpg(victim, signal.SIGKILL)
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
    parser.add_argument("--verbs", default=",".join(verbs(Path())))
    parser.add_argument("--log", type=Path, default=Path("kill_runs.jsonl"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for all verbs together")
    parser.add_argument("--table", action="store_true", help="print the results so far, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.log))
        return 0
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
