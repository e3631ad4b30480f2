"""What ships: sizes, names, and that held-out prompts are held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lcm_kit import assets
from lcm_kit.errors import UserError
from lcm_kit.tiny import world
from lcm_kit.tiny.probe import load_probe


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_sizes() -> None:
    assert sum(size(assets.path(name)) for name in assets.NAMES) <= 33e6
    assert size(assets.path("brand")) <= 2e6


def test_the_brand_set_is_whole_and_its_prompts_are_held_out() -> None:
    pictures = sorted(assets.path("brand").glob("*.png"))
    assert 60 <= len(pictures) <= 120
    captions = {path.with_suffix(".txt").read_text().strip() for path in pictures}
    assert all(world.parse(caption) for caption in captions)
    held_out = assets.prompts("asset:brand")
    assert len(held_out) >= 24 and not captions & set(held_out)
    assert all(world.parse(prompt) for prompt in held_out)
    drawn = {world.parse(caption).object for caption in captions}  # type: ignore[union-attr]
    assert {world.parse(prompt).object for prompt in held_out} - drawn  # type: ignore[union-attr]


def test_held_out_prompts_of_the_base() -> None:
    prompts = assets.prompts("asset:tiny-sd")
    assert len(prompts) == len(set(prompts)) >= 1000
    assert all(world.parse(prompt) for prompt in prompts)


def test_the_probe_reads_real_renders_that_it_has_not_seen() -> None:
    rng = np.random.default_rng(4711)
    scenes = [world.random_scene(rng) for _ in range(600)]
    pictures = np.stack([np.asarray(world.render(scene)) for scene in scenes])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = load_probe().read(images)
    right = [all(got[n] == getattr(s, n) for n in got) for got, s in zip(seen, scenes, strict=True)]
    assert np.mean(right) >= 0.99


def test_names_that_are_not_shipped() -> None:
    with pytest.raises(UserError, match="big-sd.*tiny-sd"):
        assets.path("big-sd")
    with pytest.raises(UserError, match="no such file"):
        assets.prompts("/nowhere/prompts.txt")
    assert assets.resolve("some/hub-id") == "some/hub-id"


def test_prompt_files_skip_blanks_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# comment\n\n  a cat  \na dog\n")
    assert assets.prompts(str(file)) == ["a cat", "a dog"]
    file.write_bytes("\ufeffa cat\n".encode())  # as Notepad saves it
    assert assets.prompts(str(file)) == ["a cat"]
    file.write_bytes("ärger\n".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        assets.prompts(str(file))
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="no prompt"):
        assets.prompts(str(file))


def test_general_pictures_leave_the_held_out_prompts_out() -> None:
    from lcm_kit.config.schema import Data
    from lcm_kit.data.records import open_records

    records, bad = open_records(Data(path="asset:general"))
    assert len(records) == 384 and not bad
    captions = {record.caption for record in records}
    assert all(world.parse(caption) for caption in captions)
    assert not captions & set(assets.prompts("asset:tiny-sd"))


@pytest.mark.parametrize(("base", "guidance_brings"), [("tiny-sd", 0.05), ("tiny-sd-v", 0.02)])
def test_the_base_is_as_good_as_its_card_says(base: str, guidance_brings: float) -> None:
    """`quality.json` is what `lcm-kit evaluate evaluation/tiny_base` measured (see the card)."""
    import json

    rows = json.loads((assets.path(base) / "quality.json").read_text())["rows"]
    teacher = {row["guidance_scale"]: row for row in rows if row["kind"] == "teacher"}
    assert teacher[5.0]["samples"] >= 500 and teacher[5.0]["prompt_adherence"] >= 0.95
    assert teacher[1.0]["prompt_adherence"] <= teacher[5.0]["prompt_adherence"] - guidance_brings
    plain = [row for row in rows if row["kind"] == "plain" and row["guidance_scale"] == 5.0]
    assert {row["sampler"] for row in plain if row["unet_calls"] == 4} == {"ddim", "dpmpp_2m"}
    for row in plain:
        if row["unet_calls"] == 4:
            assert row["prompt_adherence"] <= teacher[5.0]["prompt_adherence"] - 0.20
    card = (assets.path(base) / "README.md").read_text()
    assert f"{teacher[5.0]['prompt_adherence']:.1%}" in card


def test_a_place_is_an_asset_or_a_path_from_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert assets.place("~/a") == tmp_path / "a" and assets.place("b/~") == Path("b/~")
    assert assets.place("asset:brand") == assets.path("brand")
    assert assets.place("~no-such-user/a") == Path("~no-such-user/a")
    (tmp_path / "p.txt").write_text("a fox\n")
    assert assets.prompts("~/p.txt") == ["a fox"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a fox\n\x1b[2Ja cat\n", r", line 2: prompt holds a control character, '\x1b'; take it out"),
        (b"x" * 20_001, ", line 1: prompt is too long: 20,001 characters of at most 20,000; take it out"),
        (b"# a\n \n", ": the file holds no prompt; write one a line"),
        (b"\xff\xfe\x00", ": the file cannot be read ("),
        (b"a\n" * 2**25 + b"a", ": more than 67,108,864 bytes, which no file of prompts has; "),
    ],
    ids=["control", "long", "none", "bytes", "large"],
)
def test_what_is_no_file_of_prompts(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        assets.prompts(str(file))
    assert str(caught.value).startswith(f"prompts {str(file)!r}{sentence}")


def test_prompts_as_editors_save_them(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("a\tfox  runs\r\n\r\n# no\r\nan\u2028owl\rb".encode("utf-16"))
    assert assets.prompts(str(tmp_path / "p.txt")) == ["a fox runs", "an owl", "b"]
