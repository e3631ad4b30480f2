"""From pictures to one adapter: every stage's artefacts, once, and again after a stop; mistakes are told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from lcm_kit import workflow
from lcm_kit.adapter import folder as adapter
from lcm_kit.bases import inspect_base
from lcm_kit.cli.main import app
from lcm_kit.config import shipped
from lcm_kit.config.evaluation import Quality
from lcm_kit.config.load import dump, load
from lcm_kit.config.schema import Base
from lcm_kit.data import reconstruction
from lcm_kit.data.cache import Cache
from lcm_kit.evaluation import results
from lcm_kit.io import own_files
from lcm_kit.io.files import sha256_file
from lcm_kit.lora import locate as lora_file
from lcm_kit.workflow import configs, show, stages
from tests.runs import build_run

FEW = [
    "style.steps=2", "style.batch_size=2", "style.validation.every=0", "style.validation.count=1",
    "style.adapter.rank=4", "style.optimizer.warmup_steps=0", "style.checkpoint.every=1",
    "style.logging.trackers=[]", "distill.steps=2", "distill.batch_size=2", "distill.adapter.rank=4",
    "distill.validation.every=0", "distill.validation.count=1", "distill.optimizer.warmup_steps=0",
    "distill.checkpoint.every=1", "distill.logging.trackers=[]", "distill.data.samples.count=4",
    "style.validation.prompts=null", "style.validation.control=null", "distill.validation.prompts=null",
    "brand.control=null",
    "distill.data.regularization=null", "style.data.regularization=null",
    "distill.data.regularization_share=null", "style.data.regularization_share=null",
    "distill.data.samples.steps=1", "brand.count=3", "brand.teacher_steps=2",
    "brand.steps=[1, 4]", "brand.resamples=100", "brand.pictures=3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def studio(folder: Path, count: int = 6) -> Path:
    """A folder of pictures with captions; every one another picture."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    for i in range(count):
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing {'abcdefgh'[i]}")
    return folder


def cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def lasting(run: Path) -> dict[Path, int]:
    """When each file was written that a finished story has no reason to write again."""
    kinds = ("*.safetensors", "adapter.json", "config.yaml", "metrics.jsonl", "verified.json")
    found = {path for kind in kinds for path in run.rglob(kind)}
    return {path: path.stat().st_mtime_ns for path in found}


class Stopped(Exception):
    """What ends a story in the middle."""


def test_the_whole_story_then_nothing_more(
    sd_base: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, folder, run = Base(str(sd_base())), studio(tmp_path / "my brand"), tmp_path / "run"
    few = [*FEW, "style.prior.prompts=asset:everyday", "style.prior.count=3", "style.prior.steps=1"]
    tell = lambda: workflow.finetune(str(folder), base, run, few)  # noqa: E731

    # killed while it distils: the style is there, the run is not
    recipe = shipped.load_recipe("train/distill")
    with monkeypatch.context() as killed, pytest.raises(Stopped):
        killed.setattr(recipe, "main", lambda config: (_ for _ in ()).throw(Stopped))
        tell()
    assert adapter.read_provenance(run / "style" / "adapter").steps == 2 and not (run / "adapter").exists()
    before = lasting(run)

    # the same command continues, and leaves what was done as it was
    assert tell() == run / "report.html"
    after = lasting(run)
    assert {path: after[path] for path in before} == before

    # the teacher of the adapter is the style, as its file would be loaded by anybody
    facts = adapter.read_provenance(run / "adapter")
    style_file = run / "style" / lora_file.ADAPTER_FILE
    assert [each.sha256 for each in facts.teachers] == [sha256_file(style_file)]
    assert facts.teacher and not facts.teacher.in_student
    names = {path.relative_to(run).as_posix() for path in after}
    assert {
        "export/run.safetensors", "export/pytorch_lora_weights.safetensors", "export/verified.json",
        "style/export/style.safetensors", "style/export/pytorch_lora_weights.safetensors",
    } <= names  # fmt: skip
    weights = load_file(run / "export" / "pytorch_lora_weights.safetensors")
    assert weights and all(tensor.isfinite().all() for tensor in weights.values())

    # what the base drew for the style is among what the adapter was trained on
    config = load(run / "config.yaml")
    cache = Cache.open(Path(config.data.cache), base=inspect_base(base.path), data=config.data)
    assert sum(id.startswith("regularisation/") for id in cache.ids) == 3 and len(cache) == 9

    # captions of held-out pictures are the prompts, those of the others are sampled from
    held, seen = ((run / name).read_text().splitlines() for name in (configs.PROMPTS, configs.CAPTIONS))
    captions = {file.read_text() for file in folder.glob("*.txt")}
    assert len(held) == 1 and set(held) | set(seen) == captions and not set(held) & set(seen)

    # the evaluation: all three, at the steps that were asked for
    brand = results.read(run / "brand.json")
    named = [(row["name"], row["steps"]) for row in results.brand_rows(brand)]
    assert named == [("base", 2), ("styled", 2), ("adapter", 1), ("adapter", 4)]
    assert set(results.prompts(brand)["texts"]) == set(held)
    page = (run / "report.html").read_text()
    drawn = reconstruction.read(run)  # of random weights: nothing comes back
    assert drawn is not None and drawn.of == 6 == len(drawn.figures)
    assert "Can the base draw your pictures at all?" in page and "a colour of 6 pictures" in page
    assert page.index("Your pictures") < page.index("The base, 2 steps") < page.index("Your adapter, 4 steps")
    assert (run / "style" / "report.html").is_file() and (run / "export" / "README.md").is_file()

    # once more: nothing of it is written again, and what is told is the same
    capsys.readouterr()
    tell()
    told = capsys.readouterr().out
    assert f"lcm-kit compose {run / 'style'} LCM_LORA --base {base.path}" in told
    assert str(run / "export" / "run.safetensors") in told
    assert lasting(run) == after

    # a style that was trained on: the run was distilled from another, and that is said
    done = cli("finetune", folder, "--base", base.path, "--output", run, *few, "style.steps=3")
    assert done.exit_code == 2 and "was distilled from another style" in done.stderr


def test_the_plan_says_all_and_writes_nothing(
    sd_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    folder = studio(tmp_path / "brand")
    done = cli("finetune", folder, "--base", sd_base(), "--output", tmp_path / "run", "--dry-run", *FEW)
    assert done.exit_code == 0, done.output
    told = " ".join(done.stdout.split())
    assert "6 pictures of" in told and "1 of them held out" in told and "2 steps of 2, LoRA of rank 4" in told
    assert "evaluation/brand" in told
    assert not (tmp_path / "run").exists()


def test_an_lcm_lora_of_the_base_is_started_from_too(
    sd_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    run, folder = build_run(tmp_path / "speed", sd_base(), rank=5, alpha=10.0), studio(tmp_path / "brand")
    stages.export(run)
    words = ["finetune", folder, "--base", sd_base(), "--output", tmp_path / "run", "--dry-run"]
    done = cli(*words, "--speed", run, *FEW)
    assert done.exit_code == 0, done.output
    assert f"2 steps of 2, LoRA of rank 9, which starts as the style and {run}" in done.stdout
    wide = cli(*words, "--speed", run, *FEW, "distill.adapter.rank=12", "distill.adapter.alpha=6")
    assert "LoRA of rank 12, which" in wide.stdout  # wide enough: as it was
    refused = cli(*words, "--speed", "asset:tiny-lcm-lora", *FEW)
    assert refused.exit_code == 2 and "--speed: asset:tiny-lcm-lora is not whole" in refused.stderr
    place = {"path": "b", "revision": None, "variant": None}
    told = configs.finetune(
        "my/brand", place, "sd15", Path("runs/x"), 512, None, ["distill.adapter.alpha=32"]
    )
    adapter = configs.from_speed_too(told, "hub:some/lora", 64).distill.adapter
    assert (adapter.rank, adapter.alpha) == (80, 40.0)
    assert [(e.path, e.weight) for e in adapter.start] == [("runs/x/style", 1), ("hub:some/lora", 1)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere", "--base", "BASE"], "there is no such folder"),
        (["empty", "--base", "BASE"], "holds no image"),
        (["brand", "--base", "/nowhere/base"], "there is no such folder; check base.path"),
        (["brand", "--base", "BASE", "steps=3"], "steps=3: it must say which stage it is for"),
        (["brand", "--base", "BASE", "style.stepz=3"], "stepz: unknown key"),
        (["brand", "--base", "BASE", "distill.output=x"], "distill.output is decided by the story"),
        (["brand", "--base", "BASE", "distill.teacher.adapters=[]"], "decided by the story"),
        (["brand", "--base", "BASE", "brand.run=x"], "brand.run is decided by the story"),
        (["brand", "--base", "BASE", "evaluation.count=3"], "no stage of that name; write brand.count"),
        (["brand", "--base", "BASE", "--prompts", "nowhere.txt"], "there is no such file"),
    ],
)
def test_mistakes_are_a_sentence_and_code_2(
    words: list[str], sentence: str, sd_base: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    studio(Path("brand"), 2)
    Path("empty").mkdir()
    done = cli("finetune", *[str(sd_base()) if word == "BASE" else word for word in words])
    assert done.exit_code == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("width", "family"), [(768, "sd15"), (1024, "sd15"), (2048, "sdxl"), (32, "tiny"), (128, "tiny")]
)
def test_configs_come_by_the_bases_family(width: int, family: str) -> None:
    assert configs.configs_for(width) == family
    place = {"path": "some/base", "revision": None, "variant": "fp16"}
    told = configs.finetune("my/brand", place, family, Path("runs/x"), 768, None, ["distill.data.flip=false"])
    for config in (told.style, told.distill):
        assert (config.base.path, config.base.variant) == ("some/base", "fp16")
        assert (config.data.path, config.data.resolution) == ("my/brand", 768)
        assert config.validation.prompts == "runs/x/prompts.txt"
    assert [each.path for each in told.distill.teacher.adapters] == ["runs/x/style"]
    assert (told.style.output, told.distill.output) == ("runs/x/style", "runs/x")
    shipped_style = "tiny_brand" if family == "tiny" else f"{family}_style"
    assert told.style.steps == load(shipped.find(f"configs/finetune/{shipped_style}")).steps
    (brand,) = told.evaluations
    assert (brand.run, brand.style, brand.brand, brand.resolution) == (
        "runs/x",
        "runs/x/style",
        "my/brand",
        768,
    )
    assert told.own_prompts and brand.prompts is None
    if family != "tiny":
        assert told.distill.data.samples.prompts == "runs/x/captions.txt"
        assert brand.features.startswith("openai/clip") and brand.control_prompts == "asset:everyday"


def test_one_cache_for_both_trainings_if_they_read_the_same() -> None:
    def caches(*overrides: str) -> tuple[str, str]:
        place = {"path": "some/base", "revision": None, "variant": None}
        told = configs.finetune("my/brand", place, "sd15", Path("runs/x"), 512, None, overrides)
        return told.style.data.cache, told.distill.data.cache

    own = "style.prior.prompts=null"
    assert caches(own) == ("runs/x/cache", "runs/x/cache")
    assert caches() == ("runs/x/cache-style", "runs/x/cache")  # the base's pictures are one's rows only
    assert caches(own, "style.data.flip=false") == ("runs/x/cache-style", "runs/x/cache")
    assert caches(own, "distill.data.regularization=general") == ("runs/x/cache-style", "runs/x/cache")
    assert caches(own, "style.data.cache=mine") == ("mine", "runs/x/cache")


def test_what_the_base_drew_for_the_style_keeps_the_rest_in_the_distillation() -> None:
    def general(family: str, *overrides: str) -> str | None:
        place = {"path": "some/base", "revision": None, "variant": None}
        told = configs.finetune("my/brand", place, family, Path("runs/x"), 512, None, overrides)
        assert told.distill.teacher.regularization == "base"
        if told.style.prior.prompts:
            assert (told.style.prior.prompts, told.style.prior.count) == ("asset:everyday", 100)
        return told.distill.data.regularization

    assert general("sd15") == general("sdxl") == "runs/x/cache-style-prior/pictures"
    assert general("sd15", "style.data.cache=mine") == "mine-prior/pictures"
    assert general("sd15", "style.prior.prompts=null") is None
    assert general("sd15", "distill.data.regularization=others") == "others"
    assert general("sd15", "distill.data.source=teacher", "distill.data.flip=false") is None
    assert general("tiny") == "asset:general"


def test_the_trigger_is_of_both_trainings() -> None:
    place = {"path": "asset:tiny-sd", "revision": None, "variant": None}
    told = configs.finetune("my/brand", place, "sd15", Path("runs/x"), 512, None, [], "lumo style")
    assert told.style.data.trigger == told.distill.data.trigger == "lumo style"


def test_pictures_are_read_alike_by_both_trainings_and_cached_together_if_they_are() -> None:
    """Otherwise the second encode of one folder would undo the first."""
    place = {"path": "asset:tiny-sd", "revision": None, "variant": None}

    def told(*keys: str) -> configs.Story:
        return configs.finetune("my/brand", place, "tiny", Path("runs/x"), 64, None, keys)

    given = told(
        "distill.data.shapes={kind: square, crop: subject}", "distill.data.masks={background: 0.2}",
        "distill.data.chunks=2", "distill.data.require_license=[any]",
    )  # fmt: skip
    style, distill = given.style.data, given.distill.data
    assert style.shapes == distill.shapes and (style.shapes.kind, style.shapes.crop) == ("square", "subject")
    assert style.masks == distill.masks and style.masks.background == 0.2
    assert style.chunks == distill.chunks == 2
    assert style.require_license == distill.require_license == ("any",)
    assert style.cache == distill.cache == told().style.data.cache
    for key in ("shapes.crop=subject", "masks.background=0.5", "chunks=1"):
        other = told(f"style.data.{key}")
        assert other.style.data.cache != other.distill.data.cache, key


def test_quickstarts_config_is_the_distillation_that_it_runs(tmp_path: Path) -> None:
    told = configs.quickstart(Path("runs/quickstart"), [])
    assert load(shipped.find("quickstart")) == told.distill
    assert load(shipped.find("finetune/tiny_brand")).steps == told.style.steps
    other = configs.quickstart(tmp_path, ["steps=30", "base.path=b", "data.cache=c", "style.steps=90",
                                          "quality.count=4", "quality.unet_calls=[2]",
                                          "brand.count=5"])  # fmt: skip
    assert (other.distill.steps, other.distill.base.path, other.distill.data.cache) == (30, "b", "c")
    assert (other.style.steps, other.style.base.path, other.style.data.path) == (90, "b", "asset:brand")
    brand, quality = other.evaluations
    assert (brand.recipe, brand.count, quality.recipe, quality.count) == (
        "evaluation/brand", 5, "evaluation/quality", 4,
    )  # fmt: skip
    # plain samplers where the report shows them; as many as are asked for
    calls = [each.unet_calls for each in (told.evaluations[1], quality) if isinstance(each, Quality)]
    assert calls == [(4,), (2,)]


def test_an_export_is_done_while_it_is_whole_and_of_these_weights(
    sd_base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(tmp_path / "run", sd_base())
    stages.export(run)
    assert stages.exported(run)
    file = run / "export" / "run.safetensors"
    weights = load_file(file)
    file.write_bytes(file.read_bytes()[:-1])
    assert not stages.exported(run)
    file.unlink()
    assert not stages.exported(run)
    capsys.readouterr()
    stages.export(run)
    assert load_file(file).keys() == weights.keys() and "exported" in capsys.readouterr().out
    stages.export(run)
    assert "nothing to do" in capsys.readouterr().out
    os.utime(run / "adapter" / adapter.WEIGHTS)  # copied, say: they are the same weights
    assert stages.exported(run)
    trained = adapter.read_weights(run / "adapter")
    own_files.write_tensors(run / "adapter" / adapter.WEIGHTS, {k: 2 * t for k, t in trained.items()})
    assert not stages.exported(run)


def test_a_folder_of_another_run_is_left_alone(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", sd_base())
    before = lasting(run)
    for words in (("quickstart",), ("finetune", studio(tmp_path / "mine"), "--base", sd_base())):
        done = cli(*words, "--output", run)
        assert done.exit_code == 2 and "holds a run without a style" in done.stderr
    assert lasting(run) == before and not (run / "style").exists()


def test_several_processes_are_told_to_go_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli("finetune", "asset:brand", "--base", "asset:tiny-sd")
    assert done.exit_code == 2 and "one by one" in done.stderr


def test_the_plan_tells_what_is_done(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", sd_base())  # 20 steps
    told = configs.quickstart(run, ["steps=20"])
    rows = {row[0]: row[1] for row in show.rows(told, 96)}
    wanted = "20 steps of 16, LoRA of rank 32, which starts as the style and asset:tiny-lcm-lora; done, on"
    assert wanted in rows["distil"] and "done" not in rows["style"]
    assert (
        "; begun, continues"
        in dict((row[0], row[1]) for row in show.rows(configs.quickstart(run, ["steps=21"]), 96))["distil"]
    )
    assert rows["encode"] == "96 pictures of asset:brand, 10 of them held out from the style"
    assert dump(told.distill)  # a config that could be written and read again
