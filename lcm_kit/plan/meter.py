"""The highest memory of this process in each phase of what it does, and how much there is at all."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Meter:
    """The highest memory in each phase: CUDA's own count, else the kernel's of resident bytes."""

    cuda: bool
    before: int = 0  # bytes that are not the run's
    peaks: dict[str, int] = field(default_factory=dict)
    most: int | None = None
    _now: str | None = None

    def start(self, phase: str | None) -> None:
        """From here on it is `phase`; None: nothing that counts."""
        held = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        if self._now and held is not None:
            held -= self.before
            self.most = max(held, self.most or 0)
            self.peaks[self._now] = max(held, self.peaks.get(self._now, 0))
        self._now = phase
        if not _forget_peak(self.cuda):
            self.peaks = {}  # they would be those of the run so far


def _forget_peak(cuda: bool) -> bool:
    """Whether the highest memory counts from here on."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes VmRSS
    except OSError:
        return False
    return True


def resident(key: str) -> int | None:
    """Bytes that /proc calls VmRSS (held now) or VmHWM (held at most); None where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def capacity(device: str) -> float | None:
    """GiB of the device that is here; None without one, or if the system does not say."""
    if device == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30 or None
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None
