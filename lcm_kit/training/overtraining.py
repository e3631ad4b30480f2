"""Over-training, forgetting, collapse: which measured weights are kept, and what the figures say, in words.

Two figures tell on a run, both measured with the same noise every time: the loss on held-out pictures of
the style, which falls, and rises again when the trained ones are learned by heart; and one on control
prompts, which do not name the style, that rises when they are forgotten.

The rule. A step passes if its control figure is at most the tolerance above the lowest one that was measured,
step 0 included. Of the steps that pass, the one with the lowest held-out loss is kept; where no picture is
held out, the last one. If none passes, the least degraded is kept. Without control prompts all pass; where
nothing is measured, the last weights are the result. Diversity chooses nothing, it is told: a method that
collapses does not come back, and its earlier steps are not yet fit to be a result.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

HELD_OUT_LOSS, DIVERSITY = "held_out_loss", "diversity"  # in metrics.jsonl and adapter.json
OVERTRAINED = 0.02  # a last loss this share above the lowest is told as over-training
CONTROL = {"train/finetune": "control_loss", "train/distill": "control_distance"}  # its name, by the recipe
# By that name: the share above the lowest that still passes, as measured on tiny-sd
# (docs/finetuning.md, docs/training.md). The loss may double, since a style that shows in every picture
# raises it too.
TOLERANCE = {"control_loss": 1.0, "control_distance": 0.12}
# Of the teacher's diversity, below which a method is told to collapse. A distillation should keep 0.9; a few
# prompts' pictures leave some hundredths to chance, and a warning that comes for nothing is not read
COLLAPSED = 0.7
HELP = {
    "control_loss": "prior.prompts, fewer steps, a lower optimizer.lr",
    "control_distance": "data.regularization, a higher teacher.weight, fewer steps, a lower optimizer.lr",
}


@dataclass(frozen=True)
class Measured:
    """The figures of a run by step (0: before the first); an empty table: that figure is not measured."""

    held_out: Mapping[int, float] = field(default_factory=dict)
    control: Mapping[int, float] = field(default_factory=dict)
    recipe: str = "train/finetune"
    diversity: Mapping[int, float] = field(default_factory=dict)

    @property
    def control_name(self) -> str:
        """What `control` is called in metrics.jsonl and adapter.json."""
        return CONTROL[self.recipe]

    @property
    def steps(self) -> list[int]:
        """The steps that have every figure, in order, without step 0, whose weights nobody needs."""
        tables = [set(table) for table in (self.held_out, self.control) if table]
        return sorted(set.intersection(*tables) - {0}) if tables else []

    @property
    def limit(self) -> float:
        """The largest control figure that passes. It can only fall as more is measured."""
        least = min(self.control.values(), default=math.inf)
        return least * (1 + TOLERANCE[self.control_name])

    def passes(self, step: int) -> bool:
        """Whether the control prompts are not degraded at `step`; true where there are none."""
        return not self.control or self.control[step] <= self.limit

    def best(self, among: Collection[int]) -> int:
        """The step of `among` (measured ones) that the rule keeps; 0 if there is none."""
        return next(iter(self.candidates(among)), 0)

    def candidates(self, among: Collection[int]) -> list[int]:
        """The steps of `among` that are kept now or may be once more is measured; the one kept now is first.

        A step can come to be kept only when a lower limit shuts out all that are better by the held-out loss,
        so it needs a lower control figure than these.
        """
        known = [step for step in self.steps if step in among]
        found: list[int] = []
        for step in sorted(filter(self.passes, known), key=self._order):
            if not found or (self.control and self.control[step] < self.control[found[-1]]):
                found.append(step)
        return found or sorted(known, key=lambda step: self.control[step])[:1]

    def _order(self, step: int) -> tuple[float, int]:
        """Smaller is better: the held-out loss, and of equal ones the earlier; without it the later step."""
        return (self.held_out[step], step) if self.held_out else (0.0, -step)


def of_tables(tables: Mapping[str, Mapping[int, float]], recipe: str) -> Measured:
    """The figures of a run from tables by name, of which those of other names are passed over."""
    held_out, control, diversity = (tables.get(n, {}) for n in (HELD_OUT_LOSS, CONTROL[recipe], DIVERSITY))
    return Measured(held_out, control, recipe, diversity)


def verdict(measured: Measured, kept: int) -> list[str]:
    """Sentences on the figures of a run, the weights of step `kept` being the result; often none."""
    return _on_held_out(measured, kept) + _on_control(measured, kept) + _on_diversity(measured, kept)


def fallen(measured: Measured, step: int) -> list[str]:
    """What is to be said at once, after `step`: a sentence where diversity was not below its level before."""
    trained = {at: ratio for at, ratio in measured.diversity.items() if 0 < at <= step}
    before = max((at for at in trained if at < step), default=None)
    if trained.get(step, 1.0) >= COLLAPSED or (before is not None and trained[before] < COLLAPSED):
        return []
    return [_collapsing(step, trained[step])]


def _on_held_out(measured: Measured, kept: int) -> list[str]:
    losses, styled = measured.held_out, measured.recipe == "train/finetune"
    trained = {step: loss for step, loss in losses.items() if step}
    if not trained:
        return []
    last, lowest, said = max(trained), min(trained, key=trained.__getitem__), []
    if losses[last] > losses[lowest] * (1 + OVERTRAINED):
        more = losses[last] / losses[lowest] - 1
        said.append(
            f"over-trained: the loss on held-out pictures was lowest at step {lowest} ({losses[lowest]:.4g}) "
            f"and is {more:.0%} higher at step {last}; adapter/ holds step {kept}. Fewer steps, a lower "
            f"optimizer.lr, more pictures or {'prior.prompts' if styled else 'data.regularization'} help"
        )
    elif kept == lowest != last:
        said.append(f"adapter/ holds step {kept}, which has the lowest loss on held-out pictures")
    # The consistency loss is of the student against itself and may rise while it learns
    if styled and 0 in losses and losses[lowest] >= losses[0]:
        said.append(
            f"warning: the loss on held-out pictures never fell below the base's ({losses[0]:.4g}), so what "
            "was learned does not hold for them; are they of one style, and do the captions fit?"
        )
    return said


def _on_control(measured: Measured, kept: int) -> list[str]:
    """What is to be said where the last weights do not pass."""
    control, steps, name = measured.control, measured.steps, measured.control_name
    if not control or not steps or measured.passes(steps[-1]):
        return []
    good = max(filter(measured.passes, steps), default=0)
    since = next(step for step in steps if step > good)
    best, last = min(control, key=control.__getitem__), steps[-1]
    # at 0 the student is the teacher, as the base is of its own one step
    more = f"{control[last] / control[best] - 1:.0%} higher" if control[best] else "higher"
    which = {0: ", the least degraded", kept: ", the last one measured before that"}.get(good, "")
    return [
        f"warning: control prompts degrade: {name} is {more} at step {last} "
        f"({control[last]:.4g}) than at step {best} ({control[best]:.4g}), and more than "
        f"{TOLERANCE[name]:.0%} since step {since}, so what the pictures lack is being forgotten; adapter/ "
        f"holds step {kept}{which}. What helps: {HELP[name]}"
    ]


def _on_diversity(measured: Measured, kept: int) -> list[str]:
    """What is to be said where the result draws too much alike; 0 kept: the last step is the result."""
    found = measured.diversity
    step = kept or max(found, default=0)
    return [_collapsing(step, found[step])] if step and found.get(step, 1.0) < COLLAPSED else []


def _collapsing(step: int, ratio: float) -> str:
    return (
        f"warning: at step {step} the pictures of one prompt are only {ratio:.2g} times as different from "
        "each other as the teacher's: the method is collapsing; what helps: a lower optimizer.lr, a start "
        "from a consistency-distilled LoRA (adapter.start), more different prompts, fewer steps"
    )
