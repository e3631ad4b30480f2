"""How much energy does it take? Measured where the device says, and not guessed where it does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

POWERCAP = Path("/sys/class/powercap")  # Intel's and AMD's RAPL, in Linux
_EVERY = 0.05  # seconds between two looks at a GPU's power


class Energy:
    """`with Energy("cuda") as energy: ...`, then `energy.joules`; None where the device does not say.

    A GPU's power is sampled every 50 ms and integrated, so that runs much shorter than that are rough. A CPU's
    counters are those of the whole package: what else ran is in them.
    """

    def __init__(
        self, device: str, *, power: Callable[[], float] | None = None, powercap: Path = POWERCAP
    ) -> None:
        """`power` (watts) is the GPU's own by default; `powercap` is where the CPU's counters lie."""
        self.joules: float | None = None
        self._cuda = device.startswith("cuda")
        self._power = power or (lambda: torch.cuda.power_draw(device) / 1000)
        self._powercap = powercap
        self._samples: list[tuple[float, float]] = []  # seconds, watts
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: dict[Path, int] = {}

    def __enter__(self) -> Energy:
        if self._cuda:
            if self._look():
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
        else:
            self._before = counters(self._powercap)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._look()
            self.joules = _integral(self._samples)
        elif self._before:
            after = counters(self._powercap)
            self.joules = sum(
                _spent(file, start, after.get(file, start)) for file, start in self._before.items()
            )

    def _look(self) -> bool:
        try:
            self._samples.append((time.perf_counter(), self._power()))
        except Exception:  # pynvml is missing, or the driver refuses: of any kind
            return False
        return True

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY):
            self._look()


def counters(powercap: Path = POWERCAP) -> dict[Path, int]:
    """Microjoules by counter of a CPU package; empty where there are none or they may not be read."""
    found = {}
    for file in sorted(powercap.glob("intel-rapl:?/energy_uj")):
        try:
            found[file] = int(file.read_text())
        except (OSError, ValueError):
            return {}
    return found


def _spent(file: Path, before: int, after: int) -> float:
    """Joules between two readings of a counter that starts again at its maximum."""
    if after < before:
        after += int((file.parent / "max_energy_range_uj").read_text()) + 1
    return (after - before) / 1e6


def _integral(samples: list[tuple[float, float]]) -> float:
    """Watts over seconds, by trapezoids."""
    pairs = zip(samples, samples[1:], strict=False)
    return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairs)
