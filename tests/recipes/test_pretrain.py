"""The recipe of the embedded base: stops and continues to the same bits, and writes a pipeline that draws."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcm_kit import assets
from lcm_kit.config import shipped
from lcm_kit.config.pretrain import PretrainTiny
from lcm_kit.errors import UserError
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


def small(folder: Path, **changes: object) -> PretrainTiny:
    settings: dict[str, object] = {
        "recipe": "train/pretrain_tiny", "output": str(folder / "out" / "tiny"), "work": str(folder / "work"),
        "renders": 64, "manners": 8, "studio": 8, "probe_steps": 2, "probe_batch_size": 4, "vae_steps": 2,
        "vae_batch_size": 2, "unet_steps": 2, "unet_batch_size": 2, "decay_steps": 1, "prompts": 5,
    }  # fmt: skip
    return PretrainTiny(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_recipe_writes_a_pipeline_that_draws(kind: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    config = small(tmp_path, prediction_type=kind)
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


def test_a_twin_keeps_the_vae_and_begins_from_the_weights(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    main = shipped.load_recipe("train/pretrain_tiny").main
    first = main(small(tmp_path / "first"))
    twin = main(small(tmp_path / "twin", start=str(first), prediction_type="v_prediction", unet_lr=1e-8))
    old, new = (
        StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32) for folder in (first, twin)
    )
    assert new.scheduler.config.prediction_type == "v_prediction"
    assert new.vae.config.scaling_factor == old.vae.config.scaling_factor
    assert new.tokenizer.get_vocab() == old.tokenizer.get_vocab()
    for part in ("vae", "unet", "text_encoder"):
        pairs = zip(getattr(old, part).parameters(), getattr(new, part).parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs), part
    files = (file for file in twin.rglob("*.json") if file.name != "training.json")
    assert all(str(tmp_path) not in file.read_text() for file in files)
    assert (first.parent / "probe").is_dir() and not (twin.parent / "probe").exists()


def test_a_twin_of_what_is_no_such_pipeline(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    main = shipped.load_recipe("train/pretrain_tiny").main
    with pytest.raises(UserError, match="start '/nowhere': there is no pipeline; name the folder of one"):
        main(small(tmp_path, start="/nowhere"))
    with pytest.raises(UserError, match="this is no pipeline of `lcm-kit train pretrain/tiny_sd`"):
        main(small(tmp_path, start=str(sd_base("epsilon"))))
    cut = tmp_path / "cut"
    shutil.copytree(assets.path("tiny-sd"), cut)
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="this is no pipeline of `lcm-kit train pretrain/tiny_sd`"):
        main(small(tmp_path, start=str(cut)))
    assert not (tmp_path / "out").exists()
