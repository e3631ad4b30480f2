"""Evaluations of pictures that are no squares: drawn, cut, kept, measured and shown in their shape."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from lcm_kit import sample
from lcm_kit.bases import inspect_base
from lcm_kit.cli.main import app
from lcm_kit.config import shipped
from lcm_kit.config.evaluation import Quality
from lcm_kit.config.sweep import Compose
from lcm_kit.errors import UserError
from lcm_kit.evaluation import draw, recommended, results
from lcm_kit.evaluation.draw import Samples
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.evaluation.metrics.features import extractor
from lcm_kit.evaluation.metrics.similarity import brand_similarity
from tests.loras import random_lora
from tests.recipes import test_brand, test_compose, test_sweep
from tests.recipes.test_sweep import save, tiny
from tests.test_features import save as save_model

WIDTH, HEIGHT = SHAPE = (96, 64)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random CLIP model, which sees the middle square of a picture."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    save_model(folder, "clip")
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The brand's and the control's pictures: of all shapes, with detail up to their edges."""
    at, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(5)
    sizes = {"brand": [(64, 64), (200, 90), (50, 120)], "control": [(96, 64), (70, 80)]}
    for name, each in sizes.items():
        (at / name).mkdir()
        for k, size in enumerate(each):
            rows = torch.randint(256, (12, 12, 3), generator=generator, dtype=torch.uint8)
            picture = Image.fromarray(rows.numpy()).resize(size, Image.Resampling.BICUBIC)
            picture.save(at / name / f"{k}.png")
            (at / name / f"{k}.txt").write_text(f"a cat {k}")
    return at / "brand", at / "control"


def slowly_cut(file: Path) -> Tensor:
    """The picture scaled so that it just covers the shape, then its middle; one side at a time, in words."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    if width / height > WIDTH / HEIGHT:  # too wide: the height decides
        width, height = round(width * HEIGHT / height), HEIGHT
    else:
        width, height = WIDTH, round(height * WIDTH / width)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - WIDTH) // 2, (height - HEIGHT) // 2
    image = image.crop((left, top, left + WIDTH, top + HEIGHT))
    values = [[[image.getpixel((x, y))[c] for x in range(WIDTH)] for y in range(HEIGHT)] for c in range(3)]
    return torch.tensor(values, dtype=torch.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def swept(
    clip: str, folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A small sweep with its page: the folder and the results."""
    at = tmp_path_factory.mktemp("sweep")
    file = save(random_lora(tiny(), size=0.02), at / "weak.safetensors")
    changes = {
        "resolution": [WIDTH, HEIGHT],
        "features": clip,
        "student": [{"samplers": ["ddim"], "steps": [2]}],
    }
    brand, control = map(str, folders)
    config = test_sweep.configure([file], at / "out", **changes, brand=brand, control=control)
    assert config.resolution == SHAPE
    return at, test_sweep.run(config, report=True)


def test_a_sweep_draws_the_shape_that_plain_diffusers_draws(swept: tuple[Path, dict[str, Any]]) -> None:
    at, found = swept
    assert found["resolution"] == found["settings"]["resolution"] == [WIDTH, HEIGHT]
    assert results.of_sweep(at / "out") is not None
    names = [name for cell in found["cells"] for name in cell["pictures"]]
    assert len(names) == 2 * len(found["cells"])
    for name in names:
        with Image.open(at / "out" / name) as picture:
            assert picture.size == (WIDTH, HEIGHT)

    texts = [prompt for prompt in found["prompts"]["main"]["texts"] for _ in range(2)]
    pipe = sample.pipeline("asset:tiny-sd")
    sample.load_adapter(pipe, at / "weak.safetensors")
    wanted = sample.latents(pipe, texts, sampler="ddim", steps=2, size=(HEIGHT, WIDTH))
    (file,) = (at / "out/cells").glob("weak-ddim-2-g1-w1-*.safetensors")
    rows = load_file(file)
    side = inspect_base("asset:tiny-sd").factor
    assert rows["latents"].shape == (6, wanted.shape[1], HEIGHT // side, WIDTH // side)
    torch.testing.assert_close(rows["latents"], wanted, rtol=0, atol=2e-4)
    assert rows["pictures"].shape == (2, 3, HEIGHT, WIDTH)


def test_the_brands_pictures_are_cut_to_the_shape(
    swept: tuple[Path, dict[str, Any]], clip: str, folders: tuple[Path, Path]
) -> None:
    """The figure of a cell from features of pictures that are cut here, slowly."""
    at, found = swept
    model = extractor(clip)
    own, others = (
        model.images(torch.stack([slowly_cut(file) for file in sorted(folder.glob("*.png"))]))
        for folder in folders
    )
    (file,) = (at / "out/cells").glob("teacher-ddim-4-g3-*.safetensors")
    wanted = float(brand_similarity(load_file(file)["features"], own, others).mean())
    cell = next(cell for cell in found["cells"] if cell["id"] == "teacher-ddim-4-g3")
    assert cell["metrics"]["brand_similarity"]["value"] == pytest.approx(wanted, abs=1e-5)
    square = FeatureExtractor.of("evaluation/guidance_sweep", ["a"], 64, "cpu", features=clip)
    assert not torch.allclose(square.folder(str(folders[0]), 64), own, atol=1e-3)


def test_what_a_model_sees_of_it_is_said(
    swept: tuple[Path, dict[str, Any]], clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"of pictures of 96 × 64 pixels {clip} sees the middle 64 × 64"
    assert swept[1]["seen"] == said
    FeatureExtractor.of("evaluation/guidance_sweep", ["a"], SHAPE, "cpu", features=clip)
    assert said in capsys.readouterr().err.replace("\n", "")
    square = FeatureExtractor.of("evaluation/guidance_sweep", ["a"], 96, "cpu", features=clip)
    assert square.seen(96) is None and "sees" not in capsys.readouterr().err
    with pytest.raises(UserError, match="reads pictures of 64 × 64 pixels, and these have 96 × 64; set"):
        FeatureExtractor.of("evaluation/guidance_sweep", ["a"], SHAPE, "cpu", features="asset:probe")


def test_the_page_shows_the_shape_and_how_to_draw_it(swept: tuple[Path, dict[str, Any]]) -> None:
    at, found = swept
    text = (at / "out/report.html").read_text()
    boxes = set(re.findall(r'viewBox="([^"]+)"', text))
    assert boxes == {"0 0 100 66.6667"}
    assert {*re.findall(r'<image id="p\d+" width="([^"]+)" height="([^"]+)"', text)} == {("100", "66.6667")}
    assert "2 of each, 96 × 64 pixels" in html.unescape(text) and found["seen"] in html.unescape(text)
    use = found["recommended"]
    if use["cell"] is None:
        return
    assert use["sentence"].startswith("For pictures of 96 × 64 pixels use 2 steps of DDIM")
    assert "--width 96 --height 64" in html.unescape(text)


def test_a_recommendation_is_told_as_of_its_shape(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """As for a run whose sweep recommended a cell."""
    at, found = swept
    (tmp_path / "sweep").mkdir()
    chosen = {
        "sentence": "Use it.", "adapter": "weak", "cell": "c", "sampler": "ddim", "steps": 2,
        "guidance_scale": 1.0, "lora_weight": 1.0, "reasons": [], "warnings": [],
    }  # fmt: skip
    for size, told in (([WIDTH, HEIGHT], "96 × 64"), (64, None)):
        changed = {key: value for key, value in found.items() if key != "hash"}
        changed |= {"recommended": chosen, "resolution": size}
        (tmp_path / "sweep/results.json").write_text(json.dumps(changed))
        use = recommended.of_run(tmp_path, at / "weak.safetensors")
        assert use is not None and use.at == told


def test_squares_are_hashed_as_they_always_were() -> None:
    """By what was hashed before there were shapes, so that what is drawn is kept; a shape is another key."""
    base, look = inspect_base("asset:tiny-sd"), FeatureExtractor(None, None, None, {})
    square = Samples(("a", "b"), 2, 7, 64, 4, 1)
    found = draw.inputs(base, square, look, "cpu")
    assert found[1:6] == [("a", "b"), 2, 7, 64, 4]
    assert found[6:] == [[0], [None, None, "none", []], draw.versions(), "cpu", square.how.facts()]
    wide = draw.inputs(base, Samples(("a", "b"), 2, 7, SHAPE, 4, 1), look, "cpu")
    assert wide[4] == [96, 64] and json.dumps(wide).replace("[96, 64]", "64") == json.dumps(found)


def test_a_size_is_what_is_asked_else_what_was_trained_else_the_bases(sd_base: Callable[..., Path]) -> None:
    base = inspect_base(str(sd_base("epsilon")))
    plain = Quality(recipe="evaluation/quality", run="run")
    asked = replace(plain, resolution=(48, 80))
    assert [draw.resolution_of(asked, base, trained) for trained in (32, None)] == [(48, 80)] * 2
    assert [draw.resolution_of(plain, base, trained) for trained in (32, None)] == [32, 64]


def test_quality_draws_another_shape_than_the_run_was_trained_at(
    sd_base: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog")
    config = Quality(
        recipe="evaluation/quality", run=str(tmp_path), base=str(sd_base("epsilon")), count=2, pictures=2,
        prompts=str(tmp_path / "prompts.txt"), teacher_steps=2, unet_calls=(1,), samplers=("ddim",),
        guidance_scale=1.0, resolution=(48, 80),
    )  # fmt: skip
    found = json.loads(shipped.load_recipe("evaluation/quality").main(config).read_text())
    assert found["resolution"] == [48, 80]
    for cell in found["cells"]:
        for name in cell["pictures"]:
            with Image.open(tmp_path / name) as picture:
                assert picture.size == (48, 80)


@pytest.mark.slow  # draws three lists
def test_brand_draws_the_shape_beside_the_brands_pictures(
    clip: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    speed = save(random_lora(tiny(), size=0.03, seed=2), tmp_path / "speed.safetensors")
    brand, control = map(str, folders)
    config = test_brand.configure(
        run=str(speed), output=str(tmp_path / "out"), resolution=[WIDTH, HEIGHT], features=clip, brand=brand,
        control=control, prompts=brand, steps=[1],
    )  # fmt: skip
    found = results.read(shipped.load_recipe("evaluation/brand").main(config))
    assert found["resolution"] == [WIDTH, HEIGHT]
    for k, name in enumerate(found["brand_pictures"]):
        assert name is not None
        with Image.open(tmp_path / "out" / name) as picture:
            shown = torch.tensor(list(picture.convert("RGB").getdata())).view(HEIGHT, WIDTH, 3)
        wanted = (slowly_cut(folders[0] / f"{k}.png") + 1) * 127.5
        assert (shown.permute(2, 0, 1) - wanted).abs().max() < 0.01
    drawn = [name for row in results.brand_rows(found) for name in row["pictures"]]
    for name in drawn:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == (WIDTH, HEIGHT)


@pytest.mark.slow  # draws a grid, and merges
def test_a_pair_is_searched_for_on_the_shape(clip: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    style, speed = (
        save(random_lora(tiny(), size=0.03, seed=seed), tmp_path / f"{name}.safetensors")
        for seed, name in enumerate(("style", "speed"))
    )
    brand, control = map(str, folders)
    keys = test_compose.SMALL | {
        "style": str(style), "speed": str(speed), "output": str(tmp_path / "out"), "features": clip,
        "brand": brand, "control": control, "resolution": [HEIGHT, WIDTH],
    }  # fmt: skip
    config = TypeAdapter(Compose).validate_python(keys)
    found = results.read(shipped.load_recipe("evaluation/compose").main(config))
    assert found["resolution"] == [HEIGHT, WIDTH] and found["recommended"] is not None
    assert found["recommended"]["sentence"].startswith("For pictures of 64 × 96 pixels use the style at ")
    with Image.open(tmp_path / "out/teacher-and-pair.png") as sheet:
        assert sheet.size == (2 * HEIGHT + 4, 2 * WIDTH + 4)  # two prompts, the teacher above the pair


@pytest.fixture(scope="module")
def coarse(sd_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose VAE makes one cell of 16 x 16 pixels."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("coarse") / "base"
    shutil.copytree(sd_base("epsilon"), folder)
    shutil.rmtree(folder / "vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8, 8, 8, 8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=64, mid_block_add_attention=False, scaling_factor=0.5,
    ).save_pretrained(folder / "vae")  # fmt: skip
    assert inspect_base(str(folder)).factor == 16
    return folder


@pytest.mark.parametrize(
    ("asked", "said"), [(104, "104"), ((96, 104), "96 × 104: 104"), ((72, 96), "72 × 96: 72")]
)
def test_a_size_that_the_vae_has_no_latents_of_is_refused_before_anything_is_drawn(
    coarse: Path, tmp_path: Path, asked: Any, said: str
) -> None:
    file = save(random_lora(tiny(), size=0.02), tmp_path / "weak.safetensors")
    sentence = f"resolution {said} is not a multiple of 16, as the base's VAE needs; try"
    near = 96 if "104" in said else 64
    base = inspect_base(str(coarse))
    sweep = test_sweep.configure([file], tmp_path / "out", base=str(coarse), resolution=asked)
    quality = Quality(
        recipe="evaluation/quality", run=str(tmp_path / "run"), base=str(coarse), resolution=asked
    )
    brand = test_brand.configure(run=str(file), base=str(coarse), resolution=asked)
    for config in (quality, brand, sweep):
        with pytest.raises(UserError, match=f"^{re.escape(sentence)} {near}$"):
            draw.resolution_of(config, base)
    with pytest.raises(UserError, match=re.escape(sentence)):
        shipped.load_recipe("evaluation/quality").main(quality)
    with pytest.raises(UserError, match=re.escape(sentence)):
        Samples.of(sweep, base)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.safetensors"))
    keys = [
        f"adapters={[str(file)]}",
        f"base={coarse}",
        f"resolution={asked if isinstance(asked, int) else [*asked]}",
    ]
    done = CliRunner().invoke(app, ["check", "evaluation/guidance_sweep", *keys])
    assert done.exit_code == 2 and f"resolution {said} is not a multiple of 16" in " ".join(
        done.output.split()
    )
    size = (asked, asked) if isinstance(asked, int) else asked[::-1]
    with pytest.raises(UserError, match="is not a multiple of 16, as the base's VAE needs"):
        next(iter(sample.draw_images(str(coarse), ["a cat"], size=size)))
