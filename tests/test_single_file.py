"""A base in one .safetensors file: what comes back, what is refused, and that it is converted once."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_kit import bases
from lcm_kit.bases import inspect_base, single_file
from lcm_kit.bases.single_file import folder_of
from lcm_kit.errors import UserError
from tests import ldm

OPEN_CLIP = {"num_hidden_layers": 23, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LCM_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "lcm-kit" / "bases"


@pytest.fixture(scope="module")
def originals(tmp_path_factory, real_sd_base, sd2_v_base, sdxl_base, ssd1b_base) -> dict[str, Path]:
    """Pipeline folders with the parts that real bases have: two text encoders differ in width."""
    top = tmp_path_factory.mktemp("originals")
    wide = {
        "text_encoder": {"hidden_size": 16},
        "text_encoder_2": {"hidden_size": 48, "hidden_act": "gelu", "projection_dim": 32},
    }
    bases = {"sd1": real_sd_base, "sd2": sd2_v_base, "sdxl": sdxl_base, "ssd1b": ssd1b_base}
    text = {"sd1": {}, "sd2": {"text_encoder": OPEN_CLIP}, "sdxl": wide, "ssd1b": wide}
    return {name: ldm.with_real_parts(base, top / name, text[name]) for name, base in bases.items()}


@pytest.fixture(scope="module")
def files(originals, tmp_path_factory) -> dict[str, Path]:
    """Each of `originals` as one file, with its configuration beside it."""
    top = tmp_path_factory.mktemp("files")
    for name, folder in originals.items():
        ldm.config_only(folder, top / name)
        ldm.write(folder, top / f"{name}.safetensors", sd2=name == "sd2")
    return {name: top / f"{name}.safetensors" for name in originals}


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def shared(shared_cache: Path, monkeypatch) -> Path:
    """A cache that tests which only read what is converted have in common: each file is converted once."""
    monkeypatch.setenv("LCM_KIT_CACHE", str(shared_cache))
    return shared_cache / "lcm-kit" / "bases"


@pytest.fixture
def alone(files, tmp_path: Path) -> Path:
    """SD1's file without a configuration."""
    return Path(shutil.copy(files["sd1"], tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "ssd1b"])
def test_every_tensor_comes_back_bit_for_bit(name: str, originals, files, shared: Path):
    found = folder_of(files[name])
    assert found.parent == shared
    # sha256sum's word for it
    digest = subprocess.run(["sha256sum", files[name]], capture_output=True, text=True, check=True).stdout
    assert found.name.startswith(f"{name}-{digest[:12]}")
    expected, actual = ldm.states(originals[name]), ldm.states(found)
    assert actual.keys() == expected.keys()
    for part in expected:
        assert actual[part].keys() == expected[part].keys()
        for key, tensor in expected[part].items():
            assert torch.equal(actual[part][key], tensor), (part, key)
    assert not list(shared.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "ssd1b"])
def test_a_base_like_any_other(name: str, originals, files, shared):
    base, original = inspect_base(str(files[name])), inspect_base(str(originals[name]))
    assert base.folder == folder_of(files[name]) and base.path == str(files[name])
    fields = (
        "family", "prediction_type", "latent_channels", "factor", "sample_size", "scaling_factor", "width",
        "zeros_when_empty",
    )  # fmt: skip
    for field in fields:
        assert getattr(base, field) == getattr(original, field), field
    own = {key: value for key, value in original.scheduler_config.items() if not key.startswith("_")}
    assert own.items() <= dict(base.scheduler_config).items()


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_it_draws_what_the_folder_draws(name: str, originals, files, shared):
    from diffusers import DiffusionPipeline

    def picture(folder: Path) -> torch.Tensor:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        more = {"prompt": "a red cat", "num_inference_steps": 2, "height": 64, "width": 64}
        return pipeline(**more, output_type="pt", generator=torch.Generator().manual_seed(5)).images

    expected = picture(originals[name])
    assert expected.std() > 0.01
    assert torch.equal(torch.as_tensor(picture(folder_of(files[name]))), torch.as_tensor(expected))


def test_the_second_call_converts_nothing(files, shared, monkeypatch):
    first = folder_of(files["sd1"])
    stamps = {path: path.stat().st_mtime_ns for path in first.rglob("*")}

    def never(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(single_file, "_convert", never)
    assert folder_of(files["sd1"]) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in first.rglob("*")}


def test_another_configuration_makes_another_base(files, originals, tmp_path: Path):
    changed = ldm.config_only(originals["sd1"], tmp_path / "changed")
    scheduler = changed / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    first, second = folder_of(files["sd1"]), folder_of(files["sd1"], config=str(changed))
    assert first != second and folder_of(files["sd1"]) == first
    assert inspect_base(str(first)).prediction_type == "epsilon"
    assert inspect_base(str(second)).prediction_type == "v_prediction"


def test_precision_is_kept_part_by_part(originals, tmp_path: Path):
    ldm.config_only(originals["sd1"], tmp_path / "config")
    half = {"unet": torch.float16, "text_encoder": torch.float16}
    whole = ldm.write(originals["sd1"], tmp_path / "half.safetensors", **half, vae=torch.float16)
    mixed = ldm.write(originals["sd1"], tmp_path / "mixed.safetensors", **half)
    for file, kind in ((whole, torch.float16), (mixed, torch.float32)):
        folder = folder_of(file)
        unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        text = load_file(folder / "text_encoder" / "model.safetensors")
        decoder = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in (*unet.values(), *text.values())} == {torch.float16}
        assert {tensor.dtype for tensor in decoder.values()} == {kind}
        expected = ldm.states(originals["sd1"])
        assert all(torch.equal(tensor, expected["unet"][key].half()) for key, tensor in unet.items())
        assert all(torch.equal(tensor, expected["vae"][key].to(kind)) for key, tensor in decoder.items())


@pytest.mark.parametrize(
    ("name", "scheduler"), [("sdxl", "EulerDiscreteScheduler"), ("sd1", "PNDMScheduler")]
)
def test_its_word_stands_in_the_schedulers_configuration(name, scheduler, files, tmp_path: Path):
    tensors = load_file(files[name]) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(tensors, tmp_path / "model.safetensors")
    config = Path(shutil.copytree(files[name].with_suffix(""), tmp_path / "model"))
    for file in (config / "model_index.json", config / "scheduler" / "scheduler_config.json"):
        file.write_text(file.read_text().replace("DDIMScheduler", scheduler))
    base = inspect_base(str(tmp_path / "model.safetensors"))
    assert base.prediction_type == "v_prediction"
    assert base.scheduler_config["rescale_betas_zero_snr"] is True
    assert base.scheduler_config["beta_end"] == 0.012
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(base.folder).scheduler
    assert float(loaded.alphas_cumprod[-1]) < 1e-7  # diffusers' own, too, reaches pure noise


# --- the configuration ---


def test_offline_without_a_configuration(alone: Path, cache: Path):
    with pytest.raises(UserError) as caught:
        folder_of(alone)
    text = str(caught.value)
    assert "those of stable-diffusion-v1-5/stable-diffusion-v1-5 cannot be had from the hub" in text
    assert text.endswith(f"without weights, into {alone.with_suffix('')}") and "\n" not in text
    assert not cache.exists() or not [path for path in cache.iterdir() if path.suffix != ".lock"]


def _into_hub_cache(folder: Path, repository: Path) -> None:
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    ldm.config_only(folder, repository / "snapshots" / commit)


def test_the_hubs_cache_is_enough(alone: Path, originals, tmp_path: Path):
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    _into_hub_cache(originals["sd1"], repository)
    found = folder_of(alone)
    assert len(found.name.rpartition("-")[2]) == 12
    assert ldm.states(found).keys() == {"unet", "vae", "text_encoder"}


def test_a_repository_of_which_the_cache_holds_half_is_not_enough(alone: Path, originals, tmp_path: Path):
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    _into_hub_cache(originals["sd1"], repository)
    shutil.rmtree(next((repository / "snapshots").iterdir()) / "vae")
    with pytest.raises(UserError, match=r"lacks vae/config\.json"):
        folder_of(alone)


def test_a_configuration_of_another_model(files, originals, tmp_path: Path):
    with pytest.raises(UserError, match=r"is not of an SDXL model .*put that of stabilityai/"):
        folder_of(files["sdxl"], config=str(originals["sd1"]))
    with pytest.raises(UserError, match=r"is not of an SD1\.x model \(text_encoder_2\)"):
        folder_of(files["sd1"], config=str(originals["sdxl"]))
    # the same classes, other sizes or other blocks
    for file, config in (("sd2", "sd1"), ("ssd1b", "sdxl"), ("sdxl", "ssd1b")):
        with pytest.raises(UserError, match="its weights do not fit the configuration") as caught:
            folder_of(files[file], config=str(originals[config]))
        assert "\n" not in str(caught.value)


def test_a_configuration_without_the_attention_that_the_file_has(files, originals, tmp_path: Path):
    config = ldm.config_only(originals["sd1"], tmp_path / "changed")
    file = config / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mid_block_add_attention": False}))
    with pytest.raises(UserError, match=r"the file has \d+ tensors for the vae, not \d+"):
        folder_of(files["sd1"], config=str(config))


@pytest.mark.parametrize("entry", [["os", "PathLike"], ["diffusers", "AutoencoderTiny"], None, "x"])
def test_a_strangers_configuration_imports_nothing_of_its_choice(entry, files, originals, tmp_path: Path):
    config = ldm.config_only(originals["sd1"], tmp_path / "changed")
    index = config / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": entry}))
    with pytest.raises(UserError, match=r"is not of an SD1\.x model \(.*\); put that of"):
        folder_of(files["sd1"], config=str(config))


# --- damaged files ---


def test_truncated_and_senseless_files(files, tmp_path: Path):
    for content in (b"", b"\x80\x02cos", files["sd1"].read_bytes()[:-1]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a safetensors file"):
            folder_of(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("prefix", "sentence"),
    [
        (
            "model.diffusion_model.middle_block.0.in_layers.0.weight",
            r"has \d+ tensors for the unet, not \d+",
        ),
        ("first_stage_model.decoder.conv_out.bias", r"has \d+ tensors for the vae, not \d+"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "has no text_encoder final_layer_norm",
        ),
    ],
)
def test_a_tensor_that_is_missing_is_never_made_up(prefix, sentence, files, tmp_path: Path, cache: Path):
    tensors = load_file(files["sd1"])
    del tensors[prefix]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        folder_of(tmp_path / "model.safetensors", config=str(files["sd1"].with_suffix("")))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


# --- other spellings, 8 bits, parts alone ---


def _same_as(
    folder: Path, expected: dict[str, dict[str, torch.Tensor]], parts=("unet", "vae", "text_encoder")
):
    found = ldm.states(folder)
    for part in parts:
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(tensor, expected[part][key]) for key, tensor in found[part].items()), part


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_text_encoder_as_old_merges_spell_it(name: str, files, originals, tmp_path: Path):
    old = {
        key.replace(".transformer.text_model.", ".transformer."): x
        for key, x in load_file(files[name]).items()
    }
    assert not any("text_model" in key for key in old)
    save_file(old, tmp_path / "old.safetensors")
    parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if name == "sdxl" else [])]
    found = folder_of(tmp_path / "old.safetensors", config=str(files[name].with_suffix("")))
    _same_as(found, ldm.states(originals[name]), parts)
    assert not list(found.glob("*.safetensors"))


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
def test_eight_bit_floats_are_multiplied_by_their_scales(end: str, files, tmp_path: Path):
    tensors, scaled, expected = load_file(files["sd1"]), {"scaled_fp8": torch.zeros(0)}, {}
    for key, tensor in tensors.items():
        scaled[key] = expected[key] = tensor.half()
        if key.startswith("model.diffusion_model.") and key.endswith("weight") and tensor.ndim == 2:
            scale = (
                tensor.abs().max() / 448 if "attn1" in key else tensor.abs().amax(1) / 448
            )  # of all, or by row
            small = (tensor / (scale if scale.ndim == 0 else scale[:, None])).to(torch.float8_e4m3fn)
            scaled[key], scaled[key.removesuffix("weight") + end] = small, scale
            scaled[key.removesuffix("weight") + "scale_input"] = torch.ones(())
            expected[key] = (small.float() * (scale if scale.ndim == 0 else scale[:, None])).half()
    save_file(scaled, tmp_path / "fp8.safetensors")
    save_file({key: tensor.clone() for key, tensor in expected.items()}, tmp_path / "plain.safetensors")
    config = str(files["sd1"].with_suffix(""))
    found = folder_of(tmp_path / "fp8.safetensors", config=config)
    _same_as(found, ldm.states(folder_of(tmp_path / "plain.safetensors", config=config)))


def test_a_scale_of_other_bits_is_refused(files, tmp_path: Path):
    tensors = load_file(files["sd1"])
    key = next(key for key in tensors if "attn1.to_q" in key)
    tensors[key], tensors[key.replace(".weight", ".weight_scale")] = tensors[key].char(), torch.ones(())
    save_file(tensors, tmp_path / "int8.safetensors")
    with pytest.raises(
        UserError, match=r"is quantised in a way that this kit does not read \(.*weight_scale\)"
    ):
        folder_of(tmp_path / "int8.safetensors", config=str(files["sd1"].with_suffix("")))


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_unet_alone_takes_the_rest_from_the_folder_beside_it(
    name: str, bare: bool, files, originals, tmp_path: Path
):
    prefix = "model.diffusion_model."
    alone = {key: tensor + 1 for key, tensor in load_file(files[name]).items() if key.startswith(prefix)}
    file = tmp_path / "alone.safetensors"
    save_file({key.removeprefix(prefix) if bare else key: tensor for key, tensor in alone.items()}, file)
    for config in (None, files[name].with_suffix("")):  # none, and one without weights
        if config is not None:
            shutil.copytree(config, file.with_suffix(""))
        with pytest.raises(UserError, match=r"(?:lacks weights of|has no vae).*") as caught:
            folder_of(file)
        assert "\n" not in str(caught.value)
    shutil.rmtree(file.with_suffix(""))
    shutil.copytree(originals[name], file.with_suffix(""))
    expected = ldm.states(originals[name])
    expected["unet"] = {key: tensor + 1 for key, tensor in expected["unet"].items()}
    first = folder_of(file)
    _same_as(first, expected)
    weights = file.with_suffix("") / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor * 2 for key, tensor in load_file(weights).items()}, weights)
    assert folder_of(file) != first  # another VAE makes another base


def test_a_vae_alone_is_put_into_a_base_as_the_sentence_says(files, originals, tmp_path: Path):
    from diffusers import AutoencoderKL

    vae = {
        key.removeprefix("first_stage_model."): tensor
        for key, tensor in load_file(files["sd1"]).items()
        if key.startswith("first_stage_model.")
    }
    file = tmp_path / "vae.safetensors"
    save_file({key: tensor + 1 for key, tensor in vae.items()}, file)
    with pytest.raises(
        UserError, match=r"is one part .* a VAE in the original names; copy .*save_pretrained"
    ) as caught:
        folder_of(file)
    base = Path(shutil.copytree(originals["sd1"], tmp_path / "FOLDER"))
    command = str(caught.value).partition("diffusers' ")[2].partition(" in Python")[0]
    eval(
        command.replace("THIS", repr(str(file))).replace("'FOLDER/", f"'{base}/"),
        {"AutoencoderKL": AutoencoderKL},
    )
    expected = ldm.states(originals["sd1"])["vae"]
    bases.require_fit(inspect_base(str(base)))
    assert all(torch.equal(tensor, expected[key] + 1) for key, tensor in ldm.states(base)["vae"].items())


# --- whole or not at all ---


def test_an_interrupted_conversion_leaves_nothing(files, cache: Path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    def half(_: object, folder: Path, **__: object) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "save_pretrained", half)
        with pytest.raises(KeyboardInterrupt):
            folder_of(files["sd1"])
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert (folder_of(files["sd1"]) / "model_index.json").is_file()


KILLED = """
import os, signal, sys
from pathlib import Path
from lcm_kit.bases import single_file
class Pipeline:
    def save_pretrained(self, folder, **_):
        (folder / "half").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
single_file._load = lambda *_: Pipeline()
single_file.folder_of(Path(sys.argv[1]))
"""


def test_a_killed_conversion_is_cleaned_up_by_the_next(files, cache: Path):
    child = subprocess.run([sys.executable, "-c", KILLED, str(files["sd1"])], check=False)
    assert child.returncode == -signal.SIGKILL
    assert {path.suffix for path in cache.iterdir()} == {".lock", ".tmp"}
    found = folder_of(files["sd1"])
    assert {path.name for path in cache.iterdir() if path.suffix != ".lock"} == {found.name}


def test_two_at_once_convert_once(files, monkeypatch):
    converted = []

    def slow(*arguments: Path) -> None:
        converted.append(arguments[-1])
        time.sleep(0.3)
        arguments[-1].mkdir()

    monkeypatch.setattr(single_file, "_convert", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(folder_of, [files["sd1"]] * 4))
    assert converted == found[:1] and len(set(found)) == 1


def test_a_full_disk_is_a_sentence(files, monkeypatch, cache: Path):
    from diffusers import StableDiffusionPipeline
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", full)
    with pytest.raises(UserError, match="cannot be written .*No space left on device"):
        folder_of(files["sd1"])
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_a_sentence(files, tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LCM_KIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set LCM_KIT_CACHE to a folder"):
        folder_of(files["sd1"])
