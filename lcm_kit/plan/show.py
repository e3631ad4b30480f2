"""A plan as tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lcm_kit.plan.advice import Option
from lcm_kit.plan.estimate import CONTEXT, GIB, MARGIN, Disk, Estimate, room

if TYPE_CHECKING:
    from lcm_kit.plan.probe import Probe

_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
_WHERE = {"cuda": "a GPU", "cpu": "the CPU"}


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


def _table(*columns: str) -> Table:
    """Sizes to the right, the rest to the left."""
    table = Table(box=SIMPLE)
    for column in columns:
        table.add_column(column, justify="right" if column == "size" else "left")
    return table


def facts(estimate: Estimate, disk: Disk) -> None:
    """Parameters, memory by part and by phase, FLOPs by part, disk."""
    weights, config = estimate.weights, estimate.config
    lora, name = sum(weights.lora), str(estimate.dtype).removeprefix("torch.")
    _print(
        f"parameters: {weights.base / 1e6:.1f}M of the UNet, frozen; {lora / 1e6:.2f}M of the LoRA, trained"
    )
    _print(
        f"a step of {config.batch_size * config.accumulation} samples: {flops(sum(estimate.flops.values()))} "
        f"({', '.join(f'{part} {flops(count)}' for part, count in estimate.flops.items())})"
    )
    _print(f"disk: {_cache(disk)}; {disk.keep} training states of {size(disk.state)}")
    where = _WHERE[estimate.device]
    _print(f"memory of lcm-kit train on {where}, frozen weights in {name}, at its peak:")
    table = _table("part", "size")
    for part, count in estimate.parts.items():
        table.add_row(part, size(count))
    table.add_section()
    table.add_row(f"peak, in the phase {estimate.phase}", size(estimate.peak))
    Console().print(table)
    staying = sum(estimate.staying.values())
    _print(
        "other phases: "
        + ", ".join(
            f"{phase} {size(staying + estimate.passing(phase))}"
            for phase in estimate.phases
            if phase != estimate.phase
        )
    )
    _print(f"lcm-kit encode, a process of its own: {size(estimate.encode_peak)}")


def _cache(disk: Disk) -> str:
    if disk.cache is None:
        return f"cache {size(disk.record)} a picture (they are not here to be counted)"
    return f"cache {size(disk.cache)} ({disk.records} rows of {size(disk.record)})"


def presets(found: Mapping[int, Option | None]) -> None:
    """What to add to the command for each card."""
    _print("presets, what to add to the command:")
    for card, option in found.items():
        if option is None:
            said = "does not fit; nothing helps but a lower data.resolution or adapter.rank"
        else:
            verdict = "fits" if option.fits_unchanged else "does not fit"
            said = f"{verdict}; {option.typed or 'as it is'}: {size(option.estimate.peak)}"
        _print(f"{card:>3} GB: {said}")
    _print(
        "(the fewest savings that fit, then the largest batch at the same samples a step; "
        f"{CONTEXT:g} GiB of a card is left to CUDA and the desktop, {MARGIN:.0%} of the rest stays free)"
    )


def verdict(estimate: Estimate, card: float, tried: Sequence[Option]) -> None:
    """Whether it fits into `card` GiB and, from what was `tried`, what to change."""
    limit = f"the {room(card):.2f} GiB that a plan may fill of {card:.3g} GiB"
    if not estimate.encode_fits(card):
        _print(f"encoding does not fit: {size(estimate.encode_peak)} are more than {limit};")
        _print(_encode_help(estimate))
    if estimate.fits(card):
        _print(f"training fits: {size(estimate.peak)} are within {limit}")
        return
    _print(f"training does not fit: {size(estimate.peak)} are more than {limit}")
    table = _table("tried", "size", "fits")
    for option in tried:
        fits = "yes" if option.estimate.fits(card) else "no"
        table.add_row(option.typed, size(option.estimate.peak), fits)
    Console().print(table)
    if tried and tried[-1].estimate.fits(card):
        _print(f"to make it fit, add: {tried[-1].typed}")
    else:
        _print("nothing that was tried makes it fit; lower data.resolution or adapter.rank")


def _encode_help(estimate: Estimate) -> str:
    smaller = "set data.batch_size=1, or " if estimate.config.data.batch_size > 1 else ""
    return f"{smaller}encode on the CPU (CUDA_VISIBLE_DEVICES= lcm-kit encode ...)"


def probe(measured: Probe, estimate: Estimate) -> None:
    """Estimate and measurement side by side, and the time of the run."""
    _print(f"probe on {_WHERE[measured.device]}, {measured.weights} weights:")
    if measured.micro < estimate.config.batch_size:
        _print(f"  memory ran out: it went on with {measured.micro} samples a forward")
    for phase, count in measured.phases.items():
        expected = sum(estimate.staying.values()) + estimate.passing(phase) if phase in estimate.phases else 0
        if 2 * expected > estimate.peak:  # what is far below the peak matters to nobody
            _print(f"  {phase}: {size(count)}, estimated {size(expected)} ({expected / count - 1:+.0%})")
    if measured.peak is None:
        _print("  this system does not say how much memory was used")
    elif not measured.phases:
        _print(f"  peak {size(measured.peak)}, estimated {size(estimate.peak)}")
    steps = estimate.config.steps
    _print(f"  {measured.seconds:.2f} s a step: {span(measured.seconds * steps)} for {steps} steps")
    _print(f"  export and reload: all {measured.exported} modules came back as they were")
