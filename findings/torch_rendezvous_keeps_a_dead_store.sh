#!/usr/bin/env bash
# torch 2.13.0, torchrun with the c10d rendezvous on two machines: the one that is first in their order (by address)
# loses its power, comes back and is first again. The other one's agent starts its process anew with the address of
# the store that died with it (DynamicRendezvousHandler asks for it in the first round, and later only if it has
# itself become the first), so the two never meet. TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes it ask in each round.
# A good guess: after a restart all processes are given the store of this round.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy psutil
cat > worker.py <<'PY'
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

distributed.init_process_group("gloo", timeout=timedelta(seconds=300))
assert distributed.get_world_size() == 2
if not (Path(sys.argv[1]) / "killed").exists():
    (Path(sys.argv[1]) / f"met-{distributed.get_rank()}").touch()
    while True:  # until the other one dies
        distributed.all_reduce(torch.ones(1))
        time.sleep(0.1)
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


def meet_again(variable: str, port: int) -> bool:
    """Whether both end well within a minute of the return of the first."""
    folder = Path(tempfile.mkdtemp(dir="."))

    def agent(address: str, host: int) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--local-addr={address}",
            f"--rdzv-conf=is_host={host},keep_alive_interval=1,keep_alive_max_attempt=3", "worker.py", str(folder),
        ]  # fmt: skip
        variables = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": variable}
        return subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)

    def lose_power(there: subprocess.Popen) -> None:
        processes = psutil.Process(there.pid).children(recursive=True) if there.poll() is None else []
        for process in (there, *processes):
            process.kill()
        there.wait()

    second, first = agent("127.0.0.2", 1), agent("127.0.0.1", 0)
    while len(list(folder.glob("met-*"))) < 2:
        time.sleep(0.1)
    (folder / "killed").touch()
    lose_power(first)
    first, until = agent("127.0.0.1", 0), time.monotonic() + 60
    while None in (first.poll(), second.poll()) and time.monotonic() < until:
        time.sleep(0.1)
    done = (first.poll(), second.poll()) == (0, 0)
    lose_power(first)
    lose_power(second)
    return done


found = {variable: meet_again(variable, 29700 + int(variable)) for variable in ("0", "1")}
print("they meet again, by TORCH_DISABLE_SHARE_RDZV_TCP_STORE:", found)
assert found == {"0": False, "1": True}, "changed"
PY
