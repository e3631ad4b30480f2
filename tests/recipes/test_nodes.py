"""Several machines under torchrun, as two agents on this one: folders that are not shared, a machine lost."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lcm_kit.config.load import dump
from tests.agents import agents, below, freeze
from tests.recipes.small import configure, contents
from train import distill

TRAIN = """
import os, sys, time
from pathlib import Path
import torch
from lcm_kit.config.load import load
from train import distill

folder, draws = Path(sys.argv[2]), distill.step_randomness
def look(*arguments):
    step, rank = arguments[-1], torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == 2
    with (folder / f"steps-{rank}").open("a") as file:
        file.write(f"{step} ")
    if step == 5 and not (folder / "go").exists():
        (folder / f"waits-{rank}").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)
    return draws(*arguments)
distill.step_randomness = look
distill.main(load(Path(sys.argv[1])))
"""
STEPS = {"steps": 7, "checkpoint": {"every": 2, "keep": 9}, "ema": 0.5}


def steps(folder: Path) -> list[list[int]]:
    """The steps that each rank began, those of its predecessors first."""
    return [[int(step) for step in (folder / f"steps-{rank}").read_text().split()] for rank in (0, 1)]


@pytest.fixture
def training(distill_keys: dict[str, Any], tmp_path: Path, one_thread: None) -> list[object]:
    """A program that trains in `tmp_path/run`; step 5 waits until there is `tmp_path/go`."""
    (tmp_path / "rank.py").write_text(TRAIN)
    (tmp_path / "train.yaml").write_text(
        dump(configure(distill_keys, tmp_path / "run", **STEPS, batch_size=1))
    )
    return [tmp_path / "rank.py", tmp_path / "train.yaml", tmp_path]


def alone(keys: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of one process that nothing interrupts, which takes the two samples of a step in turn."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return distill.main(configure(keys, folder, **STEPS, batch_size=1, accumulation=2))


@pytest.mark.slow  # five processes that import torch and diffusers anew
@pytest.mark.parametrize("orphaned", [False, True], ids=["the machine", "its agent alone"])
def test_a_machine_that_is_lost_comes_back_and_no_bit_of_the_run_is_lost(
    distill_keys: dict[str, Any], training: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    orphaned: bool,
) -> None:  # fmt: skip
    """The one with the first process, which holds the run's lock and writes its states.

    Orphaned by its agent it still holds the lock when its successor comes.
    """
    with agents(tmp_path, training) as both:
        hurry = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"} if orphaned else {}
        head, lost = both.start(True, **hurry), both.start(False)
        both.until(lambda: all((tmp_path / f"waits-{rank}").exists() for rank in (0, 1)))
        both.kill(lost, alone=orphaned)
        back = both.start(False)
        if orphaned:
            both.until(lambda: "is at work there (train); waiting up to 120 s" in both.said())
        (tmp_path / "go").touch()
        both.until(lambda: head.poll() is not None and back.poll() is not None)
        assert (head.returncode, back.returncode) == (0, 0), both.said()[-6000:]
        assert orphaned or "another process of this run has ended, and so does this one" in both.said()
    assert steps(tmp_path) == [[0, 1, 2, 3, 4, 5, 4, 5, 6]] * 2
    straight = alone(distill_keys, tmp_path / "straight", monkeypatch)
    ours, wanted = (
        {name: content for name, content in contents(run).items() if not name.endswith("manifest.json")}
        for run in (tmp_path / "run", straight)
    )  # a manifest has the config, which says batch_size and accumulation
    assert len(wanted) == 4 * 3 + 2 and ours == wanted


@pytest.mark.slow  # two processes that import torch anew
def test_a_machine_that_vanishes_is_missed(training: list[object], tmp_path: Path) -> None:
    """It is frozen: no connection of its breaks, and it holds the store through which the others listen."""
    program = (tmp_path / "rank.py").read_text()
    hasty = "from lcm_kit.training import peers\npeers.BEAT, peers.SILENCE = 0.2, 3.0\n"
    (tmp_path / "rank.py").write_text(hasty + program)
    with agents(tmp_path, training) as both:
        head, lost = both.start(True), both.start(False)
        both.until(lambda: all((tmp_path / f"waits-{rank}").exists() for rank in (0, 1)))
        before = below(head)
        freeze(lost)
        (tmp_path / "go").touch()
        sentence = "process 0 of this run, on another machine, has not been heard of for 3 s"
        both.until(lambda: sentence in both.said())
        (worker,) = before
        worker.wait(10)  # raises where it lives on


# -- What all machines must have -----------------------------------------------------------------------------

APART = """
import os, sys
from pathlib import Path
from lcm_kit.config.load import load
from lcm_kit.data import sources
from lcm_kit.errors import UserError
from lcm_kit.training import processes
from train import distill

processes._LATE = 1.0
share = processes.share()
here = Path(sys.argv[2], f"node-{share.rank}")

def refused(work, *changes):
    config = load(Path(sys.argv[1]), changes)
    try:
        sources.encode(config, progress=False, share=share) if work == "encode" else distill.main(config)
    except UserError as error:
        print("refused:", error)

refused("encode", f"data.path={here / 'images'}", f"data.cache={sys.argv[2]}/other")
refused("train", f"seed={share.rank}")
refused("train", f"base.path={here / 'base'}")
os.chdir(here)  # what a machine without the shared folder works in
refused("encode", "data.cache=cache")
refused("train", "output=run")
"""


@pytest.mark.slow  # two processes that import torch and diffusers anew
def test_machines_without_the_same_folder_pictures_base_and_config_are_named(
    distill_keys: dict[str, Any], tmp_path: Path
) -> None:
    """Before anything is written."""
    (tmp_path / "apart.py").write_text(APART)
    (tmp_path / "my.yaml").write_text(dump(configure(distill_keys, tmp_path / "run")))
    nodes = [tmp_path / f"node-{rank}" for rank in (0, 1)]
    for node in nodes:
        shutil.copytree(distill_keys["data"]["path"], node / "images")
        shutil.copytree(distill_keys["base"]["path"], node / "base")
    (nodes[1] / "images/3.txt").write_text("another caption")
    scheduler = nodes[1] / "base/scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_end": 0.013}))
    program = [tmp_path / "apart.py", tmp_path / "my.yaml", tmp_path]
    with agents(tmp_path, program) as both:
        both.run()
        said = both.said()
    for sentence in (
        r"process 1 on \S+ has another set of pictures than process 0 on ",
        r"process 1 on \S+ has another seed than process 0 on ",
        r"process 1 on \S+ has another base than process 0 on ",
        r"cache is not one folder for all: process 1 on ",
        r"run is not one folder for all: process 1 on ",
    ):
        assert len(re.findall(f"refused: {sentence}", said)) == 2, (sentence, said[-6000:])
    left = [path.name for node in nodes for path in node.iterdir()]
    assert sorted(left) == ["base", "base", "images", "images"] and not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "other").glob("*")] == []
