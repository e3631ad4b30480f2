"""What a run computes: FLOPs of a step, and the passes of the UNet besides the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lcm_kit.adapter import matching, roles
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.schema import Distill, Training
from lcm_kit.core.methods import DMD
from lcm_kit.plan.dry_run import DryRun
from lcm_kit.training import validation
from lcm_kit.training.diversity import PICTURES
from lcm_kit.training.held_out import TIMES


@dataclass(frozen=True)
class ExtraPasses:
    """Passes of the UNet, each of one sample, besides the optimizer steps."""

    what: str
    passes: int
    flops: float


def pairs(config: Training) -> bool:
    """Whether every sample has one of the base's own beside it, which costs a step as much again."""
    return isinstance(config, Finetune) and config.prior.prompts is not None


def place_on_trial(method: DMD) -> int:
    """The step of the longest trajectory that a probe tries: with as many before it as come in the mean."""
    return min(round(matching.place_in_the_mean(method)), method.steps[-1] - 1)


def graphs(config: Training) -> int:
    """Forwards of what is trained that one backward goes through."""
    method = config.matching
    return 2 if pairs(config) or (method and method.consistency) else 1


def guided(guidance_scale: float) -> int:
    """Passes of the UNet for one step of one picture."""
    return 2 if guidance_scale > 1 else 1


def student_guidance(config: Training) -> float:
    """The guidance_scale that what is trained is drawn with while it trains."""
    if isinstance(config, Distill):
        return validation.student_of(config).usual_guidance
    return config.validation.guidance_scale


def flops_of_step(config: Training, dry_run: DryRun, fake: DryRun | None) -> dict[str, float]:
    """FLOPs of an optimizer step on one process, in the mean, by part; no part for what is left out.

    `fake`: the fake score's passes, where there is one.
    """
    samples, method = config.batch_size * config.accumulation, config.matching
    found: dict[str, float] = {}
    if fake and method and isinstance(config, Distill):
        asked, one = matching.passes(config, method), dry_run.forward / graphs(config)
        trained = asked["fake score, trained"]
        found = {
            "trajectory": asked["trajectory"] * one * samples,
            "teacher": asked["teacher"] * dry_run.teacher.flops * samples,
            "fake score forward": (asked["fake score"] + trained) * fake.forward * samples,
            "fake score backward": trained * (fake.student.flops - fake.forward) * samples,
        }
        if asked["target"]:
            found["target"] = asked["target"] * one * samples
    elif isinstance(config, Distill):
        teacher, student = _of_loss(config)
        if teacher:
            found["teacher"] = teacher * dry_run.teacher.flops * samples / config.teacher.reuse
        # one where the teacher's step ends, one where the sample's own noise leads
        found["target"] = (student - 1) * dry_run.forward * samples
    found["student forward"] = dry_run.forward * samples
    found["student backward"] = (dry_run.student.flops - dry_run.forward) * samples
    return found


def while_training(config: Training, flops: Mapping[str, float], held: int | None) -> list[ExtraPasses]:
    """Validation pictures, held-out loss, control prompts, all through the run; `flops`: `of_forwards`.

    `held`: pictures that are held out; None: not known.
    """
    wanted, style = config.validation, isinstance(config, Finetune)
    times = sum(validation.due(wanted, step, config.steps) for step in range(1, config.steps + 1))
    teacher = (validation.STYLE_STEPS if style else validation.TEACHER_STEPS) * guided(wanted.guidance_scale)
    drawn, each_step = (
        validation.student_steps(validation.student_of(config)),
        guided(student_guidance(config)),
    )
    student = (validation.STYLE_STEPS if style else sum(drawn)) * each_step
    control, found = wanted.control_count if wanted.control else 0, []
    if wanted.prompts is not None:
        shown = wanted.count + min(control, validation.CONTROL_ROWS)
        what = f"pictures for validation, {times} times"
        found.append(_aside(what, flops, wanted.count * teacher, times * shown * student))
    times += 1  # figures are of the start too
    if held:
        each = [round(held * TIMES * times * passes) for passes in _of_loss(config)]
        found.append(_aside(f"loss on {held} held-out pictures, {times} times", flops, *each))
    if control:
        each = [control * teacher, times * control * (TIMES if style else each_step)]
        found.append(_aside(f"{control} control prompts, {times} times", flops, *each))
    if wanted.diversity:
        count = wanted.diversity * PICTURES
        few = validation.student_of(config).usual_steps
        what = f"{PICTURES} pictures of {wanted.diversity} prompts for diversity, {times} times"
        found.append(_aside(what, flops, count * teacher, times * count * few))
    return found


def _of_loss(config: Training) -> tuple[float, float]:
    """Passes for the loss of one sample: of the teacher, and of the UNet with the LoRA."""
    if not isinstance(config, Distill):
        return 0, 1
    asked = roles.passes(config)
    return asked["teacher"], asked["target"] + asked["student"]


def _aside(what: str, flops: Mapping[str, float], teacher: int, student: int) -> ExtraPasses:
    """So many passes without and with the LoRA that is trained."""
    return ExtraPasses(what, teacher + student, teacher * flops["teacher"] + student * flops["student"])


def while_encoding(config: Training, flops: Mapping[str, float]) -> list[ExtraPasses]:
    """What is drawn to be trained on."""
    found = []
    if isinstance(config, Distill) and config.data.has_samples:
        s = config.data.samples
        passes = s.count * s.steps * guided(s.guidance_scale)
        found.append(ExtraPasses(f"{s.count} samples of the teacher", passes, passes * flops["teacher"]))
    if isinstance(config, Finetune) and config.prior.prompts is not None:
        p = config.prior
        passes = p.count * p.steps * guided(p.guidance_scale)
        found.append(ExtraPasses(f"{p.count} pictures of the base's own", passes, passes * flops["teacher"]))
    return found


def of_forwards(config: Training, dry_run: DryRun) -> dict[str, float]:
    """FLOPs of a pass of one sample without and with the LoRA that is trained."""
    return {"teacher": dry_run.teacher.flops, "student": dry_run.forward / graphs(config)}
