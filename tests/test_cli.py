"""The command line: what each verb calls with what, exit codes, and that help loads nothing heavy."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner, Result

from lcm_kit import __version__
from lcm_kit.cli.main import app
from lcm_kit.config import shipped
from lcm_kit.config.load import load
from lcm_kit.core.methods import DEFAULT
from lcm_kit.errors import UserError
from lcm_kit.evaluation import recommended
from lcm_kit.lora.provenance import Recommended
from tests.measured import cell, results


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


HEAVY = {"torch", "diffusers", "transformers", "pydantic", "yaml", "numpy", "accelerate", "PIL"}
AT_WORK = {
    "lcm_kit.api",
    "lcm_kit.config.load",
    "lcm_kit.console",
    "lcm_kit.io.files",
    "lcm_kit.config.shipped",
}


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], HEAVY | {f"lcm_kit.{name}" for name in AT_WORK}),
        ([], HEAVY | {f"lcm_kit.{name}" for name in AT_WORK}),
        (["--version"], HEAVY),
        (["ls"], HEAVY - {"pydantic"}),  # typer's own, since 0.29, to read the options of a verb that runs
    ],
)
def test_help_imports_nothing_heavy(words: list[str], absent: set[str]) -> None:
    code = (
        "import sys, lcm_kit.cli.main\n"
        "from typer.testing import CliRunner\n"
        f"assert CliRunner().invoke(lcm_kit.cli.main.app, {words}).output\n"
        f"print(sorted({absent} & set(sys.modules)))\n"
    )
    assert python("-c", code).stdout.strip() == "[]"


def test_a_list_of_verbs_builds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcm_kit.cli import lazy as cli_lazy

    monkeypatch.setattr(cli_lazy._Commands, "__getitem__", lambda self, name: pytest.fail(f"built {name}"))
    assert " finetune " in cli("--help").output


def test_the_module_runs_as_a_program() -> None:
    done = python("-m", "lcm_kit", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"lcm-kit {__version__}")


def test_help_names_every_verb() -> None:
    verbs = [
        "quickstart",
        "finetune",
        "ls",
        "cp",
        "show",
        "check",
        "encode",
        "train",
        "evaluate",
        "export",
        "sample",
        "edit",
        "report",
    ]
    text = cli("--help").output
    assert [verb for verb in verbs if f" {verb} " not in text] == []
    assert all(cli(verb, "--help").exit_code == 0 for verb in verbs)


def test_help_shows_all_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich takes `[default: x]` in a help text for markup and shows nothing of it."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    defaults = 0
    for name, verb in verbs.items():
        shown = " ".join(cli(name, "--help").output.replace("│", " ").split())
        for parameter in verb.params:
            said = [" ".join((getattr(parameter, "help", None) or "").split())]
            if isinstance(parameter.show_default, str):
                said.append(f"[default: ({parameter.show_default})]")
                defaults += 1
            assert [text for text in said if text not in shown] == [], f"{name} {parameter.name}"
    assert defaults >= 13


def test_ls_prints_one_line_a_file() -> None:
    lines = cli("ls").output.splitlines()
    assert [line.split()[0] for line in lines] == shipped.names()


def test_cp_then_show_then_check(tmp_path: Path) -> None:
    assert cli("cp", "configs/pretrain/tiny_sd.yaml", tmp_path / "mine.yaml").exit_code == 0
    shown = cli("show", tmp_path / "mine.yaml", "seed=7")
    assert shown.exit_code == 0 and yaml.safe_load(shown.stdout)["seed"] == 7
    (tmp_path / "resolved.yaml").write_text(shown.stdout)
    assert load(tmp_path / "resolved.yaml") == load(tmp_path / "mine.yaml", ["seed=7"])
    checked = cli("check", tmp_path / "mine.yaml")
    assert checked.exit_code == 0 and checked.output.endswith(f"ok: {tmp_path / 'mine.yaml'}\n")


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Recipes that only note what they were called with."""
    calls: list[tuple[str, Any]] = []

    def load_recipe(name: str) -> SimpleNamespace:
        return SimpleNamespace(main=lambda config: calls.append((name, config)))

    monkeypatch.setattr(shipped, "load_recipe", load_recipe)
    return calls


def test_train_and_evaluate_run_the_recipe_that_the_config_names(recipes: list[tuple[str, Any]]) -> None:
    assert cli("train", "quickstart", "steps=70").exit_code == 0
    assert cli("evaluate", "evaluation/quality", "run=runs/mine").exit_code == 0
    (first, distill), (second, quality) = recipes
    assert (first, distill.steps) == ("train/distill", 70)
    assert (second, quality.run) == ("evaluation/quality", "runs/mine")


@pytest.mark.parametrize(
    ("verb", "config", "right"),
    [("train", "evaluation/quality", "evaluate"), ("evaluate", "quickstart", "train")],
)
def test_a_config_of_another_stage_names_the_right_verb(
    verb: str, config: str, right: str, recipes: list[tuple[str, Any]]
) -> None:
    done = cli(verb, config)
    assert done.exit_code == 2 and f"run `lcm-kit {right} {config}`" in done.stderr and recipes == []


def test_encode_refuses_a_config_without_data() -> None:
    done = cli("encode", "evaluation/quality")
    assert done.exit_code == 2 and "has no data to encode" in done.stderr


def test_encode_draws_the_bases_own_pictures_if_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcm_kit.data import images, prior

    seen: list[str] = []
    monkeypatch.setattr(images, "encode", lambda config, *rest: seen.append("brand"))
    monkeypatch.setattr(prior, "encode", lambda config, *rest: seen.append("prior"))
    assert cli("encode", "finetune/tiny_brand").exit_code == 0 and seen == ["brand"]
    assert cli("encode", "finetune/tiny_brand", "prior.prompts=asset:tiny-sd").exit_code == 0
    assert seen == ["brand", "brand", "prior"]


def test_check_looks_for_the_prompts_of_the_prior() -> None:
    done = cli("check", "finetune/tiny_brand", "prior.prompts=nowhere.txt")
    assert done.exit_code == 2 and "prompts 'nowhere.txt': there is no such file" in done.stderr
    done = cli("check", "finetune/tiny_brand")
    assert done.exit_code == 0 and "480 images with captions" in done.stdout


def test_encode_gets_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcm_kit.data import sources

    seen: list[Any] = []

    def encode(config: Any, share: Any, elsewhere: Any) -> None:
        seen.extend([config, share, elsewhere])

    monkeypatch.setattr(sources, "encode", encode)
    assert cli("encode", "quickstart", "data.resolution=128").exit_code == 0
    assert seen[0].data.resolution == 128 and (seen[1].rank, seen[1].world) == (0, 1) and seen[2] is None


def test_encode_passes_the_options_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcm_kit.data import ray_engine, sources

    seen: list[Any] = []
    monkeypatch.setattr(sources, "encode", lambda config, share, elsewhere: seen.append(elsewhere))
    monkeypatch.setattr(ray_engine.importlib.util, "find_spec", lambda name: True)
    on_ray = ("encode", "quickstart", "--engine", "ray")
    assert cli(*on_ray).exit_code == 0
    assert cli(*on_ray, "--address", "a:1", "--workers", "3", "--gpus", "0.5").exit_code == 0
    assert [(each.address, each.workers, each.gpus) for each in seen] == [(None, None, None), ("a:1", 3, 0.5)]
    for wrong in (("--workers", "0"), ("--gpus", "nan"), ("--gpus", "-1")):
        assert cli(*on_ray, *wrong).exit_code == 2
    assert cli("encode", "quickstart", "--workers", "3").exit_code == 2
    assert cli("encode", "quickstart", "--engine", "spark").exit_code == 2 and len(seen) == 2


def test_export_passes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcm_kit.export import run

    calls: list[Any] = []
    monkeypatch.setattr(run, "export_run", lambda *args, **more: calls.append((*args, *more.items())))
    assert cli("export", "runs/x", "--with-evaluation").exit_code == 0
    assert (
        cli("export", "runs/x", "--format", "kohya", "--dtype", "bfloat16", "--output", "out").exit_code == 0
    )
    assert calls == [
        (Path("runs/x"), "both", "float16", None, ("with_evaluation", True)),
        (Path("runs/x"), "kohya", "bfloat16", Path("out"), ("with_evaluation", False)),
    ]
    assert cli("export", "runs/x", "--dtype", "int4").exit_code == 2
    assert cli("export", "runs/x", "--format", "ckpt").exit_code == 2


def test_a_lora_for_another_base_is_refused_before_weights_are_loaded(
    sd_base: Any, sdxl_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lcm_kit import sample
    from lcm_kit.lora import structure
    from tests import broken
    from tests.loras import random_lora

    place = structure.of_base(str(sdxl_base))
    broken.save(tmp_path / "xl.safetensors", broken.kohya_without_alphas(random_lora(place), place))
    monkeypatch.setattr(sample, "pipeline", lambda *a, **k: pytest.fail("weights were loaded"))
    done = cli(
        "sample", "--prompt", "a", "--base", sd_base("epsilon"), "--adapter", tmp_path / "xl.safetensors"
    )
    assert done.exit_code == 2 and "xl.safetensors is not whole" in done.stderr


def test_sample_passes_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import lcm_kit.sample
    from lcm_kit.api import pictures

    calls, pairs = list[Any](), list[Any]()
    monkeypatch.setattr(pictures, "_require_a_pair", lambda *pair: pairs.append(pair))
    advice: list[Recommended | None] = [None]
    monkeypatch.setattr(recommended, "of_adapter", lambda adapter, file: advice[0])
    monkeypatch.setattr(recommended, "method_of", lambda file: DEFAULT)
    monkeypatch.setattr(
        lcm_kit.sample, "sample_to_folder", lambda *a, **k: calls.append((a, k)) or Path("sheet.png")
    )
    (tmp_path / "prompts.txt").write_text("# held out\n\ntwo\nthree\n")
    (tmp_path / "run").mkdir()
    config = (
        (shipped.root() / "configs" / "quickstart.yaml")
        .read_text()
        .replace("asset:tiny-sd # or", "my/base\n  variant: fp16 # or")
    )
    (tmp_path / "run" / "config.yaml").write_text(config)
    done = cli(
        "sample", "--prompt", "one", "--prompts", tmp_path / "prompts.txt", "--adapter", tmp_path / "run",
        "--steps", "2", "--seed", "5", "--weight", "0.8", "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.output == "sheet.png\n"
    assert pairs[0][0] == tmp_path / "run" and pairs[0][1].variant == "fp16"
    assert calls[0][0] == ("my/base", ["one", "two", "three"], tmp_path / "out")
    assert calls[0][1] == {
        "adapter": tmp_path / "run", "steps": 2, "guidance_scale": 1.0,
        "seed": 5, "lora_weight": 0.8, "sampler": "lcm", "revision": None, "variant": "fp16",
        "negative_prompt": None, "emphasis": None, "size": None, "count": 1, "batch_size": "auto",
        "device": None, "dtype": None, "decoder": None, "tiling": False, "compile": False,
    }  # fmt: skip
    cli("sample", "--prompt", "one", "--base", "other", "--adapter", tmp_path / "run")
    cli("sample", "--prompt", "one")
    assert [call[0][0] for call in calls[1:]] == ["other", "asset:tiny-sd"]
    advice[0] = Recommended("Use 2 steps of TCD.", "tcd", 2, 1.5, 0.7)
    done = cli("sample", "--prompt", "one", "--adapter", tmp_path / "run", "--weight", "0")
    assert "tcd, 2 steps, guidance_scale 1.5, LoRA weight 0; measured for it" in " ".join(done.output.split())
    more = ("--negative", "red", "--width", "64", "--count", "2", "--batch-size", "3", "--device", "cpu")
    cli("sample", "--prompt", "one", "--base", "b", *more, "--dtype", "bfloat16", "--guidance", "2")
    given, keys = calls.pop()[1], ("negative_prompt", "size", "count", "batch_size", "device", "dtype")
    assert [given[key] for key in keys] == ["red", (64, 64), 2, 3, "cpu", torch.bfloat16]
    cli("sample", "--prompt", "one", "--base", "b", "--decoder", "my/tiny", "--tiling", "--compile")
    given = calls.pop()[1]
    assert [given[key] for key in ("decoder", "tiling", "compile")] == ["my/tiny", True, True]
    for wrong, words in (
        ("some", "--batch-size 'some' is no number; give one, or auto"),
        ("0", "out of range"),
    ):
        done = cli("sample", "--prompt", "one", "--base", "b", "--batch-size", wrong)
        assert done.exit_code == 2 and words in " ".join(done.stderr.split())
    how = ("sampler", "steps", "guidance_scale", "lora_weight")
    assert [calls[-1][1][key] for key in how] == ["tcd", 2, 1.5, 0.0]


def test_sample_without_prompts_says_how() -> None:
    done = cli("sample")
    assert done.exit_code == 2 and "give --prompt TEXT" in done.stderr


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Result:
    def main(config: Any) -> None:
        raise error

    monkeypatch.setattr(shipped, "load_recipe", lambda name: SimpleNamespace(main=main))
    return cli("train", "quickstart")


def test_user_errors_are_one_sentence_and_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    done = failing(monkeypatch, UserError("base 'x': not there; give another"))
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", "error: base 'x': not there; give another\n")


def test_an_interruption_says_that_the_command_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    done = failing(monkeypatch, KeyboardInterrupt())
    assert (
        done.exit_code == 130
        and done.stderr == "error: stopped; the same command continues where it left off\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left (os error 28)"),
    ],
)
def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    done = failing(monkeypatch, error)
    assert done.exit_code == 2 and done.stderr.startswith("error: the disk is full (")


@pytest.mark.parametrize("error", [ValueError("ours"), OSError("a library's, of no file")])
def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    assert failing(monkeypatch, error).exception is error


def test_quickstart_runs_the_stages_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lcm_kit.data import sources
    from lcm_kit.export import run as exporting
    from lcm_kit.report import build as building

    output, order = tmp_path / "run", list[Any]()
    cells = [
        cell("teacher", "ddim", 50, 5.0, prompt_adherence=0.97, frechet_biased=1.0),
        cell("plain", "ddim", 4, prompt_adherence=0.11, frechet_biased=60.0),
        cell("plain", "dpmpp_2m", 4, prompt_adherence=0.31, frechet_biased=40.0),
        cell("student", "lcm", 4, adapter="student", prompt_adherence=0.93, frechet_biased=8.0),
    ]

    def recipe(name: str) -> SimpleNamespace:
        def main(config: Any) -> None:
            order.append((name, config))
            output.mkdir(exist_ok=True)
            (output / "results.json").write_text(json.dumps(results("evaluation/quality", cells, ["a cat"])))

        return SimpleNamespace(main=main)

    monkeypatch.setattr(shipped, "load_recipe", recipe)
    monkeypatch.setattr(sources, "encode", lambda config: order.append(("encode", config)))
    monkeypatch.setattr(exporting, "export_run", lambda run: order.append(("export", run)))
    monkeypatch.setattr(exporting, "write_card", lambda run: order.append(("card", run)))
    monkeypatch.setattr(building, "write_report", lambda run: order.append(("report", run)))

    done = cli("quickstart", "steps=30", "quality.count=4", "--output", output)
    assert done.exit_code == 0, done.output
    stages = ["encode", "train/finetune", "export", "encode", "train/distill", "export"]
    stages += ["evaluation/brand", "evaluation/quality", "card", "report", "card", "report"]
    assert [name for name, _ in order] == stages
    calls = dict(order)
    assert (calls["train/distill"].steps, calls["train/distill"].output) == (30, str(output))
    assert (calls["evaluation/quality"].count, calls["evaluation/quality"].run) == (4, str(output))
    style = output / "style"
    assert [at for name, at in order if name == "export"] == [style, output]
    assert [at for name, at in order if name == "report"] == [output, style]
    assert (calls["train/finetune"].output, calls["evaluation/brand"].style) == (str(style), str(style))
    summary = done.stdout
    assert "97.0%" in summary and "93.0%" in summary and "31.0%" in summary and "11.0%" not in summary
    assert str(output / "report.html") in summary.replace("\n", "")


def test_quickstart_checks_both_configs_before_it_starts(tmp_path: Path) -> None:
    assert "steps: 0 is not allowed" in cli("quickstart", "steps=0", "--output", tmp_path / "r").stderr
    assert (
        "count: 0 is not allowed" in cli("quickstart", "quality.count=0", "--output", tmp_path / "r").stderr
    )
    assert not (tmp_path / "r").exists()


def test_the_summary_takes_the_best_plain_solver_even_without_a_probe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lcm_kit.workflow.show import quality_table

    cells = [
        cell("teacher", "ddim", 50, 5.0, pixel_distance=0.0),
        cell("plain", "ddim", 4, pixel_distance=0.3),
        cell("plain", "dpmpp_2m", 4, pixel_distance=0.2),
        cell("plain", "ddim", 8, pixel_distance=0.1),
    ]
    quality_table(results("evaluation/quality", cells, ["a cat"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["base", "base, dpmpp_2m"]


def test_compare_and_compose_make_their_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lcm_kit.config import shipped

    ran: list[Any] = []
    monkeypatch.setattr(shipped, "load_recipe", lambda name: SimpleNamespace(main=ran.append))
    odd = tmp_path / "a=b.safetensors"
    odd.touch()
    assert cli("compare", "runs/a", str(odd), "count=8", "--base", "B", "--output", "out").exit_code == 0
    assert cli("compose", "style.safetensors", "runs/b", "steps=2", "--base", "B").exit_code == 0
    sweep, pair = ran
    assert (sweep.adapters, sweep.count, sweep.base) == (("runs/a", str(odd)), 8, "B")
    assert (sweep.output, pair.output) == ("out", "runs/compose")
    assert (pair.style, pair.speed, pair.steps, pair.base) == ("style.safetensors", "runs/b", 2, "B")
    alone = cli("compare", "runs/a", "count=8")
    assert alone.exit_code == 2 and "two adapters or more, and 1 are named" in alone.stderr
    other = cli("compare", "runs/a", "runs/b", "--config", "quickstart")
    assert other.exit_code == 2 and "adapters: unknown key" in other.stderr


def test_check_looks_at_what_a_sweep_names(tmp_path: Path) -> None:
    done = cli(
        "check", "evaluation/guidance_sweep", f"adapters=['{tmp_path}/no.safetensors']", "brand=nowhere"
    )
    assert (
        done.exit_code == 2 and "no.safetensors" in done.stderr and "nowhere: there is no such" in done.stderr
    )
    assert "count" in cli("check", "evaluation/compose", "count=2").stderr
