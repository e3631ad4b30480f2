"""What the losses on held-out pictures say of a run, in words."""

from __future__ import annotations

from collections.abc import Mapping

NAME = "held_out_loss"  # in metrics.jsonl and adapter.json
OVERTRAINED = 0.02  # a last loss this share above the lowest is told as over-training


def verdict(losses: Mapping[int, float], best: int) -> list[str]:
    """Sentences on `losses` by step (0: the base), the weights of step `best` being kept; often none."""
    last, said = max(losses), []
    if losses[last] > losses[best] * (1 + OVERTRAINED):
        more = losses[last] / losses[best] - 1
        said.append(
            f"over-trained: the loss on held-out pictures was lowest at step {best} ({losses[best]:.4g}) and "
            f"is {more:.0%} higher at step {last}; adapter/ holds step {best}. Fewer steps, a lower "
            "optimizer.lr, more pictures or prior.prompts help"
        )
    elif best != last:
        said.append(f"adapter/ holds step {best}, which has the lowest loss on held-out pictures")
    if 0 in losses and losses[best] >= losses[0]:
        said.append(
            f"warning: the loss on held-out pictures never fell below the base's ({losses[0]:.4g}), so what "
            "was learned does not hold for them; are they of one look, and do the captions fit?"
        )
    return said
