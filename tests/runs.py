"""A small finished run (adapter, config, metrics) on the random base, for tests of what comes after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lcm_kit import bases, sample
from lcm_kit.adapter import folder as adapter
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.config import schema
from lcm_kit.config.load import dump
from lcm_kit.lora import provenance


def build_run(run: Path, base: Path, rank: int = 8, alpha: float = 16.0) -> Path:
    """Write a run whose LoRA has random weights, strong enough to matter."""
    adapted = AdaptedUNet(sample.pipeline(str(base)).unet)
    torch.manual_seed(1)
    for parameter in adapted.add_lora(schema.Adapter(rank=rank, alpha=alpha)):
        parameter.data = torch.randn_like(parameter) * 0.1
    made_on = provenance.Base(str(base), bases.inspect_base(str(base)).base_hash)
    adapter.save_adapter(run / "adapter", adapted, provenance.Provenance(base=made_on, steps=20))
    config = schema.Distill(recipe="train/distill", output=str(run), base=schema.Base(path=str(base)))
    (run / "config.yaml").write_text(dump(config))
    lines = [{"step": k, "loss": 1 / k} for k in range(1, 41)] + [{"step": 20, "one_step_distance": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def load_adapter(folder: Path, unet: Any) -> AdaptedUNet:
    """`unet` with the LoRA of an adapter folder on it; what that holds for text encoders is left out."""
    config, adapted = adapter.read_provenance(folder).lora_config, AdaptedUNet(unet)
    whole = config["target_modules"] == sorted(bases.lora_targets("lcm"))
    adapted.add_lora(schema.Adapter(config["r"], config["lora_alpha"], "lcm" if whole else "attention"))
    weights = adapter.read_weights(folder)
    adapted.load_state({key: t for key, t in weights.items() if not key.startswith("text_encoder")})
    return adapted
