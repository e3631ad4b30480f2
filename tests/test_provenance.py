"""What a LoRA is and how it was made, from a config to what is made of its files: each field by each verb."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lcm_kit import __version__
from lcm_kit.adapter import folder as adapter
from lcm_kit.cli.main import app
from lcm_kit.config import finetune, schema
from lcm_kit.config.data import Data as DataKeys
from lcm_kit.errors import UserError
from lcm_kit.families import FAMILIES, Family
from lcm_kit.io import own_files, own_shapes
from lcm_kit.io.own_files import Damaged
from lcm_kit.lora import metadata, provenance, structure
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.provenance import (
    Base,
    Data,
    Grid,
    Guidance,
    Layers,
    Lora,
    Loss,
    Method,
    Part,
    Prior,
    Provenance,
    Recommended,
    Rights,
    Teacher,
    TextEncoder,
    from_json,
)
from lcm_kit.lora.provenance_rules import converted, merged, of_training, part_of
from lcm_kit.lora.untrusted import inspect
from lcm_kit.lora.write import write
from tests.loras import lcm_modules, random_lora


class Inspected(NamedTuple):
    """A base as `bases.inspect_base` tells of it."""

    base_hash: str = "fe60"
    prediction_type: str = "v_prediction"
    family: Family = FAMILIES["sd"]
    license: str | None = "openrail"


RIGHTS: own_shapes.Rights = {
    "pictures": 9, "licenses": {"MIT": 4, "CC-BY-NC-4.0": 2}, "source": 3, "consent": 1, "refused": 1,
    "author": 2,
}  # fmt: skip
LOOK, FAST = (
    Lora("runs/look/style.safetensors", "5a" * 32, 0.7, "CC0-1.0"),
    Lora("asset:tiny-lcm-lora", "1c" * 32, -1.0),
)
DISTILL = schema.Distill(
    recipe="train/distill", output="run", base=schema.Base("org/base", "main", "fp16"),
    data=DataKeys(resolution=512, source="mix", trigger="lumo"),
    adapter=schema.Adapter(rank=8, alpha=4.0, targets="attention"), solver="heun",
    teacher=schema.Teacher(in_student=True, regularization="adapters", weight=0.5),
    grid=schema.Grid(40, 10), loss=schema.Loss("huber_norm", 0.01, "interval"),
    guidance=schema.Guidance(2.0, 6.0),
)  # fmt: skip
FINETUNE = finetune.Finetune(
    recipe="train/finetune", output="look", base=schema.Base("org/base"), caption_dropout=0.2,
    data=DataKeys(resolution=768), adapter=schema.Adapter(rank=16, alpha=8.0),
    loss=finetune.Denoising(None, 0.5, 0.1), text_encoder=finetune.TextEncoder(4, 2.0, 1e-5),
    prior=finetune.Prior("general.txt", 0.5, 30, 20, 4.0, 7),
)  # fmt: skip
SPEED = of_training(DISTILL, Inspected(), "ab12", 300, teacher=[LOOK], start=[FAST], rights=RIGHTS)
STYLE = of_training(FINETUNE, Inspected(), "cd34", 90)


def test_a_distillation_says_all_of_it() -> None:
    assert Provenance(
        base=Base("org/base", "fe60", "main", "fp16", "sd", "openrail"),
        kit_version=__version__, recipe="train/distill",
        prediction_type="v_prediction", steps=300, adapter=Layers(8, 4.0, "attention"),
        method=Method("lcm", **_said(), constants={"sigma_data": 0.5, "timestep_scaling": 10.0}),
        solver="heun", grid=Grid(40, 10), loss=Loss("huber_norm", 0.01, "interval"),
        guidance=Guidance(1.0, 6.0), teacher=Teacher((LOOK,), True, "adapters", 0.5), start=(FAST,),
        data=Data("ab12", 512, "mix", "lumo", Rights(9, {"MIT": 4, "CC-BY-NC-4.0": 2}, 3, 1, 1, 2)),
    ) == SPEED  # fmt: skip
    drawn = schema.Grid(40, 10, "shifted", shift=2.0)
    robust = replace(DISTILL, grid=drawn, loss=schema.Loss("cauchy", 0.03, adaptive=True))
    made = of_training(robust, Inspected(), "ab12", 300)
    assert made.grid == Grid(40, 10, "shifted", shift=2.0)
    assert made.loss == Loss("cauchy", 0.03, "none", adaptive=True)
    assert from_json(made.to_json()) == made
    alone = replace(DISTILL, teacher=schema.Teacher(weight=0.0), solver="ddim", guidance=schema.Guidance())
    made = of_training(alone, Inspected(), "ab12", 300)
    assert made.solver is None and from_json(made.to_json()).teacher == Teacher(weight=0.0)


def test_of_pictures_in_shapes_it_says_how_many_there_are_of_each() -> None:
    """By width, with repeats; of squares of data.resolution alone it says nothing."""
    side = DISTILL.data.resolution
    runs = [(3, (), 1), (2, (96, 48), 5), (1, (), 2), (4, (48, 96), 1), (1, (96, 48), 1)]
    made = of_training(DISTILL, Inspected(), "ab12", 300, runs=runs)
    wanted = {"48x96": 4, "96x48": 11, f"{side}x{side}": 5}
    assert made.data.shapes == wanted and from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.data.sizes == [(48, 96), (96, 48), (side, side)]
    assert of_training(DISTILL, Inspected(), "ab12", 300, runs=[(3, (), 1), (1, (side, side), 2)]).data == (
        of_training(DISTILL, Inspected(), "ab12", 300).data
    )
    drawn = replace(STYLE, prior=Prior("general.txt", resolutions=(64, (96, 48))))
    assert from_json(json.loads(json.dumps(drawn.to_json()))) == drawn
    assert "resolutions" not in STYLE.to_json()["prior"]
    for odd in ({"64": 1}, {"0x64": 1}, {"64x64x64": 1}, {"64x64\n": 1}):
        with pytest.raises(ValueError, match="pattern"):
            Data(shapes=odd)


def test_a_style_says_all_of_it() -> None:
    assert Provenance(
        base=Base("org/base", "fe60", family="sd", license="openrail"),
        kit_version=__version__, recipe="train/finetune",
        prediction_type="v_prediction", steps=90, adapter=Layers(16, 8.0, "lcm"),
        loss=Loss(min_snr_gamma=None, snr_floor=0.5, noise_offset=0.1),
        text_encoder=TextEncoder(4, 2.0, 1e-5),
        prior=Prior("general.txt", 0.5, 30, 20, 4.0, 7), caption_dropout=0.2,
        data=Data("cd34", 768, "images"),
    ) == STYLE  # fmt: skip


def _said() -> dict[str, Any]:
    """What the class of the method says without a setting."""
    method, keys = DISTILL.method, ("title", "samplers", "steps", "tags")
    return {key: getattr(method, key) for key in keys if hasattr(method, key)}


@pytest.mark.parametrize(
    ("section", "config"),
    [
        (Base, schema.Base), (Layers, schema.Adapter), (Grid, schema.Grid), (Loss, schema.Loss),
        (Guidance, schema.Guidance), (Teacher, schema.Teacher), (Loss, finetune.Denoising),
        (TextEncoder, finetune.TextEncoder), (Prior, finetune.Prior),
    ],
)  # fmt: skip
def test_a_section_has_every_key_of_the_configs(section: Any, config: Any) -> None:
    """So that a key which is added there is not lost here; `adapter.start` is `Provenance.start`."""
    known = {each.name for each in fields(section)}
    assert {each.name for each in fields(config)} - {"start"} <= known


@dataclass(frozen=True)
class Mine:
    """A method of somebody's own: constants of any kind, and what a class says without a setting."""

    title: ClassVar[str] = "my method"
    samplers: ClassVar[tuple[str, ...]] = ("tcd", "lcm")
    steps: ClassVar[tuple[int, ...]] = (2, 4)
    tags: ClassVar[tuple[str, ...]] = ("mine",)

    name: str = "custom"
    path: str = "my_methods.py:Mine"
    edges: tuple[int, ...] = (1, 5)
    scale: float | None = None


def test_a_methods_constants_are_read_back_without_its_code() -> None:
    made = Method.of(Mine())
    constants = {"path": "my_methods.py:Mine", "edges": [1, 5], "scale": None}
    assert made == Method("custom", "my method", ("tcd", "lcm"), (2, 4), ("mine",), constants)
    written = Provenance(method=made).to_json()
    assert written["method"] == {
        "name": "custom", "title": "my method", "samplers": ["tcd", "lcm"], "steps": [2, 4], "tags": ["mine"],
        **constants,
    }  # fmt: skip
    assert from_json(json.loads(json.dumps(written))).method == made


# -- adapter.json --------------------------------------------------------------------------------------------

PEFT = {"r": 8, "lora_alpha": 4.0, "target_modules": ["to_q"], "alpha_pattern": {}, "use_dora": False}


def folder(place: Path, content: dict[str, Any], *, hashed: bool = True) -> Path:
    place.mkdir(parents=True)
    (place / adapter.WEIGHTS).touch()
    text = own_files.json_text(content) if hashed else json.dumps(content)
    (place / adapter.FACTS).write_text(text)
    return place


@pytest.mark.parametrize("made", [SPEED, STYLE], ids=["distill", "finetune"])
def test_adapter_json_is_read_back_whole(tmp_path: Path, made: Provenance) -> None:
    made = replace(made, step=70, held_out_loss=0.5, control_distance=0.25)
    texts = {"text_encoder": PEFT}
    found = adapter.read_provenance(folder(tmp_path / "adapter", provenance.trained(made, PEFT, texts)))
    assert found.of_file("t", "2026").to_json() == replace(made, date="2026").to_json()
    assert (found.lora_config, found.text_lora_config) == (PEFT, texts)  # with what peft alone knows
    assert found.measured == {
        "step": 70, "held_out_loss": 0.5, "control_loss": None, "control_distance": 0.25,
        "diversity": None,
    }  # fmt: skip


def test_an_old_adapter_json_is_read(tmp_path: Path) -> None:
    """Of the first kit, and of the last before this: `start` twice, nulls, no recipe."""
    base = {"path": "org/base", "revision": None, "variant": None, "hash": "fe60"}
    old: dict[str, Any] = {"base": base, "steps": 9, "lora_config": PEFT, "guidance": {"min": 3, "max": 8.0}}
    found = adapter.read_provenance(folder(tmp_path / "a", old, hashed=False))
    assert (found.base.hash, found.optimizer_steps, found.guidance) == ("fe60", 9, Guidance(3.0, 8.0))
    last = {
        **old, "adapter": {"rank": 8, "alpha": 4.0, "targets": "lcm", "start": [{"path": "x", "weight": 1}]},
        "start": [{"path": "x", "weight": 1.0, "sha256": "9f"}], "solver": None, "step": 5,
        "teacher": {"adapters": [], "in_student": False, "regularization": "base", "weight": 0.0},
        "method": {"name": "lcm", "sigma_data": 0.5, "timestep_scaling": 10.0},
        "data": {"fingerprint": "ab12", "resolution": 64, "source": "images", "trigger": None},
    }  # fmt: skip
    found = adapter.read_provenance(folder(tmp_path / "b", last))
    assert found.start == (Lora("x", "9f"),) and found.adapter == Layers(8, 4.0, "lcm")
    assert found.teacher == Teacher(weight=0.0) and found.optimizer_steps == 5


WRONG: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda c: c.pop("base"), "base is missing"),
    (lambda c: c["base"].pop("hash"), "base.hash is missing"),
    (lambda c: c.pop("steps"), "steps is missing"),
    (lambda c: c.pop("lora_config"), "lora_config is missing"),
    (lambda c: c["lora_config"].pop("r"), "lora_config.r is missing"),
    (lambda c: c.update(steps="300"), "steps is not as it should be: Input should be a valid integer"),
    (lambda c: c["loss"].update(c="x"), "loss.c is not as it should be: Input should be a valid number"),
    (lambda c: c.update(dial=3), "dial is unknown"),
    (lambda c: c["grid"].update(shape="x"), "grid.shape is unknown"),
    (lambda c: c["teacher"]["adapters"][0].pop("sha256"), "teacher.adapters.0.sha256 is missing"),
]


@pytest.mark.parametrize(("spoil", "why"), WRONG, ids=[why for _, why in WRONG])
def test_damage_is_one_sentence(tmp_path: Path, spoil: Callable[[dict[str, Any]], object], why: str) -> None:
    content = provenance.trained(SPEED, dict(PEFT), {})
    spoil(content)
    place = folder(tmp_path / "run" / "adapter", content)
    with pytest.raises(Damaged) as error:
        adapter.read_provenance(place)
    text = str(error.value)
    assert f"{place / adapter.FACTS} is damaged ({why}" in text and f"train {tmp_path / 'run'}" in text


def test_what_a_later_kit_says_is_refused_by_name(tmp_path: Path) -> None:
    content = provenance.trained(SPEED, PEFT, {}) | {"kit_version": "9.9", "dial": {"from": 1}}
    content["grid"]["shape"] = "cosine"
    place = folder(tmp_path / "adapter", content)
    with pytest.raises(UserError) as error:
        adapter.read_provenance(place)
    assert not isinstance(error.value, Damaged)  # it is whole, so nobody is told to make it anew
    assert str(error.value) == (
        f"{place / adapter.FACTS} was written by lcm-kit 9.9 and says grid.shape, dial, which lcm-kit "
        f"{__version__} does not know; use lcm-kit 9.9 for it"
    )


# -- Fields and verbs ----------------------------------------------------------------------------------------

USE = Recommended("Use 2 steps of TCD.", "tcd", 2, 1.5, 0.8)
MADE = {
    "speed": replace(
        SPEED, title="speed", step=200, date="2026-01-31T23:59:58+00:00",
        recommended=replace(USE, reasons=("nearest to the teacher",), warnings=("mind the colours",)),
        control_distance=0.5, diversity=0.9, guidance_scale=6.0,
    ),
    "look": replace(
        STYLE, title="look", step=80, date="2026-01-01T00:00:00+00:00", held_out_loss=0.25,
        data=replace(STYLE.data, trigger="ink"),
    ),
}  # fmt: skip
# What a file says: of what lies in a folder the name alone; the reasons are the card's
TAUGHT = Teacher((replace(LOOK, path="style.safetensors"),), True, "adapters", 0.5)
HAS = {"speed": replace(MADE["speed"], teacher=TAUGHT, recommended=USE), "look": MADE["look"]}
NAMES = [each.name for each in fields(Provenance)]
# By field: of a merged file; a conversion keeps all but what is named there
MERGED: dict[str, Any] = {
    # of the part that makes it fast
    **{name: getattr(HAS["speed"], name) for name in ("base", "kit_version", "date", "prediction_type")},
    **{name: getattr(HAS["speed"], name) for name in ("step", "method", "guidance", "guidance_scale")},
    # of all of them
    "data": Data("ab12", 512, "mix", "ink, lumo"),
    "parents": ("look.safetensors:0.5", "speed.safetensors:1"),
    "parts": (
        Part("look.safetensors", 0.5, replace(HAS["look"], title="")),
        Part("speed.safetensors", 1.0, replace(HAS["speed"], title="")),
    ),
    # measured of a part, alone; the weight is in the file
    "recommended": replace(USE, lora_weight=1.0, part="speed.safetensors"),
    # what only a training has: each part says its own
    **{name: None for name in ("recipe", "steps", "adapter", "solver", "grid", "loss", "teacher", "prior")},
    **{name: None for name in ("text_encoder", "caption_dropout", "held_out_loss", "control_loss")},
    "control_distance": None, "diversity": None, "start": (), "license": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(sd_base: Callable[..., Path]) -> Path:
    return sd_base("epsilon")


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files as `export` writes them."""
    folder, place = tmp_path_factory.mktemp("files"), structure.of_base(str(base))
    for seed, (name, made) in enumerate(MADE.items()):
        lora = random_lora(place, lcm_modules(place)[:8], ranks=(4,), seed=seed)
        write(folder / f"{name}.safetensors", lora, place, "kohya", "float32", made)
    return folder


def read(file: Path) -> Provenance:
    return provenance_from_header(inspect(file).metadata, file.stem)


def cli(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def agree(found: Provenance, wanted: dict[str, Any]) -> None:
    """Field by field, so that a failure says which."""
    for name in NAMES:
        assert getattr(found, name) == wanted[name], name


def values(made: Provenance, **changed: Any) -> dict[str, Any]:
    return {name: getattr(made, name) for name in NAMES} | changed


@pytest.mark.parametrize("name", MADE)
def test_export_keeps_every_field(files: Path, name: str) -> None:
    """Both recipes together leave none unset, but for what files alone have."""
    agree(read(files / f"{name}.safetensors"), values(HAS[name]))
    empty = {each for each in NAMES if all(not values(made)[each] for made in HAS.values())}
    assert empty == {"control_loss", "license", "parents", "parts"}


def test_convert_keeps_every_field(files: Path, base: Path) -> None:
    cli("convert", files / "speed.safetensors", "--base", base)
    for style in ("kohya", "diffusers"):
        wanted = values(HAS["speed"], title=f"speed_{style}", parents=("speed.safetensors",))
        agree(read(files / f"speed_{style}.safetensors"), wanted)
    two = ("--format", "kohya", "--rank", 2, "--output", files / "two")
    cli("convert", files / "speed.safetensors", "--base", base, *two)
    measured = replace(USE, part="speed.safetensors")
    wanted = values(HAS["speed"], title="speed_kohya", parents=("speed.safetensors",), recommended=measured)
    agree(read(files / "two/speed_kohya.safetensors"), wanted)


def test_merge_keeps_every_field_of_every_part(files: Path, base: Path) -> None:
    parts, more = (f"{files / 'look.safetensors'}:0.5", files / "speed.safetensors"), ("--base", base)
    cli("merge", *parts, "--output", files / "both", "--format", "kohya", *more)
    agree(read(files / "both_kohya.safetensors"), {"title": "both_kohya", **MERGED})
    # and again: what was merged is a part with its parts
    both = files / "both_kohya.safetensors"
    cli("merge", both, parts[0], "--output", files / "three", "--format", "kohya", *more)
    assert read(files / "three_kohya.safetensors").parts[0].made == replace(read(both), title="")


def test_a_file_names_no_folder(files: Path) -> None:
    made = replace(
        SPEED, base=Base("/home/ann/base", "fe60"), start=(Lora("hub:org/lora/file.safetensors", "1c"),),
        prior=Prior("/home/ann/prompts.txt"), parts=(Part("x", 1.0, replace(SPEED, teacher=Teacher((
            Lora("~/ann/look", "5a"),)))),),
    )  # fmt: skip
    built = metadata.build(random_lora(structure.known("sd1"), ranks=(1,)), structure.known("sd1"), made)
    assert "ann" not in json.dumps(built)
    found = provenance_from_header(built, "t")
    assert found.start == made.start and found.prior == Prior("prompts.txt") and found.base.path == "base"
    assert found.parts[0].made.teachers[0].path == "look"


def test_a_name_that_is_no_text_is_shown_as_one() -> None:
    """Bytes of a file's name that are not UTF-8, which no header holds."""
    odd = part_of("caf\udce9.safetensors", 1.0, HAS["speed"])
    for made in (
        merged([odd, odd], "t"),
        converted(HAS["speed"], "caf\udce9.safetensors", None, changed=True),
    ):
        assert made.parents[0].startswith("caf?.safetensors") and made.recommended
        assert made.recommended.part == "caf?.safetensors"
        place = structure.known("sd1")
        built = metadata.build(random_lora(place, lcm_modules(place)[:1], ranks=(1,)), place, made)
        assert provenance_from_header(built, made.title) == made


def test_fused_json_says_every_part(files: Path, base: Path) -> None:
    parts = (f"{files / 'look.safetensors'}:0.5", files / "speed.safetensors")
    cli("merge", *parts, "--fuse-into", base, "--output", files / "fused")
    told = json.loads((files / "fused/fused.json").read_text())
    assert told["base"] == str(base) and told["kit_version"] == __version__
    assert from_json({"parts": told["parts"]}).parts == MERGED["parts"]


def test_what_is_not_read_of_a_part_is_said(files: Path, base: Path) -> None:
    with safe_open(files / "speed.safetensors", "pt") as opened:
        header = opened.metadata()
    rest = json.loads(header["lcm_kit.provenance"]) | {"dial": 3}
    later = {**header, "lcm_kit.provenance": json.dumps(rest), "lcm_kit.kit_version": "9.9"}
    save_file(load_file(files / "speed.safetensors"), files / "later.safetensors", later)
    words = "its lcm_kit.provenance (of lcm-kit 9.9) says dial, which this kit does not know"
    for verb in (
        ("convert", files / "later.safetensors", "--format", "kohya"),
        ("merge", files / "later.safetensors", files / "look.safetensors", "--output", files / "l"),
    ):
        assert words in " ".join(cli(*verb, "--base", base).split())
    found = read(files / "later_kohya.safetensors")
    assert found.grid is None and found.guidance == HAS["speed"].guidance  # which has keys of its own
