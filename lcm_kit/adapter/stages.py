"""Which stage of a run a step is in; only progressive distillation has several."""

from __future__ import annotations

from lcm_kit.config.schema import Distill
from lcm_kit.core.methods import Stage
from lcm_kit.core.schedule import grid_steps


def stage_at(config: Distill, step: int) -> Stage:
    """The stage that optimizer step `step` (from 0) is in, with the solver's grid at that step.

    A run of one piece is one stage, whose grid may grow on the way.
    """
    for stage in config.stages:
        if step < stage.end:
            return stage
    n_grid = grid_steps(step, config.steps, config.grid.steps_start, config.grid.steps)
    return Stage(0, 0, config.steps, n_grid)
