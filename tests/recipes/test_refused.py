"""What is refused leaves nothing behind: no folder, no file, whatever verb it is and whatever is wrong."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lcm_kit.cli.main import app
from lcm_kit.config.load import dump
from tests.recipes.small import configure


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Place:
    """A folder that commands run in, with a cache, a run and things that are refused."""

    def __init__(self, folder: Path, keys: dict[str, Any]) -> None:
        self.folder, self.keys = folder, keys
        inputs = folder / "inputs"
        inputs.mkdir()
        (inputs / "pickled.safetensors").write_bytes(pickle.dumps({"w": 1}))
        torch.save({"w": torch.zeros(2)}, inputs / "base.ckpt")
        (inputs / "control.txt").write_bytes(b"a \x1b[2J fox\n")
        (inputs / "bad").mkdir()
        (inputs / "bad/a.png").write_bytes(b"no picture")
        (inputs / "bad/a.txt").write_text("a fox")

    def config(self, recipe: str, **changes: Any) -> str:
        """A config of a run that is not there yet, with `changes`."""
        keys = {
            key: value for key, value in self.keys.items() if key != "guidance" or recipe == "train/distill"
        }
        made = configure({**keys, "recipe": recipe}, Path("new/run"), **changes)
        (self.folder / "inputs/config.yaml").write_text(dump(made))
        return "inputs/config.yaml"

    def refused(self, monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
        """The sentence with which a command ends, and that it left everything as it was."""
        monkeypatch.chdir(self.folder)
        before = listing(self.folder)
        done = CliRunner().invoke(app, list(args))
        assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
        assert listing(self.folder) == before
        return done.stderr[done.stderr.index("error: ") :]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, distill_keys: dict[str, Any]) -> Place:
    return Place(tmp_path_factory.mktemp("refused"), distill_keys)


PICKLED = {"path": "inputs/pickled.safetensors"}
TRAINING = {
    "a pickled teacher": ({"teacher": {"adapters": [PICKLED]}}, "can run code"),
    "a pickled start": ({"adapter": {"start": [PICKLED]}}, "can run code"),
    "a pickled base": ({"base": {"path": "inputs/base.ckpt"}}, "can run code"),
    "no base": ({"base": {"path": "inputs/none"}}, "is neither a folder nor a hub id"),
    "no prompts": ({"validation": {"prompts": "inputs/none.txt"}}, "there is no such file"),
    "prompts of no text": ({"validation": {"prompts": "inputs/control.txt"}}, "holds a control character"),
    "no control": ({"validation": {"prompts": None, "control": "inputs/none.txt"}}, "there is no such file"),
    "no cache": ({"data": {"cache": "inputs/none"}}, "there is no finished cache"),
    "no run to leave out": ({"data": {"leave_out": "inputs/none"}}, "is not the folder of a run"),
    "an unknown tracker": ({"logging": {"trackers": ["x"]}}, "is not a tracker of accelerate"),
    "half precision on a CPU": ({"precision": "float16"}, "does not train on a CPU"),
}


def _style_too(changes: dict[str, Any]) -> bool:
    """Whether these keys are those of a style as well."""
    return not {"teacher", "adapter"} & changes.keys() and "leave_out" not in changes.get("data", {})


@pytest.mark.parametrize(
    ("recipe", "what"),
    [("train/distill", what) for what in TRAINING]
    + [("train/finetune", what) for what, (changes, _) in TRAINING.items() if _style_too(changes)],
)
def test_training(place: Place, monkeypatch: pytest.MonkeyPatch, recipe: str, what: str) -> None:
    changes, words = TRAINING[what]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert words in place.refused(monkeypatch, "train", place.config(recipe, **changes))


ENCODING = {
    "pictures that are none": ({"data": {"path": "inputs/bad"}}, "1 of 1 records of 'inputs/bad' cannot"),
    "no pictures": ({"data": {"path": "inputs/none"}}, "is neither a folder of images nor a data set"),
    "a pickled base": ({"base": {"path": "inputs/base.ckpt"}}, "can run code"),
    "no base": ({"base": {"path": "inputs/none"}}, "is neither a folder nor a hub id"),
    "no prompts": ({"data": {"source": "teacher", "samples": {"prompts": "inputs/none"}}}, "no such file"),
    "a pickled teacher": (
        {"data": {"source": "teacher"}, "teacher": {"adapters": [PICKLED]}}, "can run code",
    ),
    "no prompts beside pictures": (
        {"data": {"source": "mix", "samples": {"prompts": "inputs/none"}}}, "there is no such file",
    ),
    "a pickled teacher beside pictures": (
        {"data": {"source": "mix"}, "teacher": {"adapters": [PICKLED]}}, "can run code",
    ),
    "no prompts of a style": (
        {"recipe": "train/finetune", "prior": {"prompts": "inputs/none"}}, "no such file",
    ),
    "no general pictures": ({"data": {"regularization": "inputs/none"}}, "there is no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("what", ENCODING)
def test_encoding(place: Place, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    changes, words = ENCODING[what]
    changes = {**changes, "data": {"cache": "new/cache", **changes.get("data", {})}}
    assert words in place.refused(
        monkeypatch, "encode", place.config(**{"recipe": "train/distill", **changes})
    )


P, OUT = "inputs/pickled.safetensors", ("--output", "new/out")
SWEEP, COMPOSE, BRAND = "evaluation/guidance_sweep", "evaluation/compose", "evaluation/brand"
VERBS = {
    "evaluate quality, no run": (("evaluate", "evaluation/quality", "run=new/run"), "new/run"),
    "evaluate quality, pickled base": (
        ("evaluate", "evaluation/tiny_base", "base=inputs/base.ckpt", "run=new/run"), "can run code",
    ),
    "evaluate quality, no prompts": (
        ("evaluate", "evaluation/tiny_base", "prompts=inputs/none", "run=new/run"), "there is no such file",
    ),
    "evaluate sweep, pickled": (
        ("evaluate", SWEEP, f"adapters=[{P}]", "base=asset:tiny-sd", "output=new/sweep"), "can run code",
    ),
    "evaluate sweep, no prompts": (
        ("evaluate", SWEEP, "adapters=[asset:tiny-lcm-lora]", "prompts=inputs/none", "output=new/sweep",
         "base=asset:tiny-sd"), "there is no such file",
    ),
    "evaluate sweep, no features": (
        ("evaluate", SWEEP, "adapters=[asset:tiny-lcm-lora]", "features=./inputs/none", "output=new/sweep",
         "base=asset:tiny-sd"), "there is no such folder",
    ),
    "evaluate compose, pickled": (
        ("evaluate", COMPOSE, f"style={P}", f"speed={P}", "base=asset:tiny-sd", "output=new"),
        "can run code",
    ),
    "evaluate brand, pickled": (
        ("evaluate", BRAND, f"run={P}", "base=asset:tiny-sd", "output=new/x", "style=null"), "can run code",
    ),
    "evaluate brand, no pictures": (
        ("evaluate", BRAND, "run=asset:tiny-lcm-lora", "brand=inputs/none", "output=new/x", "style=null",
         "base=asset:tiny-sd"), "there is no such folder",
    ),
    "compare": (("compare", P, P, "--base", "asset:tiny-sd", *OUT), "one of them is there twice"),
    "compose": (("compose", P, P, "--base", "asset:tiny-sd", *OUT), "can run code"),
    "export": (("export", "inputs", *OUT), "there is no trained adapter"),
    "convert": (("convert", P, *OUT), "can run code"),
    "convert, no base": (("convert", "inputs/none", "--base", "inputs/none", *OUT), "is neither a folder"),
    "verify": (("verify", P), "can run code"),
    "merge": (("merge", P, P, *OUT), "can run code"),
    "merge into a base": (("merge", P, "--fuse-into", "inputs/base.ckpt", *OUT), "can run code"),
    "sample": (("sample", "--prompt", "a", "--adapter", P, *OUT), "can run code"),
    "sample, pickled base": (("sample", "--prompt", "a", "--base", "inputs/base.ckpt", *OUT), "can run code"),
    "sample, no prompts": (("sample", "--prompts", "inputs/control.txt", *OUT), "a control character"),
    "report": (("report", "inputs"), "has no results.json"),
    "finetune": (("finetune", "inputs/bad", "--base", "asset:tiny-sd", *OUT), "cannot be read"),
    "finetune, pickled base": (
        ("finetune", "asset:brand", "--base", "inputs/base.ckpt", *OUT), "can run code",
    ),
    "finetune, pickled speed": (
        ("finetune", "asset:brand", "--base", "asset:tiny-sd", "--speed", P, *OUT), "can run code",
    ),
    "finetune, no prompts": (
        ("finetune", "asset:brand", "--base", "asset:tiny-sd", "--prompts", "inputs/none", *OUT),
        "no such file",
    ),
    "bench": (("bench", "evaluation/speed", "resolution=63", "output=new/x"), "is not a multiple of 8"),
    "pretrain": (("train", "pretrain/tiny_sd", "renders=0", "output=new/x", "work=new/y"), "renders: 0"),
    "cp": (("cp", "nothing", "new/x"), "is not shipped"),
}  # fmt: skip


@pytest.mark.parametrize("what", VERBS)
def test_verbs(place: Place, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    args, words = VERBS[what]
    assert words in place.refused(monkeypatch, *args)
