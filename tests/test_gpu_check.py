"""tools/gpu_check.py, rehearsed on a CPU: what is measured, killed, left out and told."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lcm_kit import load_config
from lcm_kit.errors import UserError
from tools import gpu_bases, gpu_check, gpu_table, gpu_work
from tools.gpu_cases import CASES, Case

ROOT = Path(__file__).parents[1]


# -- What the children below do: named as cases of the tool's table name theirs ------------------------------


def hangs(setting: gpu_bases.Setting, tell: gpu_work.Tell) -> None:
    """Tells something, has a child of its own, and does not end."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tell(first_step_after_s=3.0, ids=[os.getpid(), child.pid])
    time.sleep(600)


def raises(setting: gpu_bases.Setting, tell: gpu_work.Tell) -> None:
    tell(batch=4)
    raise UserError("there is no such base; give another")


def dies(setting: gpu_bases.Setting, tell: gpu_work.Tell) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def case(name: str, limit: float = 300) -> Case:
    return Case(name, f"tests.test_gpu_check:{name}", limit)


def rows_of(*cases: Case, work: Path, **changes: Any) -> list[dict[str, Any]]:
    """The rows, which are those of the results file."""
    settings: dict[str, Any] = {"seconds": None, "factor": 1.0, "rehearsed": True, **changes}
    output = work / "results.jsonl"
    found = list(gpu_check.run(cases, work, output, **settings))
    assert [json.loads(line) for line in output.read_text().splitlines()] == found
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    file = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").is_file():
        return file.is_file() and file.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_dead(*pids: int) -> None:
    until = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < until, pids
        time.sleep(0.05)


# -- Measuring -----------------------------------------------------------------------------------------------


@pytest.mark.slow  # half a minute: two processes that load all libraries
def test_two_cases_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One is asked for, and what makes its cache comes first; its figures are those of the run's steps."""
    work, output = tmp_path / "work", tmp_path / "results.jsonl"
    words = ["sd15", "--rehearse", "--work", str(work), "--output", str(output)]
    assert gpu_check.main(words) == 0
    first, second = (json.loads(line) for line in output.read_text().splitlines())
    said = capsys.readouterr().out
    assert (first["case"], second["case"]) == ("encode-sd15", "sd15")
    assert first["status"] == second["status"] == "done" and "sd15" in said
    assert first["figures"]["pictures_per_second"] > 0
    cache = json.loads((work / "rehearsed/sd15/cache/manifest.json").read_text())
    assert sum(shard["rows"] for shard in cache["shards"]) == gpu_bases.PICTURES["sd15"]
    unet = json.loads((work / "rehearsed/sd15/base/unet/config.json").read_text())
    assert unet["block_out_channels"] == [40, 80, 160, 160]
    found = second["figures"]
    assert (found["batch"], found["precision"], found["timed_steps"]) == (2, "float32", 2)
    assert found["samples_per_second"] == pytest.approx(2 / (found["step_ms"] / 1000))
    # from here to the end of the first step there is at least a step, and the case has all four
    assert found["first_step_after_s"] + 3 * found["step_ms"] / 2000 < second["seconds"]
    assert f"{found['samples_per_second']:.3g} samples/s" in said
    # and the second time the cache is there
    again = gpu_check.with_needed([gpu_check.BY_NAME["sd15"]], work / "rehearsed")
    assert [each.name for each in again] == ["sd15"]


@pytest.mark.slow  # each of them is a run of the kit
@pytest.mark.parametrize("name", [each.name for each in CASES if each.usual and "compiled" not in each.name])
def test_the_default_set_rehearsed(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    work = tmp_path_factory.getbasetemp() / "gpu_check"
    wanted = ["sd15", "plan"] if name == "plan" else [name]
    output = work / f"{name}.jsonl"
    assert gpu_check.main([*wanted, "--rehearse", "--work", str(work), "--output", str(output)]) == 0
    last = json.loads(output.read_text().splitlines()[-1])
    assert (last["case"], last["status"]) == (name, "done") and last["figures"]


@pytest.mark.slow  # a distillation
def test_the_share_that_the_table_holds_a_gpu_against(tmp_path: Path) -> None:
    """100 steps are another run on another processor: within what 120 pictures allow."""
    assert gpu_check.main(["tiny-cpu", "--work", str(tmp_path), "--limits", "10"]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert row["figures"]["judged"] == 120
    assert row["figures"]["right_at_4"] == pytest.approx(gpu_table.RIGHT_ON_A_CPU, abs=0.05)


def test_the_median_leaves_the_warm_up_and_another_optimizer_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps end at 10, 20, 22, 24.5 and 26.5: the first interval is warm-up, then 2, 2.5 and 2 seconds."""
    # the beginning; a trial's end, told; the first end, told; the others; and the beginning of another
    clock = iter([0.0, 1.0, 1.0, 10.0, 10.0, 20.0, 22.0, 24.5, 26.5, 30.0])
    monkeypatch.setattr(gpu_work, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    told: dict[str, float] = {}
    steps = gpu_work.Steps(lambda **figures: told.update(figures), samples=8, warmup=1)
    steps.seen("one that the kit tries out", (), {})
    for _ in range(5):
        steps.seen("the optimizer", (), {})
    steps.finish()
    assert told["first_step_after_s"] == 10.0
    assert (told["step_ms"], told["samples_per_second"], told["timed_steps"]) == (2000.0, 4.0, 3)
    few = gpu_work.Steps(lambda **figures: None, samples=8, warmup=1)
    with pytest.raises(RuntimeError, match="1 steps of an optimizer were seen, too few"):
        few.finish()


# -- What goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.slow  # as above
def test_at_its_limit_a_case_is_killed_with_its_children_and_keeps_what_it_told(tmp_path: Path) -> None:
    """And one that fails, or dies, is a row with its reason; the others follow."""
    work = tmp_path / "work"
    rows = rows_of(case("hangs", 20), case("raises"), case("dies"), work=work)
    assert [row["status"] for row in rows] == ["limit", "failed", "failed"]
    hung, raised, died = rows
    assert hung["figures"]["first_step_after_s"] == 3.0
    wait_until_dead(*hung["figures"]["ids"])
    assert hung["seconds"] >= 20
    assert raised["reason"] == "there is no such base; give another" and raised["figures"] == {"batch": 4}
    assert "UserError" in raised["log"]
    assert died["reason"] == "its process ended with -9 and told no reason"
    lines = [gpu_table.line(row) for row in rows]
    assert "first step after 3 s, not done within 20 s" in lines[0]
    assert "failed: there is no such base; give another" in lines[1]


def test_a_tool_that_is_ended_ends_its_case(tmp_path: Path) -> None:
    """By a signal that can be caught, and by one that cannot."""
    script = (
        "import sys; from tests.test_gpu_check import case; from tools import gpu_check as g;"
        "g.CASES[:] = [case('hangs')]; g.BY_NAME['hangs'] = g.CASES[0];"
        "sys.exit(g.main(['hangs', '--rehearse', '--work', sys.argv[1]]))"
    )
    for number in (signal.SIGTERM, signal.SIGKILL):
        work = tmp_path / number.name
        told = work / "rehearsed/logs/hangs.jsonl"
        tool = subprocess.Popen([sys.executable, "-c", script, str(work)], cwd=ROOT)
        until = time.monotonic() + 120
        while not (told.is_file() and '"ids"' in told.read_text()):
            assert tool.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        ids = next(
            line["figures"]["ids"]
            for line in map(json.loads, told.read_text().splitlines())
            if "figures" in line
        )
        assert all(map(alive, ids))
        tool.send_signal(number)
        tool.wait(60)
        wait_until_dead(*ids)


def test_nobody_who_listens_is_no_loss(tmp_path: Path) -> None:
    """The reader of the pipe is gone before the first line: the file has all rows."""
    script = (
        "import sys; from tests.test_gpu_check import case; from tools import gpu_check as g;"
        "g.CASES[:] = [case('dies'), g.replace(case('dies'), name='dies-too')];"
        "sys.exit(g.main(['--all', '--rehearse', '--work', sys.argv[1]]))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
    rows = [json.loads(line) for line in (tmp_path / "rehearsed/results.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["dies", "dies-too"]


# -- What is not tried ---------------------------------------------------------------------------------------


def test_what_is_not_there_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        gpu_check.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_check, "has_cache", lambda mine, work: True)
    names = ("sd15-nf4", "sd15-int8", "sdxl-nf4", "sdxl-int8")
    rows = rows_of(*(gpu_check.BY_NAME[name] for name in names), work=tmp_path, rehearsed=False)
    assert [row["status"] for row in rows] == ["left out"] * 4
    assert gpu_table.line(rows[0]).endswith("left out: bitsandbytes is not installed")
    needing = {each.name for each in CASES if any("quantize" in key or "8bit" in key for key in each.keys)}
    assert needing == {each.name for each in CASES if "bitsandbytes" in each.needs} == set(names)


def test_without_a_gpu_a_rehearsal_is_offered(tmp_path: Path) -> None:
    """Tests see none."""
    (row,) = rows_of(gpu_check.BY_NAME["sdxl"], work=tmp_path, rehearsed=False)
    assert row["reason"] == "there is no GPU; --rehearse tries it on a CPU"
    assert gpu_check.lacking(gpu_check.BY_NAME["tiny-cpu"], tmp_path, rehearsed=False) is None


def test_what_another_case_had_to_make_is_missed_before_a_process_starts(tmp_path: Path) -> None:
    (row,) = rows_of(gpu_check.BY_NAME["sdxl"], work=tmp_path)
    assert (row["status"], row["reason"]) == ("left out", "encode-sdxl made no cache")


def test_a_set_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case has what is left of it, and is not begun where that is next to nothing."""
    monkeypatch.setattr(gpu_check, "LEAST", 1.0)
    first, second = rows_of(case("hangs"), case("hangs"), work=tmp_path, seconds=3.0)
    assert first["status"] == "limit" and 1 <= first["limit"] <= 3
    assert second["reason"] == "the time of this set is used up; run it by its name"


def test_plan_is_asked_for_what_was_trained(tmp_path: Path) -> None:
    plan = gpu_check.BY_NAME["plan"]
    (row,) = rows_of(plan, work=tmp_path)
    assert row["reason"] == "no training case was measured"
    rows = [{"case": "sd15", "figures": {"planned": [key]}} for key in ("batch_size=1", "batch_size=2")]
    rows += [
        {"case": "sdxl-nf4", "figures": {"planned": ["steps=3"]}},
        {"case": "sample-sd15", "figures": {}},
    ]
    asked = [json.loads(key) for key in gpu_check._planning(plan, rows).keys]
    assert asked == [["sd15", "sd15", "batch_size=2"], ["sdxl-nf4", "sdxl", "steps=3"]]


# -- The table of cases --------------------------------------------------------------------------------------


def test_every_case_is_a_config_that_the_kit_takes(tmp_path: Path) -> None:
    assert len({each.name for each in CASES}) == len(CASES)
    for each in CASES:
        setting = gpu_bases.Setting(each.name, each.base, each.keys, tmp_path, rehearsed=False)
        for small in (False, True):
            setting = replace(setting, rehearsed=small)
            if each.base:
                config = load_config(setting.config, gpu_bases.given(setting))
            elif each.name.startswith("pair"):
                config = load_config("evaluation/speed_sd15", setting.overrides(gpu_work.SMALL_PAIR))
            elif each.name.startswith("tiny"):
                config = load_config("distill/tiny_quick", setting.overrides(gpu_work.SMALL_TINY))
            else:
                assert each.name == "plan"
                continue
            assert small or config.steps > gpu_work.WARMUP or each.name.startswith("pair")
            assert not small or getattr(config, "precision", None) != "float16"


def test_the_list_names_all_with_their_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--list"]) == 0
    said = capsys.readouterr().out
    for usual in (True, False):
        cases = [each for each in CASES if each.usual == usual]
        assert f"(limits: {sum(each.limit for each in cases):.0f} s together)" in said
        assert all(f"  {each.name} " in said and f" {each.limit:.0f} s" in said for each in cases)
    assert gpu_check.SECONDS < 360 and f"ends after {gpu_check.SECONDS:.0f} s" in said
    with pytest.raises(SystemExit):
        gpu_check.main(["sd16"])


# -- The table of results ------------------------------------------------------------------------------------


def row(name: str, status: str = "done", day: str = "2026-11-28", **figures: Any) -> dict[str, Any]:
    told = {
        "card": "H100, 80 GiB",
        "driver": "580.1",
        "torch": "2.11.0",
        "diffusers": "0.42.1",
        "lcm_kit": "1",
    }
    return {
        "case": name, "status": status, "limit": 90.0, "figures": figures, "machine": told, "date": day,
        "rehearsed": False, "seconds": 31.0,
    }  # fmt: skip


def test_the_table_has_the_newest_row_of_each_case_by_card_and_day() -> None:
    steps = {"samples_per_second": 19.8, "step_ms": 404.04, "first_step_after_s": 21.2, "batch": 8}
    memory = {"peak_gib": 13.91, "reserved_gib": 15.22, "precision": "float16"}
    rows = [
        row("sd15", samples_per_second=1.0, step_ms=8000.0, first_step_after_s=1.0),
        row("sd15", **steps, **memory),
        row("sd15-compiled", "limit", first_step_after_s=75.0),
        row("sample-sd15", ms_of_1=122.1, ms_of_4=135.2),
        row("tiny-float16", **steps, right_at_4=0.975, judged=120, right_of_teacher=0.992),
        row("pair-sd15", ours_samples_per_second=24.0, baseline_samples_per_second=12.0, ratio=2.0),
        row("plan", sd15_gib=14.1),
        {"case": "sdxl", "status": "left out", "reason": "no time", "rehearsed": False},
        row("encode-sd15", day="2026-11-29", pictures_per_second=77.0),
    ]
    known = f"{gpu_table.RIGHT_ON_A_CPU:.1%}"
    assert gpu_table.markdown(rows) == (
        "H100, 80 GiB, driver 580.1, torch 2.11.0, diffusers 0.42.1, lcm-kit 1, 2026-11-28:\n\n"
        "| case | batch, precision | measured | peak GiB | reserved | `plan` says |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| sd15 | 8, float16 | 19.8 samples/s, 404 ms a step, first step after 21 s | 13.9 | 15.2 | 14.1 |\n"
        "| sd15-compiled |  | first step after 75 s, not done within 90 s |  |  |  |\n"
        "| sample-sd15 |  | 122.1 ms a picture, 135.2 ms four at once |  |  |  |\n"
        "| tiny-float16 | 8 | 19.8 samples/s, 404 ms a step, first step after 21 s, 97.5% of 120 right at 4 "
        f"steps ({known} on a CPU, teacher 99.2%) |  |  |  |\n"
        "| pair-sd15 |  | ours 24 samples/s, baseline 12 samples/s, 2.00 times the speed |  |  |  |\n\n"
        "H100, 80 GiB, driver 580.1, torch 2.11.0, diffusers 0.42.1, lcm-kit 1, 2026-11-29:\n\n"
        "| case | batch, precision | measured | peak GiB | reserved | `plan` says |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| encode-sd15 |  | 77 pictures/s |  |  |  |"
    )


def test_a_line_that_a_kill_cut_short_hides_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    gpu_check.append(file, row("encode-sd15", pictures_per_second=77.0))
    with file.open("a") as end:
        end.write('{"case": "sd15", "sta')
    gpu_check.append(file, row("sample-sd15", ms_of_1=122.1))
    assert gpu_check.main(["--table", "--output", str(file)]) == 0
    said = capsys.readouterr().out
    assert "| encode-sd15 |  | 77 pictures/s |" in said and "| sample-sd15 |  | 122.1 ms a picture |" in said
