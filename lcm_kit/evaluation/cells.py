"""The cells of a sweep: each a way to draw all samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

from lcm_kit import sample, samplers
from lcm_kit.config.sweep import GuidanceSweep, SweptPlain, SweptStudent, SweptTeacher
from lcm_kit.core.methods import MethodInfo, usual

Kind = Literal["teacher", "student", "plain"]
_BEYOND = (1.0, 1.5)  # guidance_scale of a student into which guidance is baked


@dataclass(frozen=True)
class Cell:
    """One way to draw; `adapter` is its name in the sweep, None for the base alone."""

    kind: Kind
    adapter: str | None
    sampler: str
    steps: int
    guidance_scale: float
    lora_weight: float = 1.0

    @property
    def id(self) -> str:
        """The cell as a file name, such as `quickstart-lcm-4-g1.5-w1`."""
        weight = f"-w{self.lora_weight:g}" if self.adapter else ""
        who = self.adapter or self.kind
        sampler = samplers.in_file_name(self.sampler)
        return f"{who}-{sampler}-{self.steps}-g{self.guidance_scale:g}{weight}"

    @property
    def unet_calls(self) -> int:
        """UNet passes for one image."""
        return sample.unet_calls(self.steps, self.guidance_scale)

    @property
    def deterministic(self) -> bool:
        """Whether the picture follows from the initial noise, so that it compares with the teacher's."""
        return samplers.deterministic(self.sampler, self.steps)

    def settings(self) -> dict[str, Any]:
        """What results.json says of it."""
        return {"id": self.id, **asdict(self), "unet_calls": self.unet_calls}


def plan(config: GuidanceSweep, adapters: Mapping[str, MethodInfo]) -> list[Cell]:
    """All cells: the teacher's by guidance, plain samplers, then each adapter's grids; none twice.

    `adapters`: by name what made each, which says how it is drawn where a grid does not.

    The base alone is drawn with the adapters' own sampler too, once: what an adapter changes is seen by that.
    """
    cells = [*teachers(config.teacher), *_plain(config.plain)]
    grids = {
        name: [_of_method(grid, method, config) for grid in config.student]
        for name, method in adapters.items()
    }
    cells += [_untrained(grids[name][0]) for name in adapters]
    for name in adapters:
        cells += [cell for grid in grids[name] for cell in _students(grid, name)]
    return list(dict.fromkeys(cells))


def teachers(config: SweptTeacher) -> list[Cell]:
    """The teacher at each guidance_scale, in rising order; the one of the comparison is always among them."""
    scales = sorted({*config.guidance_scales, config.guidance_scale})
    return [Cell("teacher", None, "ddim", config.steps, scale) for scale in scales]


def reference(config: SweptTeacher) -> Cell:
    """The teacher's cell that others are compared with."""
    return Cell("teacher", None, "ddim", config.steps, config.guidance_scale)


def _plain(config: SweptPlain) -> Iterator[Cell]:
    for calls, sampler, scale in product(config.unet_calls, config.samplers, config.guidance_scales):
        steps = calls // sample.unet_calls(1, scale)
        if steps and sample.unet_calls(steps, scale) == calls:
            yield Cell("plain", None, sampler, steps, scale)


class _Grid(NamedTuple):
    """A `SweptStudent` in which nothing is left to the method."""

    samplers: tuple[str, ...]
    lora_weights: tuple[float, ...]
    steps: tuple[int, ...]
    guidance_scales: tuple[float, ...]


def _of_method(grid: SweptStudent, method: MethodInfo, config: GuidanceSweep) -> _Grid:
    baked = method.guidance_scale is None
    scales = grid.guidance_scales or (_BEYOND if baked else config.teacher.guidance_scales)
    return _Grid(
        grid.samplers or (method.sampler,), grid.lora_weights, grid.steps or method.judged_steps, scales
    )


def _untrained(grid: _Grid) -> Cell:
    return Cell("plain", None, grid.samplers[0], usual(grid.steps), min(grid.guidance_scales))


def _students(grid: _Grid, name: str) -> Iterator[Cell]:
    for sampler, weight, steps, scale in product(*grid):
        yield Cell("student", name, sampler, steps, scale, weight)
