"""Every file of a finished run, damaged in every way, under every verb that reads it.

The verb then ends well with the same product as before, or with exit code 2 and one sentence that names the
file: no traceback, no other product, nothing in silence.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from lcm_kit.cli.main import app
from lcm_kit.config.continued import fixed, flat
from lcm_kit.config.load import dump, load
from lcm_kit.config.schema import Training
from tests.recipes.small import configure, draw_little, prepare
from tests.snapshots import snapshot

pytestmark = pytest.mark.slow  # a training for each damage

FEW = ["count=2", "batch_size=2", "prompts={place}/prompts.txt"]
QUALITY = ["teacher_steps=2", "student_steps=[1]", "unet_calls=[2]", "pictures=2"]


def cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def train(place: Path) -> Result:
    return cli("train", place / "config.yaml")


def goes_on(place: Path) -> Result:
    return cli("train", place / "config.yaml", "steps=6")


def encode(place: Path) -> Result:
    return cli("encode", place / "config.yaml")


def export(place: Path) -> Result:
    return cli("export", place / "run")


def report(place: Path) -> Result:
    return cli("report", place / "run")


def sample(place: Path) -> Result:
    base = json.loads((place / "base.json").read_text())
    given = ("--prompt", "a cat", "--steps", 1, "--output", place / "drawn")
    return cli("sample", "--base", base, "--adapter", place / "run", *given)


def quality(place: Path) -> Result:
    run = place / "run"
    few = [each.format(place=place) for each in (*FEW, *QUALITY)]
    return cli("evaluate", "evaluation/quality", f"run={run}", *few)


SWEPT = [
    "count=3", "batch_size=6", "images_per_prompt=2", "resamples=100", "pictures=1", "teacher.steps=2",
    "teacher.guidance_scales=[1,5]", "student=[{samplers: [lcm], steps: [1], guidance_scales: [1.0]}]",
    "plain={samplers: [ddim], unet_calls: [2], guidance_scales: [1.0]}",
]  # fmt: skip
BRAND = ["control=null", "style=null", "count=3", "images_per_prompt=2", "teacher_steps=2", "steps=[1]"]


def sweep(place: Path) -> Result:
    run, few = place / "run", [f"prompts={place}/prompts.txt", *SWEPT]
    looks = (f"brand={place}/images", f"control={place}/images")
    return cli("evaluate", "evaluation/guidance_sweep", f"adapters=[{run}]", *looks, *few)


def brand(place: Path) -> Result:
    few = [*BRAND, "batch_size=6", "resamples=100", "pictures=1"]
    given = (f"run={place}/run", f"brand={place}/images", f"prompts={place}/prompts.txt")
    return cli("evaluate", "evaluation/brand", *given, *few)


def sweep_report(place: Path) -> Result:
    return cli("report", place / "run/sweep")


def export_advised(place: Path) -> Result:
    return cli("export", place / "run", "--with-evaluation")


def hash_of(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def weights(place: Path) -> Any:
    tensors = load_file(place / "run/adapter/lora.safetensors")
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def exported(place: Path) -> Any:
    return [hash_of(file) for file in sorted((place / "run/export").glob("*.safetensors"))]


def cache(place: Path) -> Any:
    files = [file for file in sorted((place / "cache").iterdir()) if not file.name.startswith(".")]
    return [json.loads(file.read_text()) if file.suffix == ".json" else hash_of(file) for file in files]


def drawn(place: Path) -> Any:
    return [hash_of(file) for file in sorted((place / "drawn").glob("*.png"))]


def figures(place: Path) -> Any:
    return snapshot(place)["run/results.json"]


def page(place: Path) -> Any:
    return hash_of(place / "run/report.html")


def sweep_page(place: Path) -> Any:
    return hash_of(place / "run/sweep/report.html")


def swept(place: Path) -> Any:
    return snapshot(place)["run/sweep/results.json"]


def branded(place: Path) -> Any:
    return snapshot(place)["run/brand.json"]


def kept_keys(place: Path) -> Any:
    """What of the config, which anybody may edit, must stay as it is."""
    config = load(place / "run/config.yaml")
    assert isinstance(config, Training)
    return fixed(flat(config))


Verb = Callable[[Path], Result]
Product = Callable[[Path], Any]

# file, the verb that reads it, its product, what lies there no more when it runs
CASES: list[tuple[str, Verb, Product, str | None]] = [
    ("run/adapter/adapter.json", export, exported, "run/export"),
    ("run/adapter/lora.safetensors", export, exported, "run/export"),
    ("run/adapter/adapter.json", quality, figures, None),
    ("run/adapter/lora.safetensors", report, page, None),
    ("run/adapter/adapter.json", report, page, None),
    ("run/adapter/adapter.json", goes_on, weights, None),
    ("run/config.yaml", report, kept_keys, None),
    ("run/metrics.jsonl", report, page, None),
    ("run/metrics.jsonl", goes_on, weights, None),
    ("run/results.json", report, page, None),
    ("run/pictures/*.png", report, page, None),
    ("run/validation/step-*.png", report, page, None),
    ("run/validation/*.safetensors", goes_on, weights, None),
    ("run/state/step-000004/manifest.json", goes_on, weights, None),
    ("run/state/step-000004/lora.safetensors", goes_on, weights, None),
    ("run/state/step-000004/ema.safetensors", goes_on, weights, None),
    ("run/state/step-000004/training.pt", goes_on, weights, None),
    ("cache/manifest.json", train, weights, "run"),
    ("cache/shard-00001.safetensors", train, weights, "run"),
    ("cache/empty.safetensors", train, weights, "run"),
    ("cache/manifest.json", encode, cache, None),
    ("cache/shard-00001.safetensors", encode, cache, None),
    ("cache/empty.safetensors", encode, cache, None),
    ("run/export/pytorch_lora_weights.safetensors", sample, drawn, None),
    ("run/export/verified.json", sample, drawn, None),
    ("run/export/verified.json", export, exported, None),
    ("run/evaluation/student-*.safetensors", quality, figures, None),
    ("run/sweep/results.json", sweep_report, sweep_page, None),
    ("run/sweep/results.json", export_advised, exported, None),
    ("run/sweep/results.json", sample, drawn, None),
    ("run/sweep/results.json", sweep, swept, None),
    ("run/sweep/recommended.json", sweep, swept, None),
    ("run/sweep/pictures/*.png", sweep_report, sweep_page, None),
    ("run/sweep/cells/*.safetensors", sweep, swept, None),
    ("run/brand.json", report, page, None),
    ("run/brand.json", brand, branded, None),
    ("run/brand/pictures/*.png", report, page, None),
    ("run/brand/brand/*.safetensors", brand, branded, None),
]


def _flip(share: float, bit: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        place = min(int(len(data) * share), len(data) - 1)
        return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]

    return change


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    **{f"flipped at {share}": _flip(share, 1) for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)},
    **{f"high bit at {share}": _flip(share, 128) for share in (0.1, 0.5, 0.9)},
    "cut": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "other JSON": lambda data: b'{"a": [1, 2]}',
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "nested": lambda data: b"[" * 5000,
}


@pytest.fixture(scope="module")
def pristine(sd_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place with a run that all verbs have worked on, and a copy of it beside."""
    with pytest.MonkeyPatch.context() as patch:
        draw_little(patch)
        place = tmp_path_factory.mktemp("damage") / "place"
        keys = prepare(place, sd_base("epsilon"))
        prompts = place / "prompts.txt"
        prompts.write_text("a cat\na dog\n")
        config = configure(
            keys, place / "run", ema=0.5, checkpoint={"every": 2}, data={"shard_size": 4},
            validation={"prompts": str(prompts), "count": 2, "every": 2, "held_out": 0.25},
        )  # fmt: skip
        (place / "config.yaml").write_text(dump(config))
        (place / "base.json").write_text(json.dumps(keys["base"]["path"]))
        for verb in (encode, train, export, quality, sweep, brand, report, sample):
            done = verb(place)
            assert done.exit_code == 0, done.output
        shutil.copytree(place, place.with_name("copy"))
        yield place


@pytest.mark.parametrize(
    ("name", "verb", "product", "gone"), CASES, ids=[f"{name} {verb.__name__}" for name, verb, *_ in CASES]
)
def test_damage_is_named_or_changes_nothing(
    pristine: Path, name: str, verb: Verb, product: Product, gone: str | None
) -> None:
    def again() -> Path:
        shutil.rmtree(pristine)
        shutil.copytree(pristine.with_name("copy"), pristine)
        if gone:
            shutil.rmtree(pristine / gone)
        return next(iter(sorted(pristine.glob(name))))

    again()
    done = verb(pristine)
    assert done.exit_code == 0, done.output
    wanted, faults = product(pristine), []
    for what, change in DAMAGE.items():
        file = again()
        whole = file.read_bytes()
        file.write_bytes(change(whole))
        done = verb(pristine)
        told = f"{done.stdout}{done.stderr}"
        named = file.name in told or file.parent.name in told
        if done.exit_code == 0 and product(pristine) != wanted:
            faults.append(f"{what}: another product in silence")
        elif done.exit_code == 2 and not (named and done.stderr.startswith("error: ")):
            faults.append(f"{what}: not named: {done.stderr}")
        elif done.exit_code not in (0, 2):
            faults.append(f"{what}: exit code {done.exit_code}, {done.exception!r}: {done.stderr[-300:]}")
    assert not faults, "\n".join(faults)
