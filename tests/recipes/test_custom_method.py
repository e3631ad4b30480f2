"""A method in a user's own file: docs/extending/method.md is followed, and what is wrong with one is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from click.testing import Result
from pydantic import Tag
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from lcm_kit.adapter.folder import read_provenance
from lcm_kit.cli.main import app
from lcm_kit.config.brand import Brand
from lcm_kit.config.load import dump, load
from lcm_kit.config.methods import AnyMethod, Custom, imported
from lcm_kit.config.sweep import Compose, GuidanceSweep, SweptStudent
from lcm_kit.core.methods import DEFAULT, METHODS, MethodInfo
from lcm_kit.core.schedule import SD_BETAS, Schedule, add_noise
from lcm_kit.core.solvers import SOLVERS
from lcm_kit.core.step import consistency_loss
from lcm_kit.errors import UserError
from lcm_kit.evaluation import brand, cells, pairs, recommended
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.provenance import from_json
from lcm_kit.report import plots
from lcm_kit.training import validation
from lcm_kit.training.run_files import config_of
from tests.recipes.small import configure, draw_little

PAGE = (Path(__file__).parents[2] / "docs" / "extending" / "method.md").read_text()
TITLE = "trajectory consistency over short ways"
SCHEDULE = Schedule.from_config(SD_BETAS)
NARROW = """
from dataclasses import dataclass
from lcm_kit.core.methods import LCM

@dataclass(frozen=True)
class Narrow(LCM):
    title = "a narrower LCM"
    timestep_scaling: float = 0.001
"""


def block(language: str) -> str:
    """The first block of code of a language in the page."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def said(done: Result) -> str:
    """What a command said, on one line."""
    return " ".join(done.output.split())


def write(keys: dict[str, Any], file: str = "config.yaml") -> Path:
    Path(file).write_text(yaml.safe_dump(keys, sort_keys=False))
    return Path(file)


def config_keys(keys: dict[str, Any], output: str, method: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(dump(configure(keys, Path(output), **changes))), "method": method}


# -- The page, followed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(distill_keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's method trained and exported by the command line, in a folder of its own."""
    folder = tmp_path_factory.mktemp("custom")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_little(patch)
        Path("my_methods.py").write_text(block("python"))
        Path("prompts.txt").write_text("a cat\na dog\na bird\n")
        watched = {"prompts": "prompts.txt", "count": 2}
        keys = config_keys(
            distill_keys, "runs/short", yaml.safe_load(block("yaml"))["method"], validation=watched
        )
        write(keys, "my_config.yaml")
        for command in block("bash").splitlines():
            done = cli(*command.split()[1:])
            assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, on a machine that has not the file of the method."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    hidden = world / "my_methods.hidden"
    (world / "my_methods.py").rename(hidden)
    for name in [name for name in sys.modules if name.startswith("_lcm_kit_method_")]:
        monkeypatch.delitem(sys.modules, name)
    yield world
    assert not any(name.startswith("_lcm_kit_method_") for name in sys.modules), "its file was imported"
    hidden.rename(world / "my_methods.py")


def test_the_pages_method_is_what_the_page_says(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one picture the exact denoiser is known: a student that is it has no loss, each end is exact."""
    monkeypatch.chdir(world)
    method: Any = imported(load(Path("my_config.yaml"), imports=True).method)  # type: ignore[union-attr]
    times = method.times(SCHEDULE, 50, 5000, torch.Generator().manual_seed(0))
    way = times.s - times.end
    assert bool(((times.end >= 0) & (way >= 0) & (way <= 500) & (times.s < times.t)).all())
    far = way[times.s >= 500].float()
    assert abs(float(far.mean()) - 250) < 15 and far.min() < 5 and far.max() > 495  # uniform on 0 .. 500
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.ones(1, 4, 8, 8)

    def exact(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = SCHEDULE.at(t)
        return picture.expand_as(x), (x - alpha * picture) / sigma

    x = add_noise(SCHEDULE, picture.expand(5000, -1, -1, -1), noise, times.t)
    landed = method.endpoint(SCHEDULE, x, *exact(x, times.t), times.t, times.end)
    truth = add_noise(SCHEDULE, picture.expand(5000, -1, -1, -1), noise, times.end)
    assert torch.allclose(landed, truth, atol=1e-4)
    found = consistency_loss(
        method=method, solver=SOLVERS["ddim"], loss=lambda a, b: (a - b).square().mean((1, 2, 3)),
        schedule=SCHEDULE, teacher=exact, target=exact, student=exact, x0=picture.expand(5000, -1, -1, -1),
        noise=noise.expand(5000, -1, -1, -1), times=times, teacher_weight=1.0,
    )  # fmt: skip
    assert float(found.max()) < 1e-8


def test_it_is_on_the_card_and_in_metadata(here: Path) -> None:
    card = Path("runs/short/export/README.md").read_text()
    assert f"| method | {TITLE} |" in card and f"It was made by {TITLE}" in card
    assert "| sampler | DDIM, trailing timesteps |\n| steps | 4; try 2 to 8 |" in card
    assert 'DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", ' in card
    assert "LCM" not in card.replace("The LCM paper's w", "")
    for file in Path("runs/short/export").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
        assert told["lcm_kit.method"] == "custom" and told["lcm_kit.sampling_steps"] == "2-8"
        kept = json.loads(told["lcm_kit.provenance"])["method"]
        del kept["sha256"]
        assert kept == {"title": TITLE, "samplers": ["ddim"], "steps": [2, 4, 8], "reach": 500}
        assert f"distilled by {TITLE} in 4 optimizer steps" in told["modelspec.description"]
        hint = "Sampler DDIM, trailing timesteps, 4 steps (2 to 8), guidance_scale / CFG 1.0"
        assert told["modelspec.usage_hint"].startswith(hint)
        assert "my_methods" not in "".join(told.values()), "a path tells about its owner's machine"
        assert provenance_from_header(told, "x").student == MethodInfo("custom", TITLE, ("ddim",), (2, 4, 8))
        assert str(recommended.settings(None, recommended.method_of(file))).startswith("ddim, 4 steps")


def test_it_is_read_without_its_file(here: Path) -> None:
    """Nothing that takes a run imports anything, and it says what the run was trained by."""
    facts = json.loads(Path("runs/short/adapter/adapter.json").read_text())
    keys = {
        "name": "custom",
        "path": "my_methods.py:Short",
        "sha256": facts["method"]["sha256"],
        "reach": 500,
    }
    says = {"title": TITLE, "samplers": ["ddim"], "steps": [2, 4, 8]}
    assert facts["method"] == keys | says and len(keys["sha256"]) == 64
    assert read_provenance(Path("runs/short/adapter")).student.title == TITLE
    assert config_of(Path("runs/short"))["method"] == keys
    method = load(Path("runs/short/config.yaml")).method  # type: ignore[union-attr]
    with pytest.raises(UserError, match="was read without importing its file"):
        imported(method)
    shown = cli("show", "my_config.yaml")
    assert shown.exit_code == 0 and "path: my_methods.py:Short" in shown.output
    refused = cli("check", "my_config.yaml")
    assert refused.exit_code == 2 and "my_methods.py cannot be read (No such file" in said(refused)


def test_it_is_exported_verified_evaluated_and_reported_without_its_file(here: Path) -> None:
    base = json.loads(Path("runs/short/adapter/adapter.json").read_text())["base"]["path"]
    few = ["prompts=prompts.txt", "batch_size=6"]
    for words in (
        ["export", "runs/short", "--dtype", "float32"],
        ["verify", "runs/short/export/short.safetensors", "--base", base],
        ["evaluate", "evaluation/quality", "run=runs/short", *few, "count=2", "teacher_steps=2",
         "unet_calls=[2]", "pictures=1"],
        ["report", "runs/short"],
    ):  # fmt: skip
        done = cli(*words)
        assert done.exit_code == 0, done.output
    cells_of_run = json.loads(Path("runs/short/results.json").read_text())["cells"]
    drawn = [(cell["sampler"], cell["steps"]) for cell in cells_of_run if cell["kind"] == "student"]
    assert drawn == [("ddim", 2), ("ddim", 4), ("ddim", 8)]
    assert TITLE in Path("runs/short/report.html").read_text()
    assert "student (DDIM)" in plots.by_calls(cells_of_run, "pixel_distance", "distance")


def test_it_is_planned(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    done = cli("plan", "my_config.yaml", "output=runs/planned")
    assert done.exit_code == 0, done.output


def test_every_evaluation_draws_as_the_method_says_unless_the_config_does() -> None:
    other = MethodInfo("custom", TITLE, ("ddim", "tcd"), (2, 4))
    swept = GuidanceSweep(recipe="evaluation/guidance_sweep", adapters=("a", "b"))
    grid = cells.plan(swept, {"a": DEFAULT, "b": other})
    drawn = {(c.adapter, c.sampler, c.steps) for c in grid if c.kind == "student"}
    assert drawn == {("a", "lcm", n) for n in (1, 2, 4, 8)} | {("b", "ddim", n) for n in (2, 4)}
    untrained = [(c.sampler, c.steps) for c in grid if c.kind == "plain" and c.guidance_scale == 1]
    assert ("lcm", 4) in untrained and ("ddim", 4) in untrained, "the base alone as each adapter"
    asked = SweptStudent(samplers=("tcd",), steps=(3,))
    only = cells.plan(replace(swept, student=(asked,)), {"b": other})
    assert {(c.sampler, c.steps) for c in only if c.kind == "student"} == {("tcd", 3)}

    judged = Brand(recipe="evaluation/brand", run="a")
    students = [(c.sampler, c.steps) for c in brand.plan(judged, other) if c.kind == "student"]
    assert students == [("ddim", 2), ("ddim", 4)]
    students = [(c.sampler, c.steps) for c in brand.plan(judged, DEFAULT) if c.kind == "student"]
    assert students == [("lcm", n) for n in (1, 2, 4, 8)]
    pair = Compose(recipe="evaluation/compose", style="a", speed="b")
    assert {c.sampler for c in pairs.plan(pair, other) if c.kind == "student"} == {"ddim"}
    assert {c.sampler for c in pairs.plan(pair, DEFAULT) if c.kind == "student"} == {"lcm"}
    assert validation.student_steps(DEFAULT) == (1, 2, 4)
    assert validation.student_steps(other) == (1, 2, 4)
    assert validation.student_steps(replace(other, steps=(6, 8, 9))) == (1, 6, 8)


# -- Trained as what it says ---------------------------------------------------------------------------------


def losses(run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_it_trains_as_lcm_with_that_constant_and_goes_on_with_the_same_code_alone(
    distill_keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    Path("mine.py").write_text(NARROW)
    own = {"name": "custom", "path": "mine.py:Narrow"}
    for name, method in (("own", own), ("lcm", {"timestep_scaling": 0.001}), ("plain", {})):
        done = cli("train", write(config_keys(distill_keys, name, method), f"{name}.yaml"))
        assert done.exit_code == 0, done.output
    weights = [load_file(f"{name}/adapter/lora.safetensors") for name in ("own", "lcm")]
    assert losses("own") == losses("lcm") != losses("plain")
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])

    # Two steps and two more are four; from another place of the file, too
    half = config_keys(distill_keys, "half", own, steps=2)
    assert cli("train", write(half)).exit_code == 0
    Path("elsewhere").mkdir()
    Path("mine.py").rename("elsewhere/mine.py")
    more = {**half, "steps": 4, "method": {**own, "path": "elsewhere/mine.py:Narrow"}}
    done = cli("train", write(more))
    assert done.exit_code == 0 and losses("half") == losses("own"), done.output

    # Another code is another run
    Path("elsewhere/mine.py").write_text(NARROW + "\n# changed\n")
    refused = cli("train", write({**more, "steps": 6}))
    assert refused.exit_code == 2 and "the Python file of the method changed since" in said(refused)
    again = cli("train", "half/config.yaml", "steps=6")
    assert again.exit_code == 2 and "elsewhere/mine.py has changed since" in said(again)
    other = {**more, "method": {**own, "path": "elsewhere/mine.py:Other"}}
    Path("elsewhere/mine.py").write_text(NARROW + "\nclass Other(Narrow): pass\n")
    assert cli("train", write(other)).exit_code == 2


# -- Mistakes ------------------------------------------------------------------------------------------------

GOOD = block("python")
MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "wrong key": (GOOD, {"reech": 4}, "method.reech: unknown key; did you mean `reach`?"),
    "key of the other member": (
        GOOD, {"zzz": 4}, "method.zzz: unknown key; allowed here: name, path, sha256, reach",
    ),
    "wrong type": (GOOD, {"reach": "4"}, "method.reach: '4' is not allowed; it must be a whole number"),
    "truth value": (GOOD, {"reach": True}, "method.reach: true is not allowed; it must be a whole number"),
    "no path": (GOOD, {"path": None}, "method.path: null is not allowed; it must be text"),
    "no class named": (GOOD, {"path": "m.py"}, "method.path: m.py is not FILE.py:CLASS, as my_meth"),
    "missing file": (GOOD, {"path": "n.py:A"}, "method.path: n.py cannot be read (No such file or dir"),
    "missing class": (GOOD, {"path": "m.py:A"}, "method.path: m.py has no class A"),
    "no class": ("Short = 3", {}, "method.path: m.py has no class Short"),
    "not frozen": (
        GOOD.replace("(frozen=True)", ""), {},
        "method.path: m.py:Short is no frozen dataclass; write @dataclass(frozen=True) above it",
    ),
    "lacks a function": (
        GOOD.replace("def endpoint", "def end_point"), {},
        "method.path: m.py:Short has not both functions of a method, times and endpoint",
    ),
    "lacks a title": (
        NARROW.replace("Narrow", "Short").replace("title =", "titel ="), {},
        "method.path: m.py:Short has no title of its own, which cards and reports call it by",
    ),
    "odd sampler": (
        GOOD.replace('"ddim"', '"dimm"'), {},
        "method.path: m.py:Short must say its samplers, one or more of lcm, tcd, ddim, as ('lcm', 'tcd')",
    ),
    "odd steps": (
        GOOD.replace("(2, 4, 8)", "(0, 4)"), {},
        "method.path: m.py:Short must say the steps that it serves, whole numbers from 1 to 50",
    ),
    "a field of the kit's name": (
        GOOD.replace("reach: int", "path: int"), {}, "method.path: m.py:Short has a field path, a key of",
    ),
    "an error while it is imported": (
        GOOD + "\nmissing + 1\n", {},
        "method.path: m.py cannot be imported: NameError: name 'missing' is not defined",
    ),
    "it leaves": ("raise SystemExit(3)", {}, "method.path: m.py cannot be imported: SystemExit: 3"),
    "it is no Python": ("class:", {}, "method.path: m.py cannot be imported: SyntaxError: invalid syntax"),
    "a value that it refuses": (
        GOOD + "\n    def __post_init__(self):\n        raise ValueError('reach divides 1000')\n", {},
        "method: reach divides 1000",
    ),
    "a key that is no name": (GOOD, {"a b": 1}, "method.a b: it is no name of a key; a key of a method is"),
    "another file": (GOOD, {"sha256": "ab"}, "method.sha256: m.py has changed since; put it back, or remove"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, keys, sentence = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(code)
    method = {"name": "custom", "path": "m.py:Short", **keys}
    file = write({"recipe": "train/distill", "output": "x", "method": method})
    with pytest.raises(UserError) as caught:
        load(file, imports=True)
    told = str(caught.value)
    assert told.startswith(f"config config.yaml: {sentence}") and "\n" not in told
    assert not Path("x").exists()


KNOWN = "lcm, tcd, pcm, progressive, dmd, custom"


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (
            {"name": "lmc"},
            "method.name: 'lmc' is not allowed; it must be one of " + KNOWN + "; did you mean `lcm`?",
        ),
        (
            {"name": 3},
            "method.name: 3 is not allowed; it must be one of " + KNOWN,
        ),
        (
            "lcm",
            "method: 'lcm' is not allowed; it must be a block of keys, whose name is one of " + KNOWN,
        ),
        ({"name": "custom"}, "method.path: missing; it must be text"),
        ({"sigma_dta": 1}, "method.sigma_dta: unknown key; did you mean `sigma_data`?"),
        ({"zzz": 1}, "method.zzz: unknown key; allowed here: name, sigma_data, timestep_scaling"),
    ],
)
def test_a_mistake_within_the_union(method: Any, sentence: str, tmp_path: Path) -> None:
    """Names and keys are those of the member that is meant; without a name that is the default."""
    file = tmp_path / "config.yaml"
    keys = {"recipe": "train/distill", "output": "x", "method": method}
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    with pytest.raises(UserError) as caught:
        load(file)
    assert str(caught.value) == f"config {file}: {sentence}"


def test_a_config_of_it_comes_back_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(GOOD)
    keys = {"recipe": "train/distill", "output": "x", "method": {"name": "custom", "path": "m.py:Short"}}
    config: Any = load(write(keys), imports=True)
    Path("again.yaml").write_text(dump(config))
    assert load(Path("again.yaml"), imports=True) == config
    assert type(config.method).__mro__[1].__name__ == "Short" and isinstance(config.method, Custom)
    record: Any = load(Path("again.yaml"))
    assert record.method.reach == 500 and type(record.method).__mro__[1] is Custom


def header(rest: dict[str, Any]) -> dict[str, str]:
    own = {"lcm_kit.metadata": "1", "lcm_kit.method": "custom", "lcm_kit.provenance": json.dumps(rest)}
    return own


def test_a_run_that_somebody_gave_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its config.yaml nor its adapter.json nor the header of its file brings code with it."""
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text(GOOD + "\nopen('ran', 'w')\n")
    method = {"name": "custom", "path": "evil.py:Short", "__class__": "x"}
    file = write({"recipe": "train/distill", "output": "x", "method": method})
    with pytest.raises(UserError, match="it is no name of a key"):
        load(file)
    del method["__class__"]
    write({"recipe": "train/distill", "output": "x", "method": method})
    assert config_of(tmp_path)["method"]["path"] == "evil.py:Short"
    info = {"title": "t", "samplers": ["evil.py:Short"], "steps": [1], "tags": []}
    for said_by in (
        from_json({"method": {**method, **info}}),
        provenance_from_header(header({"method": info}), "x"),
    ):
        assert (
            said_by.student == MethodInfo("custom", "custom") and said_by.student.sampler == DEFAULT.sampler
        )
    broken = header({}) | {"lcm_kit.provenance": "[" * 9999}
    assert provenance_from_header(broken, "x").student == MethodInfo("custom", "custom")
    assert cli("show", file).exit_code == 0 and not Path("ran").exists()
    load(file, imports=True)
    assert Path("ran").exists(), "this test could not fail"


@pytest.mark.parametrize(
    "said",
    [
        None, [], {}, {"name": "custom"}, {"name": "custom", "title": 3},
        {"name": "custom", "title": "t", "samplers": "lcm", "steps": [1], "tags": []},
        {"name": "custom", "title": "t", "samplers": ["lcm"], "steps": [True], "tags": []},
        {"name": "custom", "title": "t", "samplers": ["lcm"], "steps": [1] * 101, "tags": []},
        {"name": "custom", "title": "t" * 201, "samplers": ["lcm"], "steps": [1], "tags": []},
    ],
)  # fmt: skip
def test_what_is_no_method_info_is_none(said: Any) -> None:
    assert MethodInfo.read(said) is None


def test_the_union_has_every_method_of_the_kit() -> None:
    members = get_args(get_args(AnyMethod)[0])
    tags = [meta.tag for member in members for meta in get_args(member) if isinstance(meta, Tag)]
    assert tags == [*METHODS, "custom"] and [get_args(member)[0] for member in members] == [
        *METHODS.values(),
        Custom,
    ]


def test_a_config_is_read_without_torch() -> None:
    code = "import sys, lcm_kit.config.load; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
