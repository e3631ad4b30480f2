"""A plan as tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lcm_kit.plan.advice import Option
from lcm_kit.plan.estimate import CARDS, CONTEXT, GIB, Disk, Estimate

if TYPE_CHECKING:
    from lcm_kit.plan.probe import Probe

_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"


def flops(count: float) -> str:
    """FLOPs in the unit that suits them."""
    unit, name = next(((u, n) for u, n in _UNITS if count >= u), _UNITS[-1])
    return f"{count / unit:.2f} {name}s"


def span(seconds: float) -> str:
    """A time in words."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _print(text: str) -> None:
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def facts(estimate: Estimate, disk: Disk) -> None:
    """Weights, memory by part, FLOPs by part and disk."""
    weights, config = estimate.weights, estimate.config
    lora = sum(weights.lora)
    _print(f"weights: {weights.base / 1e6:.1f}M of the UNet, frozen; {lora / 1e6:.2f}M of the LoRA, trained")
    where = "a GPU" if estimate.device == "cuda" else "the CPU"
    name = str(estimate.dtype).removeprefix("torch.")
    table = Table("memory", "GiB", box=SIMPLE, title=f"on {where}, frozen weights in {name}")
    for part, count in estimate.staying.items():
        if count:
            table.add_row(part, f"{count / GIB:.3f}")
    table.add_section()
    for part, count in estimate.phases.items():
        mark = " (the highest)" if part == estimate.phase else ""
        table.add_row(f"{part}{mark}", f"{count / GIB:.3f}")
    table.add_section()
    table.add_row("peak", f"{estimate.peak / GIB:.3f}")
    Console().print(table)
    _print(f"The passing parts of the phases never meet: the peak is in the {estimate.phase}.")
    parts = ", ".join(f"{part} {flops(count)}" for part, count in estimate.flops.items())
    total = flops(sum(estimate.flops.values()))
    samples = config.batch_size * config.accumulation
    _print(f"a step of {samples} samples: {total} ({parts}); a multiply-add counts as two")
    rows = (
        "its images cannot be counted here"
        if disk.cache is None
        else f"{disk.records} rows, {size(disk.cache)}"
    )
    _print(f"cache: {size(disk.record)} a row; {rows}")
    _print(
        f"states: {size(disk.state)} each, {size(disk.state * disk.keep)} for the {disk.keep} that are kept"
    )


def cards(estimate: Estimate) -> None:
    """Whether it fits into the usual cards."""
    for card in CARDS:
        verdict = "fits" if estimate.fits(card) else "does not fit"
        _print(f"{card:>3} GB card: {verdict}")
    _print(f"({CONTEXT:g} GiB of a card is left to CUDA and the desktop)")


def advice(tried: Sequence[Option], card: float) -> None:
    """What to change for a card of `card` GiB."""
    if not tried or not tried[-1].estimate.fits(card):
        _print(f"Nothing that was tried fits into {card:g} GB; lower data.resolution or adapter.rank.")
    else:
        _print(f"To fit into {card:g} GB add: {tried[-1].typed}")
    table = Table("tried", "peak, GiB", "fits", box=SIMPLE)
    for option in tried:
        fits = "yes" if option.estimate.fits(card) else "no"
        table.add_row(option.typed, f"{option.estimate.peak / GIB:.2f}", fits)
    Console().print(table)


def presets(found: Mapping[int, Option | None]) -> None:
    """The overrides for each card."""
    table = Table("preset", "add to the command", "peak, GiB", box=SIMPLE)
    for card, option in found.items():
        if option is None:
            table.add_row(f"{card} GB", "nothing fits: lower data.resolution or adapter.rank", "")
        else:
            table.add_row(
                f"{card} GB", option.typed or "nothing, it fits as it is", f"{option.estimate.peak / GIB:.2f}"
            )
    Console().print(table)


def probe(measured: Probe, estimate: Estimate) -> None:
    """Estimate and measurement side by side, and the time of the run."""
    if measured.peak is None:
        _print(f"probe on {measured.device}: this system does not say how much memory was used")
    else:
        ratio = estimate.peak / measured.peak
        _print(
            f"probe on {measured.device}: peak {size(measured.peak)}, estimated {size(estimate.peak)} "
            f"({ratio - 1:+.0%})"
        )
    steps = estimate.config.steps
    _print(f"{measured.seconds:.2f} s a step: {span(measured.seconds * steps)} for {steps} steps")
    _print(f"export and reload: all {measured.exported} modules came back as they were")
