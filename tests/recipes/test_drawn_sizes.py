"""Sizes of what is drawn on the way: samples of the teacher, prompts, the prior's pictures, validation."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lcm_kit import sample
from lcm_kit.bases import inspect_base
from lcm_kit.cli.main import app
from lcm_kit.config.continued import flat
from lcm_kit.config.data import Samples
from lcm_kit.config.load import dump, load
from lcm_kit.data import prior, samples, sources
from lcm_kit.data.batches import Batches
from lcm_kit.data.encoder import Encoder, usable_base
from lcm_kit.errors import UserError
from lcm_kit.training.control import Control
from lcm_kit.training.diversity import Diversity
from lcm_kit.training.run_files import config_of
from lcm_kit.training.run_folder import adapter_steps
from lcm_kit.training.validation import Validation
from tests.recipes.small import configure
from tests.runs import load_adapter
from train import distill

Keys = dict[str, Any]
PROMPTS = ["a red cat", "two blue dogs", "an owl"]
# of five pictures of three prompts in the sizes 64, (96, 32): the fourth is the first prompt again, whose
# turn is at the second size
SIZES = [64, (96, 32), 64, (96, 32), 64]
HOW = {"sampler": "ddim", "steps": 2, "guidance_scale": 3.0, "seed": 11}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return str(tmp_path / "prompts.txt")


def drawing(keys: Keys, folder: Path, prompts: str, **drawn: Any) -> Any:
    """A config that trains on five samples of the teacher, in shards of two."""
    given = {**HOW, "count": 5, "prompts": prompts, **drawn}
    data = {"source": "teacher", "shard_size": 2, "samples": given, "cache": str(folder / "c")}
    return configure(keys, folder / "run", data={**data, "path": str(folder / "no images")})


def opened(config: Any) -> Any:
    return sources.open_cache(config, inspect_base(config.base.path))


def test_samples_take_turns_at_the_sizes(distill_keys: Keys, prompts: str, tmp_path: Path) -> None:
    config = drawing(distill_keys, tmp_path, prompts, resolutions=[64, [96, 32]])
    (report,) = sources.encode(config, progress=False)
    assert report.rows == 5 and report.remarks == ["shapes: 64 x 64 (3), 96 x 32 (2)"]
    cache, pipe = opened(config), sample.pipeline(config.base.path)
    assert sorted(cache.ids) == [f"teacher/{i:05d}" for i in range(5)]
    for at, id in enumerate(cache.ids):
        number = int(id[-5:])
        assert cache.captions[at] == PROMPTS[number % 3]
        size = SIZES[number] if isinstance(SIZES[number], tuple) else (64, 64)
        alone = sample.latents(pipe, [PROMPTS[number % 3]], first=number, size=size[::-1], **HOW)
        torch.testing.assert_close(cache.latents([at]), alone, atol=1e-4, rtol=1e-4)
        assert alone.shape[-2:] == (size[1] // 4, size[0] // 4)
    distill.main(config)  # batches of one shape each
    assert {Batches(cache, 2, 0).at(step).latents.shape[-2:] for step in range(4)} == {(16, 16), (8, 24)}


def test_a_cache_knows_its_sizes_and_one_without_is_as_before(
    distill_keys: Keys, prompts: str, tmp_path: Path
) -> None:
    squares = drawing(distill_keys, tmp_path, prompts)
    assert sources.encode(squares, progress=False)[0].remarks == []
    manifest = samples.folder_of(squares.data) / "manifest.json"
    before = json.loads(manifest.read_text())
    assert "resolutions" not in before["settings"] and "size" not in before["records"][0]
    mixed = drawing(distill_keys, tmp_path, prompts, resolutions=[64, [96, 32]])
    with pytest.raises(UserError, match=r"the sizes in data\.samples\.resolutions"):
        opened(mixed)
    sources.encode(mixed, progress=False)
    with pytest.raises(UserError, match=r"the sizes in data\.samples\.resolutions"):
        opened(squares)
    same = drawing(distill_keys, tmp_path, prompts, resolutions=[[64, 64]])
    sources.encode(same, progress=False)
    assert json.loads(manifest.read_text())["shards"] == before["shards"]


def test_sizes_that_the_base_cannot_draw_are_refused(
    distill_keys: Keys, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = replace(inspect_base(distill_keys["base"]["path"]), factor=16)
    config = drawing(distill_keys, tmp_path, prompts, resolutions=[64, [96, 40]])
    monkeypatch.setattr("lcm_kit.data.encoder.inspect_base", lambda *_, **__: coarse)
    for source in ("teacher", "mix"):
        config = replace(config, data=replace(config.data, source=source))
        with pytest.raises(
            UserError, match=r"data\.samples\.resolutions 96 × 40: 40 is not a multiple of 16"
        ):
            sources.encode(config, progress=False)
    with pytest.raises(UserError, match=r"validation\.resolution 64 × 24: 24 is not a multiple of 16"):
        usable_base(configure(distill_keys, tmp_path, validation={"resolution": [64, 24]}))


def test_sizes_of_the_prior_are_asked_for_before_hours_of_encoding_and_by_every_verb(
    distill_keys: Keys, prompts: str, tmp_path: Path
) -> None:
    keys = {key: value for key, value in distill_keys.items() if key != "guidance"}
    config = configure(
        {**keys, "recipe": "train/finetune"}, tmp_path / "run", data={"cache": str(tmp_path / "none")},
        prior={"prompts": prompts, "count": 2, "steps": 1, "resolutions": [[96, 32]]},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"prior\.resolutions: 96 × 32 is none of the shapes"):
        sources.encode(config, progress=False)
    assert not [*tmp_path.glob("none/*.safetensors")]
    (tmp_path / "my.yaml").write_text(dump(config))
    for verb in ("check", "plan"):
        done = CliRunner().invoke(app, [verb, str(tmp_path / "my.yaml")])
        said = " ".join(done.output.split())
        assert "prior.resolutions: 96 × 32 is none of the shapes that data.shapes trains at" in said, said
        assert done.exit_code == 2, verb
    config = replace(config, prior=replace(config.prior, prompts=None))
    usable_base(config)  # nothing is drawn


def test_a_prior_of_fewer_pictures_leaves_no_captions_behind(
    distill_keys: Keys, prompts: str, tmp_path: Path
) -> None:
    keys = {key: value for key, value in distill_keys.items() if key != "guidance"}
    for count in (3, 1):
        given = {"prompts": prompts, "count": count, "steps": 1}
        config = configure(
            {**keys, "recipe": "train/finetune"}, tmp_path / "run", data={"cache": str(tmp_path / "brand")},
            prior=given,
        )  # fmt: skip
        prior.draw(config, progress=False)
        names = [f"{number:05d}.{ending}" for number in range(count) for ending in ("png", "txt")]
        found = (tmp_path / "brand-prior/pictures").iterdir()
        assert sorted(file.name for file in found if file.suffix in (".png", ".txt")) == names


def test_prompts_have_latents_of_their_sizes(distill_keys: Keys, prompts: str, tmp_path: Path) -> None:
    from lcm_kit.data import prompts as made

    given = {"prompts": prompts, "resolutions": [[96, 32], 64]}
    config = configure(
        distill_keys, tmp_path / "run",
        data={"source": "prompts", "samples": given, "cache": str(tmp_path / "c")},
        method={"name": "dmd", "steps": [2]},
    )  # fmt: skip
    assert made.encode(config, progress=False).remarks == ["shapes: 96 x 32 (2), 64 x 64 (1)"]
    cache = made.open_cache(config, inspect_base(config.base.path))
    shapes = {cache.ids[at]: tuple(cache.latents([at]).shape) for at in range(3)}
    wide, square = (1, 4, 8, 24), (1, 4, 16, 16)
    assert shapes == {"prompts/00000": wide, "prompts/00001": square, "prompts/00002": wide}
    run = distill.main(config)  # which draws its pictures itself, in batches of one shape each
    assert {Batches(cache, 2, 0).at(step).latents.shape[1:] for step in range(4)} == {wide[1:], square[1:]}
    assert (run / "adapter").is_dir()


def test_sizes_of_what_nobody_draws_are_refused(distill_keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with source images it draws nothing to train on"):
        configure(distill_keys, tmp_path, data={"samples": {"resolutions": [64]}})


def test_sdxl_is_told_the_sizes_of_what_is_drawn(sdxl_base: Path) -> None:
    encoder = Encoder.load(inspect_base(str(sdxl_base)), "cpu", vae=False)
    wide = encoder.of_whole_pictures(["a", "b"], (96, 32))["time_ids"]
    assert wide.tolist() == [[32, 96, 0, 0, 32, 96]] * 2  # height first
    assert encoder.of_whole_pictures(["a"], 64)["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]


def test_the_prior_is_drawn_and_trained_on_in_shapes_of_the_training(
    distill_keys: Keys, prompts: str, tmp_path: Path
) -> None:
    keys = {key: value for key, value in distill_keys.items() if key != "guidance"}
    keys = {**keys, "recipe": "train/finetune"}
    data = {"cache": str(tmp_path / "brand"), "shapes": {"multiple": 16}}

    def config(*resolutions: Any, **more: Any) -> Any:
        given = {"prompts": prompts, "count": 5, "steps": 2, "resolutions": resolutions}
        return configure(keys, tmp_path / "run", data=data, prior={**given, **more})

    with pytest.raises(UserError, match=r"prior\.resolutions: 96 × 32 is none .* the nearest is \[128, 32\]"):
        prior.draw(config(64, [96, 32]), progress=False)
    made = config(64, [128, 32])
    prior.encode(made, progress=False)
    found = prior.open_cache(made, inspect_base(made.base.path))
    assert found is not None and len(found) == 5
    for number in range(5):
        size = (128, 32) if isinstance(SIZES[number], tuple) else (64, 64)
        picture = tmp_path / f"brand-prior/pictures/{number:05d}.png"
        seen = Image.open(picture).convert("RGB")
        assert seen.size == size
        at = found.ids.index(picture.name)
        assert found.latents([at]).shape[-2:] == (size[1] // 4, size[0] // 4)  # nothing is cropped
        alone = sample.sample(
            sample.pipeline(made.base.path), [PROMPTS[number % 3]], first=number, size=size[::-1],
            sampler="ddim", steps=2, guidance_scale=5.0, seed=0,
        )  # fmt: skip
        told = sample.to_pil(alone)[0]
        gap = [abs(a - b) for a, b in zip(told.tobytes(), seen.tobytes(), strict=True)]
        assert max(gap) <= 1
    with pytest.raises(UserError, match="not there or were drawn otherwise"):
        prior.open_cache(config(64), inspect_base(made.base.path))


def test_validation_draws_and_measures_at_its_own_size(
    distill_keys: Keys, prompts: str, tmp_path: Path
) -> None:
    measured = {
        "prompts": prompts, "count": 2, "resolution": [96, 32], "guidance_scale": 3.0, "control": prompts,
        "control_count": 2, "diversity": 1,
    }  # fmt: skip
    config = configure(distill_keys, tmp_path / "run", steps=1, validation=measured)
    run = distill.main(config)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = {key: value for line in lines for key, value in json.loads(line).items()}
    sheet = Image.open(run / "validation/step-000001.png")
    # teacher and student in 1, 2 and 4 steps; two prompts and two controls, with gaps and two headings
    assert 0 <= sheet.width - 4 * 96 <= 20 and 28 <= sheet.height - 4 * 32 <= 48
    pipe = sample.pipeline(config.base.path)
    wide = {"seed": 1234, "size": (32, 96)}
    teacher = [
        sample.latents(pipe, [p], first=i, sampler="ddim", steps=50, guidance_scale=3.0, **wide)
        for i, p in enumerate(PROMPTS[:2])
    ]
    load_adapter(run / "adapter", pipe.unet)
    student = [
        sample.latents(pipe, [p], first=i, sampler="lcm", steps=1, **wide) for i, p in enumerate(PROMPTS[:2])
    ]
    gap = (torch.cat(student) - torch.cat(teacher)).square().mean().sqrt()
    assert last["one_step_distance"] == pytest.approx(float(gap), rel=1e-3)
    assert last["control_distance"] == pytest.approx(last["one_step_distance"], rel=1e-6)  # the same prompts


@pytest.mark.parametrize("kind", [Validation, Control, Diversity])
def test_what_is_kept_of_squares_keeps_its_name(
    kind: Any, distill_keys: Keys, prompts: str, tmp_path: Path
) -> None:
    def file(resolution: Any) -> str:
        measured = {"prompts": prompts, "control": prompts, "diversity": 1, "resolution": resolution}
        return str(kind.prepare(configure(distill_keys, tmp_path, validation=measured), "h").file)

    assert file(None) == file(64) == file([64, 64])
    assert len({file(each) for each in (64, [96, 32], [32, 96])}) == 3


def test_a_run_does_not_change_the_size_of_its_controls(
    distill_keys: Keys, prompts: str, tmp_path: Path
) -> None:
    measured = {"prompts": None, "control": prompts, "control_count": 1}
    run = distill.main(configure(distill_keys, tmp_path / "run", steps=1, validation=measured))
    wide = configure(distill_keys, run, steps=1, validation={**measured, "resolution": [96, 32]})
    with pytest.raises(UserError, match="control_count, seed, guidance_scale and resolution back"):
        Control.prepare(wide, inspect_base(wide.base.path).base_hash)


def test_a_run_of_several_sizes_goes_on_and_is_exported(
    distill_keys: Keys, prompts: str, tmp_path: Path
) -> None:
    """What a run was started with is kept as JSON, which has no tuples: within lists neither."""
    first = drawing(distill_keys, tmp_path, prompts, resolutions=[[96, 32], 64])
    sources.encode(first, progress=False)
    run = distill.main(replace(first, steps=2))
    assert config_of(run)["data"]["samples"]["resolutions"] == ((96, 32), 64)
    again = distill.main(replace(load(run / "config.yaml"), steps=4))
    assert adapter_steps(again) == 4
    other = replace(first, data=replace(first.data, samples=replace(first.data.samples, resolutions=(64,))))
    with pytest.raises(UserError, match=r"started with data\.samples\.resolutions \[\[96, 32\], 64\] and"):
        distill.main(other)


def test_a_key_is_the_same_as_an_object_and_as_json() -> None:
    sizes = ((96, 32), 64)
    samples_ = Samples(resolutions=sizes)
    assert flat(samples_)["resolutions"] == [[96, 32], 64]
    assert flat(samples_) == flat(json.loads(json.dumps(asdict(samples_))))
