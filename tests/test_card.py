"""The model card: right for each kind of LoRA, unbroken by foreign text, and its code runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lcm_kit.export import card
from lcm_kit.lora.layers import Lora
from lcm_kit.lora.provenance import Data, Guidance, Provenance
from lcm_kit.lora.structure import Structure, known, of_base
from tests.cards import (
    BOTH,
    HOSTILE,
    HUB,
    WORSE,
    evaluated,
    facts,
    front,
    headings,
    hollow,
    save,
    section,
    shown,
    snippets,
    tables,
    tokens,
)
from tests.loras import fuse, lcm_modules, random_lora, text_modules


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(structure: Structure | None = None, **changed: Any) -> str:
        structure = structure or known("sd1")
        given = {
            "title": "house", "files": BOTH, "facts": facts(), "lora": hollow(structure),
            "checks": [("ComfyUI", "kohya", "loads 278 of 278 modules")],
        }  # fmt: skip
        path = card.write(tmp_path / "export", structure=structure, **given | changed)
        assert path == tmp_path / "export" / "README.md"
        return path.read_text(encoding="utf-8")

    return write


# -- Front matter --------------------------------------------------------------------------------------------


def test_the_front_matter_is_what_the_hub_reads(write: Callable[..., str]) -> None:
    assert front(write()) == {
        "base_model": HUB,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "stable-diffusion", "lora", "lcm", "lcm-lora", "diffusers"],
    }
    tags = front(write(known("sdxl"), facts=facts(method=None)))["tags"]
    assert tags == ["text-to-image", "stable-diffusion-xl", "lora", "diffusers"]


@pytest.mark.parametrize(
    "base", ["/data/bases/own", "./own", "asset:tiny-sd", "own", "a/b/c", f"a/{HOSTILE}", None]
)
def test_only_a_hub_id_becomes_base_model(base: str | None, write: Callable[..., str]) -> None:
    assert "base_model" not in front(write(facts=facts(base=base)))


def test_a_folder_that_is_named_like_a_hub_id_is_a_folder(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bases" / "own").mkdir(parents=True)
    assert "base_model" not in front(write(facts=facts(base="bases/own")))
    assert front(write(facts=facts(base="bases/other")))["base_model"] == "bases/other"


# -- Settings and apps ---------------------------------------------------------------------------------------


def test_guidance_is_said_in_both_conventions(write: Callable[..., str]) -> None:
    page = write()
    assert "with a guidance of 3 to 8.5 baked in" in page
    assert "2 to 7.5 for the 3 to 8.5 baked in" in page  # the paper's w = guidance_scale - 1
    assert "4 for the 5 baked in" in write(facts=facts(guidance=Guidance(5.0, 5.0)))
    assert "baked in" not in write(facts=facts(guidance=None))


def test_an_lcm_lora_of_an_epsilon_base(write: Callable[..., str]) -> None:
    page = write()
    settings = dict(tables(page)[0][1:])
    assert settings["sampler"] == "LCM" and settings["resolution"] == "512 × 512 pixels"
    assert settings["steps"].startswith("4;") and settings["guidance (CFG)"].startswith("1.0;")
    comfy = section(page, "ComfyUI")
    assert comfy.startswith("Checked with ComfyUI 0.19.3 (2026-11-28).")
    assert "`house.safetensors` into `models/loras`" in comfy
    assert "Add *Load LoRA* behind *Load Checkpoint*: `strength_model` 1.0. 3." in comfy
    assert "`sampling` set to `lcm` and `zsnr` off." in comfy
    assert "`sampler_name` `lcm`, `scheduler` `simple`, `steps` 4, `cfg` 1.0" in comfy
    web = section(page, "A1111 and Forge")
    assert web.startswith("Checked with A1111 1.10.1 and Forge dfdcbab (2026-11-28).")
    assert "`<lora:house:1>`" in web and "schedule type *Simple* (A1111 has it since 1.10; in 1.9 *SGM" in web
    invoke = section(page, "InvokeAI")
    assert invoke.startswith("Checked with InvokeAI 6.14.0-alpha") and "in *Add LoRA*, below" in invoke
    assert "weight 1. 3. Scheduler *LCM*, steps 4, CFG scale 1." in invoke and "4." not in invoke[-30:]
    assert "`diffusers` (0.41 or newer)" in section(page, "diffusers")
    assert "No app but diffusers" not in page and "v_prediction" not in page and "sgm_uniform" not in page
    assert "licence" in page and "license" not in front(page)


def test_a_v_prediction_base_in_each_app(write: Callable[..., str]) -> None:
    """Right in ComfyUI whatever it finds out, exact in Forge, nothing in A1111."""
    sd2 = known("sd2")
    v = replace(sd2, prediction_type="v_prediction")
    page = write(v, facts=facts(data=Data("cd34")))
    comfy = section(page, "ComfyUI")
    assert "`sampling` set to `v_prediction` and `zsnr` off." in comfy and "`scheduler` `simple`" in comfy
    web = section(page, "A1111 and Forge")
    assert "**A1111: not supported for this base.**" in web and "Forge's is exact:" in web
    assert "`<lora:house:1>`" in web and "which says `model: {params: {parameterization: v}}`" in web
    assert "Zero Terminal SNR" not in page and "A1111 has it since" not in page
    assert "predicts `v_prediction`." in section(page, "InvokeAI")
    assert dict(tables(page)[0][1:])["resolution"] == "768 × 768 pixels"  # the base's own
    page = write(replace(v, zero_terminal_snr=True))
    assert "set to `v_prediction` and `zsnr` on." in section(page, "ComfyUI")
    assert "*Noise schedule for sampling* *Zero Terminal SNR*" in section(page, "A1111 and Forge")
    assert "with zero terminal SNR" in section(page, "InvokeAI")
    sample = write(replace(sd2, prediction_type="sample"))
    assert "set to `x0` and `zsnr` off" in section(sample, "ComfyUI") and "<lora:" not in sample
    assert "**Not supported for this base.**" in section(sample, "A1111 and Forge")
    unknown = write(sd2)
    assert "set to `lcm` if the base predicts epsilon and to `v_prediction`" in section(unknown, "ComfyUI")
    assert "with a v-prediction base use Forge" in section(unknown, "A1111 and Forge")
    epsilon = write(replace(sd2, prediction_type="epsilon"))
    assert "set to `lcm`" in epsilon and "v-prediction" not in epsilon
    style = write(v, facts=facts(method=None))
    assert "`<lora:house:1>`" in style and "ot supported" not in style


def test_a_lora_with_text_encoder_layers_takes_the_node_for_both(write: Callable[..., str]) -> None:
    """ComfyUI's *Load LoRA* is for the model alone since January 2026."""
    sd1 = known("sd1")
    comfy = section(write(lora=hollow(sd1, lcm_modules(sd1) + text_modules(sd1))), "ComfyUI")
    assert (
        "*Load LoRA (Model and CLIP)* behind *Load Checkpoint*: `strength_model` 1.0, `strength_clip`"
        in comfy
    )
    assert "January 2026" in comfy


def test_the_versions_are_those_of_the_documentation() -> None:
    """The table of docs/lora-files.md names each app's version and the date."""
    from lcm_kit.lora.apps import CHECKED, TITLES, VERSIONS

    page = (Path(__file__).parents[1] / "docs" / "lora-files.md").read_text(encoding="utf-8")
    assert VERSIONS.keys() == TITLES.keys()
    for app, version in VERSIONS.items():
        assert f"| {TITLES[app]} | {version} | {CHECKED} |" in page, app


def test_a_zero_snr_base_is_known_by_its_scheduler(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(sd_base("v_prediction"), tmp_path / "base"))
    assert not of_base(str(folder)).zero_terminal_snr
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    assert of_base(str(folder)).zero_terminal_snr


def test_a_style_lora_has_no_talk_of_lcm(write: Callable[..., str]) -> None:
    page = write(facts=facts(method=None, guidance=None))
    assert "trained for 2000 optimizer steps" in page and "keep the sampler, the steps" in page
    assert "LCM" not in page and "`lcm`" not in page and "baked" not in page and "sgm_uniform" not in page
    assert "num_inference_steps=30, guidance_scale=7.5" in snippets(page)[0]


def test_a_merged_lora_names_its_parents(write: Callable[..., str]) -> None:
    page = " ".join(write(facts=facts(parents=("ink:1", "fast:0.8"))).split())
    assert "It joins `ink:1`, `fast:0.8`; its speed comes from latent consistency distillation" in page
    page = write(facts=facts(method=None, guidance=None, parents=("ink.pt",)))
    # A stranger's file may be of any kind
    assert "It was made from `ink.pt`. If that takes special settings" in page and "keep the" not in page
    assert "It joins" not in write() and "It was made by latent consistency distillation" in write()


def test_sdxl_uses_its_own_pipeline(write: Callable[..., str]) -> None:
    sdxl = known("sdxl")
    source, _ = snippets(write(sdxl, facts=facts(base="stabilityai/stable-diffusion-xl-base-1.0")))
    compile(source, "card", "exec")
    assert "StableDiffusionXLPipeline.from_pretrained" in source and "StableDiffusionPipeline" not in source
    assert 'base = "stabilityai/stable-diffusion-xl-base-1.0"' in source
    assert "guidance_scale=5.0" in snippets(write(sdxl, facts=facts(method=None)))[0]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (Data("cd34", 64), "64 × 64 pixels"),
        (Data("cd34", (768, 512)), "768 × 512 pixels"),
        (Data("cd34", 64, shapes={"128x32": 5, "64x64": 1, "32x128": 2}),
         "about 64 × 64 pixels, in 3 shapes, 32 × 128 to 128 × 32"),
        (Data("cd34", 64, shapes={"96x48": 5}), "about 64 × 64 pixels, in 1 shape, 96 × 48"),
        (Data(), "512 × 512 pixels"),
    ],
)  # fmt: skip
def test_the_size_that_it_was_trained_at(write: Callable[..., str], data: Data, told: str) -> None:
    page = write(facts=facts(data=data))
    assert dict(tables(page)[0][1:])["resolution"] == told
    made = dict(tables(page)[-1][1:])
    assert made.get("training resolution") == (told if data.resolution else None)


def test_a_base_in_small_says_so(write: Callable[..., str]) -> None:
    page = write(of_base("asset:tiny-sd"), facts=facts(base="asset:tiny-sd", data=Data("cd34", 64)))
    assert "**No app but diffusers can load this base.**" in page
    (source,) = snippets(page)
    compile(source, "card", "exec")
    assert "from lcm_kit import assets" in source and 'assets.path("tiny-sd")' in source


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_one_format_may_be_missing(style: str, write: Callable[..., str]) -> None:
    page = write(files={style: BOTH[style]})
    assert BOTH["kohya" if style == "diffusers" else "diffusers"].name not in page
    assert f'weight_name="{BOTH[style].name}"' in snippets(page)[0]
    assert ("which is not here" in page) == (style == "diffusers")
    assert section(page, "Does it load?").count("lcm-kit verify") == 1


def test_what_it_is_made_of(write: Callable[..., str]) -> None:
    made = dict(tables(write())[-1][1:])
    assert made["size"] == "278 modules, 67.25 million parameters"  # those of SD1.5's LCM-LoRA at rank 64
    assert made["rank, alpha"] == "64, 32"
    assert made["UNet"].startswith("278 modules (")
    assert sum(map(int, re.findall(r": (\d+)", made["UNet"]))) == 278
    assert made["training data, fingerprint"] == "cd34" and made["training resolution"] == "512 × 512 pixels"
    assert made["date"] == "2026-01-31" and made["made with"] == "lcm-kit 0.2.0"
    assert made["optimizer steps"] == "2000" and made["base hash"] == "ab12"
    sd1 = known("sd1")
    text = hollow(sd1, text_modules(sd1)).layers
    mixed = Lora(text | hollow(sd1, lcm_modules(sd1)[:2], rank=4, alpha=8.0).layers)
    made = dict(tables(write(lora=mixed))[-1][1:])
    assert made["rank, alpha"] == "4 to 64, 8 to 32" and made["text encoder"] == "72 modules"


def test_what_is_not_known_is_left_out(write: Callable[..., str]) -> None:
    page = write(facts=Provenance("house"), checks=[])
    assert "None" not in page and "base_model" not in front(page) and "--base BASE" in page
    assert [row[0] for row in tables(page)[-1]] == ["", "base", "rank, alpha", "size", "UNet"]
    compile(snippets(page)[0], "card", "exec")


def test_checks_are_a_table(write: Callable[..., str]) -> None:
    checks = [("ComfyUI", "kohya", "loads 278 of 278 modules"), ("A|B", "kohya", HOSTILE)]
    page = write(checks=checks)
    assert [["app", "format", "verdict"], *map(list, checks)] in tables(page)
    assert f"lcm-kit verify house.safetensors --base {HUB}" in page


# -- Evaluation ----------------------------------------------------------------------------------------------


def test_without_an_evaluation_nothing_is_claimed(write: Callable[..., str], tmp_path: Path) -> None:
    page = write()
    assert "How good" not in page and "UNet calls" not in page and "pictures/" not in page
    results = evaluated(tmp_path / "run")
    results["cells"] = [each for each in results["cells"] if each["kind"] != "student"]
    assert "How good" not in write(results=results, pictures_from=tmp_path / "run")
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["README.md"]


def test_the_evaluation_compares_at_equal_cost(write: Callable[..., str], tmp_path: Path) -> None:
    page = write(results=evaluated(tmp_path / "run"), pictures_from=tmp_path / "run")
    (table,) = (table for table in tables(page) if table[0][0] == "drawn by")

    def share(right: int) -> str:
        return f"{right}\u00a0% ({right - 3}\u00a0% to {right + 1}\u00a0%)"

    assert table == [
        ["drawn by", "how", "UNet calls", "all right", "Fréchet distance", "colour"],
        ["teacher", "DDIM, 50 steps with guidance", "100", share(99), "0.0223", "0.99"],
        ["this LoRA", "LCM, 2 steps", "2", share(83), "0.182", "0.99"],
        # 62 % beat the 31 % of the other row at 4 calls; the one at 8 has no student beside it
        ["base, plain sampler", "DPM-Solver++ 2M, 4 steps", "4", share(62), "0.392", "0.99"],
        ["this LoRA", "LCM, 4 steps", "4", share(94), "0.0723", "0.99"],
    ]
    assert "Measured on 4 prompts, every row from the same noise" in page and "0.0411" in page
    assert 'prompt = "a red fox"' in snippets(page)[0]


def test_what_was_not_measured_is_left_out(write: Callable[..., str], tmp_path: Path) -> None:
    results = evaluated(tmp_path / "run", prompt_adherence=None, frechet_biased=None)
    results["frechet_floor"], results["settings"]["lora_weight"] = None, 0.8
    page = write(results=results)
    (table,) = (table for table in tables(page) if table[0][0] == "drawn by")
    assert table[0] == ["drawn by", "how", "UNet calls", "distance to teacher", "colour"]
    assert table[-1] == ["this LoRA", "LCM, 4 steps", "4", "1.00", "0.99"]
    assert "All right" not in page and "None" not in page and "Fréchet" not in page
    assert "at strength 0.8" in page and "pictures/" not in page


def test_the_sheet_has_the_teacher_above_the_student(write: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    results = evaluated(run)
    (run / results["cells"][4]["pictures"][0]).unlink()  # the student's first: then no column shows it
    page = write(results=results, pictures_from=run)
    (link,) = re.findall(r"^!\[.*\]\((.*)\)$", page, re.MULTILINE)
    with Image.open(tmp_path / "export" / link) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (12 + 4 + 12, 16 + 4 + 16, 3)
    cells = [[pixels[y, x].tolist() for x in (8, 28)] for y in (6, 22)]
    assert cells == [[[10, 40, 0], [10, 80, 0]], [[50, 40, 0], [50, 80, 0]]]
    items = [shown(t) for t in tokens(page) if t.type == "inline"]
    assert HOSTILE in items and "an owl" in items and "a red fox" not in items and "a boat" not in items
    assert sorted(p.name for p in (tmp_path / "export").rglob("*.png")) == ["teacher-and-student.png"]


def test_large_pictures_are_shown_small(write: Callable[..., str], tmp_path: Path) -> None:
    results = evaluated(tmp_path / "run")
    for file in (tmp_path / "run" / "pictures").iterdir():
        Image.new("RGB", (768, 512), "red").save(file)
    write(results=results, pictures_from=tmp_path / "run")
    with Image.open(tmp_path / "export" / card.SHEET) as sheet:
        assert sheet.size == (3 * 192 + 8, 2 * 128 + 4)


# -- Foreign text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [HOSTILE, WORSE], ids=["hostile", "worse"])
def test_foreign_text_breaks_nothing(text: str, write: Callable[..., str], tmp_path: Path) -> None:
    results = evaluated(tmp_path / "run")
    plain = write(results=results, pictures_from=tmp_path / "run")
    results["prompts"]["main"]["texts"][0] = text
    page = write(
        title=text, files={"kohya": Path(f"{text}.safetensors".replace("/", ""))},
        facts=facts(base=text, base_hash=text, data=Data(text, 512), parents=(text,)),
        checks=[(text, text, text)], results=results, pictures_from=tmp_path / "run",
    )  # fmt: skip
    assert front(page)["library_name"] == "diffusers" and "base_model" not in front(page)
    parsed, line = tokens(page), " ".join(text.split("\n"))
    assert headings(page) == [line, *headings(plain)[1:]]
    sizes = [[[len(row) for row in table] for table in tables(each)] for each in (page, plain)]
    assert sizes[0] == sizes[1]
    assert [[line] * 3] in [table[1:] for table in tables(page)]
    for source in (codes := snippets(page)):
        names: dict[str, Any] = {}
        exec("\n".join(row for row in source.splitlines() if row.startswith(("base =", "prompt ="))), names)
        compile(source, "card", "exec")
        assert names["base"] == text and names["prompt"] == text
    assert len(codes) == 2 and sum(t.type == "fence" for t in parsed) == 3
    assert not any(t.type == "html_block" for t in parsed)
    tags = [c.content for t in parsed for c in t.children or () if c.type == "html_inline"]
    assert set(tags) <= {"<code>", "</code>"}


@pytest.mark.parametrize("trigger", ["lumo style", HOSTILE, WORSE], ids=["plain", "hostile", "worse"])
def test_the_trigger_is_a_row_of_the_settings(trigger: str, write: Callable[..., str]) -> None:
    page = write(facts=facts(data=Data("cd34", 512, trigger=trigger)))
    line = " ".join(trigger.split("\n"))
    shown = dict(tables(page)[0][1:])["trigger"]
    assert shown.replace("<code>", "").replace("</code>", "") == f"{line}, in every prompt"
    assert "trigger" not in dict(tables(write())[0][1:])


@pytest.mark.parametrize("prompt", ["- a", "+ a", "1. a", "12) a", "# a", "> a", "a_b", "---", "-"])
def test_a_prompt_opens_no_list(prompt: str, write: Callable[..., str], tmp_path: Path) -> None:
    results = evaluated(tmp_path / "run")
    plain = tokens(write(results=results, pictures_from=tmp_path / "run"))
    results["prompts"]["main"]["texts"][0] = prompt
    parsed = tokens(write(results=results, pictures_from=tmp_path / "run"))
    assert [t.type for t in parsed] == [t.type for t in plain]
    assert prompt in [shown(t) for t in parsed if t.type == "inline"]


def test_a_name_that_a_prompt_cannot_hold_is_renamed(write: Callable[..., str]) -> None:
    web = section(write(files=BOTH | {"kohya": Path("a:b>.safetensors")}), "A1111 and Forge")
    assert "`<lora:a-b-:1>`" in web and "renamed to `a-b-.safetensors`" in web
    assert "renamed" not in write()


def test_a_name_that_is_not_text_does_not_stop_it(write: Callable[..., str]) -> None:
    assert "caf?" in write(title="caf\udce9")


# -- The code runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_the_diffusers_snippet_draws_with_the_lora(
    style: str, sd_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import LCMScheduler, StableDiffusionPipeline

    base, folder = sd_base("v_prediction"), tmp_path / "export"
    structure = of_base(str(base))
    lora = random_lora(structure, ranks=(4,), alphas=(8.0,))
    file = save(lora, structure, folder, style)
    about = {"title": "t", "structure": structure, "facts": facts(base=str(base)), "lora": lora, "checks": []}
    source = snippets(card.write(folder, files={style: file}, **about).read_text())[0]
    assert source.count("\nimage = pipe(") == 1
    monkeypatch.chdir(folder)
    exec(source.replace("\nimage = pipe(", "\ntorch.manual_seed(7)\nimage = pipe("), {})
    with Image.open(folder / "picture.png") as picture:
        found = np.asarray(picture).astype(int)

    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)

    def draw() -> np.ndarray:
        torch.manual_seed(7)
        asked = re.search(r'prompt = "(.*)"', source)[1]
        picture = pipe(asked, num_inference_steps=4, guidance_scale=1.0).images[0]
        return np.asarray(picture).astype(int)

    without = draw()
    fuse(pipe.unet, lora)
    wanted = draw()
    assert found.shape == wanted.shape == (64, 64, 3)
    assert np.abs(found - wanted).max() <= 1  # rounding to 8 bits
    assert np.abs(found - without).mean() > 3
