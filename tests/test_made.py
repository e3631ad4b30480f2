"""How a picture was made, in its PNG: read back as A1111 and ComfyUI read it, whatever is in a prompt."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from PIL import Image

from lcm_kit import __version__, assets, bases, sample, samplers
from lcm_kit.bases.emphasis import Weighted, read, words
from lcm_kit.drawing.made import Lora, Source, base_name, for_apps
from lcm_kit.drawing.pictures import png_bytes, save_png
from lcm_kit.errors import UserError
from lcm_kit.io.files import sha256_file
from lcm_kit.io.written import tidied
from tests.app_text import Read, a1111, chunks, comfyui, texts
from tests.fuzz.doors import fuzz, text

SIZE = (64, 48)
SOURCE = Source("asset:tiny-sd", {"lumo": Lora("Lumo_v2", "ab" * 32), "dusk": Lora("dusk", "cd" * 32)})
SETTINGS = {
    "prompt": "a red circle", "negative_prompt": None, "seed": 7, "count": 1, "sampler": "lcm", "steps": 4,
    "guidance_scale": 1.0, "width": 64, "height": 48, "adapters": {"lumo": 1.0, "dusk": 0.25},
}  # fmt: skip
FIELDS = {
    "Steps": "4", "Sampler": "LCM", "Schedule type": "Simple", "CFG scale": "1", "Seed": "7", "Size": "64x48",
    "Model": "tiny-sd",
}  # fmt: skip
LORAS = [("Lumo_v2", 1.0), ("dusk", 0.25)]


def written(source: Source = SOURCE, index: int = 0, **changed: Any) -> bytes:
    """A PNG file that says how it was made."""
    told = source.told(SETTINGS | changed, SIZE, index)
    return png_bytes(Image.new("RGB", SIZE), told, quick=True)


def in_apps(png: bytes) -> tuple[Read, Read]:
    """As A1111 reads it and as ComfyUI does."""
    dropped = comfyui(texts(png, latin="utf-8")["parameters"])
    assert dropped is not None
    return a1111(texts(png)["parameters"]), dropped


def test_the_apps_read_the_prompts_the_loras_and_every_setting() -> None:
    png = written(negative_prompt="blue", guidance_scale=2.5, seed=-3)
    assert [kind for kind, _ in chunks(png)][:3] == ["IHDR", "tEXt", "tEXt"]
    assert texts(png)["parameters"] == (
        "a red circle <lora:Lumo_v2:1> <lora:dusk:0.25>\n"
        "Negative prompt: blue\n"
        "Steps: 4, Sampler: LCM, Schedule type: Simple, CFG scale: 2.5, Seed: -3, Size: 64x48, Model: tiny-sd"
    )
    fields = FIELDS | {"CFG scale": "2.5", "Seed": "-3"}
    web, dropped = in_apps(png)
    assert web == Read("a red circle", "blue", fields, LORAS)
    assert dropped == Read("a red circle", "blue", {key.lower(): each for key, each in fields.items()}, LORAS)
    with Image.open(io.BytesIO(png)) as picture:  # as A1111 does
        assert picture.info["parameters"] == texts(png)["parameters"]


def test_all_of_it_is_json_too() -> None:
    own = json.loads(texts(written(index=2, count=3))["lcm_kit"])
    assert own == {
        "lcm_kit": __version__, "base": "asset:tiny-sd", "index": 2, "settings": SETTINGS | {"count": 3},
        "adapters": {"lumo": "ab" * 32, "dusk": "cd" * 32},
    }  # fmt: skip


def test_without_a_negative_prompt_comfyui_still_reads_it() -> None:
    web, dropped = in_apps(written())
    assert (web.prompt, web.negative, dropped.prompt, dropped.negative) == ("a red circle", "") * 2
    assert in_apps(written(prompt="", adapters={}))[1].prompt == ""


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"sampler": "ddim"}, {"Sampler": "Euler", "Schedule type": "Simple"}),
        ({"sampler": "dpmpp_2m"}, {"Sampler": "DPM++ 2M", "Schedule type": "Simple"}),
        ({"sampler": "tcd:0.5"}, {"Sampler": "TCD", "Schedule type": "Simple"}),
        ({"count": 4}, {"Batch size": "4", "Batch pos": "3"}),
        ({"strength": 0.6}, {"Denoising strength": "0.6"}),
        ({"guidance_scale": 1.0000001}, {"CFG scale": "1.0000001"}),
        ({"seed": 2**63 - 1}, {"Seed": "9223372036854775807"}),
    ],
)  # fmt: skip
def test_settings_as_a1111_calls_them(changed: dict[str, Any], fields: dict[str, str]) -> None:
    assert in_apps(written(index=3, **changed))[0].fields == FIELDS | fields


def test_comfyui_knows_the_samplers_by_these_names() -> None:
    """It makes small letters, pp of ++, and _ of spaces; its own names are these."""
    known = {"lcm", "euler", "dpmpp_2m"}
    for name in {"lcm", "ddim", "dpmpp_2m"}:
        said = in_apps(written(sampler=name))[1].fields["sampler"]
        assert said.lower().replace("++", "pp").replace(" ", "_") in known
    assert all(each.in_pictures for each in samplers.SAMPLERS.values())


@pytest.mark.parametrize(
    ("base", "model"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5"),
        ("brand.safetensors", "brand"),
        ('a", Seed: 5, {x}: <lora:y:1>', "a Seed 5 x lora y 1"),
    ],
)
def test_a_base_cannot_forge_a_field(base: str, model: str) -> None:
    """Nor can what a LoRA's file is called."""
    evil = Lora('e", Seed: 5>\nSteps: 9', "")
    web, dropped = in_apps(written(Source(base, {"x": evil}), adapters={"x": 1.0}))
    assert web.fields == FIELDS | {"Model": model} and web.loras == [("e Seed 5 Steps 9", 1.0)]
    assert dropped.fields == {key.lower(): each for key, each in web.fields.items()}
    assert dropped.loras == web.loras and dropped.prompt == "a red circle"


def test_of_a_folder_its_name_alone_is_said(tmp_path: Path) -> None:
    (tmp_path / "house style").mkdir()
    assert base_name(str(tmp_path / "house style")) == "house style"
    assert base_name("asset:tiny-sd") == "asset:tiny-sd" and base_name("a/b") == "a/b"


def test_what_is_no_ascii_comes_through_in_both() -> None:
    """Latin-1 too, which ComfyUI reads as UTF-8 where it stands in tEXt."""
    for prompt in ("caf\xe9", "\u6f22\u5b57 \U0001f98a"):
        png = written(prompt=prompt)
        assert [each.prompt for each in in_apps(png)] == [prompt] * 2
        assert json.loads(texts(png)["lcm_kit"])["settings"]["prompt"] == prompt


def test_prompts_can_be_left_out() -> None:
    told = SOURCE.told(SETTINGS | {"negative_prompt": "blue", "prompt_to": "green"}, SIZE, prompts=False)
    assert not [word for word in ("circle", "blue", "green") for each in told.values() if word in each]
    web = a1111(told["parameters"])
    assert (web.prompt, web.negative, web.fields, web.loras) == ("", "", FIELDS, LORAS)


def test_lines_become_one_and_words_stay_apart() -> None:
    assert for_apps("a\ncat\u2028on\r\na\tmat\x00") == "a cat on a mat"


# -- Prompts that would be something else --------------------------------------------------------------------

FORGED = (
    "Negative prompt: evil", "Steps: 9, Sampler: Euler a, CFG scale: 9, Seed: 9, Size: 8x8", "\n", "\r\n",
    "\u2028", "\x85", "\x0b", '"', "\\", ",", ":", "<lora:evil:1>", "<hypernet:evil:1>", "<lora:", ">", "(",
    ")", "[", "]", "(a:1.3)", ":0.5]", "|", " AND ", " BREAK ", "{a|b}", "negative prompt:", "steps:", "\\(",
    "\\)", "Negative prompt : evil", " ", "a cat", "\xe9", "\u6f22", "1.5", "\ufeff",
)  # fmt: skip
PROMPTS = st.one_of(st.lists(st.sampled_from(FORGED), max_size=8).map("".join), text)


@fuzz(
    st.tuples(PROMPTS, PROMPTS), small=300, large=5000,
    examples=[(each, other) for each in FORGED for other in ("", each)],
)  # fmt: skip
def test_no_prompt_forges_a_field(_: Path, prompts: tuple[str, str]) -> None:
    """Whatever stands in prompts, tidied as the server does it or as it came."""
    for prompt, negative in (prompts, tuple(tidied(each)[0] for each in prompts)):
        png = written(prompt=prompt, negative_prompt=negative)
        web, dropped = in_apps(png)
        assert len(texts(png)["parameters"].splitlines()) == 3  # however somebody parts lines
        assert web.fields == FIELDS and web.loras == LORAS
        assert (
            dropped.fields == {key.lower(): each for key, each in FIELDS.items()} and dropped.loras == LORAS
        )
        assert (web.prompt, web.negative) == (dropped.prompt, dropped.negative)
        assert web.prompt == for_apps(prompt).strip() and web.negative == for_apps(negative).strip()
        own = json.loads(texts(png)["lcm_kit"])["settings"]
        assert (own["prompt"], own["negative_prompt"]) == (prompt, negative)


@fuzz(PROMPTS.filter(lambda prompt: "\ufeff" not in prompt), small=300, large=5000, examples=FORGED)
def test_the_apps_draw_what_was_drawn(_: Path, prompt: str) -> None:
    """Read as A1111 reads, it has the tokens and the weights of what the kit drew."""
    prompt = tidied(prompt)[0]
    try:
        drawn = read(prompt)
    except UserError:
        return  # there is no picture
    shown = read(for_apps(prompt), True)
    assert isinstance(shown, Weighted) == isinstance(drawn, Weighted)
    if isinstance(drawn, Weighted) and isinstance(shown, Weighted):
        assert [[span.weight for span in part] for part in shown.parts] == [
            [span.weight for span in part] for part in drawn.parts
        ]
    assert _tokens(words(shown)) == _tokens(words(drawn))


@cache
def _tokenizer() -> Any:
    return bases.load_tokenizer(bases.inspect_base("asset:tiny-sd"), "tokenizer")


def _tokens(prompt: str) -> list[int]:
    found: list[int] = _tokenizer()(prompt).input_ids
    return found


# -- Files ---------------------------------------------------------------------------------------------------


def test_a_file_is_written_with_it(tmp_path: Path) -> None:
    told = SOURCE.told(SETTINGS, SIZE)
    save_png(Image.new("RGB", SIZE, "red"), tmp_path / "a.png", told)
    assert texts((tmp_path / "a.png").read_bytes()) == told


def test_what_sample_writes_says_how_it_was_made(tmp_path: Path) -> None:
    lora = assets.path("tiny-lcm-lora") / "pytorch_lora_weights.safetensors"
    prompts = ["a red circle", "a blue (house)"]
    sheet = sample.sample_to_folder(
        "asset:tiny-sd", prompts, tmp_path, adapter="asset:tiny-lcm-lora", lora_weight=0.5, steps=2, seed=3,
        guidance_scale=1.5, negative_prompt="green", size=(48, 64), count=2,
    )  # fmt: skip
    assert texts(sheet.read_bytes()) == {}
    names = ["000-a-red-circle-1", "001-a-blue-house-1", "000-a-red-circle-2", "001-a-blue-house-2"]
    for index, name in enumerate(names):
        png, prompt = (tmp_path / f"{name}.png").read_bytes(), prompts[index % 2]
        own = json.loads(texts(png)["lcm_kit"])
        assert own == {
            "lcm_kit": __version__, "base": "asset:tiny-sd", "index": index,
            "adapters": {"tiny-lcm-lora": sha256_file(lora)},
            "settings": {
                "prompt": prompt, "count": 4, "negative_prompt": "green", "seed": 3, "sampler": "lcm",
                "steps": 2, "guidance_scale": 1.5, "adapters": {"tiny-lcm-lora": 0.5},
            },
        }  # fmt: skip
        web, _ = in_apps(png)
        assert web == Read(
            prompt.replace("(", "\\(").replace(")", "\\)"), "green",
            FIELDS | {"Steps": "2", "CFG scale": "1.5", "Seed": "3"}
            | {"Batch size": "4", "Batch pos": str(index)},
            [("tiny-lcm-lora", 0.5)],
        )  # fmt: skip
    lonely = sample.sample_to_folder(
        "asset:tiny-sd", ["a cat"], tmp_path / "plain", steps=1, say_prompts=False
    )
    png = (lonely.parent / "000-a-cat.png").read_bytes()
    assert b"a cat" not in png and in_apps(png)[0].fields["Steps"] == "1"
