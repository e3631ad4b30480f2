"""Distribution matching without a second net: an energy distance in features of the frozen UNet.

    OMP_NUM_THREADS=1 python -m studies.kernel_matching [STEPS]

The student draws two pictures of a prompt, a and b, whose data set has one, y. Their energy distance, which
is the maximum mean discrepancy of the kernel -|a - b| (arXiv:1207.6076), is E|a - y| + E|b - y| - E|a - b|,
place by place in what the down blocks and the middle of the base make of them at a noise level t. Its
gradient goes through the UNet into the student; there is no fake score, and no teacher under guidance.
Otherwise as the entry `dmd` of `studies/methods.yaml`: the same trajectories, rank, learning rate and
prompts. Prints right attributes, Frechet distance, sharpness and diversity over the teacher's at 1, 2 and 4
steps of DDIM on 160 held-out prompts, and the processor seconds of training (docs/methods.md).
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

from lcm_kit import assets, bases, sample
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.bases.condition import Condition
from lcm_kit.bases.memory import make_optimizer, set_rates
from lcm_kit.config import shipped
from lcm_kit.config.load import load
from lcm_kit.config.schema import Distill
from lcm_kit.core.flat import clip_grad_norm_
from lcm_kit.core.matching import Draws, timesteps, walk
from lcm_kit.core.prediction import predictor
from lcm_kit.core.schedule import Schedule, add_noise
from lcm_kit.data import sources
from lcm_kit.data.batches import Batches
from lcm_kit.evaluation.draw import repeated
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.evaluation.metrics.features import PROBE
from lcm_kit.evaluation.metrics.frechet import frechet
from lcm_kit.evaluation.metrics.sharpness import laplacian_energy
from lcm_kit.evaluation.results import QUALITY
from lcm_kit.quiet import quiet
from lcm_kit.tiny import world
from lcm_kit.training import runtime
from lcm_kit.training.diversity import spread

PROMPTS, SPREAD, AT_ONCE = 160, (8, 8), 32  # drawn; prompts and pictures of each for the diversity
NOISE = 5, 700  # least and most timestep at which features are compared
_SMOOTH = 1e-4  # below the root of a distance, whose gradient is infinite at 0


class Features:
    """What the frozen UNet's down blocks and its middle make of latents: [n, channels, places] each."""

    def __init__(self, adapted: AdaptedUNet) -> None:
        """Of the UNet of `adapted`, which is called without what is trained."""
        self.adapted, self.found, self.wanted = adapted, [], False
        for block in (*adapted.unet.down_blocks, adapted.unet.mid_block):
            block.register_forward_hook(self._keep)

    def _keep(self, block: Any, args: Any, output: Any) -> None:
        if self.wanted:
            self.found.append(output[0] if isinstance(output, tuple) else output)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Of latents x at t."""
        self.found, self.wanted = [], True
        with self.adapted.teacher():
            self.adapted.unet(x, t, **condition.kwargs())
        self.wanted = False
        return [each.flatten(2) for each in self.found]


def energy(both: list[Tensor], real: list[Tensor]) -> Tensor:
    """The energy distance of pairs of pictures [2n, c, places] to real ones [n, c, places], of all blocks."""

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b).square().mean(1) + _SMOOTH).sqrt().mean()

    total = torch.zeros(())
    for mine, theirs in zip(both, real, strict=True):
        (a, b), y = (mine / theirs.std()).chunk(2), theirs / theirs.std()
        total = total + apart(a, y) + apart(b, y) - apart(a, b)
    return total


def train(config: Distill, adapted: AdaptedUNet, schedule: Schedule, kind: str, cache: Any) -> float:
    """Train the adapter on `adapted`; returns processor seconds."""
    started = time.process_time()
    weights = adapted.parameters()
    optimizer = make_optimizer(weights, config.optimizer, torch.device("cpu"))
    features, prompts = Features(adapted), config.batch_size // 2
    batches = Batches(cache, prompts, config.seed)
    g = torch.Generator().manual_seed(config.seed)
    assert config.matching is not None
    numbers = config.matching.steps
    for step in range(config.steps):
        batch = batches.at(step)
        twice = Condition.cat([batch.condition] * 2)
        n = numbers[int(torch.randint(len(numbers), (1,), generator=g))]
        points, place = timesteps(schedule, "ddim", n), int(torch.randint(n, (1,), generator=g))
        x = torch.randn(2 * prompts, *batch.latents.shape[1:], generator=g)

        t = torch.randint(*NOISE, (prompts,), generator=g)
        noise = torch.randn(3 * prompts, *x.shape[1:], generator=g).split([2 * prompts, prompts])
        student = predictor(lambda x, t, c=twice: adapted.unet(x, t, **c.kwargs()).sample, schedule, kind)
        draws = Draws(n, place, x, x[:, None], t.repeat(2), noise[0])
        x0, _ = student(*walk(student, schedule, points, draws, renew=False))
        with torch.no_grad():
            real = features(add_noise(schedule, batch.latents, noise[1], t), t, batch.condition)
        energy(features(add_noise(schedule, x0, noise[0], draws.t), draws.t, twice), real).backward()
        clip_grad_norm_(weights, config.optimizer.grad_clip)
        set_rates(optimizer, runtime.learning_rate(config.optimizer, step, config.steps))
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - started


def judge(adapted: AdaptedUNet) -> None:
    """Print the figures, beside those of 50 steps of the base with guidance 5."""
    prompts = repeated(assets.prompts("asset:tiny-sd"), PROMPTS)
    same = [prompt for prompt in prompts[:: PROMPTS // SPREAD[0]][: SPREAD[0]] for _ in range(SPREAD[1])]
    pipe = sample.pipeline("asset:tiny-sd", unet=adapted.unet)
    look = FeatureExtractor.of(QUALITY, prompts, world.SIZE, "cpu", features=PROBE)
    real = look.renders(1024)

    def figures(steps: int, guidance: float) -> dict[str, float]:
        def draw(asked: list[str], seed: int) -> Tensor:
            return torch.cat([
                sample.latents(
                    pipe, asked[i : i + AT_ONCE], sampler="ddim", steps=steps, guidance_scale=guidance,
                    seed=seed, first=i,
                )
                for i in range(0, len(asked), AT_ONCE)
            ])  # fmt: skip

        pixels = torch.cat([sample.decode(pipe, part) for part in draw(prompts, 0).split(AT_ONCE)])
        parts = [look(pixels[i : i + AT_ONCE], prompts[i : i + AT_ONCE]) for i in range(0, PROMPTS, AT_ONCE)]
        return {
            "right": 100 * float(torch.cat([part["adherence"] for part in parts]).mean()),
            "frechet": frechet(torch.cat([part["features"] for part in parts]), real),
            "sharpness": float(laplacian_energy(pixels).mean()),
            "diversity": float(spread(draw(same, 1), SPREAD[1])),
        }

    with adapted.teacher():
        teacher = figures(50, 5.0)
    print("| who | right | frechet | sharpness | diversity |\n| --- | --- | --- | --- | --- |")
    for name, found in (
        ("teacher", teacher),
        *((f"{n} step{'s' * (n > 1)}", figures(n, 1.0)) for n in (1, 2, 4)),
    ):
        ratios = (found[key] / teacher[key] for key in ("sharpness", "diversity"))
        print(f"| {name} | {found['right']:.1f}% | {found['frechet']:.3f} |", *(f"{r:.2f} |" for r in ratios))


def main() -> None:
    """Train, then judge."""
    quiet()
    steps = f"steps={sys.argv[1] if sys.argv[1:] else 100}"
    small = "adapter.rank=16", "adapter.alpha=16", "data.cache=cache/tiny_quick"
    config = load(shipped.find("distill/tiny_dmd"), [steps, *small])
    assert isinstance(config, Distill)
    sources.encode(config)
    base = bases.inspect_base(config.base.path)
    adapted = AdaptedUNet(bases.load_unet(base))
    adapted.add_lora(config.adapter, seed=config.seed)
    adapted.make_fast()
    schedule = Schedule.from_config(base.scheduler_config)
    seconds = train(config, adapted, schedule, base.prediction_type, sources.open_cache(config, base))
    print(f"{config.steps} steps, {seconds:.0f} s of one core")
    judge(adapted)


if __name__ == "__main__":
    main()
