"""Recipes and configs are found, listed, copied and loaded, in a checkout and in the layout of a wheel."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from lcm_kit.config import shipped
from lcm_kit.errors import UserError


def test_names_hold_what_readers_are_told_about() -> None:
    names = shipped.names()
    assert {"train/distill.py", "configs/quickstart.yaml", "configs/evaluation/quality.yaml"} <= set(names)
    assert len(names) == len(set(names)) and all((shipped.root() / name).is_file() for name in names)
    folders = [name.partition("/")[0] for name in names]
    assert folders == sorted(folders, key=["train", "evaluation", "configs"].index)


@pytest.mark.parametrize("name", shipped.names())
def test_every_shipped_file_says_what_it_is_for(name: str) -> None:
    assert len(shipped.describe(name)) > 20


def test_what_a_file_is_for_is_told_in_whole_sentences() -> None:
    assert [name for name in shipped.names() if not shipped.describe(name).endswith((".", "?"))] == []
    assert shipped.describe("configs/quickstart.yaml") == (
        "The distillation of the story that `lcm-kit quickstart` tells, after finetune/tiny_brand: style and "
        "speed in one LoRA, from a styled teacher, in minutes on a CPU."
    )
    assert shipped.describe("configs/launch/slurm.sh").endswith("queues itself again.")


@pytest.mark.parametrize(
    "text",
    [
        "distill/tiny_lcm",
        "configs/distill/tiny_lcm",
        "configs/distill/tiny_lcm.yaml",
        "distill/tiny_lcm.yaml",
    ],
)
def test_a_config_is_found_by_all_its_names(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = shipped.root() / "configs" / "distill" / "tiny_lcm.yaml"
    assert shipped.config_path(text) == shipped.find(text) == wanted


def test_a_folder_in_the_place_of_a_config_is_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "brand").mkdir()
    with pytest.raises(UserError, match="^config 'brand' is a folder; give a config, .* as data.path$"):
        shipped.config_path("brand")


def test_a_file_on_disk_comes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder of that name is no config
    assert shipped.config_path("quickstart") == shipped.root() / "configs" / "quickstart.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("recipe: train/distill\n")
    assert shipped.config_path("configs/quickstart.yaml") == Path("configs/quickstart.yaml")


@pytest.mark.parametrize(
    ("text", "guess"), [("quickstat", "quickstart"), ("distill/tiny_lc", "distill/tiny_lcm")]
)
def test_a_near_miss_is_guessed(text: str, guess: str) -> None:
    with pytest.raises(UserError, match=f"{text}.*did you mean `configs/{guess}.yaml`"):
        shipped.config_path(text)
    with pytest.raises(UserError, match=f"{text}.*did you mean `configs/{guess}.yaml`"):
        shipped.find(text)


def test_an_unknown_name_points_to_the_list() -> None:
    with pytest.raises(UserError, match="'zzz'.*lcm-kit ls"):
        shipped.find("zzz")


def test_copy_is_exact_and_never_overwrites(tmp_path: Path) -> None:
    source = shipped.find("quickstart")
    assert shipped.copy("quickstart", tmp_path) == tmp_path / "quickstart.yaml"
    assert shipped.copy("train/distill", tmp_path / "new" / "mine.py").read_bytes() == (
        shipped.find("train/distill").read_bytes()
    )
    assert (tmp_path / "quickstart.yaml").read_bytes() == source.read_bytes()
    (tmp_path / "quickstart.yaml").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        shipped.copy("quickstart", tmp_path)
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder as a wheel installs it: recipes and configs inside, nothing beside it."""
    package = tmp_path / "site-packages" / "lcm_kit"
    (package / "_shipped" / "train").mkdir(parents=True)
    shutil.copytree(shipped.root() / "configs", package / "_shipped" / "configs")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    return package / "_shipped"


def test_a_wheel_answers_from_inside_the_package(wheel: Path) -> None:
    assert shipped.root() == wheel
    assert shipped.find("quickstart") == wheel / "configs" / "quickstart.yaml"
    assert "train/distill.py" not in shipped.names()


def test_a_recipe_is_loaded_once_and_knows_its_dataclasses(wheel: Path) -> None:
    (wheel / "train" / "toy.py").write_text(
        '"""A toy."""\nfrom __future__ import annotations\nfrom dataclasses import dataclass\n'
        "@dataclass\nclass Point:\n    x: int\ndef main(config):\n    return Point(config)\n"
    )
    before = set(sys.modules)
    module = shipped.load_recipe("train/toy")
    assert module.main(3).x == 3 and shipped.load_recipe("train/toy") is module
    assert not {"train", "toy"} & (set(sys.modules) - before)


def test_a_recipe_that_fails_to_load_is_not_half_there(wheel: Path) -> None:
    (wheel / "train" / "broken.py").write_text("raise RuntimeError('while loading')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="while loading"):
            shipped.load_recipe("train/broken")
