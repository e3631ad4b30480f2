"""Ten mistakes of users: each ends in one `error:` sentence that names the thing, code 2 and no traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from lcm_kit.cli.main import app


class Project:
    """A folder with a config, a base and two good captioned images, for one mistake at a time."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.images, self.config = folder, folder / "images", folder / "config.yaml"
        self.images.mkdir()
        for name in ("a", "b"):
            Image.new("RGB", (64, 64), "red").save(self.images / f"{name}.png")
            (self.images / f"{name}.txt").write_text("a red square")
        self.config.write_text(
            f"recipe: train/distill\noutput: {folder / 'run'}\nsteps: 2\nbase:\n  path: {base}\n"
            f"data:\n  path: {self.images}\n  cache: {folder / 'cache'}\n  resolution: 64\n"
            "validation:\n  prompts: null\n"
        )

    def fails(self, verb: str, *overrides: str) -> str:
        """The one sentence that the command ends with."""
        done = CliRunner().invoke(app, [verb, str(self.config), *overrides])
        assert isinstance(done.exception, SystemExit), done.exception  # anything else would be a traceback
        assert done.exit_code == 2
        assert done.output.count("error: ") == 1 and "Traceback" not in done.output
        return done.stderr.partition("error: ")[2].rstrip("\n")


@pytest.fixture
def project(tmp_path: Path, sd_base: Callable[..., Path]) -> Project:
    return Project(tmp_path, sd_base("epsilon"))


def test_missing_folder(project: Project) -> None:
    for path in ("/nowhere/images", "nowhere/images", "./images"):
        assert path in project.fails("encode", f"data.path={path}")
    assert "/nowhere/images" in project.fails("check", "data.path=/nowhere/images")


def test_empty_folder(project: Project) -> None:
    (project.folder / "empty").mkdir()
    sentence = project.fails("encode", f"data.path={project.folder / 'empty'}")
    assert str(project.folder / "empty") in sentence and "no image" in sentence


def test_broken_image(project: Project) -> None:
    good = (project.images / "a.png").read_bytes()
    (project.images / "b.png").write_bytes(good[: len(good) // 2])
    sentence = project.fails("encode")
    assert "b.png" in sentence and "data.skip_bad" in sentence and "a.png" not in sentence


def test_missing_caption(project: Project) -> None:
    (project.images / "a.txt").unlink()
    for verb in ("encode", "check"):
        sentence = project.fails(verb)
        assert "a.png" in sentence and "caption" in sentence and "b.png" not in sentence


def test_unknown_key(project: Project) -> None:
    sentence = project.fails("train", "adapter.rnk=8")
    assert sentence == f"config {project.config}: adapter.rnk: unknown key; did you mean `rank`?"


def test_wrong_type(project: Project) -> None:
    sentence = project.fails("train", "batch_size=many")
    assert sentence.endswith(
        "batch_size: 'many' is not allowed; it must be a whole number of at least 1 and at most 100000"
    )


def test_no_steps(project: Project) -> None:
    assert project.fails("train", "steps=0").endswith(
        "steps: 0 is not allowed; it must be a whole number of at least 1 and at most 10000000"
    )
    done = CliRunner().invoke(app, ["sample", "--prompt", "x", "--steps", "0"])
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and "steps" in done.stderr


def test_base_not_found(project: Project) -> None:
    for verb in ("encode", "check"):
        assert "/nowhere/base" in project.fails(verb, "base.path=/nowhere/base")
    assert "nobody/nothing" in project.fails("encode", "base.path=nobody/nothing")
    assert "asset 'tiny'" in project.fails("encode", "base.path=asset:tiny")


def test_not_a_pipeline_folder(project: Project) -> None:
    for verb in ("encode", "check"):
        sentence = project.fails(verb, f"base.path={project.images}")
        assert str(project.images) in sentence and "not a diffusers pipeline folder" in sentence


def test_full_disk(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lcm_kit.io.files.os.fsync", full)
    sentence = project.fails("encode")
    assert "No space left on device" in sentence and "free some space" in sentence
    half = [path for path in (project.folder / "cache").rglob("*") if path.is_file()]
    assert half == []  # nothing half-written stays behind
