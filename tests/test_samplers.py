"""A gamma behind a sampler's name, and what TCD does with it, against closed forms written from the paper.

arXiv:2402.19159, algorithm 4 (strategic stochastic sampling): from t the student lands at s = (1 - gamma) t',
x_s = alpha_s x0 + sigma_s eps, and fresh noise leads up from there to the next timestep t',
x_t' = alpha_t' / alpha_s x_s + sqrt(1 - alpha_t'^2 / alpha_s^2) z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lcm_kit import sample, samplers
from lcm_kit.cli.main import app
from lcm_kit.config import shipped
from lcm_kit.config.load import load
from lcm_kit.config.sweep import Compose, GuidanceSweep
from lcm_kit.core.methods import DEFAULT, MethodInfo
from lcm_kit.errors import UserError
from lcm_kit.evaluation import cells, pairs
from lcm_kit.evaluation.results import MAIN
from lcm_kit.lora import metadata, structure
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.provenance import Method, Provenance, Recommended
from lcm_kit.report import plots
from tests.loras import random_lora

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
GAMMA = "behind the colon stands a gamma from 0 (no noise renewed) to 1, as tcd:0.5"
TIMESTEP = "behind the colon stands one of its timesteps, 19 to 999, as lcm:399"
REFUSED = {
    "tcd:2": f"sampler 'tcd:2': {GAMMA}",
    "tcd:-0.1": f"sampler 'tcd:-0.1': {GAMMA}",
    "tcd:nan": f"sampler 'tcd:nan': {GAMMA}",
    "tcd:x": f"sampler 'tcd:x': {GAMMA}",
    "tcd:": f"sampler 'tcd:': {GAMMA}",
    "tcd:0.5:0.5": f"sampler 'tcd:0.5:0.5': {GAMMA}",
    "lcm:0.5": f"sampler 'lcm:0.5': {TIMESTEP}",
    "lcm:400": f"sampler 'lcm:400': {TIMESTEP}",
    "lcm:1019": f"sampler 'lcm:1019': {TIMESTEP}",
    "ddim:0.5": "sampler 'ddim:0.5': ddim takes no setting behind a colon; only lcm:... and tcd:... do",
    "heun:0.5": "sampler 'heun:0.5' is unknown; choose one of lcm, tcd, ddim, dpmpp_2m",
}
# -- The name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spelled", "eta"),
    [("tcd", "tcd", 0.3), ("tcd:0.5", "tcd:0.5", 0.5), ("tcd:.50", "tcd:0.5", 0.5), ("tcd:1.0", "tcd:1", 1.0),
     ("tcd:0", "tcd:0", 0.0), ("tcd:-0", "tcd:0", 0.0), ("tcd:3e-1", "tcd:0.3", 0.3)],
)  # fmt: skip
def test_a_name_says_its_gamma(name: str, spelled: str, eta: float) -> None:
    assert samplers.spelled(name) == spelled
    found = samplers.sampler_of(name)
    assert found.call == {"eta": eta} and math.copysign(1, found.call["eta"]) == 1
    assert found.title == ("TCD" if name == "tcd" else f"TCD, gamma {eta:g}") == samplers.title_of(name)
    assert found.scheduler == "TCDScheduler" and found.most_steps == 50 and found.for_adapter
    assert samplers.deterministic(name, 4) == (eta == 0) and samplers.deterministic(name, 1)
    assert sample.call_settings(name, 4, 1.0) == {
        "num_inference_steps": 4, "guidance_scale": 1.0, "eta": eta,
    }  # fmt: skip
    assert samplers.sampler_of("tcd").call == {"eta": 0.3}  # the table's entry stays as it is


@pytest.mark.parametrize(("name", "sentence"), REFUSED.items())
def test_another_name_is_refused_in_a_sentence_wherever_it_stands(name: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        samplers.sampler_of(name)
    assert str(caught.value) == sentence
    assert not samplers.serves_adapter(name) and samplers.title_of(name) == name
    refused = CliRunner().invoke(app, ["sample", "--prompt", "a", "--sampler", name])
    assert refused.exit_code == 2 and sentence in refused.stderr
    with pytest.raises(UserError) as caught:
        load(shipped.config_path("evaluation/brand"), ["run=r", f"sampler={name!r}"])
    known = name.partition(":")[0] in samplers.for_adapter()
    wanted = sentence if known else f"{name!r} is not allowed; it must be one of lcm, tcd, ddim, or null"
    assert str(caught.value).endswith(f"sampler: {wanted}")


def test_configs_have_one_spelling_and_cells_a_file_name() -> None:
    swept = load(shipped.config_path("evaluation/tcd_gamma"), ["adapters=[a]"])
    assert isinstance(swept, GuidanceSweep)
    drawn = [cell for cell in cells.plan(swept, {"mine": DEFAULT}) if cell.kind == "student"]
    names = ["tcd:0", "tcd:0.3", "tcd:0.6", "tcd:1"]
    assert [cell.sampler for cell in drawn] == [name for name in names for _ in range(3)]
    assert [cell.id for cell in drawn[:4]] == [
        "mine-tcd0-2-g1-w1", "mine-tcd0-4-g1-w1", "mine-tcd0-8-g1-w1", "mine-tcd0.3-2-g1-w1",
    ]  # fmt: skip
    assert len({cell.id for cell in drawn}) == len(drawn)
    assert [cell.deterministic for cell in drawn] == [True] * 3 + [False] * 9
    assert drawn[6].settings()["sampler"] == "tcd:0.6"  # as results.json has it
    same = "student=[{samplers: ['tcd:0.50', tcd:.5], steps: [2], guidance_scales: [1.0]}]"
    again = load(shipped.config_path("evaluation/tcd_gamma"), ["adapters=[a]", same])
    assert isinstance(again, GuidanceSweep) and again.student[0].samplers == ("tcd:0.5", "tcd:0.5")
    assert [c.id for c in cells.plan(again, {"m": DEFAULT}) if c.kind == "student"] == ["m-tcd0.5-2-g1-w1"]
    joined = load(shipped.config_path("evaluation/compose"), ["style=a", "speed=b", "sampler='tcd:0.6'"])
    assert isinstance(joined, Compose)
    pair = pairs.plan(joined, DEFAULT)[-1]
    assert pair.sampler == "tcd:0.6" and pair.id.startswith("pair-tcd0.6-") and ":" not in pair.id


def test_metadata_is_read_back_and_a_method_may_say_a_gamma() -> None:
    use = Recommended("Use 4 steps of TCD, gamma 0.6.", "tcd:0.6", 4, 1.0, 1.0)
    facts = Provenance("mine", method=Method("tcd"), recommended=use)
    base = structure.known("sd1")
    header = metadata.build(random_lora(base, (Q,)), base, facts)
    assert header["lcm_kit.sampler"] == "tcd:0.6"
    assert header["modelspec.usage_hint"].startswith("Sampler TCD, gamma 0.6, 4 steps, ")
    assert provenance_from_header(header, "mine").recommended == use
    spoiled = provenance_from_header({**header, "lcm_kit.sampler": "tcd:6"}, "mine").recommended
    assert spoiled == Recommended(use.sentence, None, None, None, None)
    own = Provenance("mine", method=Method("theirs", "a method", ("tcd:0.6", "lcm"), (2, 4)))
    assert own.student == MethodInfo("theirs", "a method", ("tcd:0.6", "lcm"), (2, 4))
    other = Provenance("mine", method=Method("theirs", "a method", ("tcd:6",), (2, 4)))
    assert other.student == MethodInfo("theirs", "theirs")  # nothing is known of how it draws


def cell(kind: str, sampler: str, calls: int, scale: float = 1.0) -> Any:
    return {
        "kind": kind, "prompts": MAIN, "adapter": None, "sampler": sampler, "guidance_scale": scale,
        "unet_calls": calls, "metrics": {"frechet": {"value": 1.0 / calls, "low": 0.0, "high": 1.0}},
    }  # fmt: skip


def test_plots_give_each_gamma_a_line_of_its_own_look() -> None:
    names = ["tcd:0", "tcd:0.3", "tcd:0.5", "tcd:0.6", "tcd:1", "tcd", "no such"]
    drawn = [cell("student", name, n) for name in names for n in (2, 4)]
    drawn += [cell("student", "tcd:0.5", n, 2.0) for n in (2, 4)]
    found = plots.styles(drawn)
    lines = {how[1:] for how in found if how[0] == "student"}
    assert lines == {*((name, False) for name in (*names, "lcm", "ddim")), ("tcd:0.5", True)}
    looks = [style[1:] for (who, _, _), style in found.items() if who == "student"]
    assert len(set(looks)) == len(looks)
    assert found["student", "lcm", False] == plots.styles()["student", "lcm", False]
    picture = plots.by_calls(drawn, "frechet", "distance")
    for title in ("(TCD, gamma 0.5)", "(TCD, gamma 0.5), guidance", "(TCD, gamma 1)", "(TCD)", "(no such)"):
        assert f"<!-- student {title} -->" in picture  # matplotlib's note on each text


# -- What TCD does with it -----------------------------------------------------------------------------------


def tcd(gamma: float, steps: int, kind: str = "epsilon") -> tuple[Any, float, Tensor]:
    """The scheduler that the kit draws with, its eta, and alpha_bar from the betas."""
    name = f"tcd:{gamma:g}"
    made = sample.scheduler(name, {**BETAS, "num_train_timesteps": 1000, "prediction_type": kind})
    made.set_timesteps(steps)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return made, sample.call_settings(name, steps, 1.0)["eta"], (1 - betas).cumprod(0)


def said(x: Tensor, x0: Tensor, t: int, alpha_bar: Tensor, kind: str) -> Tensor:
    """What a model says that knows x0."""
    alpha, sigma = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
    eps = (x - alpha * x0) / sigma
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_without_noise_a_chain_follows_a_line_exactly(steps: int, kind: str) -> None:
    """Where (x0, eps) stay the same, gamma 0 passes alpha_t x0 + sigma_t eps everywhere, to t = 0."""
    made, eta, alpha_bar = tcd(0.0, steps, kind)
    x0, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = [*map(int, made.timesteps), 0]
    x = alpha_bar[times[0]].sqrt() * x0 + (1 - alpha_bar[times[0]]).sqrt() * eps
    for t, after in zip(times, times[1:], strict=False):
        x = made.step(said(x, x0, t, alpha_bar, kind), t, x, eta=eta).prev_sample
        on_the_line = alpha_bar[after].sqrt() * x0 + (1 - alpha_bar[after]).sqrt() * eps
        assert float((x - on_the_line).abs().max()) < 2e-5


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5, 1.0])
def test_a_step_lands_between_and_renews_the_rest(gamma: float) -> None:
    """Given the noise, to the number; over noises, with the mean and the variance of algorithm 4."""
    made, eta, alpha_bar = tcd(gamma, 4)
    x0, eps = torch.full((2, 1, 512, 512), 0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    t, after = map(int, made.timesteps[:2])
    s = math.floor((1 - gamma) * after)
    assert (t, after) == (999, 759) and s < after
    x = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * eps
    stream = torch.Generator().manual_seed(1)
    found = made.step(eps.expand_as(x), t, x, eta=eta, generator=stream).prev_sample
    z = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ratio = alpha_bar[after] / alpha_bar[s]
    landed = alpha_bar[s].sqrt() * x0 + (1 - alpha_bar[s]).sqrt() * eps
    assert float((found - (ratio.sqrt() * landed + (1 - ratio).sqrt() * z)).abs().max()) < 2e-5
    count = found.numel()
    assert float(found.mean()) == pytest.approx(float(ratio.sqrt() * landed.mean()), abs=4 / count**0.5)
    assert float(found.var()) == pytest.approx(float(1 - ratio), rel=4 * (2 / count) ** 0.5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.6, 1.0])
def test_of_an_exact_teacher_every_gamma_draws_the_same_pictures(gamma: float) -> None:
    """x0 ~ N(0.5, 0.3^2) and an exact jump to s: mean and variance stay those of the forward process.

    The exact jump keeps a place in the marginal, x_s = mean_s + std_s (x_t - mean_t) / std_t; a scheduler
    takes it from (x0, eps) with alpha_s x0 + sigma_s eps = x_s and alpha_t x0 + sigma_t eps = x_t.
    """
    made, eta, alpha_bar = tcd(gamma, 4)

    def marginal(t: int) -> tuple[Tensor, Tensor]:
        return 0.5 * alpha_bar[t].sqrt(), (0.09 * alpha_bar[t] + 1 - alpha_bar[t]).sqrt()

    stream = torch.Generator().manual_seed(2)
    times = [*map(int, made.timesteps), 0]
    mean, std = marginal(times[0])
    x = mean + std * torch.randn(1, 1, 1024, 1024, dtype=torch.float64, generator=stream)
    for t, after in zip(times, times[1:], strict=False):
        s = math.floor((1 - gamma) * after)
        (mean, std), (mean_s, std_s) = marginal(t), marginal(s)
        wanted = mean_s + std_s * (x - mean) / std
        alpha, sigma = alpha_bar[[s, t]].sqrt(), (1 - alpha_bar[[s, t]]).sqrt()
        output = (wanted * alpha[1] - x * alpha[0]) / (sigma[0] * alpha[1] - sigma[1] * alpha[0])
        x = made.step(output, t, x, eta=eta, generator=stream).prev_sample
        mean, std = marginal(after)
        assert float(x.mean()) == pytest.approx(float(mean), abs=4e-3)
        assert float(x.std()) == pytest.approx(float(std), rel=4e-3)


def test_the_pipeline_draws_with_the_gamma_of_the_name(sd_base: Callable[..., Path]) -> None:
    pipe = sample.pipeline(str(sd_base("epsilon")))

    def draw(name: str, steps: int, seed: int = 5) -> Tensor:
        return sample.latents(pipe, ["a cat"], sampler=name, steps=steps, seed=seed)

    assert torch.equal(draw("tcd:0.3", 3), draw("tcd", 3))
    assert torch.equal(draw("tcd:0", 1), draw("tcd:1", 1))  # the last step renews nothing
    drawn = [draw(name, 3) for name in ("tcd:0", "tcd:0.3", "tcd:0.6", "tcd:1")]
    for one, other in zip(drawn, drawn[1:], strict=False):
        assert float((one - other).abs().max()) > 1e-2
    # Without noise the picture is DDIM's over the same timesteps, which ends at t = 0 as well
    from diffusers import DDIMScheduler

    noise = torch.randn((1, 4, 16, 16), generator=sample.generators(5, 0, 1)[0])
    own = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(
        sample.noise_of(own.config), clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    plain = pipe(["a cat"], num_inference_steps=2, guidance_scale=1.0, latents=noise, output_type="latent")
    pipe.scheduler = own
    torch.testing.assert_close(draw("tcd:0", 2), plain.images, rtol=0, atol=1e-4)  # 999 and 499 in both
