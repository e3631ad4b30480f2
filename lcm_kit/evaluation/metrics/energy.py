"""How much energy does it take? Measured where the device says, and not guessed where it does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

POWERCAP = Path("/sys/class/powercap")  # Linux's counters, of Intel's and AMD's CPUs
_EVERY = 0.05  # seconds between two styles at a GPU's power


class Energy:
    """`with Energy("cuda") as energy: ...`, then `energy.joules`; None where the device does not say.

    A GPU's power (NVML, by pynvml) is sampled every 50 ms and integrated, so runs of less than a second are
    rough. A CPU's counters (RAPL) are those of its whole packages, readable by root only on most systems.
    Whatever else ran on the device is in the figure, and the rest of the machine is not.
    """

    def __init__(
        self, device: str, *, power: Callable[[], float] | None = None, powercap: Path = POWERCAP
    ) -> None:
        """`power` gives watts, the GPU's own by default; `powercap` is where the CPU's counters lie."""
        self.joules: float | None = None
        self._device = device
        self._given = power
        self._powercap = powercap
        self._samples: list[tuple[float, float]] = []  # seconds, watts
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: dict[Path, int] = {}

    def __enter__(self) -> Energy:
        """Begin to measure."""
        if not self._device.startswith("cuda"):
            self._before = counters(self._powercap)
        elif self._look():
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Fill in `joules`."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            if self._look():
                self.joules = integral(self._samples)
        elif self._before:
            self.joules = spent(self._before, counters(self._powercap))

    def _power(self) -> float:
        return self._given() if self._given is not None else torch.cuda.power_draw(self._device) / 1000

    def _look(self) -> bool:
        try:
            if self._given is None and self._thread is not None and self._stop.is_set():
                torch.cuda.synchronize(self._device)  # work that was queued in the block belongs to it
            self._samples.append((time.perf_counter(), self._power()))
        except Exception:  # pynvml is missing, or the driver refuses: of any kind
            return False
        return True

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY):
            self._look()


def counters(powercap: Path = POWERCAP) -> dict[Path, int]:
    """Microjoules by zone of a CPU package; empty where there are none or they may not be read.

    Parts of a package (cores, memory: `intel-rapl:0:1`) and the whole board (`psys`) are left out: they would
    count the same energy twice.
    """
    found = {}
    try:
        for zone in sorted(powercap.glob("intel-rapl:*")):
            name = zone / "name"
            board = name.is_file() and name.read_text().startswith("psys")
            if zone.name.count(":") == 1 and not board:
                found[zone] = int((zone / "energy_uj").read_text())
    except (OSError, ValueError):
        return {}
    return found


def spent(before: dict[Path, int], after: dict[Path, int]) -> float | None:
    """Joules between two readings; None if a counter has gone.

    A counter that reached its end starts at 0 again. That it did so once is seen; twice in between is not (a
    package of 100 W takes about 40 minutes a turn).
    """
    total = 0
    for zone, start in before.items():
        if zone not in after:
            return None
        used = after[zone] - start
        try:
            total += used if used >= 0 else used + int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            return None
    return total / 1e6


def integral(samples: list[tuple[float, float]]) -> float:
    """Joules of (seconds, watts), by trapezoids."""
    pairs = zip(samples, samples[1:], strict=False)
    return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairs)
