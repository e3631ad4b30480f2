"""The report of a style LoRA: was the style learned, on which step is it best, was it over-trained?

Its figures are those of the training, so it needs no evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_kit.adapter import folder as adapter
from lcm_kit.lora.provenance import Trained
from lcm_kit.report import plots
from lcm_kit.training.overtraining import HELD_OUT_LOSS, OVERTRAINED, Measured, of_tables, verdict

RECIPE = "train/finetune"


def context(run: Path, config: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What the page shows, plots as SVG text. Raises `UserError` if the run has no finished adapter."""
    facts = adapter.read_provenance(run / "adapter")
    measured, step = figures(metrics, RECIPE), facts.optimizer_steps
    losses = measured.held_out
    return {
        "name": run.resolve().name,
        "answer": answer(measured, step),
        "said": verdict_sentences(measured, step),
        "step": step,
        "base_loss": losses.get(0),
        "best_loss": losses.get(step),
        "facts": _facts(config, facts),
        "plots": {
            "held_out": plots.curve(metrics, HELD_OUT_LOSS, "loss on held-out pictures"),
            "control": control_curve(metrics, measured),
            "loss": plots.curve(metrics, "loss", "denoising loss"),
            "distance": plots.curve(metrics, "distance_to_base", "distance to the base"),
        },
    }


def figures(metrics: Sequence[Mapping[str, float]], recipe: str) -> Measured:
    """What the training measured of its weights, from the lines of `metrics.jsonl`."""
    names = {name for line in metrics for name in line}
    return of_tables(
        {n: {int(line["step"]): line[n] for line in metrics if n in line} for n in names}, recipe
    )


def verdict_sentences(measured: Measured, kept: int) -> list[str]:
    """The sentences of `verdict` as a page writes them."""
    found = verdict(measured, kept)
    return [sentence[0].upper() + sentence[1:] + "." * (sentence[-1] not in ".?") for sentence in found]


def control_curve(metrics: Sequence[Mapping[str, float]], measured: Measured) -> str | None:
    """The plot of the control prompts' figure with the level that it must keep below; None without one."""
    label = {"control_loss": "loss on control prompts", "control_distance": "distance on control prompts"}
    name = measured.control_name
    return plots.curve(metrics, name, label[name], level=measured.limit if measured.control else None)


def answer(measured: Measured, best: int) -> str:
    """Yes: the held-out loss fell below the base's, and the control prompts are as good as they must be."""
    losses = measured.held_out
    if 0 not in losses or best not in losses:
        return "Judge by eye"
    if losses[best] >= losses[0]:
        return "No"
    if best in measured.control and not measured.passes(best):
        return "Yes, but much else was forgotten"
    over = losses[max(losses)] > losses[best] * (1 + OVERTRAINED)
    return f"Yes, at step {best}" if over else "Yes"


def _text(config: Mapping[str, Any]) -> dict[str, str]:
    """The text encoders' LoRA, if there is one; a run of an older kit has no such key."""
    text = config.get("text_encoder") or {}
    if not text.get("rank"):
        return {}
    lr = text["lr"] or config["optimizer"]["lr"]
    alpha = text["alpha"] or text["rank"]
    return {"text encoder LoRA": f"rank {text['rank']}, alpha {alpha:g}, learning rate {lr:g}"}


def _facts(config: Mapping[str, Any], facts: Trained) -> dict[str, str]:
    """The settings that a person asks for first."""
    lora, loss, prior = config["adapter"], config["loss"], config["prior"]
    images = config["batch_size"] * config["accumulation"]
    own = f"{prior['count']} pictures, weight {prior['weight']:g}" if prior["prompts"] else "none"
    return {
        "base": config["base"]["path"],
        "images": config["data"]["path"],
        **({"trigger": config["data"]["trigger"]} if config["data"].get("trigger") else {}),
        "held out": f"{config['validation']['held_out']:.0%} of them",
        "training": f"{facts.steps} steps of {images} images a process; step {facts.optimizer_steps} is kept",
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {lora['targets']} layers",
        **_text(config),
        "min-SNR gamma": f"{loss['min_snr_gamma']:g}" if loss["min_snr_gamma"] else "off",
        "SNR floor": f"{loss['snr_floor']:g}" if loss.get("snr_floor") else "off",
        "captions left out": f"{config['caption_dropout']:.0%}",
        "the base's own pictures": own,
        "learning rate": f"{config['optimizer']['lr']:g}",
        "seed": str(config["seed"]),
    }
