"""The Python API: docs/api.md runs as it stands, imports are lazy, types right, mistakes exceptions."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lcm_kit
from lcm_kit import console, sample, workflow
from lcm_kit.api import pictures, stages
from lcm_kit.api.calls import call
from lcm_kit.config.load import RECIPES, dump
from lcm_kit.evaluation import recommended
from lcm_kit.lora import locate as lora_file
from lcm_kit.lora import merge_files, structure, verify
from lcm_kit.lora.metadata_reading import Recommended
from tests import broken, vision_language
from tests.loras import random_lora
from tests.recipes.small import configure, draw_little, environment, prepare
from tests.recipes.verbs import STORY, verbs
from tests.runs import build_run

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
CALLS = [name for name in lcm_kit.__all__ if inspect.isfunction(getattr(lcm_kit, name))]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(1))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_loads_nothing() -> None:
    heavy = {"torch", "diffusers", "transformers", "pydantic", "yaml", "numpy", "rich", "typer", "PIL"}
    code = (
        "import sys, lcm_kit\n"
        "names = dir(lcm_kit)\n"
        "from lcm_kit import UserError, __version__\n"
        f"print(sorted({heavy!r} & set(sys.modules)), 'distill' in names, issubclass(UserError, ValueError))"
    )
    assert python(code) == "[] True True"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lcm_kit' has no attribute 'distil'"):
        lcm_kit.distil  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", lcm_kit.__all__)
def test_no_name_is_a_module_of_the_kit(name: str) -> None:
    """Importing the module would put it in the function's place."""
    assert not (ROOT / "lcm_kit" / name).exists() and not (ROOT / "lcm_kit" / f"{name}.py").exists()


def test_the_stub_names_what_there_is() -> None:
    tree = ast.parse((ROOT / "lcm_kit" / "__init__.pyi").read_text())
    stub = {
        alias.asname: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert stub == lcm_kit._PLACES  # type: ignore[attr-defined]
    assert {*stub, "__version__"} == set(lcm_kit.__all__) <= set(dir(lcm_kit))


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_typed_and_told_of(name: str) -> None:
    function = getattr(lcm_kit, name)
    signature = inspect.signature(function)
    assert signature.return_annotation not in (inspect.Signature.empty, "Any", "None")
    assert all(each.annotation is not inspect.Parameter.empty for each in signature.parameters.values())
    told = " ".join((inspect.getdoc(function) or "").split())
    assert "Raises `UserError`" in told and f"lcm_kit.{name}(" in told  # its errors, and an example
    assert f"| `{name}(" in PAGE


def test_no_recipe_has_a_key_that_a_call_takes_for_itself() -> None:
    keys = {field.name for schema in RECIPES.values() for field in fields(schema)}
    assert not keys & {"overrides", "verbose", "config"}


@pytest.fixture
def studio(
    sd_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Any]]:
    """What the page takes for granted: pictures, a base, a config; and every stage made short."""
    draw_little(monkeypatch)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sd_base("epsilon"), "my/base")
    keys = prepare(tmp_path / "small", Path("my/base"))
    shutil.copytree("small/images", "my_pictures")
    shutil.copytree("small/images", "new_pictures", ignore=shutil.ignore_patterns("*.txt", "*.jsonl"))
    vision_language.blip(Path("models/blip"))
    Path("prompts.txt").write_text("a cat\na dog\n")
    Path("my.yaml").write_text(dump(configure(keys, Path("runs/small"))))
    words = verbs(tmp_path, Path("my/base"))["quality"].words[3:]  # of an evaluation of two prompts
    load, tell, stages_of = stages.load_config, workflow.finetune, workflow.stages_of

    def load_little(config: Any, /, overrides: Any = (), **keys: Any) -> Any:
        return load(config, [*overrides, *words] if config == "evaluation/quality" else overrides, **keys)

    def tell_little(folder: str, base: Any, output: Any, overrides: Any, **more: Any) -> Path:
        return tell(folder, base, output, [*overrides, *STORY], **more)

    monkeypatch.setattr(stages, "load_config", load_little)
    monkeypatch.setattr(lcm_kit, "load_config", load_little)
    monkeypatch.setattr(workflow, "finetune", tell_little)
    # both trainings, and the style's export: tests/recipes/test_story.py runs the other stages
    monkeypatch.setattr(workflow, "stages_of", lambda told: list(stages_of(told))[:3])
    return tmp_path, keys


@pytest.mark.slow  # trains and evaluates: half a minute
def test_the_page_runs_as_it_stands(studio: tuple[Path, dict[str, Any]]) -> None:
    """Three trainings and all that is done with them, one after another in one process."""
    made: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/api.md", "exec"), made)
    assert made["run"] == Path("runs/small") and (made["run"] / "adapter").is_dir()
    assert {form: path.is_file() for form, path in made["files"].items()} == {
        "kohya": True, "diffusers": True,
    }  # fmt: skip
    assert (made["config"].optimizer.lr, made["config"].seed) == (3e-4, 7)
    assert [(each.folder.name, each.rows, each.encoded) for each in made["reports"]] == [("cache", 8, 0)]
    done = made["made"]
    assert (done.run / "adapter" / "lora.safetensors").is_file() and done.style.is_file()
    assert {name: path.relative_to("runs/mine").as_posix() for name, path in asdict(done).items()} == {
        "run": ".", "apps": "export/mine.safetensors", "diffusers": f"export/{lora_file.NAME}",
        "style": "style/export/style.safetensors", "card": "export/README.md", "report": "report.html",
    }  # fmt: skip
    pictures_there = len([path for path in Path("new_pictures").iterdir() if path.suffix == ".png"])
    assert made["done"].rows == len(made["accepted"].files) + made["accepted"].rejected == pictures_there > 0
    assert isinstance(made["images"], list) and [image.size for image in made["images"]] == [(64, 64)] * 2
    with Image.open("fox.png") as opened:
        assert opened.tobytes() == made["images"][0].tobytes()
    assert made["use"] is None  # nothing was measured
    assert made["settings"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert isinstance(made["image"], Image.Image) and "lcm" in made["pipe"].get_active_adapters()
    assert isinstance(made["checked"], verify.Report) and made["checked"].rows[0].title == "diffusers"
    assert [path.name for path in made["converted"].reports] == ["small_diffusers.safetensors"]
    assert isinstance(made["merged"], merge_files.Merged)
    assert {path.name for path in made["merged"].reports} == {
        "merged_diffusers.safetensors", "merged_kohya.safetensors",
    }  # fmt: skip
    assert all(path.is_file() for path in [*made["converted"].reports, *made["merged"].reports])
    assert (made["fused"] / "model_index.json").is_file()
    assert made["results"] == made["run"] / "results.json" and made["page"] == made["run"] / "report.html"
    assert made["results"].is_file() and made["page"].is_file()


def test_a_training_in_another_thread_prints_nothing(
    studio: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    """As a notebook's or a server's: no signals there, and the keywords alone are a config."""
    _, keys = studio
    given = {key: value for key, value in keys.items() if key != "recipe"}
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(lambda: lcm_kit.distill(output=Path("runs/thread"), **given)).result()
    assert run == Path("runs/thread") and (run / "adapter" / "lora.safetensors").is_file()
    assert capfd.readouterr() == ("", "")
    assert lcm_kit.distill(output=run, verbose=True, **given) == run
    assert "finished, 4 of 4 steps; nothing to do" in capfd.readouterr().out


def test_mistakes_are_exceptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nowhere.safetensors").write_bytes(b"")
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: lcm_kit.load_config("nowhere"), "config 'nowhere': there is no such file"),
        (lambda: lcm_kit.load_config("quickstart", stepz=3, seed="x"), "2 mistakes"),
        (lambda: lcm_kit.load_config("quickstart", adapter={"rank": 0}), "adapter.rank: 0 is not allowed"),
        (
            lambda: lcm_kit.load_config("quickstart", steps=object()),
            "steps: a object is no value of a config",
        ),
        (lambda: lcm_kit.distill(steps=3), "config train/distill: output: missing"),
        (lambda: lcm_kit.distill("finetune/tiny_brand"), "is for train/finetune; give one for train/distill"),
        (lambda: lcm_kit.train("evaluation/quality"), "is for evaluation/quality; run `lcm-kit evaluate"),
        (lambda: lcm_kit.evaluate("quickstart"), "is for train/distill; run `lcm-kit train"),
        (lambda: lcm_kit.encode("evaluation/quality"), "has no data to encode"),
        (lambda: lcm_kit.finetune("nowhere", "asset:tiny-sd"), "folder 'nowhere': there is no such folder"),
        (
            lambda: lcm_kit.finetune("asset:brand", "asset:tiny-sd", style={"output": "x"}),
            "style.output is dec",
        ),
        (lambda: lcm_kit.export_run("nowhere"), "nowhere"),
        (lambda: lcm_kit.verify("nowhere.safetensors"), "nowhere.safetensors"),
        (lambda: lcm_kit.verify("x", alpha=float("nan")), "alpha nan is out of range"),
        (lambda: lcm_kit.convert("x", rank=0), "rank 0 is out of range; give a number from 1 to 65536"),
        (lambda: lcm_kit.merge({"a": 1.0}), "there is nothing to merge"),
        (lambda: lcm_kit.merge({"a": float("nan"), "b": 1.0}), "a: weight nan is out of range"),
        (lambda: lcm_kit.recommended_for("nowhere"), "'nowhere' is not a run's folder"),
        (lambda: lcm_kit.sample_images([]), "there is no prompt to draw"),
        (lambda: lcm_kit.sample_images("a", count=0), "count 0 is out of range"),
        (lambda: lcm_kit.sample_images("a", weight=float("inf")), "weight inf is out of range"),
        (lambda: lcm_kit.sample_images("a", dtype="int8"), "dtype 'int8' cannot be drawn in"),
        (lambda: lcm_kit.load_into(object(), "nowhere"), "'nowhere' is not a run's folder"),
        (lambda: lcm_kit.write_report("nowhere"), "has no results.json"),
    ]
    for mistake, sentence in wrong:
        with pytest.raises(lcm_kit.UserError, match=re.escape(sentence)):
            mistake()
    assert [path.name for path in tmp_path.iterdir()] == ["nowhere.safetensors"]


def test_what_the_file_system_refuses_is_a_sentence_and_a_bug_is_not() -> None:
    with pytest.raises(lcm_kit.UserError, match="x.txt: No such file or directory; check that"), call(False):
        open("/nowhere/x.txt")  # noqa: SIM115
    with pytest.raises(ZeroDivisionError), call(False):
        print(1 / 0)


def test_a_silent_call_leaves_the_printing_of_others_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging

    logging.enable_progress_bar()
    with call(verbose=False):
        console.say("one")
        console.show(console.Table("two"))
        console.rule("3", "three")
        with console.Progress() as bar:
            bar.add_task("four", total=1)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(console.say, "of another thread").result()
        assert not logging.is_progress_bar_enabled()
    assert capsys.readouterr() == ("of another thread\n", "")
    assert logging.is_progress_bar_enabled()
    with call(verbose=True):
        console.say("five")
    assert capsys.readouterr().out == "five\n"


def test_a_pipeline_draws_as_the_kit_does(
    sd_base: Callable[..., Path], sdxl_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what was measured for the LoRA; and it is as it was where another base's LoRA is refused."""
    base = str(sd_base("epsilon"))
    run = build_run(tmp_path / "run", Path(base))
    lcm_kit.export_run(run, format="diffusers", dtype="float32")
    file = run / lora_file.ADAPTER_FILE
    pipe = sample.pipeline(base)
    own = pipe.scheduler
    other = structure.of_base(str(sdxl_base))
    broken.save(tmp_path / "xl.safetensors", broken.kohya_without_alphas(random_lora(other), other))
    with pytest.raises(lcm_kit.UserError, match="xl.safetensors is not whole"):
        lcm_kit.load_into(pipe, tmp_path / "xl.safetensors")
    assert pipe.scheduler is own and pipe.get_list_adapters() == {}
    with pytest.raises(lcm_kit.UserError, match="a object has no UNet"):
        lcm_kit.load_into(object(), file)

    advice = Recommended("Use 2 steps of TCD.", "tcd", 2, 1.5, 0.7)
    monkeypatch.setattr(recommended, "of_run", lambda run, file: advice)
    assert lcm_kit.recommended_for(run) == advice
    settings = lcm_kit.load_into(pipe, run, guidance_scale=2.0)
    assert settings == {"num_inference_steps": 2, "guidance_scale": 2.0, "eta": 0.3}
    streams = sample.generators(5, 0, 1)
    noise = torch.randn((4, 16, 16), generator=streams[0])[None]
    drawn = pipe("a cat", **settings, latents=noise, generator=streams, output_type="latent").images
    kit = sample.pipeline(base)
    sample.load_adapter(kit, file, 0.7)
    wanted = sample.latents(kit, ["a cat"], sampler="tcd", steps=2, guidance_scale=2.0, seed=5)
    assert torch.equal(drawn, wanted)

    (image,) = lcm_kit.sample_images("a cat", adapter=run, base=base, guidance_scale=2.0, seed=5)
    assert image.tobytes() == sample.to_pil(sample.decode(kit, wanted))[0].tobytes()
    plain = lcm_kit.sample_images(["a cat", "a dog"], base=base, steps=1, width=32, count=2)
    assert [each.size for each in plain] == [(32, 32)] * 4


def test_the_command_line_and_a_program_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    how = pictures.drawing(["a  cat"], base="b", sampler="ddim", steps=3, width=64, seed=4, dtype="float16")
    assert (how.base, how.prompts, how.title) == ("b", ["a cat"], "drawing 1 of b in 3 steps")
    assert how.settings["batch_size"] == "auto" and how.settings["decoder"] is None
    assert how.settings["size"] == (64, 64) and how.settings["dtype"] == torch.float16
    seen: list[Any] = []
    monkeypatch.setattr(sample, "draw_images", lambda *given, **more: seen.append((given, more)) or [])
    assert lcm_kit.sample_images("a  cat", base="b", sampler="ddim", steps=3, width=64, seed=4) == []
    ((given, more),) = seen
    assert given == ("b", ["a cat"]) and {**more, "dtype": torch.float16} == {
        **how.settings, "batch_size": "auto", "device": None, "tiling": False, "compile": False,
        "emphasis": None,
    }  # fmt: skip


@pytest.mark.parametrize("loras", [["run"], [("a", 1.0, 2)], ["ab"]])
def test_loras_without_weights_are_a_sentence(loras: Any, tmp_path: Path) -> None:
    with pytest.raises(lcm_kit.UserError, match=r"LoRAs are given as \{file: weight\} or as pairs"):
        lcm_kit.merge(loras, tmp_path / "out", base="asset:tiny-sd")
