"""What card and metadata say of TCD, PCM and DDIM, in each app; the card's code draws what the kit draws.

The sentences' facts are held in tests/test_app_samplers_ddim_tcd.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lcm_kit import sample, samplers
from lcm_kit.api import pictures
from lcm_kit.api.calls import call
from lcm_kit.core.methods import METHODS
from lcm_kit.core.methods.dmd import DMD
from lcm_kit.evaluation.recommended import Settings, misfit
from lcm_kit.export import card, in_apps
from lcm_kit.lora import metadata
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.provenance import Method, Provenance, Recommended, from_json
from lcm_kit.lora.structure import Structure, known, of_base
from lcm_kit.lora.write import write
from lcm_kit.workflow import show
from tests.cards import BOTH, facts, hollow, save, section, snippets, tables
from tests.loras import random_lora

LCM, TCD, PCM = Method("lcm"), Method("tcd"), Method("pcm", constants={"phases": 8})
BEST = Recommended("Use them.", "tcd:0.6", 2, 1.0, 0.8)


def told(method: Method = LCM, **more: Any) -> Provenance:
    return replace(facts(**more), method=method)


def page(folder: Path, structure: Structure | None = None, **changed: Any) -> str:
    structure = structure or known("sd1")
    given = {"title": "house", "files": BOTH, "lora": hollow(structure), "checks": []}
    made = card.write(folder, structure=structure, facts=told(**changed), **given)
    return made.read_text(encoding="utf-8")


def v(zero_snr: bool = False) -> Structure:
    return replace(known("sd2"), prediction_type="v_prediction", zero_terminal_snr=zero_snr)


def test_pcm_is_euler_with_simple_and_has_one_number_of_steps(tmp_path: Path) -> None:
    written = page(tmp_path, method=PCM)
    settings = dict(tables(written)[0][1:])
    assert settings["sampler"] == "DDIM, trailing timesteps"
    assert settings["steps"] == "8, one for each of its phases, and no other number"
    comfy = section(written, "ComfyUI")
    assert "3. In *KSampler*: `sampler_name` `euler`, `scheduler` `simple`, `steps` 8, `cfg` 1.0." in comfy
    assert "ModelSamplingDiscrete" not in comfy and "`sgm_uniform` and `ddim_uniform` are others" in comfy
    web = section(written, "A1111 and Forge")
    assert "Sampling method *Euler*, schedule type *Simple*, sampling steps 8, CFG scale 1." in web
    assert "What these apps call *DDIM* is not this" in web
    invoke = section(written, "InvokeAI")
    assert "Scheduler *DDIM*, steps 8, CFG scale 1." in invoke
    assert '`"timestep_spacing": "trailing"`' in invoke and "about timestep 876 and not at 999" in invoke
    (code,) = snippets(written)[:1]
    assert 'timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)' in code
    assert "num_inference_steps=8, guidance_scale=1.0)" in code
    other = page(tmp_path, method=Method("custom", "a method", ("ddim",), (4,)))
    assert dict(tables(other)[0][1:])["steps"] == "4, what it was made for, and no other number"


def test_tcd_where_there_is_none(tmp_path: Path) -> None:
    written = page(tmp_path, method=TCD)
    assert dict(tables(written)[0][1:])["steps"] == "4; try 2 to 8"
    comfy = section(written, "ComfyUI")
    assert "3. ComfyUI has no TCD." in comfy and "*SamplerEulerAncestral*, `eta` 0.85" in comfy
    assert "gamma of 0.3" in comfy and "`euler_ancestral` has an `eta` of 1, which renews more." in comfy
    assert "https://github.com/JettHu/ComfyUI-TCD" in comfy and "`scheduler` `simple`, `eta` 0.3;" in comfy
    web = section(written, "A1111 and Forge")
    assert "Sampling method *Euler a*, schedule type *Simple*, sampling steps 4, CFG scale 1;" in web
    assert "*Eta for k-diffusion samplers* 0.85: it then renews about as much" in web
    invoke = section(written, "InvokeAI")
    assert "Scheduler *TCD*, steps 4, CFG scale 1. There it always renews all noise, a gamma of 1" in invoke
    assert "guidance_scale=1.0, eta=0.3)" in snippets(written)[0]


def test_what_a_sweep_recommends_is_what_the_apps_are_told(tmp_path: Path) -> None:
    """Sampler, steps and gamma, in the table, in each app and in the code."""
    written = page(tmp_path, method=TCD, recommended=BEST)
    settings = dict(tables(written)[0][1:])
    assert (settings["sampler"], settings["steps"]) == ("TCD, gamma 0.6", "2")
    assert "*SamplerEulerAncestral*, `eta` 0.95" in section(written, "ComfyUI")
    assert "sampling steps 2" in section(written, "A1111 and Forge")
    assert "num_inference_steps=2, guidance_scale=1.0, eta=0.6)" in snippets(written)[0]
    without = page(tmp_path, method=TCD, recommended=replace(BEST, sampler="tcd:0"))
    assert "3. In *KSampler*: `sampler_name` `euler`, `scheduler` `simple`" in section(without, "ComfyUI")
    assert "without new noise it is sampling method *Euler*," in section(without, "A1111 and Forge")
    assert "a gamma of 1 and not 0." in section(without, "InvokeAI")
    drawn = page(tmp_path, recommended=replace(BEST, sampler="ddim"))  # an LCM-LoRA
    assert "`sampler_name` `euler`, `scheduler` `simple`, `steps` 2" in section(drawn, "ComfyUI")
    assert "DDIMScheduler.from_config" in snippets(drawn)[0]


def test_a_base_that_predicts_v(tmp_path: Path) -> None:
    """Only the LCM sampler of A1111 is for epsilon alone, and ComfyUI's nodes for TCD."""
    for method in (PCM, TCD):
        written = page(tmp_path, v(zero_snr=True), method=method)
        comfy, web = section(written, "ComfyUI"), section(written, "A1111 and Forge")
        assert "3. Add *ModelSamplingDiscrete*" in comfy and "`v_prediction` and `zsnr` on" in comfy
        assert "4. " in comfy and "ComfyUI-TCD" not in comfy
        assert "ot supported" not in web and "4. They tell by a checkpoint's keys" in web
        assert "*Noise schedule for sampling* *Zero Terminal SNR*" in web
        assert "4. Import the base as its diffusers folder: there" in section(written, "InvokeAI")
    unknown = page(tmp_path, known("sd2"), method=TCD)
    assert "3. If the base predicts v, add *ModelSamplingDiscrete*" in section(unknown, "ComfyUI")
    assert "4. ComfyUI has no TCD." in section(unknown, "ComfyUI")


def hint(structure: Structure, **changed: Any) -> str:
    header = metadata.build(hollow(structure), structure, told(**changed))
    return header["modelspec.usage_hint"]


def test_metadata_says_what_to_take() -> None:
    header = metadata.build(hollow(known("sd1")), known("sd1"), told(PCM))
    assert header["lcm_kit.sampling_steps"] == "8"
    assert header["modelspec.usage_hint"] == (
        "Sampler DDIM, trailing timesteps, 8 steps (no other number), guidance_scale / CFG 1.0: the guidance "
        "of 3.0 to 8.5 is baked in. LoRA strength 1.0. In ComfyUI, A1111 and Forge: Euler, scheduler / "
        "schedule type Simple."
    )
    tcd = "In apps without TCD: Euler a (without new noise Euler), scheduler / schedule type Simple."
    assert hint(known("sd1"), method=TCD).endswith(f"LoRA strength 1.0. {tcd}")
    assert hint(known("sd1"), method=TCD, recommended=BEST).endswith(f"Chosen by measurement. {tcd}")
    said = hint(v(), method=TCD)
    assert "with sampling v_prediction and zsnr off. In apps" in said and "A1111's LCM" not in said


def test_another_number_of_steps_is_said() -> None:
    pcm, lcm = told(PCM).student, told().student
    assert (pcm.only_steps, lcm.only_steps) == (8, None)
    assert misfit(Settings("ddim", 4), pcm) == (
        "phased consistency distillation (PCM) made it for 8 steps and no other number: with 4 they begin "
        "and end where it was not trained to"
    )
    assert misfit(Settings("ddim", 8), pcm) is None and misfit(Settings("lcm", 3), lcm) is None


def test_another_number_is_drawn_and_said_in_a_line(
    sd_base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = sd_base("epsilon")
    structure = of_base(str(base))
    path = tmp_path / "phased.safetensors"
    write(path, random_lora(structure, ranks=(4,)), structure, "diffusers", "float32", told(PCM))

    def drawn(**asked: Any) -> tuple[Any, str]:
        with call(verbose=True):
            how = pictures.drawing(["a fox"], adapter=path, base=str(base), **asked)
        return how.settings, said()

    def said() -> str:
        return "".join(capsys.readouterr()).replace("\n", " ")

    settings, line = drawn()
    assert (settings["sampler"], settings["steps"], "no other number" in line) == ("ddim", 8, False)
    settings, line = drawn(steps=4)
    assert settings["steps"] == 4  # no error
    assert f"{path}: phased consistency distillation (PCM) made it for 8 steps" in line
    pipe = sample.pipeline(str(base))
    assert pictures.load_into(pipe, path, steps=2, verbose=True)["num_inference_steps"] == 2
    assert "made it for 8 steps and no other number: with 2" in said()
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


def test_the_end_of_a_story_names_the_sampler_of_its_method() -> None:
    def few(method: Method) -> str:
        return show._few_steps(SimpleNamespace(distill=SimpleNamespace(student=lambda: told(method).student)))

    assert few(LCM) == "LCM sampler, 4 steps, CFG 1, weight 1; 2 to 8 steps work"
    assert few(PCM) == (
        "DDIM, trailing timesteps sampler, 8 steps, CFG 1, weight 1; no other number of steps. In ComfyUI, "
        "A1111 and Forge: Euler, scheduler / schedule type Simple"
    )


def test_one_step_at_a_timestep_of_its_own_is_diffusers_alone(tmp_path: Path) -> None:
    """How the method was set is read back, its steps too, which are a key of its config."""
    made = Method.of(DMD(steps=(1,), conditioning_timestep=399))
    facts_of = from_json(told(made).to_json())
    assert (facts_of.student.sampler, facts_of.student.only_steps) == ("lcm:399", 1)
    header = metadata.build(hollow(known("sd1")), known("sd1"), told(made))
    assert provenance_from_header(header, "house").student == told(made).student == facts_of.student
    assert header["modelspec.usage_hint"].endswith(
        "Only diffusers draws so, with timesteps=[399] in the pipeline's call."
    )
    assert "Simple" not in header["modelspec.usage_hint"] and ", 1 step (no" in header["modelspec.usage_hint"]
    written = page(tmp_path, method=made)
    assert "num_inference_steps=1, guidance_scale=1.0, timesteps=[399])" in snippets(written)[0]
    for app in ("ComfyUI", "A1111 and Forge", "InvokeAI"):
        assert "3. **Not supported.** This LoRA draws in one step in which the UNet is told timestep 399" in (
            section(written, app)
        )


def test_every_method_of_the_kit_is_told_for_each_app(tmp_path: Path) -> None:
    """No method's own samplers fall through to the table at the top, which no app can follow."""
    for name in METHODS:
        for sampler in told(Method(name)).student.samplers:
            best = replace(BEST, sampler=sampler, steps=4)
            written = page(tmp_path, method=Method(name), recommended=best)
            for app in ("ComfyUI", "A1111 and Forge", "InvokeAI"):
                assert "as in the table at the top" not in section(written, app), (name, sampler, app)


@pytest.mark.parametrize(("method", "sampler", "steps"), [(PCM, "ddim", 8), (TCD, "tcd", 4)])
def test_the_cards_code_draws_what_the_kit_draws(
    method: Method, sampler: str, steps: int, sd_base: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base, folder = sd_base("v_prediction"), tmp_path / "export"
    structure = of_base(str(base))
    lora = random_lora(structure, ranks=(4,), alphas=(8.0,))
    file = save(lora, structure, folder, "diffusers")
    about = {"title": "t", "structure": structure, "lora": lora, "checks": []}
    given = told(method, base=str(base))
    written = card.write(folder, files={"diffusers": file}, facts=given, **about).read_text()
    source = snippets(written)[0]
    asked = "a red ball"  # what is longer than these 22 tokens the kit reads on, and diffusers cuts
    source = source.replace(re.search(r'prompt = "(.*)"', source)[1], asked)
    side = 16  # of the latents of tests/bases.py
    noise = torch.randn((1, 4, side, side), generator=sample.generators(3, 0, 1)[0])
    stream = "generator=stream, latents=noise, "
    monkeypatch.chdir(folder)
    streams = sample.generators(3, 0, 1)
    torch.randn((1, 4, side, side), generator=streams[0])  # the kit's first noise
    exec(source.replace("pipe(prompt, ", f"pipe(prompt, {stream}"), {"noise": noise, "stream": streams})
    with Image.open(folder / "picture.png") as picture:
        found = np.asarray(picture).astype(int)
    pipe = sample.pipeline(str(base))
    sample.load_adapter(pipe, file)
    drawn = sample.sample(pipe, [asked], sampler=sampler, steps=steps, seed=3)
    wanted = np.asarray(sample.to_pil(drawn)[0]).astype(int)
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 1  # rounding to 8 bits
    assert samplers.sampler_of(sampler).scheduler in source and in_apps.use_of(given).steps == steps
