"""Config files: every mistake at once, with its place, what is allowed and the nearest name."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from lcm_kit.config import schema, shipped, yaml_text
from lcm_kit.config.load import RECIPES, dump, load, parse
from lcm_kit.config.methods import Custom
from lcm_kit.core.methods import METHODS
from lcm_kit.errors import UserError

CONFIGS = shipped.configs()
MINIMAL = "recipe: train/distill\noutput: runs/x\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def mistakes(folder: Path, text: str, *overrides: str) -> list[str]:
    """The sentences of the error, without the file's name before them."""
    path = write(folder, text)
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    head, *lines = str(caught.value).split("\n  - ")
    assert head.startswith(f"config {path}")
    return lines or [head.removeprefix(f"config {path}: ")]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_validates_and_survives_the_round_trip(name: str, tmp_path: Path) -> None:
    config = load(shipped.find(name))
    assert load(write(tmp_path, dump(config))) == config == parse(dump(config))
    assert next(iter(shipped.find(name).read_text().splitlines())) == f"recipe: {config.recipe}"


def test_defaults_are_the_schemas_and_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "optimizer: {lr: 1e-5}\n")
    config = load(path)
    expected = schema.Distill(recipe="train/distill", output="runs/x", optimizer=schema.Optimizer(lr=1e-5))
    assert config == expected
    changed = load(
        path, ["optimizer.lr=3e-4", "grid.steps_start=4", "data.flip=true", "optimizer.betas=[0.8, 0.9]"]
    )
    assert isinstance(changed, schema.Distill)
    assert changed.optimizer.lr == 3e-4 and changed.grid.steps_start == 4 and changed.data.flip is True
    assert changed.optimizer.betas == (0.8, 0.9)
    assert load(path, ["grid.steps_start=4", "grid.steps_start=null"]) == expected


def test_a_home_folder_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell writes `~` out in a file; a folder of that name would be made instead, in silence."""
    monkeypatch.setenv("HOME", "/home/ada")
    path = write(tmp_path, "recipe: train/distill\noutput: ~/x\ndata: {cache: ~/c, path: asset:brand}\n")
    config = load(path, ["validation.prompts=~/p.txt", "base.path=owner/name"])
    assert isinstance(config, schema.Training)
    assert (config.output, config.data.cache, config.data.path) == (
        "/home/ada/x",
        "/home/ada/c",
        "asset:brand",
    )
    assert (config.validation.prompts, config.base.path) == ("/home/ada/p.txt", "owner/name")


def test_a_config_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        load(write(tmp_path, MINIMAL)).output = "elsewhere"  # type: ignore[misc]


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    text = MINIMAL + (
        "steps: 0\nbatchsize: 4\nprecision: fp16\nrank: 8\nadapter: {rnk: 8, rank: many}\n"
        "guidance: {min: 9, max: 3}\noptimizer: {betas: [0.9], lr: true}\nvalidation: null\n"
        "logging: {trackers: tensorboard}\n"
    )
    found = mistakes(tmp_path, text, "foo", "steps.x=3", "loss.name=hubber", "ema=.nan")
    assert sorted(found) == sorted(
        [
            "foo: an override is written key=value, as optimizer.lr=3e-4",
            "steps.x: steps is 0, not a block of keys, so x cannot be set in it",
            "optimizer.lr: true is not allowed; it must be a number of more than 0 and at most 1e+09",
            "steps: 0 is not allowed; it must be a whole number of at least 1 and at most 10000000",
            "precision: 'fp16' is not allowed; it must be one of auto, float32, float16, bfloat16",
            "ema: nan is not allowed; it must be a number of at least 0 and less than 1",
            "adapter.rank: 'many' is not allowed; it must be a whole number of at least 1 and at most 1024",
            "adapter.rnk: unknown key; did you mean `rank`?",
            "guidance: min 9.0 is larger than max 3.0; swap them",
            "loss.name: 'hubber' is not allowed; it must be one of huber, huber_norm, cauchy, l2; "
            "did you mean `huber`?",
            "optimizer.betas.1: missing; it must be a number of at least 0 and less than 1",
            "validation: null is not allowed; it must be a block of keys "
            "(every, prompts, count, resolution, guidance_scale, seed, control, control_count, held_out, "
            "diversity)",
            "logging.trackers: 'tensorboard' is not allowed; it must be a list, each text",
            "batchsize: unknown key; did you mean `batch_size`?",
            "rank: unknown key; did you mean `adapter.rank`?",
        ]
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("output: x\n", "recipe: missing; the first line must name the recipe: one of train/distill"),
        (
            "recipe: [1]\n",
            "recipe: [1] is not text; the first line must name the recipe: one of train/distill",
        ),
        ("output: x\nrecipe: train/distill\n", "recipe: it must be the first key"),
        ("recipe: train/distill\n", "output: missing; it must be text"),
        (
            "recipe: train/finetune\noutput: x\nloss: {min_snr_gamma: 2, snr_floor: 3}\n",
            "loss: snr_floor 3 is above min_snr_gamma 2; set it to that or less",
        ),
        (MINIMAL + "zzz: 1\n", "zzz: unknown key; allowed here: recipe, output, seed, steps"),
        (
            MINIMAL + "loss: {c: .inf}\n",
            "loss.c: inf is not allowed; it must be a number of more than 0 and at most 1e+09",
        ),
        (MINIMAL + "steps: 2.5\n", "steps: 2.5 is not allowed; it must be a whole number of at least 1"),
        (MINIMAL + "data: {resolution: 63}\n", "data: resolution 63 is not a multiple of 8; try 56"),
        (
            MINIMAL + "grid: {steps_start: x}\n",
            "grid.steps_start: 'x' is not allowed; it must be a whole number",
        ),
        (MINIMAL + "base: tiny-sd\n", "base: 'tiny-sd' is not allowed; it must be a block of keys (path, "),
        (MINIMAL + "base: {path: ''}\n", "base.path: '' is not allowed; it must be text, and not empty"),
        (
            MINIMAL + "teacher: {adapters: [{path: a, weight: true}]}\n",
            "teacher.adapters.0.weight: true is not allowed; it must be a number of at least -1000 and at",
        ),
        (
            MINIMAL + "teacher: {adapters: {path: a, wait: 3}}\n",
            "teacher.adapters.0.wait: unknown key; did you mean `weight`?",
        ),
        (
            MINIMAL + "teacher: {adapters: [a, 3]}\n",
            "teacher.adapters.1: 3 is not allowed; it must be a block of keys (path, weight)",
        ),
        (MINIMAL + "seed: yes\n", "seed: true is not allowed; it must be a whole number"),
        (
            MINIMAL + "steps: 5\noptimizer: {warmup_steps: 9}\n",
            "optimizer.warmup_steps 9 is larger than steps 5",
        ),
    ],
)
def test_one_mistake_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    found = mistakes(tmp_path, text)
    assert len(found) == 1 and found[0].startswith(sentence)


@pytest.mark.parametrize("override", ["\udce9=1", "a.\x00=1", "\x1b[2J=1", "=1", "a..b=1", "a"])
def test_what_is_no_override_is_shown(tmp_path: Path, override: str) -> None:
    shown = f"{override}: an override is written key=value, as optimizer.lr=3e-4"
    assert mistakes(tmp_path, MINIMAL, override) == [ascii(shown)[1:-1]]


def test_two_mistakes_in_a_list_are_both_told(tmp_path: Path) -> None:
    found = mistakes(tmp_path, MINIMAL + "teacher: {adapters: [{path: a, weight: .nan}, 3]}\n")
    assert found == [
        "teacher.adapters.0.weight: nan is not allowed; it must be a number of at least -1000 and at most "
        "1000",
        "teacher.adapters.1: 3 is not allowed; it must be a block of keys (path, weight)",
    ]


def test_an_empty_list_is_named(tmp_path: Path) -> None:
    text = "recipe: evaluation/guidance_sweep\nadapters: ['']\n"
    assert mistakes(tmp_path, text) == ["adapters.0: '' is not allowed; it must be text, and not empty"]
    text = "recipe: evaluation/guidance_sweep\nadapters: []\ncost: {prise_per_hour: 3}\n"
    assert mistakes(tmp_path, text) == [
        "adapters: [] is not allowed; it must be a list, each text, and not empty",
        "cost.prise_per_hour: unknown key; did you mean `price_per_hour`?",
    ]


def test_an_unknown_recipe_is_guessed(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "recipe: train/distil\n")[0].endswith("did you mean `train/distill`?")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps: 3\nsteps: 4\n", ", line 2: not valid YAML (key `steps` is there twice); correct that line"),
        ("recipe: a\nb:\n  yes: 1\n", ", line 3: not valid YAML (key `yes` is not text; quote it)"),
        ("a: [\n", ", line 2: not valid YAML ("),
        ("- 1\n", ": it holds no keys; its first line must be `recipe: train/distill`"),
        ("", ": it holds no keys; its first line must be `recipe: train/distill`"),
        ("\x00", ": not a text file in YAML"),
        (
            "recipe: !!python/object:os.system {}\n",
            ", line 1: not valid YAML (the tag !!python/object:os.system; leave it out)",
        ),
    ],
)
def test_what_is_not_a_config_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(f"config {path}{sentence}")


def test_a_folder_and_binary_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "picture.png").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="not a text file"):
        load(tmp_path / "picture.png")


DEEP = "a: " + "[" * 5000
HOSTILE = [
    ("a: &a [*a]\n", "an alias of what it stands in"),
    (
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)),
        "more than 10,000 values",
    ),
    (DEEP, "more than 16 blocks within each other"),
    ("b: " + "{a: " * 5000, "more than 16 blocks within each other"),
    ("steps: " + "9" * 5000 + "\n", "a value of 5,000 characters that is not text"),
    ("steps: 0x" + "f" * 5000 + "\n", "a value of 5,002 characters that is not text"),
    ("seed: !!int x\n", "a value is not what its tag says"),
    ("seed: !!bool x\n", "a value is not what its tag says"),
    ("seed: !!timestamp 2024-99-99\n", "a value is not what its tag says"),
    ("seed: !!set {a}\n", "the tag !!set; leave it out"),
    ("seed: !mine {a: 1}\n", "the tag !mine; leave it out"),
    ("? [a, b]\n: 1\n", "key is not text; quote it"),
    ('output: "a\\0b"\n', "a text with a NUL character"),
    ('output: "\\ud800"\n', "a text with a NUL character, or half of a character"),
]


@pytest.mark.parametrize(("text", "problem"), HOSTILE)
def test_hostile_yaml_is_a_sentence_within_a_second(tmp_path: Path, text: str, problem: str) -> None:
    for source in (text, MINIMAL + text):
        if "output" in text and source is not text:
            continue
        began = time.process_time()
        with pytest.raises(UserError, match=re.escape(f"not valid YAML ({problem}")) as caught:
            load(write(tmp_path, source))
        assert time.process_time() - began < 1 and len(str(caught.value)) < 300
    value = text.partition(": ")[2].strip()
    if not text.startswith(("?", "a0")):  # as an override too
        with pytest.raises(UserError, match="is not valid YAML; quote it"):
            load(write(tmp_path, MINIMAL), [f"seed={value.replace('a [*a]', 'b [*b]')}"])


def test_dates_are_text_and_aliases_work(tmp_path: Path) -> None:
    config = load(write(tmp_path, "recipe: train/distill\noutput: &o 2024-99-99\nbase: {path: *o}\n"))
    assert isinstance(config, schema.Distill)
    assert config.output == config.base.path == "2024-99-99"


def test_many_keys_are_told_in_short_within_a_second(tmp_path: Path) -> None:
    began = time.process_time()
    with pytest.raises(UserError, match=r"more than 65,536 bytes, which no config has"):
        load(write(tmp_path, MINIMAL + "".join(f"k{n}: 1\n" for n in range(100_000))))
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, MINIMAL + "".join(f"k{n}: 1\n" for n in range(3_000))))
    assert time.process_time() - began < 2
    head, *lines = str(caught.value).split("\n")
    assert head.endswith("3000 mistakes") and len(lines) == 21 and lines[-1] == "  - and 2,980 more"


def parts(hint: Any) -> Iterator[Any]:
    """A type and all that it is made of; of a block its keys' types too."""
    yield hint
    inner = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    for part in (*inner, *(get_type_hints(hint, include_extras=True).values() if is_dataclass(hint) else ())):
        yield from parts(part)


def keys_of(block: type) -> dict[str, Any]:
    """The keys of a block and their types."""
    hints = get_type_hints(block, include_extras=True)
    return {field.name: hints[field.name] for field in fields(block)}


def door(block: type) -> Any:
    """What validates a block: of a method, which knows nothing of pydantic, the union that it is in."""
    return schema.AnyMethod if "name" in named(block) else block


def named(block: type) -> dict[str, str]:
    """What tells a method from the others."""
    return {"name": block.name} if block in (*METHODS.values(), Custom) else {}


BLOCKS = sorted(
    {part for recipe in RECIPES.values() for part in parts(recipe) if is_dataclass(part)}, key=str
)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_no_number_is_infinite_or_absurd(block: type) -> None:
    """By the schema itself, so that a key that comes tomorrow is held to it too."""
    for key, hint in keys_of(block).items():
        held = [part for part in parts(hint) if part in (int, float)]
        if not held or any(is_dataclass(part) for part in parts(hint)):
            continue
        several = any(get_origin(part) is tuple for part in parts(hint))
        wrong = (
            [math.nan, math.inf, -math.inf, 1e308, -1e308] if float in held else [10**30, -(10**30), 2**64]
        )
        wrong += [True, False, "true", [1], {}, "", "1e400"]
        for value in wrong:
            with pytest.raises(ValidationError) as caught:
                TypeAdapter(door(block)).validate_python(
                    {**named(block), key: [value, value] if several else value}
                )
            assert any(key in error["loc"] for error in caught.value.errors()), f"{key} takes {value}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_no_text_is_empty(block: type) -> None:
    """An empty `output` would be the folder that the command is run in."""
    for key, hint in keys_of(block).items():
        if str not in parts(hint) or any(is_dataclass(part) for part in parts(hint)):
            continue
        value = [""] if any(get_origin(part) is tuple for part in parts(hint)) else ""
        with pytest.raises(ValidationError) as caught:
            TypeAdapter(door(block)).validate_python({**named(block), key: value})
        assert any(key in error["loc"] for error in caught.value.errors()), key


def test_the_blocks_are_all_there() -> None:
    assert {schema.Optimizer, schema.Weighted, schema.Distill} <= set(BLOCKS) and len(BLOCKS) > 20


def test_values_become_overrides_that_give_them_back() -> None:
    values = {
        "a": {"b": 1e-5, "c": None, "d": {}}, "e": ["x", 2, True], "f": Path("runs/\U0001f994"),
        "g": "a\x7fb\x85c\u2028d\ufeffe: #{}'\"", "h": ({"path": "p", "weight": 0.5},),
    }  # fmt: skip
    words = dict(text.split("=", 1) for text in yaml_text.overrides(values))
    found = {key: yaml_text.parse(word) for key, word in words.items()}
    assert float(found.pop("a.b")) == 1e-5
    assert found == {
        "a.c": None, "e": ["x", 2, True], "f": "runs/\U0001f994", "g": values["g"],
        "h": [{"path": "p", "weight": 0.5}],
    }  # fmt: skip
    assert yaml_text.overrides({"lr": torch.tensor(0.5)}, "optimizer") == ["optimizer.lr=0.5"]
    with pytest.raises(UserError, match="a set is no value of a config"):
        yaml_text.overrides({"a": {1}})
