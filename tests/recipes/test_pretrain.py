"""The recipe of the embedded base: stops and continues to the same bits, and writes a pipeline that draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcm_kit.config import shipped
from lcm_kit.config.pretrain import PretrainTiny
from lcm_kit.tiny.fit import fit, one_cycle


def test_a_stopped_fit_ends_with_the_same_bits(tmp_path: Path) -> None:
    def run(work: Path, stops: list[int]) -> torch.Tensor:
        work.mkdir()
        for stop in stops:
            torch.manual_seed(0)
            net = torch.nn.Linear(4, 4)

            def loss_at(step: int, net: torch.nn.Module = net) -> torch.Tensor:
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
                return (net(x) - 2 * x).pow(2).mean()

            fit("net", work, net, loss_at, steps=stop, rate=lambda k: 1e-2, every=4, ema_decay=0.9)
        return net.weight.detach()

    assert torch.equal(run(tmp_path / "straight", [12]), run(tmp_path / "stopped", [4, 8, 12]))


def test_one_cycle_rises_to_one_and_ends_at_zero() -> None:
    factors = [one_cycle(step, 200) for step in range(200)]
    assert max(factors) == pytest.approx(1, abs=0.01) and factors.index(max(factors)) in (9, 10)
    assert factors[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_recipe_writes_a_pipeline_that_draws(kind: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    config = PretrainTiny(
        recipe="train/pretrain_tiny", output=str(tmp_path / "out" / "tiny"), work=str(tmp_path / "work"),
        prediction_type=kind, renders=64, manners=8, studio=8, probe_steps=2, probe_batch_size=4,
        vae_steps=2, vae_batch_size=2, unet_steps=2, unet_batch_size=2, decay_steps=1, prompts=5,
    )  # fmt: skip
    main = shipped.load_recipe("train/pretrain_tiny").main
    main(config)
    pipe = StableDiffusionPipeline.from_pretrained(config.output, dtype=torch.float32)
    assert pipe.scheduler.config.prediction_type == kind
    image = pipe("a cat on a plain red background", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    before = pipe.unet.conv_in.weight.clone()
    main(replace(config, output=str(tmp_path / "again" / "tiny")))  # everything is there: nothing is trained
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "again" / "tiny", dtype=torch.float32)
    assert torch.equal(before, again.unet.conv_in.weight)
