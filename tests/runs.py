"""A small finished run (adapter, config, metrics) on the random base, for tests of what comes after."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lcm_kit import adapter, families, provenance, sample
from lcm_kit.config import schema
from lcm_kit.config.load import dump


def build_run(run: Path, base: Path, rank: int = 8, alpha: float = 16.0) -> Path:
    """Write a run whose LoRA has random weights, strong enough to matter."""
    unet = sample.pipeline(str(base)).unet
    torch.manual_seed(1)
    for parameter in adapter.add_lora(unet, schema.Adapter(rank=rank, alpha=alpha)):
        parameter.data = torch.randn_like(parameter) * 0.1
    made_on = provenance.Base(str(base), families.inspect_base(str(base)).base_hash)
    adapter.save_adapter(run / "adapter", unet, provenance.Provenance(base=made_on, steps=20))
    config = schema.Distill(recipe="train/distill", output=str(run), base=schema.Base(path=str(base)))
    (run / "config.yaml").write_text(dump(config))
    lines = [{"step": k, "loss": 1 / k} for k in range(1, 41)] + [{"step": 20, "one_step_distance": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run
