"""The header that apps read: exact keys for each base, the way back, and a hash that anyone can check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lcm_kit.lora import metadata, structure
from lcm_kit.lora.layers import Lora
from lcm_kit.lora.metadata_reading import not_read, provenance_from_header
from lcm_kit.lora.provenance import Base, Data, Guidance, Method, Provenance, Recommended
from tests.loras import random_lora

CONVENTION = (
    "diffusers' guidance_scale, where 1 means no guidance; the LCM paper's w (arXiv:2310.04378) is "
    "guidance_scale - 1"
)
RUN = Provenance(
    "brand", Base("stabilityai/sd", "fe60"), method=Method("lcm"), step=200, guidance=Guidance(4.0, 6.0),
    data=Data("ab12", 512), date="2025-11-21T05:08:00+00:00", kit_version="0.1.0",
)  # fmt: skip
LCM_HINT = (
    "Sampler LCM (TCD also works), scheduler / schedule type Simple, 4 steps (1 to 8), guidance_scale / CFG "
    "1.0: the guidance of 4.0 to 6.0 is baked in. LoRA strength 1.0."
)
Q, CONV = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.mid_block.resnets.0.conv1"
POINT = "unet.mid_block.attentions.0.proj_in"  # a 1x1 convolution in SD1.x


def of(generation: Any, prediction_type: str | None = "epsilon") -> structure.Structure:
    return replace(structure.known(generation), prediction_type=prediction_type)


def small(base: structure.Structure, *modules: str, **sizes: Any) -> Lora:
    return random_lora(base, modules or (Q,), **sizes)


def own(**more: str) -> dict[str, str]:
    return {f"lcm_kit.{key}": value for key, value in more.items()}


LCM_OWN = own(
    metadata="1", method="lcm", steps="200", guidance_min="4.0", guidance_max="6.0",
    guidance_convention=CONVENTION, base="stabilityai/sd", base_hash="fe60", data_fingerprint="ab12",
    kit_version="0.1.0", sampling_steps="1-8", sampling_guidance_scale="1",
)  # fmt: skip


def test_sd1_with_convolutions() -> None:
    base = of("sd1")
    built = metadata.build(small(base, Q, CONV, POINT, ranks=(16, 8), alphas=(16.0, 4.0)), base, RUN)
    assert built == {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "16",
        "ss_network_alpha": "16.0",
        "ss_network_args": '{"conv_dim": "8", "conv_alpha": "4.0"}',
        "ss_output_name": "brand",
        "ss_sd_model_name": "stabilityai/sd",
        "ss_resolution": "(512, 512)",
        "ss_steps": "200",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "brand",
        "modelspec.description": "A LoRA for few-step sampling with stabilityai/sd, distilled by LCM in 200 "
        "optimizer steps.",
        "modelspec.date": "2025-11-21T05:08:00+00:00",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        "modelspec.usage_hint": LCM_HINT,
        **LCM_OWN,
        "lcm_kit.modules": "3",
    }


def test_sd2_with_v_prediction() -> None:
    base = of("sd2", "v_prediction")
    facts = replace(RUN, data=Data("ab12"), date=None, step=None, guidance=Guidance(7.5, 7.5))
    hint = LCM_HINT.replace("4.0 to 6.0", "7.5")
    changed = {"guidance_min": "7.5", "guidance_max": "7.5"}
    assert metadata.build(small(base, alphas=(4,)), base, facts) == {
        "ss_base_model_version": "sd_v2_v",
        "ss_v2": "True",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4.0",
        "ss_output_name": "brand",
        "ss_sd_model_name": "stabilityai/sd",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "brand",
        "modelspec.description": "A LoRA for few-step sampling with stabilityai/sd, distilled by LCM.",
        "modelspec.resolution": "768x768",
        "modelspec.prediction_type": "v",
        "modelspec.usage_hint": f"{hint} The base predicts v: in ComfyUI add ModelSamplingDiscrete with "
        "sampling v_prediction and zsnr off; A1111's LCM sampler is for epsilon bases only, Forge's is not.",
        **{key: value for key, value in LCM_OWN.items() if key != "lcm_kit.steps"},
        **own(**changed),
        "lcm_kit.modules": "1",
    }


def test_the_hint_for_zero_terminal_snr() -> None:
    base = replace(of("sd2", "v_prediction"), zero_terminal_snr=True)
    hint = metadata.build(Lora({}), base, RUN)["modelspec.usage_hint"]
    assert "sampling v_prediction and zsnr on;" in hint and "epsilon bases only, Forge's is not." in hint


def test_sdxl_merged_from_two_files() -> None:
    base = of("sdxl")
    facts = replace(RUN, data=Data("ab12", 1024), guidance=None, parents=("style, new:0.8", "lcm:1"))
    lora = small(base, Q, "text_encoder.text_model.encoder.layers.0.mlp.fc1", ranks=(4, 8), alphas=(8.0,))
    built = metadata.build(lora, base, facts)
    guidance = ("lcm_kit.guidance_min", "lcm_kit.guidance_max", "lcm_kit.guidance_convention")
    assert built == {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "8.0",
        "ss_output_name": "brand",
        "ss_sd_model_name": "stabilityai/sd",
        "ss_resolution": "(1024, 1024)",
        "ss_steps": "200",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "brand",
        "modelspec.description": "A LoRA for few-step sampling with stabilityai/sd, distilled by LCM in 200 "
        "optimizer steps.",
        "modelspec.date": "2025-11-21T05:08:00+00:00",
        "modelspec.resolution": "1024x1024",
        "modelspec.prediction_type": "epsilon",
        "modelspec.usage_hint": LCM_HINT.replace(": the guidance of 4.0 to 6.0 is baked in", ""),
        "modelspec.merged_from": "style, new:0.8, lcm:1",
        **{key: value for key, value in LCM_OWN.items() if key not in guidance},
        "lcm_kit.parents": '["style, new:0.8", "lcm:1"]',
        "lcm_kit.modules": "2",
    }
    other = metadata.build(lora, base, facts, style="diffusers")
    assert other == built | {"modelspec.implementation": "diffusers"}


def test_a_style_lora_of_which_nothing_is_known() -> None:
    """And a base of which only the generation is: SD2.x then has no architecture of ModelSpec's."""
    base = of("sd2", None)
    assert metadata.build(small(base, CONV), base, Provenance("flat")) == {
        "ss_base_model_version": "sd_v2",
        "ss_v2": "True",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "8.0",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "8.0"}',
        "ss_output_name": "flat",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "flat",
        "modelspec.description": "A LoRA for Stable Diffusion 2.x.",
        "modelspec.resolution": "768x768",
        "modelspec.usage_hint": "Sampler, steps and guidance_scale / CFG as usual for its base, unless its "
        "maker says otherwise. LoRA strength 1.0, less for a weaker effect.",
        "lcm_kit.metadata": "1",
        "lcm_kit.modules": "1",
    }


def test_what_a_sweep_recommends_takes_the_place_of_the_method_in_general() -> None:
    use = Recommended("Use 2 steps of TCD.", "tcd", 2, 1.5, 0.8, (), ())
    built = metadata.build(small(of("sd1")), of("sd1"), replace(RUN, recommended=use))
    keys = ("sampler", "sampling_steps", "lora_weight", "recommended")
    assert {key: built[f"lcm_kit.{key}"] for key in keys} == {
        "sampler": "tcd", "sampling_steps": "2", "lora_weight": "0.8", "recommended": "Use 2 steps of TCD.",
    }  # fmt: skip
    assert built["lcm_kit.sampling_guidance_scale"] == "1.5"
    assert built["modelspec.usage_hint"] == (
        "Sampler TCD, 2 steps, guidance_scale / CFG 1.5: the guidance of 4.0 to 6.0 is baked in. LoRA "
        "strength 0.8. Chosen by measurement. In apps without TCD: Euler a (without new noise Euler), "
        "scheduler / schedule type Simple."
    )
    assert provenance_from_header(built, "brand").recommended == use and "lcm_kit.recommended_at" not in built
    wide = replace(use, at="768 × 512")
    told = metadata.build(small(of("sd1")), of("sd1"), replace(RUN, recommended=wide))
    assert "Chosen by measurement at 768 × 512 pixels. In apps" in told["modelspec.usage_hint"]
    assert provenance_from_header(told, "brand").recommended == wide
    for key, value in (("sampler", "rm -rf"), ("sampling_steps", "1e9"), ("sampling_guidance_scale", "nan")):
        spoiled = provenance_from_header({**built, f"lcm_kit.{key}": value}, "brand").recommended
        assert spoiled == Recommended("Use 2 steps of TCD.", None, None, None, None), key
    none = Recommended("None of these settings can be recommended.", None, None, None, None, (), ())
    built = metadata.build(small(of("sd1")), of("sd1"), replace(RUN, recommended=none))
    assert (
        built["lcm_kit.recommended"].startswith("None of these") and built["lcm_kit.sampling_steps"] == "1-8"
    )


def test_the_architectures() -> None:
    def found(base: structure.Structure) -> tuple[str | None, str, str | None]:
        built = metadata.build(small(base), base, RUN)
        keys = ("modelspec.architecture", "ss_base_model_version", "modelspec.prediction_type")
        return built.get(keys[0]), built[keys[1]], built.get(keys[2])

    assert found(of("sd2")) == ("stable-diffusion-v2-512/lora", "sd_v2", "epsilon")
    assert found(of("sd1", "v_prediction")) == ("stable-diffusion-v1/lora", "sd_v1_v", "v")
    assert found(of("sd1", None)) == ("stable-diffusion-v1/lora", "sd_v1", None)
    assert found(of("sdxl", "v_prediction")) == ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "v")


def test_a_converted_file_is_not_called_merged() -> None:
    built = metadata.build(Lora({}), of("sd1"), Provenance("t", parents=("old.safetensors",)))
    assert built["lcm_kit.parents"] == '["old.safetensors"]' and "modelspec.merged_from" not in built


def test_a_base_in_small_says_so(sd_base: Callable[..., Path]) -> None:
    folder = str(sd_base("epsilon"))
    base = structure.of_base(folder)
    built = metadata.build(random_lora(base), base, replace(RUN, base=Base(folder, "fe60")))
    assert built["ss_base_model_version"] == "sd_v1"
    assert built["modelspec.description"] == (
        "A LoRA for few-step sampling with epsilon, distilled by LCM in 200 optimizer steps. Its base is a "
        "Stable Diffusion 1.x in small, with text embeddings of width 32: it fits none of the published "
        "bases."
    )
    # where the folder lies is nobody's business
    assert built["ss_sd_model_name"] == built["lcm_kit.base"] == "epsilon"
    assert str(Path(folder).parent) not in json.dumps(built)


@pytest.mark.parametrize(
    ("base", "public"),
    [
        ("stabilityai/sdxl", "stabilityai/sdxl"), ("asset:tiny-sd", "asset:tiny-sd"), ("base", "base"),
        ("/home/ann/base/", "base"), ("~/base", "base"), ("../base", "base"), ("C:\\Ann\\base", "base"),
        ("ann/models/base", "base"),
    ],
)  # fmt: skip
def test_only_the_name_of_a_base_in_a_folder_is_written(base: str, public: str) -> None:
    built = metadata.build(Lora({}), of("sd1"), Provenance("t", Base(base)))
    assert built["ss_sd_model_name"] == built["lcm_kit.base"] == public
    assert built["modelspec.description"] == f"A LoRA for {public}."
    assert "ss_network_dim" not in built and "ss_network_args" not in built


@pytest.mark.parametrize(
    ("guidance", "words"),
    [
        (None, "guidance_scale / CFG 1.0. LoRA"),
        (Guidance(1.0, 1.0), "CFG 1.0: no guidance is baked in. LoRA"),
        (Guidance(1.0, 4.0), "CFG 1.0: the guidance of 1.0 to 4.0 is baked in. LoRA"),
        (Guidance(3.0, 3.0), "CFG 1.0: the guidance of 3.0 is baked in. LoRA"),
    ],
)
def test_the_hint_says_which_guidance_is_baked_in(guidance: Guidance | None, words: str) -> None:
    built = metadata.build(Lora({}), of("sd1"), replace(RUN, guidance=guidance))
    assert words in built["modelspec.usage_hint"]


def test_no_hint_for_a_method_that_is_not_known() -> None:
    built = metadata.build(Lora({}), of("sd1"), replace(RUN, method=Method("other")))
    assert "modelspec.usage_hint" not in built and "lcm_kit.sampling_steps" not in built


ALL = [
    RUN, Provenance("bare"), replace(RUN, method=Method(), guidance=None, step=0),
    replace(RUN, guidance=Guidance(1.0, 7.123456789)),
    replace(RUN, data=Data("ab12"), base=Base(), kit_version=None),
    replace(RUN, parents=("a, b.safetensors:1", "ü.safetensors:-0.5")), replace(RUN, parents=("one",)),
]  # fmt: skip


@pytest.mark.parametrize("facts", ALL)
@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_there_and_back(tmp_path: Path, facts: Provenance, style: str) -> None:
    """Through a true safetensors header, which takes strings only."""
    base = of("sdxl")
    built = metadata.build(small(base, Q, CONV), base, facts, style=style)
    assert all(type(value) is str for value in built.values())
    assert "None" not in json.dumps(built)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", built)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert provenance_from_header(file.metadata(), facts.title) == facts


def test_facts_from_a_file_of_sd_scripts() -> None:
    header = {
        "ss_sd_model_name": "v1-5.safetensors", "ss_steps": "1200", "ss_resolution": "(512, 512)",
        "ss_max_train_steps": "1600", "modelspec.date": "2024-05-01T10:00:00", "modelspec.title": "../evil",
        "modelspec.resolution": "768x768", "ss_output_name": "other", "modelspec.merged_from": "a, b",
    }  # fmt: skip
    assert provenance_from_header(header, "mine") == Provenance(
        "mine", Base("v1-5.safetensors"), step=1200, data=Data(resolution=512), date="2024-05-01T10:00:00",
        parents=("a", "b"),
    )  # fmt: skip
    nothing = dict.fromkeys(header, "None")
    assert provenance_from_header(nothing, "mine") == provenance_from_header({}, "mine") == Provenance("mine")
    assert provenance_from_header({"modelspec.resolution": "768x768"}, "t").data.resolution == 768


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("768x768", 768), ("1024,1024", 1024), ("512", 512), ("(512, 768)", (512, 768)),
        ("768x512", (768, 512)), ("x", None), ("0x512", None), ("1x2x3", None), ("9" * 20 + "x64", None),
    ],
)  # fmt: skip
def test_width_and_height_as_others_write_them(text: str, found: Any) -> None:
    for key in ("ss_resolution", "modelspec.resolution"):
        facts = provenance_from_header({key: text}, "t")
        assert facts.data.resolution == found
    both = {"ss_resolution": text, "modelspec.resolution": "640x384"}
    assert provenance_from_header(both, "t").data.resolution == (found or (640, 384))
    built = metadata.build(Lora({}), of("sd1"), facts)
    width, height = (found or 512,) * 2 if not isinstance(found, tuple) else found
    assert built["modelspec.resolution"] == f"{width}x{height}"
    assert built.get("ss_resolution") == (f"({width}, {height})" if found else None)
    assert provenance_from_header(built, "t").data.resolution == found


def test_the_shapes_of_a_file_of_sd_scripts_and_of_ours() -> None:
    """In the form of its `ss_bucket_info`, of one data set or of several, and back."""

    def info(*buckets: tuple[list[int], int]) -> dict[str, Any]:
        told = {str(k): {"resolution": size, "count": n} for k, (size, n) in enumerate(buckets)}
        return {"buckets": told, "mean_img_ar_error": 0.0426}

    one = json.dumps(info(([1216, 832], 4), ([832, 1216], 10)))
    header = {"ss_resolution": "(1024, 1024)", "ss_enable_bucket": "True", "ss_bucket_info": one}
    found = provenance_from_header(header, "t").data
    assert found == Data(resolution=1024, shapes={"1216x832": 4, "832x1216": 10})
    assert found.sizes == [(832, 1216), (1216, 832)]
    several = json.dumps([{"bucket_info": info(([64, 32], 1))}, {"bucket_info": info(([64, 32], 2))}])
    assert provenance_from_header({"ss_datasets": several}, "t").data.shapes == {"64x32": 3}

    built = metadata.build(Lora({}), of("sdxl"), replace(RUN, data=found))
    assert (built["ss_enable_bucket"], built["ss_resolution"]) == ("True", "(1024, 1024)")
    assert json.loads(built["ss_bucket_info"]) == {
        "buckets": {
            "0": {"resolution": [832, 1216], "count": 10}, "1": {"resolution": [1216, 832], "count": 4},
        }
    }  # fmt: skip
    assert provenance_from_header(built, "t").data.shapes == found.shapes
    plain = metadata.build(Lora({}), of("sdxl"), RUN)
    assert not [key for key in plain if "bucket" in key]


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "7", '{"buckets": []}', '{"buckets": {"0": {"resolution": [1, 2, 3], "count": 1}}}',
        '{"buckets": {"0": {"resolution": ["a", 2], "count": 1}}}', '{"buckets": {"0": {"count": 1}}}',
        '{"buckets": {"0": {"resolution": [true, 2], "count": 1}}}', "[" * 100_000,
        '{"buckets": {"0": {"resolution": [-1, 2], "count": 1}}}', '{"buckets": {"0": 5}}',
    ],
)  # fmt: skip
def test_forged_shapes_are_none(text: str) -> None:
    assert provenance_from_header({"ss_bucket_info": text}, "t") == Provenance("t")
    assert provenance_from_header({"ss_datasets": text}, "t") == Provenance("t")
    rest = json.dumps({"data": {"shapes": {"64": 1}}})
    forged = {**own(metadata="1"), "lcm_kit.provenance": rest}
    assert provenance_from_header(forged, "t").data.shapes == {}


def test_a_forged_header_gives_nothing_instead_of_an_error() -> None:
    forged = own(
        metadata="1",
        steps="-1",
        guidance_min="nan",
        guidance_max="inf",
        parents="[" * 100_000,
        kit_version="",
    )
    assert provenance_from_header({**forged, "ss_resolution": "9" * 5000}, "t") == Provenance("t")
    for parents in ("[1]", '["\\ud800"]', "{}"):
        assert provenance_from_header({**forged, "lcm_kit.parents": parents}, "t") == Provenance("t")
    assert provenance_from_header({"ss_steps": "9" * 5000}, "t") == Provenance("t")


REST = "lcm_kit.provenance"


@pytest.mark.parametrize(
    "rest",
    [
        "", "{", "[]", "3", "[" * 100_000, '{"a":' * 100_000, '{"steps": ' + "9" * 5000 + "}",
        '{"parts": [{"file": 1}]}', '{"steps": "3"}', '{"caption_dropout": NaN}', '{"loss": {"name": 3}}',
        '{"recipe": "\\ud800"}',
    ],
)  # fmt: skip
def test_of_a_forged_record_none_is_read_and_that_is_said(rest: str) -> None:
    built = metadata.build(small(of("sd1")), of("sd1"), replace(RUN, recipe="train/distill", steps=300))
    assert json.loads(built[REST]) == {"recipe": "train/distill", "steps": 300} and not not_read(built)
    assert provenance_from_header({**built, REST: rest}, "brand") == RUN
    if rest:
        wanted = f"its {REST} (of lcm-kit 0.1.0) is no whole record, so that none of it is read"
        assert not_read({**built, REST: rest}) == wanted


def test_of_a_record_of_a_later_kit_none_is_read_and_the_key_is_named() -> None:
    built = metadata.build(small(of("sd1")), of("sd1"), replace(RUN, recipe="train/distill"))
    for more, name in (({"dial": 3}, "dial"), ({"grid": {"steps": 5, "shape": "x"}}, "grid.shape")):
        later = {**built, REST: json.dumps({"recipe": "train/distill", **more}), "lcm_kit.kit_version": "9.9"}
        assert provenance_from_header(later, "brand") == replace(RUN, kit_version="9.9")
        says = f"says {name}, which this kit does not know, so that none of it is read"
        assert not_read(later) == f"its {REST} (of lcm-kit 9.9) {says}"


def test_a_makers_own_words_survive_a_conversion() -> None:
    """Author and licence in any case; hint and description unless this kit knows the file's method."""
    theirs = {
        "modelspec.author": "Ann", "modelspec.license": "MIT", "modelspec.trigger_phrase": "flat",
        "modelspec.usage_hint": "say flat", "modelspec.description": "flat art", "modelspec.tags": "None",
        "ss_tag_frequency": '{"d": {"flat": 3}}', "ss_network_dim": "999", "modelspec.hash_sha256": "0x0",
        "lora_adapter_metadata": "{}",
    }  # fmt: skip
    base = of("sd1")
    lora = Lora(small(base).layers, theirs)
    kept = ("modelspec.author", "modelspec.license", "modelspec.trigger_phrase", "ss_tag_frequency")
    plain = metadata.build(Lora(lora.layers), base, Provenance("t"))
    words = ("modelspec.usage_hint", "modelspec.description")
    assert metadata.build(lora, base, Provenance("t")) == plain | {
        key: theirs[key] for key in (*kept, *words)
    }
    fast = metadata.build(Lora(lora.layers), base, RUN)
    assert metadata.build(lora, base, RUN) == fast | {key: theirs[key] for key in kept}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_hash_is_that_of_the_file_after_its_header(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "z": torch.randn(3, 4).to(dtype), "b.alpha": torch.tensor(8.0), "a": torch.randn(4, 4).t().to(dtype),
        "n": torch.arange(3), "none": torch.empty(0, 2), "half": torch.randn(5, requires_grad=True).half(),
        "slice": torch.randn(6, 2)[1:3].to(dtype), "byte": torch.ones(3, dtype=torch.uint8),
    }  # fmt: skip
    written = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    for header in (None, {"any": "thing"}):
        save_file(written, tmp_path / "a.safetensors", header)
        content = (tmp_path / "a.safetensors").read_bytes()
        after = content[8 + int.from_bytes(content[:8], "little") :]
        assert metadata.tensor_hash(tensors) == hashlib.sha256(after).hexdigest()
    assert metadata.tensor_hash({}) == hashlib.sha256(b"").hexdigest()
