"""A plan as tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lcm_kit import console
from lcm_kit.adapter.matching import place_in_the_mean
from lcm_kit.config.schema import Training
from lcm_kit.console import Table, say
from lcm_kit.plan import work
from lcm_kit.plan.advice import Option
from lcm_kit.plan.disk import Disk
from lcm_kit.plan.encoding import PRIOR, SAMPLES
from lcm_kit.plan.estimate import CONTEXT, MARGIN, Estimate, Stage, room
from lcm_kit.plan.phases import FAKE_TURN, STUDENT_TURN
from lcm_kit.plan.sizes import GIB
from lcm_kit.plan.work import ExtraPasses

if TYPE_CHECKING:
    from lcm_kit.plan.probe import Probe

_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
RETURNING = "MALLOC_MMAP_THRESHOLD_"  # glibc's variable: larger blocks go back to the system when freed
_SIZES = ("size", "train", "encode")  # columns
LESS = "lower data.resolution or adapter.rank"  # what helps where nothing that was tried does
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


def _table(*columns: str) -> Table:
    """Sizes to the right, the rest to the left."""
    table = Table(box=console.SIMPLE)
    for column in columns:
        table.add_column(column, justify="right" if column in _SIZES else "left")
    return table


def facts(
    estimate: Estimate, disk: Disk, asides: Sequence[ExtraPasses], drawn: Sequence[ExtraPasses]
) -> None:
    """Parameters, FLOPs of a step and of what else is drawn, disk; memory by part and by phase."""
    weights, lora = estimate.weights, sum(estimate.weights.lora)
    beside = ", and as many of the fake score's" if estimate.config.matching else ""
    styled = f", {weights.style / 1e6:.2f}M of the teacher's adapters" if weights.style else ""
    say(
        f"parameters: {weights.base / 1e6:.1f}M of the UNet{styled}, frozen; {lora / 1e6:.2f}M of the LoRA"
        f"{beside}, trained"
    )
    _computed(estimate, asides, drawn)
    say(
        f"disk: {_cache(disk)}; {disk.keep} training states of {size(disk.state)}; adapters "
        f"{size(disk.adapters)}"
    )
    _memory(estimate)
    stages(estimate.stages, estimate.largest)


def stages(found: Sequence[Stage], largest: Stage) -> None:
    """What each stage needs, the largest named."""
    say("every stage, one after the other; the largest decides:")
    table = _table("stage", "at its highest", "size")
    for stage in found:
        table.add_row(stage.verb, stage.phase, size(stage.size))
    table.add_section()
    table.add_row("largest", largest.verb, size(largest.size))
    console.show(table)


def _computed(estimate: Estimate, asides: Sequence[ExtraPasses], drawn: Sequence[ExtraPasses]) -> None:
    """FLOPs of a step, of the run and of encoding."""
    config, step = estimate.config, sum(estimate.flops.values())
    pair = " and as many of the base's own" if work.pairs(config) else ""
    say(
        f"a step of {config.batch_size * config.accumulation} samples{pair}: {flops(step)} "
        f"({', '.join(f'{part} {flops(count)}' for part, count in estimate.flops.items())})"
    )
    say(
        f"{config.steps} steps: {flops(config.steps * step)}"
        + "".join(f"; besides, {_aside(aside)}" for aside in asides)
    )
    for aside in drawn:
        say(f"lcm-kit encode draws {_aside(aside)}")


def _aside(aside: ExtraPasses) -> str:
    return f"{aside.what}: {aside.passes} passes of the UNet, {flops(aside.flops)}"


def _memory(estimate: Estimate) -> None:
    name = str(estimate.dtype).removeprefix("torch.")
    where = _WHERE[estimate.device]
    say(f"memory of lcm-kit train on {where}, frozen weights in {name}, at its peak:")
    table = _table("part", "size")
    for part, count in estimate.parts.items():
        table.add_row(part, size(count))
    table.add_section()
    table.add_row(f"peak, in the phase {estimate.phase}", size(estimate.peak))
    console.show(table)
    staying = sum(estimate.staying.values())
    say(
        "other phases: "
        + ", ".join(
            f"{phase} {size(staying + estimate.passing(phase))}"
            for phase in estimate.phases
            if phase != estimate.phase
        )
    )
    if estimate.gaps:
        say(
            f"resident: about {size(estimate.resident)}, because glibc's heap keeps what is freed; with "
            f"{RETURNING}=65536 in the environment it is the peak above, and a step takes longer"
        )


def _cache(disk: Disk) -> str:
    if disk.cache is None:
        return f"cache {size(disk.record)} a picture (they are not here to be counted)"
    return f"cache {size(disk.cache)} ({disk.records} rows of {size(disk.record)})"


def _last_resort(config: Training) -> str:
    """What changes the outcome, for where nothing else is left."""
    ways = ["lower data.resolution"]
    started = bool(config.adapter.start)
    ways += ["lower adapter.rank" + " and start from a LoRA of that rank at most" * started]
    ways += ["leave out the base's own pictures (prior.prompts=null)"] if work.pairs(config) else []
    return " or ".join((", ".join(ways[:-1]), ways[-1]))


def presets(config: Training, found: Mapping[int, Option | None]) -> None:
    """What to add to the command for each card."""
    say("presets, what to add to the command:")
    large: dict[str, Stage] = {}
    for card, option in found.items():
        say(f"{card:>3} GB: {_preset(config, card, option)}")
        large |= {stage.name: stage for stage in (option.estimate.too_large(card) if option else ())}
    for stage in large.values():
        say(f"where {stage.name} is too large: {help_for(stage)}")
    say(
        "(by the largest of all stages; the fewest savings that fit, then the largest batch at the same "
        f"samples a step; {CONTEXT:g} GiB of a card is left to CUDA and the desktop, {MARGIN:.0%} of the "
        "rest stays free)"
    )


def _preset(config: Training, card: int, option: Option | None) -> str:
    if option is None:
        return f"does not fit; nothing helps but to {_last_resort(config)}"
    found, typed = option.estimate, option.typed or "as it is"
    if large := found.too_large(card):
        listed = ", ".join(f"{stage.name} {size(stage.size)}" for stage in large)
        rest = max((stage.size for stage in found.stages if stage not in large), default=0)
        return f"does not fit: {listed}; the rest does, {typed}: {size(rest)}"
    most, usual = found.evaluate_at(card), max(found.evaluate)
    fits = "fits" if option.fits_unchanged else "does not fit"
    by = f"; evaluate with batch_size={most}" if most < usual else ""
    return f"{fits}; {typed}: {size(found.largest.size)} to {found.largest.verb}{by}"


def verdict(estimate: Estimate, card: float, tried: Sequence[Option]) -> None:
    """Whether it fits into `card` GiB, stage by stage, and, from what was `tried`, what to change."""
    limit = f"the {room(card):.2f} GiB that a plan may fill of {card:.3g} GiB"
    large = estimate.too_large(card)
    left = {stage.name for stage in (tried[-1].estimate if tried else estimate).too_large(card)}
    for stage in large:
        if stage.verb != "train":
            say(f"{stage.name} does not fit: {size(stage.size)} are more than {limit}")
            say(f"what helps: {help_for(stage)}" if stage.name in left else "what helps is said below")
    if estimate.train_fits(card):
        fits = "training fits" if large else "every stage fits"
        largest = estimate.resident if large else estimate.largest.size
        say(f"{fits}: {size(largest)} are within {limit}")
    else:
        say(f"training does not fit: {size(estimate.resident)} are more than {limit}")
    if not large:
        return
    if tried:
        table = _table("tried", "train", "encode", "fits")
        for option in tried:
            found = option.estimate
            fits = "yes" if found.fits(card) else "no"
            table.add_row(option.typed, size(found.resident), size(found.encode_peak), fits)
        console.show(table)
    if tried and tried[-1].estimate.train_fits(card):
        say(f"to make it fit, add: {tried[-1].typed}")
    elif not estimate.train_fits(card):
        say(f"nothing that was tried makes it fit; {_last_resort(estimate.config)}")


def help_for(stage: Stage) -> str:
    """What to do where `encode` or `evaluate` fits with no batch size."""
    elsewhere = (
        f"{stage.verb} on a larger card, or on the CPU (CUDA_VISIBLE_DEVICES= lcm-kit {stage.verb} ...)"
    )
    return {
        PRIOR: f"leave out prior.prompts, or {elsewhere}",
        SAMPLES: f"set data.source=images, or {elsewhere}",
    }.get(stage.phase, elsewhere)


def probe(measured: Probe, estimate: Estimate) -> None:
    """Estimate and measurement side by side, and the time of the run."""
    say(f"probe on {_WHERE[measured.device]}, {measured.weights} weights:")
    if measured.micro < estimate.config.batch_size:
        say(f"  memory ran out: it went on with {measured.micro} samples a forward")
    if measured.peak is None:
        say("  this system does not say how much memory was used")
    else:
        _compare("peak", measured.peak, _expected(estimate))
    for phase, count in measured.phases.items():
        expected = sum(estimate.staying.values()) + estimate.passing(phase) if phase in estimate.phases else 0
        # what is far below the peak matters to nobody; and gaps hide what a phase holds itself
        if 2 * expected > estimate.peak and not estimate.gaps:
            _compare(phase, count, expected)
    steps = estimate.config.steps
    say(f"  {measured.seconds:.2f} s a step: {span(measured.seconds * steps)} for {steps} steps")
    if estimate.config.stages:
        say("  of the first stage, whose teacher is asked most: steps of later ones are shorter")
    if method := estimate.config.matching:
        tried, mean = work.place_on_trial(method), place_in_the_mean(method)
        say(f"  steps of a trajectory before the one that is taught: {tried} here, {mean:g} in the mean")
    if measured.compiled:
        say(f"  the first step, which compiles, took {span(measured.first)}")
        say("  what compiled code holds is measured here, and no part of any estimate")
    say(f"  export and reload: all {measured.exported} modules came back as they were")


def _expected(estimate: Estimate) -> int:
    """The highest of the phases that a probe goes through."""
    probed = ("loading", "teacher pass", "student pass", FAKE_TURN, STUDENT_TURN, "optimizer step")
    passing = max(estimate.passing(phase) for phase in probed if phase in estimate.phases)
    return sum(estimate.staying.values()) + passing + estimate.gaps


def _compare(what: str, count: int, expected: int) -> None:
    say(f"  {what}: {size(count)}, estimated {size(expected)} ({expected / count - 1:+.0%})")
