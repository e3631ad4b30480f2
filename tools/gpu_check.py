"""Measures the kit on a GPU, case by case, each in a process of its own that has a limit of time.

    python tools/gpu_check.py                        the default set, within 6 minutes
    python tools/gpu_check.py sd15 sdxl-nf4          some cases, and those that make what they need
    python tools/gpu_check.py --all                  all of them
    python tools/gpu_check.py --list                 what there is, with limits
    python tools/gpu_check.py --rehearse             the same on a CPU, in small: no figure counts
    python tools/gpu_check.py --table                a Markdown table of what was measured until now

A line is printed and written as soon as a case has ended. Bases have random weights in the published
structures, so that nothing is downloaded; what runs are the kit's own recipes. `tools/gpu_cases.py` is the
table of cases, `gpu_work.py` what they do, `gpu_bases.py` what they do it on, `gpu_table.py` the words. A
case that reaches its limit is killed with its children, and what it told until then is its result; so is one
that fails, with its reason. Exit code 1: a case failed. Results are appended to --output, a JSON object a
line, and stay whole whatever ends the tool.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lcm_kit import __version__ as kit_version  # noqa: E402
from tools import gpu_table  # noqa: E402
from tools.gpu_cases import BY_NAME, CASES, Case  # noqa: E402

SECONDS = 350.0  # of the default set: what does not fit any more is left out
LEAST = 15.0  # seconds below which a case is not begun
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
DONE, LIMIT, FAILED, LEFT_OUT = "done", "limit", "failed", "left out"


# -- In the case's process -----------------------------------------------------------------------------------


def perform(text: str, told: Path, work: Path, rehearsed: bool) -> None:
    """Do the case that `text` describes, and write what it tells into `told`."""
    from tools.gpu_bases import Setting

    _end_with(os.getppid())
    fields = json.loads(text)
    mine = Case(**{**fields, "keys": tuple(fields["keys"]), "needs": tuple(fields["needs"])})

    def write(**words: Any) -> None:
        with told.open("a", encoding="utf-8") as file:
            file.write(json.dumps(words) + "\n")

    try:
        write(machine=machine())
        module, _, function = mine.does.partition(":")
        setting = Setting(mine.name, mine.base, mine.keys, work, rehearsed)
        getattr(importlib.import_module(module), function)(setting, lambda **figures: write(figures=figures))
        write(done=True)
    except Exception as error:
        traceback.print_exc()
        kind = "" if type(error).__name__ == "UserError" else f"{type(error).__name__}: "
        write(failed=kind + " ".join(str(error).split())[:500])
        raise SystemExit(1) from error


def _end_with(parent: int) -> None:
    """End this process and its children when the tool is gone, however it went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def machine() -> dict[str, str]:
    """Card, driver and versions of this process, without an import: a limit may be short."""
    told = {"card": "CPU", "driver": ""}
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        told["card"] = "a GPU that nvidia-smi does not name"
        ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            said = subprocess.run(ask, capture_output=True, text=True).stdout.splitlines()
            if said and said[0].count(",") == 2:
                name, memory, driver = said[0].split(", ")
                told = {"card": f"{name}, {memory}", "driver": driver}
    return told | {name: version(name) for name in ("torch", "diffusers")} | {"lcm_kit": kit_version}


# -- One case, from outside ----------------------------------------------------------------------------------


def measure(mine: Case, work: Path, limit: float, rehearsed: bool) -> dict[str, Any]:
    """The case's row, after at most `limit` seconds."""
    started, logs = time.monotonic(), work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    told, log, own = logs / f"{mine.name}.jsonl", logs / f"{mine.name}.log", work / "cases" / mine.name
    told.unlink(missing_ok=True)
    shutil.rmtree(own, ignore_errors=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--perform", json.dumps(asdict(mine))]
    command += ["--told", str(told), "--work", str(work), *(["--rehearse"] if rehearsed else [])]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if mine.cpu or rehearsed else {}
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **hidden}, stdout=out,
            stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(limit)
        finally:
            if code is None:  # its time is over, or the tool itself is ended
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    shutil.rmtree(own, ignore_errors=True)
    return _row(mine, told, log, code, limit, rehearsed) | {"seconds": round(time.monotonic() - started, 1)}


def _row(
    mine: Case, told: Path, log: Path, code: int | None, limit: float, rehearsed: bool
) -> dict[str, Any]:
    lines = _objects(told)
    figures: dict[str, Any] = {}
    for line in lines:
        figures |= line.get("figures", {})
    row = {"case": mine.name, "status": LIMIT if code is None else DONE, "limit": limit, "figures": figures}
    row |= {key: value for line in lines for key, value in line.items() if key == "machine"}
    row |= {"keys": list(mine.keys), "date": date.today().isoformat(), "rehearsed": rehearsed}
    failed = next((line["failed"] for line in lines if "failed" in line), None)
    if code is not None and not any("done" in line for line in lines):
        row |= {"status": FAILED, "reason": failed or f"its process ended with {code} and told no reason"}
    if row["status"] != DONE:
        row["log"] = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    return row


def _objects(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects: the last one may be cut short by a kill."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


# -- All of them ---------------------------------------------------------------------------------------------


def with_needed(wanted: Sequence[Case], work: Path) -> list[Case]:
    """The cases, each after the one that makes its base and cache, unless those lie in `work`."""
    found: dict[str, Case] = {}
    for mine in wanted:
        maker = BY_NAME.get(f"encode-{mine.base}")
        if maker and not mine.encodes and not has_cache(mine, work):
            found.setdefault(maker.name, maker)
        found.setdefault(mine.name, mine)
    return list(found.values())


def lacking(mine: Case, work: Path, rehearsed: bool) -> str | None:
    """Why the case cannot be done at all; None if it can be tried."""
    for library in (*LIBRARIES, *mine.needs):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed"
    if not (mine.cpu or rehearsed or has_gpu()):
        return "there is no GPU; --rehearse tries it on a CPU"
    lost = mine.base and not mine.encodes and not has_cache(mine, work)
    return f"encode-{mine.base} made no cache" if lost else None


def has_cache(mine: Case, work: Path) -> bool:
    """Whether the base of the case, its pictures and their cache are there."""
    return (work / mine.base / "cache" / "manifest.json").is_file()


def has_gpu() -> bool:
    """Whether there is a GPU, without a context on it."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.is_available()


def run(
    cases: Iterable[Case], work: Path, output: Path, *, seconds: float | None, factor: float, rehearsed: bool
) -> Iterator[dict[str, Any]]:
    """The rows of `cases`, each appended to `output` before it is yielded.

    `seconds`: what all may take together, or None; `factor`: on each case's limit.
    """
    started = time.monotonic()
    for mine in cases:
        left = float("inf") if seconds is None else seconds - (time.monotonic() - started)
        reason = lacking(mine, work, rehearsed)
        if reason is None and left < min(LEAST, mine.limit):
            reason = "the time of this set is used up; run it by its name"
        if mine.name == "plan":
            mine = _planning(mine, [row for row in _objects(output) if row["rehearsed"] == rehearsed])
            reason = reason or (None if mine.keys else "no training case was measured")
        if reason is None:
            row = measure(mine, work, min(mine.limit * factor, left), rehearsed)
        else:
            row = {"case": mine.name, "status": LEFT_OUT, "reason": reason, "rehearsed": rehearsed}
        append(output, row)
        yield row


def _planning(mine: Case, rows: Sequence[Mapping[str, Any]]) -> Case:
    """The case `plan` for what was trained before it, each as it was the last time."""
    trained = {row["case"]: row["figures"]["planned"] for row in rows if "planned" in row.get("figures", {})}
    keys = (json.dumps([name, name.split("-")[0], *planned]) for name, planned in trained.items())
    return replace(mine, keys=tuple(keys))


def append(output: Path, row: Mapping[str, Any]) -> None:
    """A line of the results, on the disk when this returns."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        begun = file.read() not in (b"", b"\n")  # a line that a kill cut short
        file.write(b"\n" * begun + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def say(line: str) -> None:
    """Print, if anybody still listens: the file is what counts."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- The command ---------------------------------------------------------------------------------------------


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line's words."""
    place = Path("runs/gpu_check")
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names; the default set if there are none")
    parser.add_argument("--all", action="store_true", help="every case")
    parser.add_argument("--list", action="store_true", help="names, limits and keys; runs nothing")
    parser.add_argument("--table", action="store_true", help="print --output as Markdown; runs nothing")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in small")
    parser.add_argument("--output", type=Path, help="where rows are appended (runs/gpu_check/results.jsonl)")
    parser.add_argument("--work", type=Path, default=place, help="bases and caches, 10 GB (runs/gpu_check)")
    parser.add_argument("--minutes", type=float, help="that all may take (5.8 for the default set)")
    parser.add_argument("--limits", type=float, help="factor on the limits, for a slow machine (1)")
    for hidden in ("--perform", "--told"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if unknown := [name for name in args.cases if name not in BY_NAME]:
        parser.error(f"there is no case {', '.join(unknown)}; --list names them")
    return args


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that are asked for."""
    if args.cases:
        return [BY_NAME[name] for name in dict.fromkeys(args.cases)]
    return CASES if args.all else [each for each in CASES if each.usual]


def show_list() -> None:
    """Every case with its limit."""
    for usual, title in ((True, f"the default set, which ends after {SECONDS:.0f} s"), (False, "with --all")):
        cases = [each for each in CASES if each.usual == usual]
        say(f"{title} (limits: {sum(each.limit for each in cases):.0f} s together)")
        for each in cases:
            say(f"  {each.name:<24} {each.limit:>4.0f} s  {' '.join(each.keys)}")


def main(words: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the exit code."""
    args = parse(words)
    work = args.work.resolve() / "rehearsed" if args.rehearse and not args.perform else args.work.resolve()
    if args.perform:
        perform(args.perform, Path(args.told), work, args.rehearse)
        return 0
    output = args.output or work / "results.jsonl"
    if args.list or args.table:
        show_list() if args.list else say(gpu_table.markdown(_objects(output)))
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what is running is ended, too
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    seconds = None if args.minutes is None else 60 * args.minutes
    if seconds is None and not (args.cases or args.all or args.rehearse):
        seconds = SECONDS
    cases, factor = with_needed(chosen(args), work), args.limits or (8.0 if args.rehearse else 1.0)
    total = factor * sum(each.limit for each in cases)
    ends = "" if seconds is None else f", and {seconds:.0f} s for all"
    say(f"{len(cases)} cases, limits of {total:.0f} s together{ends}; results: {output}")
    failed = False
    for row in run(cases, work, output, seconds=seconds, factor=factor, rehearsed=args.rehearse):
        say(gpu_table.line(row))
        failed |= row["status"] == FAILED
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
