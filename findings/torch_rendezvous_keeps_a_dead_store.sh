#!/usr/bin/env bash
# torch 2.13.0, torchrun with the c10d rendezvous on two machines: the one that is first in their order (by address)
# loses its power, comes back and is first again. Its process is given the store of the new round; that of the other
# machine MASTER_ADDR and MASTER_PORT of the store that was lost with the first (DynamicRendezvousHandler asks for it
# in the first round, and later only if it has itself become the first). TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes it
# ask in each round.
# A good guess: after a restart all processes are given the store of this round.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy psutil
cat > worker.py <<'PY'
import os
import sys
import time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
lost = (folder / "lost").exists()
store = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
(folder / f"{'after' if lost else 'before'}-{rank}").write_text(store)
while not (folder / "lost").exists():
    time.sleep(0.1)
sys.exit(0 if lost else 1)  # as a process ends whose connections are gone
PY
export OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def stores(variable: str, port: int) -> tuple[list[str], list[str]]:
    """The stores that the processes of both machines are given, before and after the first one's loss."""
    folder = Path(tempfile.mkdtemp(dir="."))

    def agent(address: str, host: int) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--local-addr={address}",
            f"--rdzv-conf=is_host={host},keep_alive_interval=1,keep_alive_max_attempt=3", "worker.py", str(folder),
        ]  # fmt: skip
        variables = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": variable}
        return subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)

    def end(there: subprocess.Popen) -> None:
        processes = psutil.Process(there.pid).children(recursive=True) if there.poll() is None else []
        for process in (there, *processes):
            process.kill()
        there.wait()

    def given(when: str) -> list[str]:
        until = time.monotonic() + 120
        while len(found := sorted(folder.glob(f"{when}-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1)  # both are written whole
        return [file.read_text() for file in found]

    second, first = agent("127.0.0.2", 1), agent("127.0.0.1", 0)
    before = given("before")
    end(first)
    (folder / "lost").touch()
    first = agent("127.0.0.1", 0)
    after = given("after")
    for machine in (first, second):
        end(machine)
    return before, after


for variable in ("0", "1"):
    before, after = stores(variable, 29700 + int(variable))
    print(f"TORCH_DISABLE_SHARE_RDZV_TCP_STORE={variable}: before {before}, after {after}")
    assert before[0] == before[1] and after[0] != before[0], "changed: the first machine's own store"
    assert after[1] == (before[1] if variable == "0" else after[0]), "changed: the other machine's store"
PY
