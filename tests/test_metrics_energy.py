"""Joules from a fake sysfs and a fake power meter."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from lcm_kit.evaluation.metrics.energy import Energy, counters, integral, spent


def zone(powercap: Path, name: str, kind: str, microjoules: int, most: int = 9_999_999) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True)
    for file, content in (("name", kind), ("energy_uj", microjoules), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{content}\n")
    return folder


def test_packages_are_counted_once(tmp_path: Path) -> None:
    """Not their cores, which are in them, nor the board, which they are in."""
    zones = [zone(tmp_path, name, kind, 1_000_000) for name, kind in (
        ("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:12", "package-12"),
        ("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys"),
    )]  # fmt: skip
    (tmp_path / "intel-rapl").mkdir()  # the control type itself
    assert [found.name for found in counters(tmp_path)] == ["intel-rapl:0", "intel-rapl:1", "intel-rapl:12"]
    with Energy("cpu", powercap=tmp_path) as energy:
        for each in zones:
            (each / "energy_uj").write_text("3500000\n")
    assert energy.joules == pytest.approx(3 * 2.5)


def test_a_counter_starts_again_at_its_end(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    with Energy("cpu", powercap=tmp_path) as energy:
        (package / "energy_uj").write_text("500000")
    assert energy.joules == pytest.approx(1.499999)
    (package / "max_energy_range_uj").unlink()
    assert spent({package: 9_000_000}, {package: 500_000}) is None  # not known, so not guessed


def test_no_figure_where_the_counters_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    with Energy("cpu", powercap=tmp_path) as energy:
        (package / "energy_uj").unlink()
    assert energy.joules is None  # gone in between
    zone(tmp_path / "b", "intel-rapl:0", "package-0", 1)

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)  # as for any user but root; the tests may run as root
    with Energy("cpu", powercap=tmp_path / "b") as energy:
        pass
    assert energy.joules is None


def test_power_is_integrated_by_trapezoids() -> None:
    assert integral([(0.0, 100.0), (1.0, 200.0), (1.5, 200.0)]) == pytest.approx(150 + 100)
    assert integral([(0.0, 100.0)]) == 0


def test_a_meter_is_read_while_the_block_runs() -> None:
    """A meter that says how many seconds have passed: the integral of t is t^2 / 2."""
    start = time.perf_counter()
    with Energy("cuda:0", power=lambda: time.perf_counter() - start) as energy:
        began = time.perf_counter() - start
        while len(energy._samples) < 4:
            time.sleep(0.01)
        ended = time.perf_counter() - start
    (first, _), *_, (last, _) = energy._samples
    assert first - start <= began and last - start >= ended
    exact = ((last - start) ** 2 - (first - start) ** 2) / 2
    assert energy.joules == pytest.approx(exact, rel=0.01)


def test_what_goes_wrong_in_the_block_is_not_hidden_and_the_thread_ends() -> None:
    with pytest.raises(RuntimeError, match="mine"), Energy("cuda", power=lambda: 10.0) as energy:
        raise RuntimeError("mine")
    assert energy._thread is not None and not energy._thread.is_alive()


def test_torchs_own_meter_is_in_milliwatts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: asked.append(device) or 300_000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("sync"))
    with Energy("cuda:1") as energy:
        pass
    (start, watts), *_, (end, _) = energy._samples
    assert watts == 300 and energy.joules == pytest.approx(300 * (end - start))
    assert asked[0] == "cuda:1" and asked[-2:] == ["sync", "cuda:1"]

    def missing(device: str) -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "power_draw", missing)
    with Energy("cuda") as energy:
        pass
    assert energy.joules is None
