"""What wheel and sdist hold: recipes, configs and assets travel, and an install adds one import name."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lcm_kit import __version__
from lcm_kit.config import shipped

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def tracked(*folders: str) -> set[str]:
    """The files under `folders` that belong to the project: no caches of the interpreter."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {
        path.relative_to(ROOT).as_posix()
        for path in found
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_adds_one_name_and_holds_everything(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = f"lcm_kit-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"lcm_kit", information}
    assert tracked("lcm_kit") <= names
    assert {f"lcm_kit/_shipped/{name}" for name in tracked("train", "evaluation", "configs")} <= names
    assert {f"lcm_kit/_shipped/{name}" for name in shipped.names()} <= names
    assert f"{information}/licenses/LICENSE" in names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_wheel_stays_small_enough_to_ship(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 36e6  # the embedded bases and everything beside them may be 33 MB


def test_the_sdist_builds_and_tests_itself(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked("lcm_kit", "train", "evaluation", "configs", "tests") <= names
    assert {"pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md", ".ci/run"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs", "cache", ".git/"))]


def test_every_dependency_says_what_it_is_for() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = [line.strip() for line in text.splitlines()]
    for requirement in wanted:
        found = [line for line in lines if line.startswith(f'"{requirement}"')]
        assert found and all(len(line.partition("# ")[2]) > 5 for line in found), f"{requirement}: no reason"


def test_torch_stays_within_what_was_tried() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "torch>=2.6,<2.14" in dependencies


def test_every_range_has_its_tested_version() -> None:
    """Each requirement of pyproject.toml is pinned within its range, with hashes; torch by its version."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / "tools" / "versions.py")
    assert spec is not None and spec.loader is not None
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [
        *project["dependencies"],
        *(one for more in project["optional-dependencies"].values() for one in more),
    ]
    pinned = versions.versions(versions.constraints())
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no tested version; run `make lock`"
        assert requirement.specifier.contains(pinned[name]), f"{name}: run `make lock`"
    locked = versions.blocks(versions.TESTED.read_text("utf-8"))
    assert len(locked) > 80
    for block in locked:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), block
        assert not versions.MACHINE.match(block), block
    assert [pin.partition("==")[0] for pin in versions.constraints()].count("torch") == 1
