"""Bases that would train wrongly without a word: each is refused, by the part and the key at fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_kit import bases, sample
from lcm_kit.bases import inspect_base
from lcm_kit.bases.tokens import load_tokenizer
from lcm_kit.bases.weights import Place, load_model
from lcm_kit.cli.check import check
from lcm_kit.config.load import load
from lcm_kit.errors import UserError
from lcm_kit.lora.verify import base_of

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(sd_base: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd_base(), tmp_path / "base"))


@pytest.fixture
def xl(sdxl_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdxl_base, tmp_path / "xl"))


def edit(file: Path, *without: str, **change: Any) -> None:
    content = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in without}))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


def without(*keys: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key not in keys}


# -- Tokenizers ----------------------------------------------------------------------------------------------


def _no_vocabulary(folder: Path) -> None:
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / file).unlink(missing_ok=True)


def _sentencepiece(folder: Path) -> None:
    content = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]]}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _roberta(folder: Path) -> None:
    content = {"model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "\u0120a": 2}}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _other_model(folder: Path) -> None:
    content = {"model": {"type": "BPE", "vocab": {"a</w>": 0, "b</w>": 49_407}}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _t5(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class="T5Tokenizer")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_no_vocabulary, "tokenizer lacks vocab.json and merges.txt, so it would read every caption alike"),
        (_sentencepiece, "tokenizer has no vocabulary of CLIP's kind"),
        (_roberta, "tokenizer has no vocabulary of CLIP's kind"),
        (_other_model, "has tokens up to 49407, its text encoder embeds 58: they are of two models"),
        (_t5, "tokenizer is a T5Tokenizer, not CLIP's tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_clips_or_empty(spoil, sentence: str, base: Path):
    spoil(base / "tokenizer")
    with pytest.raises(UserError, match=sentence):
        inspect_base(str(base))


def test_vocabulary_and_merges_are_enough(base: Path):
    from transformers import CLIPTokenizer

    model = json.loads((base / "tokenizer" / "tokenizer.json").read_text())["model"]
    before = CLIPTokenizer.from_pretrained(base / "tokenizer")(["a b", "cab."]).input_ids
    (base / "tokenizer" / "tokenizer.json").unlink()
    (base / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (base / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = bases.load_tokenizer(inspect_base(str(base)), "tokenizer")
    assert tokenizer(["a b", "cab."]).input_ids == before


# -- Weights -------------------------------------------------------------------------------------------------

FC1 = "encoder.layers.1.mlp.fc1.weight"
DAMAGE = {
    "text encoder": (TEXT, without(FC1), f"text_encoder lacks {FC1}"),
    "unet": (UNET, without("conv_in.bias", "conv_in.weight"), "unet lacks conv_in.weight and 1 more"),
    "vae": (VAE, without("decoder.conv_out.bias"), "vae lacks decoder.conv_out.bias"),
    "other names": (TEXT, lambda t: {f"roberta.{key}": x for key, x in t.items()}, "lacks embeddings"),
    "more": (UNET, lambda t: t | {"mid_block.x": torch.zeros(1)}, "unet holds mid_block.x, for which"),
    "shape": (VAE, lambda t: t | {"encoder.conv_in.bias": torch.zeros(9)}, r"in shape \[9\], not \[8\]"),
    "bits": (UNET, lambda t: t | {"conv_in.bias": torch.zeros(16).char()}, "as I8: it is quantised"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_a_file_lacks_or_has_too_much_is_named(name: str, base: Path, tmp_path: Path):
    file, change, sentence = DAMAGE[name]
    rewrite(base / file, change)
    part = file.partition("/")[0]
    (tmp_path / "x.yaml").write_text(f"recipe: evaluation/quality\nrun: nowhere\nbase: {base}\n")
    config = load(tmp_path / "x.yaml")
    for door in (
        lambda: check(config),
        lambda: bases.load_part(inspect_base(str(base)), part, torch.float32),
        lambda: sample.pipeline(str(base)),
        lambda: load_model(Place(str(base), base), part, torch.float32),  # that of verify
    ):
        with pytest.raises(UserError, match=sentence):
            door()


def test_another_text_encoder_is_not_clips(base: Path):
    edit(base / "text_encoder" / "config.json", model_type="xlm-roberta")
    with pytest.raises(
        UserError, match=r"text_encoder/config.json: model_type 'xlm-roberta' is not supported"
    ):
        inspect_base(str(base))


def test_old_names_load_bit_for_bit(base: Path):
    """As transformers 4 and diffusers before 0.18 wrote them."""
    from diffusers import AutoencoderKL

    edit(base / "vae" / "config.json", mid_block_add_attention=True)
    AutoencoderKL.from_config(json.loads((base / "vae" / "config.json").read_text())).save_pretrained(
        base / "vae"
    )
    before = bases.load(str(base))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(key: str) -> str:
        for new, name in old.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        return key

    rewrite(base / VAE, lambda tensors: {older(key): x for key, x in tensors.items()})
    assert any(".query." in key for key in load_file(base / VAE))
    positions = {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    rewrite(base / TEXT, lambda tensors: {f"text_model.{key}": x for key, x in tensors.items()} | positions)
    after = bases.load(str(base))
    bases.require_fit(after.info)
    pairs = ((before.vae, after.vae), (before.text.text_encoder, after.text.text_encoder))
    for one, other in pairs:
        expected = one.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in other.state_dict().items())


def test_the_rest_of_a_clip_model_does_no_harm(base: Path):
    rest = {
        "logit_scale": torch.ones(()),
        "vision_model.x": torch.ones(2),
        "text_projection.weight": torch.ones(2),
    }
    rewrite(base / TEXT, lambda tensors: tensors | rest)
    bases.require_fit(inspect_base(str(base)))
    assert bases.load(str(base), parts=("text",)).text is not None


def test_a_second_text_encoder_needs_its_projection(xl: Path):
    rewrite(xl / "text_encoder_2" / "model.safetensors", without("text_projection.weight"))
    with pytest.raises(UserError, match="text_encoder_2 lacks text_projection.weight"):
        bases.require_fit(inspect_base(str(xl)))


# -- Files ---------------------------------------------------------------------------------------------------


def test_pointers_and_cut_files_are_seen_without_a_tensor(base: Path):
    whole = (base / UNET).read_bytes()
    for content, sentence in (
        (whole[: len(whole) // 2], rf"{UNET} cannot be read as a safetensors file .*; download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            f"{UNET} is a Git LFS pointer",
        ),
        (b"", f"{UNET} cannot be read"),
    ):
        (base / UNET).write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            inspect_base(str(base))
    (base / UNET).write_bytes(whole)
    (base / "vae" / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="vae/config.json is a Git LFS pointer"):
        inspect_base(str(base))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_piece_that_is_not_there(variant: str | None, base: Path):
    unet = bases.load_unet(inspect_base(str(base)))
    (base / UNET).unlink()
    unet.save_pretrained(base / "unet", max_shard_size="80KB", variant=variant)
    info = inspect_base(str(base), variant=variant)
    pieces = bases.weight_files(info, "unet")
    assert len(pieces) > 1
    again = bases.load_unet(info).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in unet.state_dict().items())
    pieces[0].unlink()
    with pytest.raises(UserError, match=rf"unet/\S*index\S* names {pieces[0].name}, which is not there"):
        inspect_base(str(base), variant=variant)


def test_a_variant_that_only_some_parts_have(base: Path):
    """As diffusers: the others are taken from their plain files."""
    rewrite(base / UNET, lambda tensors: {key: tensor.half() for key, tensor in tensors.items()})
    (base / UNET).rename(base / UNET.replace(".safetensors", ".fp16.safetensors"))
    info = inspect_base(str(base), variant="fp16")
    names = {part: bases.weight_files(info, part)[0].name for part in ("unet", "vae", "text_encoder")}
    assert names == {
        "unet": "diffusion_pytorch_model.fp16.safetensors",
        "vae": "diffusion_pytorch_model.safetensors",
        "text_encoder": "model.safetensors",
    }
    assert bases.load(str(base), variant="fp16").vae is not None
    assert sample.pipeline(str(base), variant="fp16").unet.dtype == torch.float32
    plain = inspect_base(str(base), variant="fp16").hash_of("vae")
    with pytest.raises(UserError, match=r"no safetensors weights in unet/"):
        inspect_base(str(base))
    with pytest.raises(UserError, match=r"no safetensors weights of variant 'fp8' in vae/"):
        inspect_base(str(base), variant="fp8")
    save_file(load_file(base / VAE), base / VAE.replace(".safetensors", ".fp16.safetensors"), {"a": "b"})
    assert (
        inspect_base(str(base), variant="fp16").hash_of("vae") != plain
    )  # now that file is the one that is read


def test_of_the_hub_only_the_files_that_are_needed(base: Path, monkeypatch: pytest.MonkeyPatch):
    """Plain weights are asked for where the variant's are not, and nowhere else."""
    rewrite(base / UNET, lambda tensors: {key: tensor.half() for key, tensor in tensors.items()})
    (base / UNET).rename(base / UNET.replace(".safetensors", ".fp16.safetensors"))
    asked: list[list[str]] = []

    def snapshot_download(path: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append([pattern for pattern in allow_patterns if pattern.endswith("model.safetensors")])
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    inspect_base("some/base", variant="fp16")
    assert asked == [[], ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]]
    asked.clear()
    (base / UNET.replace(".safetensors", ".fp16.safetensors")).rename(base / UNET)
    inspect_base("some/base")
    assert len(asked) == 1 and UNET in asked[0]


def test_a_dry_run_sees_it_too(base: Path, tmp_path: Path):
    from typer.testing import CliRunner

    from lcm_kit.cli.main import app

    rewrite(base / TEXT, without(FC1))
    words = ["finetune", "asset:brand", "--base", str(base), "--dry-run", "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and f"text_encoder lacks {FC1}; download" in done.stderr
    assert not (tmp_path / "run").exists()


# -- Configurations ------------------------------------------------------------------------------------------

NOISE = ("beta_start", "beta_end", "beta_schedule")


@pytest.mark.parametrize(
    ("gone", "change", "sentence"),
    [
        (NOISE, {}, "it lacks beta_start, beta_end, beta_schedule, so that nothing says which noise"),
        (("beta_end",), {}, "it lacks beta_end, so"),
        (
            (),
            {"use_flow_sigmas": True},
            "use_flow_sigmas True is a noise that this kit does not compute with",
        ),
        ((), {"timestep_type": "continuous"}, "timestep_type 'continuous' is a noise"),
        ((), {"beta_start": "small"}, "beta_start 'small' is not supported"),
        ((), {"num_train_timesteps": 10**12}, "num_train_timesteps 1000000000000 is not supported"),
    ],
)
def test_a_scheduler_that_says_no_noise_or_another(gone, change, sentence: str, base: Path):
    edit(base / "scheduler" / "scheduler_config.json", *gone, **change)
    with pytest.raises(UserError, match=f"scheduler/scheduler_config.json: {sentence}"):
        inspect_base(str(base))


@pytest.mark.parametrize(
    "name",
    [
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "IPNDMScheduler",
    ],
)
def test_a_scheduler_of_another_noise(name: str, base: Path):
    edit(base / "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(
        UserError, match=f"_class_name '{name}': its noise is not one that this kit computes with"
    ):
        inspect_base(str(base))


def test_every_scheduler_that_is_taken_has_our_noise(base: Path):
    """alphas_cumprod of diffusers' own class is alpha^2 of `Schedule`."""
    import diffusers

    from lcm_kit.bases.configs import SCHEDULERS
    from lcm_kit.core.schedule import Schedule

    config = dict(inspect_base(str(base)).scheduler_config)
    alpha = Schedule.from_config(config).alpha
    for name in set(SCHEDULERS) - {"DPMSolverSDEScheduler"}:  # needs torchsde
        own = getattr(diffusers, name).from_config(config)
        torch.testing.assert_close(own.alphas_cumprod.float(), alpha**2, rtol=1e-5, atol=1e-7)


def test_trained_betas_and_the_cosine_need_no_bounds(base: Path):
    file = base / "scheduler" / "scheduler_config.json"
    edit(file, *NOISE, trained_betas=[0.1, 0.2])
    assert inspect_base(str(base)).scheduler_config["trained_betas"] == [0.1, 0.2]
    edit(file, *NOISE, trained_betas=None, beta_schedule="squaredcos_cap_v2")
    edit(file, beta_schedule="squaredcos_cap_v2")
    inspect_base(str(base))


@pytest.mark.parametrize(
    ("part", "field", "value", "sentence"),
    [
        ("unet", "time_cond_proj_dim", 256, "takes the guidance as an input: it is already distilled"),
        ("unet", "class_embed_type", "projection", "is not supported"),
        ("unet", "encoder_hid_dim_type", "text_proj", "is not supported"),
        ("unet", "block_out_channels", [16, 10**9], "is not supported"),
        ("unet", "block_out_channels", "wide", "is not supported"),
        ("unet", "cross_attention_dim", {"a": 1}, "is not supported"),
        ("unet", "sample_size", None, "is not supported"),
        ("unet", "_class_name", "UNet3DConditionModel", "is not supported"),
        ("unet", "act_fn", None, "is not supported"),
        ("unet", "center_input_sample", 10**7, "is not supported"),
        ("unet", "conv_in_kernel", [[3]], "is not supported"),
        ("unet", "downsample_padding", 10**30, "is not supported"),
        ("unet", "dual_cross_attention", "x", "is not supported"),
        ("unet", "freq_shift", None, "is not supported"),
        ("unet", "mid_block_scale_factor", float("nan"), "is not supported"),
        ("unet", "norm_eps", -1, "is not supported"),
        ("unet", "resnet_out_scale_factor", 0, "is not supported"),
        ("unet", "time_embedding_type", "fourier", "is not supported"),
        ("vae", "act_fn", "x", "is not supported"),
        ("vae", "mid_block_add_attention", 1, "is not supported"),
        ("text_encoder", "hidden_act", "x", "is not supported"),
        ("text_encoder", "layer_norm_eps", None, "is not supported"),
        ("text_encoder", "eos_token_id", -1, "is not supported"),
        ("vae", "_class_name", "AutoencoderTiny", "is not supported"),
        ("vae", "scaling_factor", "0.18", "is not supported"),
        ("vae", "scaling_factor", 0.0, "is not supported"),
        ("vae", "latent_channels", -4, "is not supported"),
        ("vae", "block_out_channels", [], "is not supported"),
        ("text_encoder", "num_hidden_layers", 10**7, "is not supported"),
        ("text_encoder", "vocab_size", True, "is not supported"),
        ("text_encoder", "hidden_size", [32], "is not supported"),
    ],
)
def test_a_field_without_sense_is_named(part: str, field: str, value: Any, sentence: str, base: Path):
    edit(base / part / "config.json", **{field: value})
    with pytest.raises(UserError, match=rf"{part}/config.json: {field} .*{sentence}") as caught:
        inspect_base(str(base))
    assert "\n" not in str(caught.value)


def test_verify_reads_the_same_sizes_but_takes_a_distilled_base(base: Path):
    from lcm_kit.lora import structure

    edit(base / "unet" / "config.json", time_cond_proj_dim=256)
    assert structure.of_base(str(base)).unet
    edit(base / "text_encoder" / "config.json", num_hidden_layers=10**7)
    with pytest.raises(
        UserError, match=r"text_encoder/config.json: num_hidden_layers 10000000 is not supported"
    ):
        structure.of_base(str(base))


def test_verify_does_not_pass_over_a_part_without_its_configuration(base: Path):
    (base / "text_encoder" / "config.json").unlink()
    with pytest.raises(UserError, match="text_encoder/config.json is missing"):
        base_of(str(base))


def test_a_noise_that_falls(base: Path):
    edit(base / "scheduler" / "scheduler_config.json", beta_start=0.5)
    with pytest.raises(UserError, match="scheduler.*beta_start 0.5 is above beta_end 0.012"):
        inspect_base(str(base))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("model_max_length", 0, "tokenizer/tokenizer_config.json: model_max_length 0 is not supported"),
        ("model_max_length", "77", "model_max_length '77' is not supported"),
        ("pad_token", "<pad>", "tokenizer_config.json: pad_token '<pad>' is not in the vocabulary"),
        ("pad_token", {"content": 7}, "pad_token '7' is not in the vocabulary"),
        ("bos_token", True, "bos_token True is not supported"),
    ],
)
def test_a_tokenizers_settings(field: str, value: Any, sentence: str, base: Path):
    edit(base / "tokenizer" / "tokenizer_config.json", **{field: value})
    with pytest.raises(UserError, match=sentence):
        inspect_base(str(base))


def test_a_tokenizer_of_no_length_reads_as_much_as_its_encoder(base: Path):
    """transformers then says 10**30, which a pipeline pads to."""
    edit(base / "tokenizer" / "tokenizer_config.json", "model_max_length")
    assert load_tokenizer(inspect_base(str(base)), "tokenizer").model_max_length == 24


def test_fields_that_fit_no_model_together(base: Path):
    edit(base / "unet" / "config.json", block_out_channels=[16, 32, 64])
    with pytest.raises(UserError, match=r"no model can be built from unet/config.json \(") as caught:
        bases.require_fit(inspect_base(str(base)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\ud800"])
def test_a_file_that_is_no_object(content: str, base: Path):
    (base / "vae" / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"vae/config\.json cannot be read as JSON"):
        inspect_base(str(base))


def test_a_unet_of_another_family(base: Path, sdxl_base: Path):
    shutil.rmtree(base / "unet")
    shutil.copytree(sdxl_base / "unet", base / "unet")
    with pytest.raises(UserError, match="those of Stable Diffusion 1.x and 2.x, its UNet is one of SDXL"):
        inspect_base(str(base))


# -- Latents of a VAE with means and deviations --------------------------------------------------------------

MEAN, STD = [0.5, -1.0, 0.25, 2.0], [1.5, 0.5, 2.0, 1.25]


def test_means_and_deviations_of_latents_are_applied_as_diffusers_does(xl: Path):
    edit(xl / "vae" / "config.json", latents_mean=MEAN, latents_std=STD)
    info = inspect_base(str(xl))
    assert info.latents_mean == tuple(MEAN) and info.latents_std == tuple(STD)
    pipe = sample.pipeline(str(xl))
    vae = pipe.vae
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mean
        latents = bases.encode_images(vae, pixels)
        torch.testing.assert_close(latents, (raw - mean) / std * 0.5)
        torch.testing.assert_close(
            sample.decode(pipe, latents), vae.decode(raw).sample.clamp(-1, 1), atol=1e-5, rtol=0
        )
        # and what StableDiffusionXLPipeline itself makes of these latents
        same = {"prompt": "a", "num_inference_steps": 1, "height": 64, "width": 64, "guidance_scale": 1.0}
        drawn = pipe(**same, output_type="latent", generator=torch.Generator().manual_seed(1)).images
        shown = pipe(**same, output_type="pt", generator=torch.Generator().manual_seed(1)).images
    torch.testing.assert_close(
        sample.decode(pipe, drawn) / 2 + 0.5, torch.as_tensor(shown), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latents_mean": MEAN}, "latents_mean and latents_std belong together"),
        ({"latents_mean": MEAN[:3], "latents_std": STD}, "a number for each of 4 channels"),
        ({"latents_mean": MEAN, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std .* is not supported"),
    ],
)
def test_half_of_means_and_deviations(change: dict[str, Any], sentence: str, xl: Path):
    edit(xl / "vae" / "config.json", **change)
    with pytest.raises(UserError, match=sentence):
        inspect_base(str(xl))


def test_no_app_applies_them_to_other_bases(base: Path):
    edit(base / "vae" / "config.json", latents_mean=MEAN, latents_std=STD)
    with pytest.raises(UserError, match="latents_mean, which no app applies to a base of Stable"):
        inspect_base(str(base))
