"""Jobs that are shipped for clusters: their syntax, their names, and Slurm's with two commands for Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcm_kit.config import shipped
from lcm_kit.config.load import dump
from lcm_kit.data import sources
from lcm_kit.training import run_files
from tests.recipes.small import configure, environment
from train import distill

SLURM, KUBERNETES = (shipped.root() / f"configs/launch/{name}" for name in ("slurm.sh", "kubernetes.yaml"))


def test_jobs_are_listed_and_copied_and_are_no_configs(tmp_path: Path) -> None:
    names = {"configs/launch/slurm.sh", "configs/launch/kubernetes.yaml"}
    assert names <= set(shipped.names()) and not names & set(shipped.configs())
    for name in names:
        stem = name.removeprefix("configs/").partition(".")[0]
        assert shipped.copy(stem, tmp_path).read_bytes() == (shipped.root() / name).read_bytes()
        with pytest.raises(shipped.UserError, match="no shipped config of that name"):
            shipped.config_path(stem)


# -- Slurm ---------------------------------------------------------------------------------------------------


def test_the_shell_can_read_the_script() -> None:
    checks = [["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]
    for check in checks:
        done = subprocess.run([*check, str(SLURM)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_time_to_save_fits_into_the_time_that_slurm_gives() -> None:
    text = SLURM.read_text()
    given = int(text.partition("--signal=B:TERM@")[2].partition("\n")[0])
    assert given > int(text.partition("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")[2].split()[0]) > 60
    head = text.partition("\nset -u\n")[0]
    assert "#SBATCH --requeue\n" in head and "#SBATCH --ntasks-per-node=1\n" in head
    assert all(line.startswith("#") for line in head.splitlines())  # sbatch reads no further


SRUN = """#!{python}
# As Slurm's: a task on each node, signals passed on; the nodes are this machine.
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = [subprocess.Popen(command) for _ in range(int(os.environ["SLURM_NNODES"]))]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(abs(code) for code in codes))
"""

SCONTROL = """#!/bin/sh
case "$1" in
    show) echo localhost; echo localhost ;;
    *) echo "$@" >> "$TOLD" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes, with `srun` and `scontrol`; `TOLD` is what these were told."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN.replace("{python}", sys.executable)), ("scontrol", SCONTROL)):
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    here = os.path.dirname(sys.executable)
    return {
        **environment(1), "PATH": f"{tmp_path / 'bin'}:{here}:{os.environ['PATH']}",
        "TOLD": str(tmp_path / "told"), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(free_port() - 20000), "SLURM_CPUS_PER_TASK": "1", "PROCESSES_PER_NODE": "1",
    }  # fmt: skip


def free_port() -> int:
    """One of those that the script takes."""
    for port in range(20100, 30000, 7):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise AssertionError("no port")


@pytest.mark.slow  # four times two processes that import torch anew
def test_a_job_that_is_preempted_saves_is_queued_again_and_ends_with_the_same_adapter(
    distill_keys: dict[str, Any], slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = {"steps": 80, "checkpoint": {"every": 1000}}
    data = {**distill_keys["data"], "cache": str(tmp_path / "cache"), "shard_size": 3}
    config = configure({**distill_keys, "data": data}, tmp_path / "run", **settings, batch_size=1)
    (tmp_path / "my.yaml").write_text(dump(config))

    def job(**more: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "job.log").open("ab") as log:
            command = ["bash", str(SLURM), "my.yaml", "logging.every=1"]
            return subprocess.Popen(command, cwd=tmp_path, env={**slurm, **more}, stdout=log, stderr=log)

    first = job()
    try:
        told_of = tmp_path / "run/metrics.jsonl"
        wait(lambda: told_of.is_file() and told_of.stat().st_size > 0, first, tmp_path / "job.log")
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) != 0
    finally:
        first.kill()
    told, said = tmp_path / "told", (tmp_path / "job.log").read_text()
    assert told.read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n", said
    (state,) = run_files.folders(tmp_path / "run")
    assert 0 < run_files.step_of(state) < 80 and f"saved after step {run_files.step_of(state)} of 80" in said
    assert (run_files.manifest(state) or {})["batch"] == 2  # of two processes with one each
    assert not (tmp_path / "run/adapter").exists()

    again = job(SLURM_RESTART_COUNT="1")
    try:
        assert again.wait(200) == 0, (tmp_path / "job.log").read_text()[-6000:]
    finally:
        again.kill()
    assert told.read_text().count("requeue") == 1
    alone = {**data, "cache": str(tmp_path / "alone")}
    straight = configure(
        {**distill_keys, "data": alone}, tmp_path / "straight", **settings, batch_size=1, accumulation=2
    )
    sources.encode(straight, progress=False)
    distill.main(straight)
    for shard in ("empty", "shard-00000", "shard-00001", "shard-00002"):
        assert same(tmp_path / "cache", tmp_path / "alone", f"{shard}.safetensors")
    assert same(tmp_path / "run", tmp_path / "straight", "adapter/lora.safetensors")


def wait(there: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 200
    while not there():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-6000:]
        time.sleep(0.02)


def same(a: Path, b: Path, name: str) -> bool:
    return (a / name).read_bytes() == (b / name).read_bytes()


def test_a_job_without_a_config_says_how_it_is_called(slurm: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SLURM)], env=slurm, capture_output=True, text=True)
    assert done.returncode == 2 and "CONFIG [KEY=VALUE ...]" in done.stderr


# -- Kubernetes ----------------------------------------------------------------------------------------------


def pods_commands() -> list[list[str]]:
    """What a pod runs, one after the other."""
    spec = list(yaml.safe_load_all(KUBERNETES.read_text()))[1]["spec"]["template"]["spec"]
    return [container["command"] for container in (*spec["initContainers"], *spec["containers"])]


@pytest.mark.slow  # twice two processes that import torch anew
def test_the_pods_commands_encode_and_train(distill_keys: dict[str, Any], tmp_path: Path) -> None:
    """As written, but for where the first pod is and how many GPUs there are."""
    data = {**distill_keys["data"], "cache": str(tmp_path / "cache")}
    config = configure({**distill_keys, "data": data}, tmp_path / "run", steps=2, batch_size=1)
    (tmp_path / "my.yaml").write_text(dump(config))
    here = f"localhost:{free_port()}"
    swapped = {"lcm-kit-0.lcm-kit:29400": here, "$(POD_IP)": "127.0.0.1", "per-node=gpu": "per-node=1"}
    for command in pods_commands():
        for old, new in swapped.items():
            assert any(old in word for word in command)
            command = [word.replace(old, new) for word in command]
        command[0] = str(Path(sys.executable).with_name(command[0]))
        pods = [subprocess.Popen(command, cwd=tmp_path, env=environment(1)) for _ in range(2)]
        try:
            assert [pod.wait(200) for pod in pods] == [0, 0]
        finally:
            for pod in pods:
                pod.kill()
    (state,) = run_files.folders(tmp_path / "run")
    assert (run_files.manifest(state) or {})["batch"] == 2 and (tmp_path / "run/adapter").is_dir()


def test_what_the_pods_are_told_fits_together() -> None:
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    name, pods = job["metadata"]["name"], job["spec"]["completions"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": name}  # a label that Kubernetes gives a job's pods
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["parallelism"] == pods == 2
    spec = job["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"] and spec["restartPolicy"] == "Never"
    (port,) = (each["port"] for each in service["spec"]["ports"])
    volumes = {volume["name"] for volume in spec["volumes"]}
    containers = [*spec["initContainers"], *spec["containers"]]
    for container, verb, nodes in zip(containers, ("encode", "train"), ("1:2", "2"), strict=True):
        command = container["command"]
        options = dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--"))
        assert command[0] == "torchrun" and command[-4:] == ["-m", "lcm_kit", verb, "my.yaml"]
        assert options["nnodes"] == nodes and options["rdzv-id"] == verb
        assert options["rdzv-endpoint"] == f"{name}-0.{service['metadata']['name']}:{port}"
        variables = {each["name"]: each for each in container["env"]}
        assert options["local-addr"] == "$(POD_IP)" and "valueFrom" in variables["POD_IP"]
        save = int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]["value"])
        assert 60 < save < spec["terminationGracePeriodSeconds"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
