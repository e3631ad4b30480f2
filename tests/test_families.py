from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcm_kit import bases
from lcm_kit.bases import inspect_base, sd, source
from lcm_kit.errors import UserError
from lcm_kit.io.files import sha256_file

SD15_UNET = {  # unet/config.json of Stable Diffusion 1.5
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_inspect_reads_the_base_without_its_weights(sd_base: Callable[..., Path], kind: str):
    info = inspect_base(str(sd_base(kind)))
    assert (info.family.name, info.prediction_type, info.factor, info.sample_size) == ("sd", kind, 4, 16)
    assert (info.latent_channels, info.width, info.scaling_factor, info.shift_factor) == (4, 32, 0.5, 0.0)
    assert info.scheduler_config["beta_start"] == 0.00085


def _copy(base: Path, to: Path) -> Path:
    shutil.copytree(base, to)
    return to


def test_hashes_follow_the_content(sd_base: Callable[..., Path], tmp_path: Path):
    base = inspect_base(str(sd_base()))
    other = inspect_base(str(_copy(sd_base(), tmp_path / "copy")))
    assert other.base_hash == base.base_hash
    config = json.loads((other.folder / "vae" / "config.json").read_text())
    (other.folder / "vae" / "config.json").write_text(
        json.dumps({**config, "_diffusers_version": "9"}, indent=7)
    )
    assert other.base_hash == base.base_hash  # the same model, saved by another version
    (other.folder / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.6}))
    changed = [part for part in base.parts if other.hash_of(part) != base.hash_of(part)]
    assert changed == ["vae"] and other.base_hash != base.base_hash
    weights = other.folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert other.hash_of("unet") != base.hash_of("unet")
    assert inspect_base(str(sd_base("v_prediction"))).hash_of("scheduler") != base.hash_of("scheduler")


def test_parts_are_frozen_float32_and_encode_as_the_pipeline_does(sd_base: Callable[..., Path]):
    from diffusers import StableDiffusionPipeline

    parts = bases.load(str(sd_base()))
    for model in (parts.unet, parts.vae, parts.text.text_encoder):
        assert not model.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert bases.load(str(sd_base()), parts=("unet",), dtype=torch.float16).unet.dtype == torch.float16
    pipe = StableDiffusionPipeline.from_pretrained(sd_base(), safety_checker=None)
    captions = ["a red square", "", "abc " * 40]
    cond, uncond = pipe.encode_prompt(captions, "cpu", 1, True)
    condition, empty = sd.encode_text(parts.text, captions), sd.empty_condition(parts.text, 3)
    assert condition.embeds.shape == (3, 24, 32)
    torch.testing.assert_close(condition.embeds, cond)
    torch.testing.assert_close(empty.embeds, uncond)
    assert parts.unet(torch.zeros(3, 4, 16, 16), 10, **condition.kwargs()).sample.shape == (3, 4, 16, 16)


def test_latents_follow_scaling_and_shift(sd_base: Callable[..., Path]):
    vae = bases.load(str(sd_base()), parts=("vae",)).vae
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(bases.encode_images(vae, pixels), raw * 0.5)
    vae.register_to_config(shift_factor=0.25)
    latents = bases.encode_images(vae, pixels)
    torch.testing.assert_close(latents, (raw - 0.25) * 0.5)
    torch.testing.assert_close(
        bases.decode_latents(vae, latents), vae.decode(raw).sample, atol=1e-5, rtol=1e-5
    )


def test_large_pictures_are_decoded_one_by_one(
    sd_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 pixels here, with room for two and a half of them; the last part is one alone."""
    vae = bases.load(str(sd_base()), parts=("vae",)).vae
    side = 8 * 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.randn(5, vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, own, sizes = bases.decode_latents(vae, latents), vae.decode, []
    monkeypatch.setattr("lcm_kit.bases.base.DECODED_PIXELS", 5 * side**2 // 2)
    monkeypatch.setattr(vae, "decode", lambda part: sizes.append(len(part)) or own(part))
    torch.testing.assert_close(bases.decode_latents(vae, latents), whole, atol=1e-5, rtol=1e-5)
    assert sizes == [2, 2, 1]
    monkeypatch.undo()
    assert [bases.decoded_at_once(side, side) for side in (64, 512, 768, 1024, 1536)] == [256, 4, 1, 1, 1]


def test_lcm_targets_are_those_of_lcm_lora_on_sd15():
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SD15_UNET)
        unet.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=bases.lora_targets("lcm")))
    lora = {name: p.numel() for name, p in unet.named_parameters() if "lora_" in name}
    assert len(lora) == 2 * 278
    assert sum(lora.values()) == 67_252_224
    assert len(bases.lora_targets("attention")) == 4


def test_a_base_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="there is no such folder"):
        inspect_base(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="neither a folder nor a hub id that can be reached") as caught:
        inspect_base("nobody/no-such-base")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is not shipped with lcm-kit"):
        inspect_base("asset:tiny-sdd")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as a safetensors file .*; download it again"):
        inspect_base(str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="base.revision 'main' means nothing for the file"):
        inspect_base(str(tmp_path / "model.safetensors"), revision="main")
    with pytest.raises(UserError, match="base.variant 'fp16' means nothing for the file"):
        inspect_base(str(tmp_path / "model.safetensors"), variant="fp16")


def test_a_hub_id_is_read_from_the_hubs_cache_without_a_connection(sd_base, tmp_path: Path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--some--base"
    commit, blobs = "0" * 40, repository / "blobs"
    blobs.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder = _copy(sd_base(), repository / "snapshots" / commit)
    for file in folder.rglob("*.safetensors"):  # the hub keeps large files once, under their SHA-256
        blob = blobs / sha256_file(file)
        file.rename(blob)
        file.symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    info = inspect_base("some/base")
    assert info.folder == folder and info.base_hash == inspect_base(str(sd_base())).base_hash
    monkeypatch.setattr(source, "sha256_file", lambda path: pytest.fail(f"{path} was read"))
    assert len(info.hash_of("unet")) == 64


def test_a_folder_that_is_not_a_usable_pipeline(sd_base: Callable[..., Path], tmp_path: Path):
    with pytest.raises(UserError, match="is not a diffusers pipeline folder: model_index.json is missing"):
        inspect_base(str(tmp_path))
    with pytest.raises(UserError, match="base.revision 'main' means nothing for the folder"):
        inspect_base(str(sd_base()), revision="main")
    with pytest.raises(UserError, match=r"no safetensors weights of variant 'fp16' in vae/"):
        inspect_base(str(sd_base()), variant="fp16")
    shutil.rmtree(_copy(sd_base(), tmp_path / "a") / "vae")
    with pytest.raises(UserError, match="has no vae"):
        inspect_base(str(tmp_path / "a"))
    (_copy(sd_base(), tmp_path / "b") / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="unet/config.json is missing"):
        inspect_base(str(tmp_path / "b"))
    (_copy(sd_base(), tmp_path / "c") / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        inspect_base(str(tmp_path / "c"))


def _edit(file: Path, **change: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def test_bases_that_this_family_does_not_cover(sd_base: Callable[..., Path], tmp_path: Path):
    _edit(
        _copy(sd_base(), tmp_path / "xl") / "model_index.json",
        text_encoder_2=["transformers", "CLIPTextModel"],
    )
    with pytest.raises(
        UserError, match="has no text_encoder_2, tokenizer_2; give an SD1.x, SD2.x or SDXL base"
    ):
        inspect_base(str(tmp_path / "xl"))
    _edit(_copy(sd_base(), tmp_path / "in") / "unet" / "config.json", in_channels=9)
    with pytest.raises(UserError, match="its UNet takes 9 channels, its VAE gives 4; inpainting"):
        inspect_base(str(tmp_path / "in"))
    _edit(_copy(sd_base(), tmp_path / "flow") / "scheduler" / "scheduler_config.json", prediction_type="flow")
    with pytest.raises(
        UserError, match="prediction_type 'flow' is not supported, only epsilon, v_prediction, sample"
    ):
        inspect_base(str(tmp_path / "flow"))


def test_a_variant_is_found_and_broken_weights_are_a_sentence(sd_base: Callable[..., Path], tmp_path: Path):
    base = _copy(sd_base(), tmp_path / "fp16")
    for file in list(base.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    info = inspect_base(str(base), variant="fp16")
    assert [p.name for p in bases.weight_files(info, "unet")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert info.hash_of("unet") == inspect_base(str(sd_base())).hash_of("unet")
    assert bases.load_unet(info).dtype == torch.float32
    bases.weight_files(info, "vae")[0].write_bytes(b"junk")
    with pytest.raises(UserError, match=r"vae/.*fp16\.safetensors cannot be read as a safetensors file"):
        bases.load_vae(info)
