"""Every verb that writes, into every place where nothing can be written: a sentence, and nothing left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lcm_kit.assets import path as asset
from lcm_kit.cli.main import app
from lcm_kit.config import shipped
from tests.brands import write_brand
from tests.recipes.small import configure

LORA = str(asset("tiny-lcm-lora") / "pytorch_lora_weights.safetensors")
BASE = "asset:tiny-sd"


@pytest.fixture(scope="module")
def project(distill_keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs `distill.yaml` and `finetune.yaml`, and a run of one step in `run`."""
    folder = tmp_path_factory.mktemp("crooked")
    (folder / "distill.yaml").write_text(
        yaml.safe_dump({**distill_keys, "output": str(folder / "none")}, sort_keys=False)
    )
    own = {key: distill_keys[key] for key in ("batch_size", "base", "data")}
    style = {"recipe": "train/finetune", "output": str(folder / "none"), "steps": 2, **own}
    style["validation"] = {"prompts": None, "held_out": 0.0, "control": None}
    (folder / "finetune.yaml").write_text(yaml.safe_dump(style, sort_keys=False))
    shutil.copy(LORA, folder / "other.safetensors")
    shipped.load_recipe("train/distill").main(configure(distill_keys, folder / "run", steps=1))
    write_brand(folder / "run", ["a cat"])  # for the report
    return folder


# Words of each verb that writes; PROJECT and OUT are put in
VERBS: dict[str, list[str]] = {
    "encode": ["encode", "PROJECT/distill.yaml", "data.cache=OUT"],
    "distill": ["train", "PROJECT/distill.yaml", "output=OUT"],
    "style": ["train", "PROJECT/finetune.yaml", "output=OUT"],
    "export": ["export", "PROJECT/run", "--output", "OUT"],
    "convert": ["convert", LORA, "--base", BASE, "--output", "OUT"],
    "merge": ["merge", f"{LORA}:0.5", f"{LORA}:0.5", "--base", BASE, "--output", "OUT/m"],
    "fuse": ["merge", f"{LORA}:0.5", "--fuse-into", BASE, "--output", "OUT"],
    "sample": ["sample", "--base", BASE, "--prompt", "a cat", "--steps", "1", "--output", "OUT"],
    "sweep": ["evaluate", "evaluation/guidance_sweep", f"adapters=[{LORA}]", f"base={BASE}", "output=OUT"],
    "compare": ["compare", LORA, "PROJECT/other.safetensors", "--base", BASE, "--output", "OUT"],
    "compose": ["compose", LORA, LORA, "--base", BASE, "--output", "OUT"],
    "brand": ["evaluate", "evaluation/brand", f"run={LORA}", "style=null", f"base={BASE}", "output=OUT"],
    "speed": ["evaluate", "evaluation/speed", "output=OUT"],
    "pretrain": ["train", "pretrain/tiny_sd", "output=OUT"],
    "quickstart": ["quickstart", "--output", "OUT"],
    "finetune": ["finetune", "asset:brand", "--base", BASE, "--output", "OUT"],
    "cp": ["cp", "configs/quickstart.yaml", "OUT"],
}  # fmt: skip


def a_file(place: Path) -> Path:
    (place / "taken").write_text("mine")
    return place / "taken"


def within_a_file(place: Path) -> Path:
    return a_file(place) / "run"


def dangling(place: Path) -> Path:
    (place / "link").symlink_to(place / "nowhere" / "at" / "all")
    return place / "link"


def loop(place: Path) -> Path:
    (place / "one").symlink_to(place / "two")
    (place / "two").symlink_to(place / "one")
    return place / "one"


def too_long(place: Path) -> Path:
    return place / ("x" * 300)


def nul(place: Path) -> Path:
    return Path(f"{place}/a\0b")


def device(place: Path) -> Path:
    return Path("/dev/full")


def read_only(place: Path) -> Path:
    return mounted(place, "ro") / "run"


def full(place: Path) -> Path:
    folder = mounted(place, "size=4k")
    (folder / "all").write_bytes(b"x" * 4096)
    return folder / "run"


def mounted(place: Path, options: str) -> Path:
    """A file system in memory with these mount options; skips where nothing may be mounted."""
    (place / "disk").mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place / "disk")]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    return place / "disk"


CROOKED: list[Callable[[Path], Path]] = [
    a_file, within_a_file, dangling, loop, too_long, nul, device, read_only, full,
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder for the crooked output; what is mounted there is taken away again."""
    yield tmp_path
    if os.path.ismount(tmp_path / "disk"):
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def left(place: Path) -> dict[str, str]:
    """All below a folder: links with where they lead, files with their bytes."""
    found = {}
    for path in sorted(place.rglob("*")):
        link = os.readlink(path) if path.is_symlink() else ""
        found[str(path.relative_to(place))] = link or (
            path.read_bytes().hex() if path.is_file() else "folder"
        )
    return found


def cases() -> Iterator[Any]:
    """All pairs; fast are all verbs with one of the places, and all places with one of the verbs."""
    for verb in VERBS:
        for crooked in CROOKED:
            by_config = any("=OUT" in word for word in VERBS[verb])
            # no argument of a process can hold NUL; a file may well be copied to a device
            if (crooked is nul and not by_config) or (crooked is device and verb == "cp"):
                continue
            fast = verb == "encode" or crooked is within_a_file
            marks = [] if fast else [pytest.mark.slow]
            yield pytest.param(verb, crooked, id=f"{verb}-{crooked.__name__}", marks=marks)


@pytest.mark.parametrize(("verb", "crooked"), cases())
def test_a_place_that_cannot_be_written(
    verb: str, crooked: Callable[[Path], Path], project: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = crooked(place)
    before = left(place)
    monkeypatch.chdir(place)
    sentence = said(*(filled(word, project, out) for word in VERBS[verb]))
    names = [str(out), str(out.parent), str(place / "taken")]
    if crooked is nul:  # the config's loader has the word, which names the key
        names = ["output: ", "data.cache: "]
    assert any(name in sentence for name in names), sentence
    assert left(place) == before


def filled(word: str, project: Path, out: Path) -> str:
    """A word of `VERBS` with the places put in; within `key=value` as YAML can spell any name."""
    quoted = json.dumps(str(out)) if "=OUT" in word else str(out)
    return word.replace("PROJECT", str(project)).replace("OUT", quoted)


def said(*words: str) -> str:
    """The one sentence that the command ends with."""
    done = CliRunner().invoke(app, list(words))
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2, done.output
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.output
    sentence = done.stderr.partition("error: ")[2].strip()
    assert "\n" not in sentence, sentence
    return sentence


IN_PLACE = {
    "report": ["report", "OUT"],
    "quality": ["evaluate", "evaluation/quality", "run=OUT", "count=1", "batch_size=1"],
    "export": ["export", "OUT"],
    "train": ["train", "PROJECT/distill.yaml", "output=OUT", "steps=2"],
}


@pytest.mark.parametrize(
    "verb", [pytest.param(v, marks=[] if v == "report" else [pytest.mark.slow]) for v in IN_PLACE]
)
def test_a_run_on_a_disk_that_has_become_read_only(verb: str, project: Path, place: Path) -> None:
    run = mounted(place, "size=64m") / "run"
    shutil.copytree(project / "run", run)
    subprocess.run(["mount", "-o", "remount,ro", str(run.parent)], check=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    sentence = said(*(filled(word, project, run) for word in IN_PLACE[verb]))
    assert str(run) in sentence and "Read-only file system" in sentence, sentence
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
