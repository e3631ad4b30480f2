"""Other decoders in the VAE's place: what they decode, that they fit, and that it is said everywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, ConsistencyDecoderVAE
from PIL import Image, ImageChops
from torch import Tensor

import lcm_kit
from lcm_kit import sample
from lcm_kit.bases.base import inspect_base
from lcm_kit.drawing import decoders, editing
from lcm_kit.drawing import how as how_module
from lcm_kit.drawing.batches import Batches
from lcm_kit.drawing.canvas import Canvas
from lcm_kit.drawing.how import How
from lcm_kit.drawing.noise import for_decoding, generators
from lcm_kit.drawing.vae import ProvenVae
from lcm_kit.errors import UserError
from lcm_kit.evaluation import draw as drawing
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.share import ALONE
from tests.decoders import build_consistency, build_tiny


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def of(base: Path | str, decoder: Path | str) -> How:
    return How.of(inspect_base(str(base)), str(decoder), False, False)


def latents_of(count: int, channels: int = 4) -> Tensor:
    return torch.randn(count, channels, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def consistency(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_consistency(tmp_path_factory.mktemp("decoders") / "drawing-one")


# -- Previews ------------------------------------------------------------------------------------------------


def test_a_tiny_decoder_decodes_as_diffusers_does(tmp_path: Path) -> None:
    """As a diffusers pipeline decodes with it in the VAE's place: latents as the UNet sees them."""
    base = inspect_base("asset:tiny-sd")
    folder = build_tiny(tmp_path / "tiny", base.latent_channels)
    how = How.of(base, str(folder), False, False)
    pipe = sample.pipeline("asset:tiny-sd", how=how)
    settings = {"sampler": "ddim", "steps": 2, "guidance_scale": 1.0, "seed": 4}
    latents = sample.latents(pipe, ["a cat", "a dog"], **settings)
    theirs = AutoencoderTiny.from_pretrained(folder)
    with torch.no_grad():
        wanted = theirs.decode(latents / theirs.config.scaling_factor).sample.clamp(-1, 1)
    assert wanted.shape == (2, 3, 64, 64)
    torch.testing.assert_close(sample.decode(pipe, latents), wanted, rtol=0, atol=1e-6)
    full = sample.decode(sample.pipeline("asset:tiny-sd"), latents)
    assert relative(full, wanted) > 0.1
    # the whole of diffusers' own call
    pipe.scheduler, pipe.vae = sample.scheduler("ddim", pipe.scheduler.config), theirs
    noise = torch.randn((base.latent_channels, 16, 16), generator=sample.generators(4, 0, 1)[0])[None]
    shown = pipe("a cat", num_inference_steps=2, guidance_scale=1.0, latents=noise, output_type="np").images
    torch.testing.assert_close(
        torch.as_tensor(shown[0]).permute(2, 0, 1), wanted[0] / 2 + 0.5, rtol=0, atol=1e-5
    )


def test_what_a_tiny_decoder_decoded_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build_tiny(tmp_path / "my-tiny", 24)
    sheet = sample.sample_to_folder(
        "asset:tiny-sd", ["a cat"], tmp_path / "out", steps=1, decoder=str(folder)
    )
    for file in (sheet, tmp_path / "out" / "000-a-cat.png"):
        with Image.open(file) as picture:
            assert picture.text["decoder"] == "AutoencoderTiny my-tiny"
    assert "decoded by AutoencoderTiny my-tiny (" in capsys.readouterr().err
    sample.sample_to_folder("asset:tiny-sd", ["a cat"], tmp_path / "full", steps=1)
    with Image.open(tmp_path / "full" / "000-a-cat.png") as picture:
        assert "decoder" not in picture.text and "my-tiny" not in str(picture.text)


@pytest.mark.parametrize(
    ("channels", "blocks", "more", "words"),
    [
        (4, 3, {}, "decodes latents of 4 channels, and those of 'asset:tiny-sd' have 24"),
        (24, 4, {}, "makes 8 pixels of a latent's side, and the VAE of 'asset:tiny-sd' 4"),
        (24, 3, {"scaling_factor": 0.5}, "latents at another scale .scaling_factor 0.5, shift_factor 0.0"),
    ],
)
def test_a_decoder_of_other_latents_is_refused(
    tmp_path: Path, channels: int, blocks: int, more: dict[str, Any], words: str
) -> None:
    folder = build_tiny(tmp_path / "tiny", channels, blocks, **more)
    with pytest.raises(UserError, match=words):
        list(sample.draw_images("asset:tiny-sd", ["a"], decoder=str(folder)))


def test_what_is_no_decoder_is_refused(tmp_path: Path, sd_base: Callable[..., Path]) -> None:
    base = inspect_base("asset:tiny-sd")
    with pytest.raises(UserError, match="not a folder with a config.json"):
        How.of(base, str(tmp_path), False, False)
    with pytest.raises(UserError, match="is a AutoencoderKL, neither an AutoencoderTiny nor a Cons"):
        How.of(base, str(sd_base() / "vae"), False, False)
    folder = build_tiny(tmp_path / "tiny", 24)
    with pytest.raises(UserError, match="leave out decoder or tiling"):
        How.of(base, str(folder), True, False)
    before = How.of(base, str(folder), False, False).facts()
    file = folder / "diffusion_pytorch_model.safetensors"
    other = build_tiny(tmp_path / "other", 24, latent_magnitude=4)
    assert How.of(base, str(other), False, False).facts() != before
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        decoders.find(str(folder), base)
    from safetensors.torch import load_file, save_file

    file.write_bytes(content)
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "decoder.layers.0.weight"}, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"not those that its config.json describes \(decoder.layers.0.weight"
    ):
        decoders.load(decoders.find(str(folder), base), torch.float32)


# -- Those that draw -----------------------------------------------------------------------------------------


def test_it_draws_what_diffusers_draws_with_the_noise_of_seed_and_number(
    sd_base: Callable[..., Path], consistency: Path
) -> None:
    """Each picture alone, by diffusers' own `decode`, from a generator of the seed and the number."""
    pipe, latents = sample.pipeline(str(sd_base()), how=of(sd_base(), consistency)), latents_of(3)
    theirs = ConsistencyDecoderVAE.from_pretrained(consistency)
    found = sample.decode(pipe, latents, seed=4, first=2)
    assert found.shape == (3, 3, 64, 64) and float(found.std()) > 0.1
    for k in range(3):
        digest = hashlib.sha256(f"decoder/4/{2 + k}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        with torch.no_grad():
            wanted = theirs.decode(latents[k : k + 1] / theirs.config.scaling_factor, generator).sample
        torch.testing.assert_close(found[k : k + 1], wanted.clamp(-1, 1), rtol=0, atol=1e-5)


def test_its_noise_is_another_for_each_picture_and_no_batch_changes_it(
    sd_base: Callable[..., Path], consistency: Path
) -> None:
    pipe = sample.pipeline(str(sd_base()), how=of(sd_base(), consistency))
    latents = latents_of(1).expand(5, -1, -1, -1)
    together = sample.decode(pipe, latents, seed=[7, 7, 7, 8, 7], first=[0, 1, 2, 0, 1])
    assert torch.equal(together[1], together[4])
    assert min(relative(together[0], together[k]) for k in (1, 2, 3)) > 0.05
    alone = sample.decode(pipe, latents[:1], seed=7, first=1)
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-5)
    # the noise that latents were drawn from is not drawn from again
    again = torch.randn(8, generator=decoding(7, 0))
    assert not torch.equal(again, torch.randn(8, generator=generators(7, 0, 1)[0]))


def decoding(seed: int, number: int) -> torch.Generator:
    return for_decoding([(seed, number)])[0]


def test_large_pictures_are_drawn_one_by_one(
    sd_base: Callable[..., Path], consistency: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its UNet holds six times what a VAE does, so an eighth of the pixels go together."""
    pipe, latents = sample.pipeline(str(sd_base()), how=of(sd_base(), consistency)), latents_of(5)
    whole = sample.decode(pipe, latents, seed=3)
    unet, sizes = pipe.vae.decoder.full.decoder_unet, []
    unet.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr("lcm_kit.bases.base.DECODED_PIXELS", 8 * 2 * 64 * 64)
    parts = sample.decode(pipe, latents, seed=3)
    assert sizes == [2, 2, 2, 2, 1, 1]  # two steps each
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_pictures_are_the_same_in_batches_of_any_size(
    sd_base: Callable[..., Path], consistency: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"steps": 1, "seed": 6, "decoder": str(consistency)}
    drawn = [
        [*sample.draw_images(str(sd_base()), ["a", "b", "c"], batch_size=size, **asked)] for size in (1, 2, 3)
    ]
    for pictures in drawn[1:]:
        for one, other in zip(drawn[0], pictures, strict=True):
            assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1
    other = next(iter(sample.draw_images(str(sd_base()), ["a"], **{**asked, "seed": 7})))
    assert max(high for _, high in ImageChops.difference(drawn[0][0], other).getextrema()) > 30
    said = capsys.readouterr().err
    assert "decoded by ConsistencyDecoderVAE drawing-one (" in said and "fine detail is drawn anew" in said


def test_latents_of_other_channels_come_with_their_statistics(tmp_path: Path) -> None:
    """The class has four means and deviations in its code; those of others are in config.json."""
    folder = build_consistency(tmp_path / "wide", 24, scaling_factor=1.01792)
    with pytest.raises(UserError, match="for 24 its config.json must say latents_mean and latents_std"):
        of("asset:tiny-sd", folder)
    mean, deviation = [0.1 * k for k in range(24)], [1 + 0.1 * k for k in range(24)]
    file = folder / "config.json"
    plain = json.loads(file.read_text())
    for odd in (
        {"latents_std": deviation[:4]},
        {"latents_std": [0.0, *deviation[1:]]},
        {"latents_mean": "x"},
    ):
        file.write_text(json.dumps({**plain, "latents_mean": mean, "latents_std": deviation, **odd}))
        with pytest.raises(UserError, match="must say latents_mean and latents_std"):
            of("asset:tiny-sd", folder)
    file.write_text(json.dumps({**plain, "latents_mean": mean, "latents_std": deviation}))
    pipe = sample.pipeline("asset:tiny-sd", how=of("asset:tiny-sd", folder))
    latents = latents_of(1, 24)
    found = sample.decode(pipe, latents, seed=1)
    # the same latents without statistics, by a model that has none to apply
    theirs = ConsistencyDecoderVAE.from_pretrained(folder)
    theirs.means, theirs.stds = torch.zeros(1, 24, 1, 1), torch.ones(1, 24, 1, 1)
    told = (latents - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(deviation).view(1, -1, 1, 1)
    with torch.no_grad():
        wanted = theirs.decode(told / theirs.config.scaling_factor, decoding(1, 0)).sample
    torch.testing.assert_close(found, wanted.clamp(-1, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"channels": 8}, "decodes latents of 8 channels, and those of '.*' have 4"),
        ({"blocks": 4}, "makes 8 pixels of a latent's side, and the VAE of '.*' 4"),
        ({"scaling_factor": 0.18215}, "latents of scaling_factor 0.18215, and those of '.*' have 0.5"),
        ({"decoder_in_channels": 8}, "its UNet takes 8 channels, where 4 of latents and 3 of pixels"),
        ({"decoder_num_train_timesteps": 1000}, "has learned 1000 times, and diffusers asks for time 1008"),
        (
            {
                "decoder_block_out_channels": (8,) * 4,
                "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 4,
                "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 4,
            },
            "its UNet halves pictures 3 times, and those of '.*' may be any multiple of 4 pixels",
        ),
    ],
)
def test_one_of_other_latents_is_refused(
    sd_base: Callable[..., Path], tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    folder = build_consistency(tmp_path / "odd", **more)
    with pytest.raises(UserError, match=words):
        list(sample.draw_images(str(sd_base()), ["a"], decoder=str(folder)))


def test_it_is_no_decoder_of_latents_with_a_shift(sd_base: Callable[..., Path], consistency: Path) -> None:
    """As SDXL's of some copies; by its scaling_factor one of SD1.5 is refused on SDXL as well."""
    base = inspect_base(str(sd_base()))
    for shifted in ({"shift_factor": 0.1}, {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}):
        with pytest.raises(UserError, match="knows no shift of latents"):
            decoders.find(str(consistency), replace(base, **shifted))
    with pytest.raises(UserError, match="leave out decoder or tiling"):
        How.of(base, str(consistency), True, False)


def test_in_half_precision_it_draws_from_the_same_noise(
    sd_base: Callable[..., Path], consistency: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(how_module, "half_dtypes", lambda device, overflows: (torch.bfloat16,))
    base, latents = str(sd_base()), latents_of(3)
    exact = sample.decode(sample.pipeline(base, how=of(base, consistency)), latents, seed=2)
    pipe = sample.pipeline(base, how=of(base, consistency), dtype=torch.bfloat16)
    found = sample.decode(pipe, latents, seed=2)
    assert pipe.vae.dtype == torch.bfloat16 and 0 < relative(found, exact) < 0.02


def test_what_is_not_finite_in_half_is_drawn_again_as_that_picture(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By its own seed and number, wherever it was in the batch."""

    def decode(model: Any, latents: Tensor, pictures: Any) -> Tensor:
        values = torch.tensor([float(100 * seed + number) for seed, number in pictures])
        if model.weight.dtype == torch.bfloat16:
            values[latents.flatten(1)[:, 0] > 0] = float("inf")
        return values.view(-1, 1, 1, 1) / 1000 * torch.ones(len(latents), 3, 4, 4)

    class Model(torch.nn.Linear):
        device = torch.device("cpu")

    model = Model(1, 1)
    proven = ProvenVae(model, [torch.bfloat16], settled=True, decode=decode, name="mine")
    latents = torch.tensor([-1.0, 1.0, -1.0, 1.0]).view(4, 1, 1, 1)
    found = proven.decoded(latents, [(1, 1), (2, 2), (3, 3), (4, 4)])
    assert found[:, 0, 0, 0].tolist() == pytest.approx([0.101, 0.202, 0.303, 0.404])
    assert "mine: some pictures are not finite in bfloat16" in capsys.readouterr().err


# -- Where they lie, and what is said of them ----------------------------------------------------------------


def test_a_decoder_may_be_on_the_hub(
    sd_base: Callable[..., Path], consistency: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def given(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(consistency)

    base = inspect_base(str(sd_base()))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", given)
    found = decoders.find("somebody/decoder", base)
    assert asked == [("somebody/decoder", ["config.json", "diffusion_pytorch_model.safetensors"])]
    assert found.folder == consistency and str(found).startswith("ConsistencyDecoderVAE somebody/decoder (")
    assert found.sha256 == decoders.find(str(consistency), base).sha256

    def refuses(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuses)
    with pytest.raises(UserError, match=r"neither a folder nor a hub id that can be reached \(no route"):
        decoders.find("somebody/decoder", base)
    with pytest.raises(UserError, match="not a folder with a config.json"):
        decoders.find(str(tmp_path / "nothing"), base)


def look() -> FeatureExtractor:
    return FeatureExtractor(None, None, None, {"mean": lambda pixels: pixels.mean((1, 2, 3))})


def test_cells_of_other_decoders_lie_apart(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    """Each is kept, whichever was drawn last, and what two of them decoded is the same latents."""
    base = inspect_base(str(sd_base()))
    cell, plain = Cell("plain", None, "ddim", 1, 1.0), drawing.Samples(("a cat",), 1, 0, 64, 1, 1)
    folders = build_tiny(tmp_path / "tiny", 4), build_consistency(tmp_path / "drawing")
    asked = [plain, *(replace(plain, how=of(sd_base(), folder)) for folder in folders)]
    made_by = [drawing.inputs(base, samples, look(), "cpu") for samples in asked]
    assert all(made_by[a] != made_by[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    drawn: list[Any] = []
    for which in (0, 1, 2, 0, 1, 2):
        pipes = drawing.Pipes(base, {}, asked[which])
        found = drawing.draw_all(
            [cell], tmp_path / "cells", pipes.get, asked[which], look(), lambda _, k=which: made_by[k], ALONE
        )
        drawn.append(found[cell])
        assert (pipes._pipe is None) == (len(drawn) > 3)
    assert len(list((tmp_path / "cells").rglob("*.safetensors"))) == 3
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert torch.equal(drawn[a]["latents"], drawn[b]["latents"])
        assert not torch.equal(drawn[a]["pictures"], drawn[b]["pictures"])
        assert torch.equal(drawn[a]["pictures"], drawn[a + 3]["pictures"])


def test_cells_are_drawn_by_the_numbers_of_their_samples(
    sd_base: Callable[..., Path], consistency: Path, tmp_path: Path
) -> None:
    """A sample's pixels are the same in batches of any size, with the decoder's noise as well."""
    cell, base = Cell("plain", None, "ddim", 1, 1.0), inspect_base(str(sd_base()))
    samples = drawing.Samples(tuple("abc"), 1, 5, 64, 1, 3, keep_all=True, how=of(sd_base(), consistency))
    pipe = drawing.opened(base, samples)
    found = []
    for size in (1, 3):
        tables = drawing.draw(
            pipe, cell, replace(samples, batch_size=size), look(), ALONE,
            Batches.of_pictures(size, 64, 64, "cpu"), lambda calls: None,
        )  # fmt: skip
        found.append(torch.cat([table["pictures"] for table in tables]).int())
    assert (found[0] - found[1]).abs().max() <= 1


# -- Edits ---------------------------------------------------------------------------------------------------


def picture() -> Image.Image:
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@pytest.mark.parametrize("kind", ["tiny", "consistency"])
def test_an_edit_keeps_what_is_outside_whatever_decodes(
    sd_base: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    build = build_tiny if kind == "tiny" else build_consistency
    folder, mask, before = build(tmp_path / kind, 4), Image.new("L", (64, 64), 0), picture()
    mask.paste(255, (16, 16, 48, 40))
    asked: dict[str, Any] = {"mask": mask, "base": str(sd_base()), "steps": 2, "seed": 1, "feather": 0}
    plain = lcm_kit.edit("inpaint", before, "a cat", **asked)[0]
    found = lcm_kit.edit("inpaint", before, "a cat", decoder=folder, **asked)[0]
    outside = ImageChops.invert(mask)
    for each in (plain, found):
        kept = ImageChops.multiply(ImageChops.difference(each, before), outside.convert("RGB"))
        assert kept.getbbox() is None
    assert ImageChops.difference(plain, found).getbbox() is not None
    # the latents are the same: the other decoder's pixels stand where the VAE's stood
    pipe = sample.pipeline(str(sd_base()), how=of(sd_base(), folder))
    bare = sample.pipeline(str(sd_base()))
    canvas = Canvas.of(before, 8)
    assert torch.equal(editing.encode(pipe, canvas.pixels), editing.encode(bare, canvas.pixels))


@pytest.mark.parametrize("task", ["colorize", "upscale"])
def test_what_agrees_by_the_vae_is_decoded_by_it(
    sd_base: Callable[..., Path], consistency: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Asked for another decoder it is refused; a pipeline that has one, as a server's, uses the VAE."""
    asked: dict[str, Any] = {"base": str(sd_base()), "steps": 2, "seed": 1}
    with pytest.raises(UserError, match=f"^{task} is decoded and encoded by the base's VAE after each step"):
        lcm_kit.edit(task, picture(), "a cat", decoder=consistency, **asked)
    plain = lcm_kit.edit(task, picture(), "a cat", **asked)[0]
    how = of(sd_base(), consistency)
    monkeypatch.setattr(How, "of", lambda *_: how)
    assert ImageChops.difference(plain, lcm_kit.edit(task, picture(), "a cat", **asked)[0]).getbbox() is None


def test_edits_in_files_name_what_decoded_them(
    sd_base: Callable[..., Path], consistency: Path, tmp_path: Path
) -> None:
    """But for the ends of an interpolation, which nothing decoded."""
    from lcm_kit.api.editing import edit_to_folder, settled
    from lcm_kit.edits.options import checked

    wanted = checked("interpolate", picture(), to=picture().rotate(90), frames=3)
    how = settled(wanted, "a cat", base=str(sd_base()), steps=2, decoder=consistency, seed=0,
                  emphasis=None, device=None, tiling=False, compile=False)  # fmt: skip
    edit_to_folder(wanted, how, tmp_path / "out")
    texts = []
    for number in range(3):
        with Image.open(tmp_path / "out" / f"{number:03d}-interpolate.png") as file:
            texts.append(file.text)
    assert [text.get("decoder") for text in texts] == [None, "ConsistencyDecoderVAE drawing-one", None]
    assert texts[0] == texts[2] == {}
