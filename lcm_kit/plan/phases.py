"""Bytes that pass while a run trains, by phase and part."""

from __future__ import annotations

from dataclasses import replace

import torch

from lcm_kit.adapter import roles
from lcm_kit.config.finetune import Finetune
from lcm_kit.config.schema import Distill, Training
from lcm_kit.plan import encoding, work
from lcm_kit.plan.dry_run import DryRun, MetaModel, Pass
from lcm_kit.plan.sizes import FLOAT, Parts, workspace
from lcm_kit.plan.text import rank_of
from lcm_kit.plan.tracker import Held

# where distributions are matched: each with all of its passes, from the trajectory on
FAKE_TURN, STUDENT_TURN = "fake score's turn", "student's turn"


def of_training(
    config: Training,
    dry_run: DryRun,
    fake: DryRun | None,
    stage: MetaModel,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Parts]:
    """What passes: activations, gradients, conditions, workspaces. `fake`: the fake score's passes."""
    batch, alone, weights = config.batch_size, config.accumulation == 1, stage.weights
    size = encoding.trained_at(config, stage)
    lora, quantized = FLOAT * sum(weights.lora), config.memory.quantize != "none"
    workspaces = workspace(weights, dtype, device, expanded=quantized)

    def parts(held: Held, samples: int) -> dict[str, int]:
        # with accumulation the gradients of the micro-batches before are there besides
        return {
            "gradients": round(held.gradients) + (0 if alone else lora),
            "activations": round(held.at(samples, gradients=False)),
            "conditions": _conditions(config, stage, dtype, device, samples), "workspaces": workspaces,
        }  # fmt: skip

    found: dict[str, Parts] = {}
    rows = roles.Objective.of(config).rows["teacher"] * batch if isinstance(config, Distill) else batch
    held = dry_run.student.highest(batch, gradients=True)
    if fake:
        # what a pass saw of a LoRA in half precision stays until that LoRA's next pass with gradient, and
        # where the trajectories have arrived until the turns are over
        seen = 0 if dtype == torch.float32 else sum(weights.lora) * dtype.itemsize
        seen += FLOAT * config.accumulation * batch * stage.subject.latent(size)
        trained = fake.student.highest(batch, gradients=True)
        found[FAKE_TURN] = parts(_besides(trained, seen), batch)
        # what the student's pass keeps for its backward is there while the teacher and the fake score answer
        kept = seen + dry_run.graph.at(batch)
        answers = stage.drawing(size, dtype, lora=True, fake=True)
        found[STUDENT_TURN] = max(
            parts(_at(dry_run.teacher, rows, kept), rows + batch),
            parts(_at(answers, batch, kept), batch),
            parts(_besides(held, seen), batch),
            key=lambda some: sum(some.values()),
        )
    else:
        if isinstance(config, Distill) and roles.passes(config)["teacher"]:
            found["teacher pass"] = parts(dry_run.teacher.highest(rows), rows)
        found["student pass"] = parts(held, batch)
    found["optimizer step"] = {"gradients": lora}  # fused AdamW makes no copies
    if config.validation.held_out:
        guided = isinstance(config, Distill) and bool(roles.passes(config)["teacher"])
        plain, samples = (dry_run.teacher, rows) if guided else (stage.drawing(size, dtype, lora=True), batch)
        held_at = round(plain.highest(samples).at(samples))
        found["held-out loss"] = {"activations": held_at, "workspaces": workspaces}
    if config.validation.prompts is not None or config.validation.control is not None:
        found["validation"] = _validation(config, dry_run, stage, dtype, device)
    return found


def _besides(held: Held, size: float) -> Held:
    """The same with so many bytes more."""
    return replace(held, fixed=held.fixed + size)


def _at(what: Pass, samples: int, size: float) -> Held:
    """A pass without gradient of so many samples at its highest, beside so many bytes."""
    return Held(0.0, what.highest(samples).at(samples) + size)


def _conditions(config: Training, stage: MetaModel, dtype: torch.dtype, device: str, samples: int) -> int:
    """Embeddings of the captions: those of a pass, and on a CPU those of the whole step's batch."""
    subject, pair = stage.subject, 2 if work.pairs(config) else 1
    numbers = subject.tokens * subject.structure.width + subject.pooled
    size = samples * pair * numbers * dtype.itemsize
    if device == "cpu":
        size += FLOAT * config.batch_size * config.accumulation * pair * numbers
    return size


def on_the_host(config: Training, stage: MetaModel, dtype: torch.dtype, staying: Parts) -> dict[str, Parts]:
    """What costs the machine's memory and none of a GPU's: loading the base, copies of what is saved."""
    weights, stored, loras = stage.weights, stage.subject.stored, 2 if config.matching else 1
    # all layers before the first is in few bits, and the file, if its numbers are others
    full = weights.base * (dtype.itemsize + (stored.itemsize if stored and stored != dtype else 0))
    return {
        "loading": {"weights in full": max(0, full - sum(staying.values()))},
        # each LoRA, and once more in the file's form as safetensors builds it and gives it back; the EMA
        "saving": {
            "copies of the LoRA": FLOAT * sum(weights.lora) * (3 * loras + (1 if config.second_set else 0))
        },
    }


def _validation(
    config: Training, dry_run: DryRun, stage: MetaModel, dtype: torch.dtype, device: str
) -> Parts:
    """All pictures at once, with guidance: drawn by the teacher, a guided student or a style; decoded."""
    count, subject = config.validation.count, stage.subject
    with_lora = isinstance(config, Finetune) or work.student_guidance(config) > 1
    drawn = stage.drawing(config.drawn_at, dtype, lora=with_lora)
    samples = count * work.guided(config.validation.guidance_scale)
    drawing = drawn.highest(samples).at(samples)
    vae, decoding = encoding.decoder(stage, config.drawn_at, count, dtype)
    # those that are trained are there already; a style's control prompts are encoded beside the pipeline
    each = 0 if rank_of(config) else dtype.itemsize
    each += FLOAT if isinstance(config, Finetune) and config.validation.control is not None else 0
    text = {"text encoders": subject.text * each} if each else {}
    return {
        **text,
        "VAE": round(vae),
        "activations": round(max(drawing, decoding)),
        "workspaces": workspace(
            stage.weights, dtype, device, expanded=config.memory.quantize != "none"
        ),
    }  # fmt: skip
