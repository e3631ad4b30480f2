"""docs/extending/base.md, followed: its toy family and its toy model, built from the page's own code."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcm_kit import bases, families, sample
from lcm_kit.bases import inspect_base, sd
from lcm_kit.bases.checkpoint import contents_of
from lcm_kit.config import schema
from lcm_kit.data.encoder import Encoder
from lcm_kit.errors import UserError
from lcm_kit.lora import structure
from lcm_kit.lora.apps import APPS, able
from lcm_kit.plan import base_profile

PAGE = (Path(__file__).parents[1] / "docs" / "extending" / "base.md").read_text(encoding="utf-8")
MODULE, FAMILY, GENERATION = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
CAPTIONS = ["a red fox", ""]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The page's entries in the tables and its module on the path, for one test; a folder."""
    for table in ("FAMILIES", "GENERATIONS"):
        monkeypatch.setattr(families, table, dict(getattr(families, table)))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "skip_family.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    exec(FAMILY, {})
    exec(GENERATION, {})
    yield tmp_path
    sys.modules.pop("skip_family", None)
    structure.known.cache_clear()


@pytest.fixture
def base(tables: Path, sd_base: Callable[..., Path]) -> Path:
    """A base whose model_index.json names the toy's pipeline."""
    folder = shutil.copytree(sd_base(), tables / "base")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "SkipPipeline"}))
    return folder


@pytest.mark.parametrize(
    ("kind", "heading"), [(families.Family, "family"), (families.Generation, "generation")]
)
def test_the_page_names_every_field(kind: Any, heading: str) -> None:
    table = PAGE.split(f"| field of a {heading} |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {field.name for field in fields(kind)}


def test_the_page_names_every_function() -> None:
    table = PAGE.split("| function |")[1].split("\n\n")[0]
    named = {row.split("`")[1] for row in table.splitlines()[2:]}
    assert named == {name for name in vars(bases.Code) if not name.startswith("_")}
    for family in families.FAMILIES.values():
        assert named <= set(dir(bases.code_of(family)))


def skipped(base: Path) -> torch.Tensor:
    """Embeddings of `CAPTIONS` by transformers alone, one layer before the last."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder").eval()
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
    with torch.no_grad():
        return norm(encoder(ids, output_hidden_states=True).hidden_states[1])  # of 0, 1, 2


def test_a_base_of_the_family_is_recognised_and_encoded_by_its_own_code(base: Path) -> None:
    info, wanted = inspect_base(str(base)), skipped(base)
    assert info.family.name == "skip"
    encoder = Encoder.load(info, "cpu", vae=False)
    torch.testing.assert_close(encoder.condition(CAPTIONS, []).embeds, wanted)
    torch.testing.assert_close(encoder.empty().embeds, wanted[1:])
    _, modules = bases.family_of(info).text_lora_targets(encoder.text)["text_encoder"]
    assert modules and not any("layers.1." in name for name in modules)  # of two


def test_it_is_drawn_by_its_own_pipeline(base: Path) -> None:
    """As diffusers' pipeline draws from the embeddings of transformers alone."""
    from diffusers import StableDiffusionPipeline

    pipe, embeds = sample.pipeline(str(base)), skipped(base)
    assert type(pipe).__name__ == "SkipPipeline"
    own = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    own.scheduler = sample.scheduler("ddim", own.scheduler.config)
    noise = torch.randn((1, 4, 16, 16), generator=sample.generators(1, 0, 1)[0])
    wanted = own(
        prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], num_inference_steps=2,
        guidance_scale=3.0, latents=noise, output_type="latent",
    ).images  # fmt: skip
    found = sample.latents(pipe, CAPTIONS[:1], sampler="ddim", steps=2, guidance_scale=3.0, seed=1)
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1e-5)
    long = ["a red fox jumps, and a blue one too"]  # two chunks of this base's 22 tokens
    text = sd.Text(pipe.tokenizer, pipe.text_encoder)
    encode = bases.code_of(families.FAMILIES["skip"]).encode_text
    assert encode(text, long, None).embeds.shape == (1, 2 * 24, 32)
    wanted = own(
        prompt_embeds=encode(text, long, None).embeds, negative_prompt_embeds=embeds[1:].repeat(1, 2, 1),
        num_inference_steps=2, guidance_scale=3.0, latents=noise, output_type="latent",
    ).images  # fmt: skip
    found = sample.latents(pipe, long, sampler="ddim", steps=2, guidance_scale=3.0, seed=1)
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1e-5)


def test_without_the_entry_it_is_what_its_parts_say(sd_base: Callable[..., Path]) -> None:
    assert "skip" not in families.FAMILIES and "mini" not in families.GENERATIONS
    assert inspect_base(str(sd_base())).family.name == "sd"


def test_the_model_is_planned_read_and_known_to_the_apps(tables: Path) -> None:
    whole, mini = base_profile.published("sd1"), base_profile.published("mini")
    assert mini.structure.label == "Mini SD" and mini.text == whole.text
    fewer = len(structure.known("sd1").unet) - len(mini.structure.unet)
    # a residual block (4 or 3 layers) and an attention less in each block: the structure says how many
    assert fewer > 80 and set(mini.structure.unet) < set(structure.known("sd1").unet) | set(
        mini.structure.unet
    )
    narrow = {**mini.unet_config, "block_out_channels": (32, 64, 96, 96), "cross_attention_dim": 48}
    small = structure._structure("small", families.generation_of("sd1"), narrow, {})
    assert small.blocks is not None and small.blocks.name == "mini"
    assert able(small) == tuple(app for app in APPS if app != "sd-scripts")
    with pytest.raises(UserError, match="'nano' is unknown; choose one of sd1, sd2, sdxl, ssd1b, mini$"):
        base_profile.published("nano")


def test_its_checkpoint_and_its_name_on_the_hub_are_recognised(tables: Path) -> None:
    names = ("input_blocks.0.0.weight", "middle_block.1.norm.bias")
    tensors = {f"model.diffusion_model.{name}": torch.zeros(8, 4, 3, 3) for name in names}
    tensors["cond_stage_model.transformer.x"] = torch.zeros(1)
    save_file(tensors, tables / "mini.safetensors")
    assert contents_of(tables / "mini.safetensors").generation.name == "mini"
    save_file(
        tensors | {"model.diffusion_model.input_blocks.11.0.x": torch.zeros(1)}, tables / "whole.safetensors"
    )
    assert contents_of(tables / "whole.safetensors").generation.name == "sd1"
    assert base_profile.find(schema.Base(path="somebody/mini-sd-v2")).structure.label == "Mini SD"
