"""The door for reading what the kit wrote: a damaged byte of it is named, or changes nothing."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NotRequired

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typing_extensions import TypedDict

from lcm_kit.io import own_files
from lcm_kit.io.own_files import Damaged

AGAIN = "make it anew"
ROOT = Path(__file__).parents[1]


class Shape(TypedDict):
    """What the tests' files hold."""

    name: str
    steps: int
    weight: float
    rows: list[dict[str, float]]
    more: NotRequired[str]


CONTENT: Any = {"name": "brand, größer", "steps": 4, "weight": 0.1, "rows": [{"a": 1e-300}], "else": [None]}


def damages(data: bytes) -> Iterator[bytes]:
    """Each byte with one bit or all flipped, each length that is shorter, and other content."""
    for place in range(len(data)):
        for flip in (1, 32, 128, 255):
            yield data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]
    for length in range(len(data)):
        yield data[:length]
    yield from (b"{}", b"[]", b"null", b"3", b'"text"', b'{"name": 3}', b"\xff\xfe", b"[" * 100_000)


def is_named_or_harmless(file: Path, read: Callable[[], Any], same: Callable[[Any], bool]) -> tuple[int, int]:
    """How often damage to `file` was named and how often nothing changed; anything else fails."""
    whole, named, harmless = file.read_bytes(), 0, 0
    assert same(read())
    for data in damages(whole):
        file.write_bytes(data)
        try:
            found = read()
        except Damaged as error:
            assert str(error).startswith(f"{file} is damaged (") and str(error).endswith(f"); {AGAIN}")
            assert str(error).isprintable()
            named += 1
        else:
            assert same(found), data
            harmless += 1
    return named, harmless


def test_every_damage_to_json_is_named_or_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    own_files.write_json(file, CONTENT)

    def same(found: Any) -> bool:
        return {key: found.get(key) for key in CONTENT} == CONTENT

    named, harmless = is_named_or_harmless(file, lambda: own_files.read_json(file, Shape, AGAIN), same)
    assert named > 4 * harmless > 0  # spaces between values, and the key of the hash


def test_every_damage_to_a_line_is_named_or_cuts_the_last(tmp_path: Path) -> None:
    file, lines = tmp_path / "a.jsonl", [{"step": k, "loss": 1 / k} for k in (1, 2, 3)]
    for line in lines:
        own_files.append_line(file, line)

    def read() -> list[dict[str, float]]:
        return own_files.read_lines(file, dict[str, float], AGAIN)

    def same(found: Any) -> bool:
        kept = [{key: line.get(key) for key in ("step", "loss")} for line in found]
        return kept == lines[: len(kept)] and len(kept) >= file.read_bytes().count(b"\n")

    named, _ = is_named_or_harmless(file, read, same)
    assert named > 300
    file.unlink()
    assert read() == []


def test_every_damage_to_tensors_is_named_or_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {"b": torch.tensor([[0.5, -2.0]], dtype=torch.float16), "a": torch.arange(3)}
    own_files.write_tensors(file, tensors, "made-of")

    def same(found: Any) -> bool:
        return found.keys() == tensors.keys() and all(
            t.dtype == tensors[k].dtype and torch.equal(t, tensors[k]) for k, t in found.items()
        )

    named, harmless = is_named_or_harmless(file, lambda: own_files.read_tensors(file, AGAIN), same)
    assert named > 4 * harmless > 0
    own_files.write_tensors(file, tensors, "made-of")
    assert own_files.made_from(file) == "made-of" and own_files.is_whole(file)
    with safe_open(file, "pt") as opened:
        assert (opened.metadata() or {}).keys() == {"content"}  # several are written in any order
    assert file.read_bytes() == own_files.tensor_bytes(dict(sorted(tensors.items())), "made-of")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert own_files.made_from(file) == "made-of" and not own_files.is_whole(file)
    assert not own_files.is_whole(tmp_path / "none") and own_files.made_from(tmp_path / "none") is None


def test_every_damage_to_a_picture_is_named_or_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    picture = Image.new("RGB", (5, 4), (3, 200, 9))
    picture.putpixel((2, 2), (255, 0, 7))
    picture.save(file)
    read, whole = lambda: own_files.read_picture(file, AGAIN), picture.tobytes()  # noqa: E731
    named, harmless = is_named_or_harmless(file, read, lambda found: found.tobytes() == whole)
    assert named > 4 * harmless
    picture.save(file, "JPEG")  # whatever it is called, only PNG files are ours
    with pytest.raises(Damaged, match="no whole PNG file"):
        read()


def test_a_file_of_a_kit_that_wrote_no_hash_is_held_against_its_shape(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(CONTENT))
    assert own_files.read_json(file, Shape, AGAIN) == CONTENT
    for key, value, reason in (
        ("steps", 4.5, "steps is not as it should be"),
        ("steps", True, "steps is not as it should be"),
        ("rows", [{"a": "1"}], r"rows\.0\.a is not as it should be"),
    ):
        file.write_text(json.dumps({**CONTENT, key: value}))
        with pytest.raises(Damaged, match=reason):
            own_files.read_json(file, Shape, AGAIN)
    del CONTENT["else"]
    file.write_text(json.dumps({key: value for key, value in CONTENT.items() if key != "rows"}))
    with pytest.raises(Damaged, match=r"a.json is damaged \(rows is missing\); make it anew"):
        own_files.read_json(file, Shape, AGAIN)
    with pytest.raises(Damaged, match="No such file or directory"):
        own_files.read_json(tmp_path / "none.json", Shape, AGAIN)


def test_laying_json_out_anew_is_no_damage(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    own_files.write_json(file, CONTENT)
    said = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(said.items())), separators=(",", ":")))
    assert own_files.read_json(file, Shape, AGAIN) == CONTENT
    with pytest.raises(ValueError, match="not JSON compliant"):
        own_files.write_json(file, {"x": float("nan")})


# -- No second door ------------------------------------------------------------------------------------------

# Who may parse JSON, YAML, tensors and pictures by himself: what he reads is not ours, or is no file
FOREIGN = {
    "json.loads": {
        "lcm_kit/io/own_files.py", "lcm_kit/bases/source.py", "lcm_kit/bases/single_file.py",  # bases
        "lcm_kit/data/caption_tables.py", "lcm_kit/data/rights.py",  # captions, licences
        # LoRA headers
        "lcm_kit/lora/untrusted.py", "lcm_kit/lora/peft_header.py", "lcm_kit/lora/reading.py",
        "lcm_kit/lora/metadata_reading.py", "lcm_kit/lora/metadata.py", "lcm_kit/lora/write.py",
        "lcm_kit/plan/probe.py", "lcm_kit/bench/measure.py", "lcm_kit/data/ray_engine.py",  # a child's answer
        # what a server answers, its rows, what it is asked
        "lcm_kit/api/client.py", "lcm_kit/serve/store.py", "lcm_kit/serve/asked.py",
        "lcm_kit/adapter/adapted_unet.py",  # peft's config as JSON has it
        "lcm_kit/tiny/probe.py", "lcm_kit/tiny/models.py", "lcm_kit/bench/models.py",  # shipped
    },
    "json.load": {"lcm_kit/tiny/world.py"},
    "yaml.safe_load": {"lcm_kit/io/licenses.py"},  # the front of a README
    "yaml.load": set(),
    "load_file": {"lcm_kit/training/checkpoints.py", "lcm_kit/tiny/probe.py"},
    "torch.load": {"lcm_kit/training/checkpoints.py", "lcm_kit/tiny/fit.py", "train/pretrain_tiny.py"},
    "Image.open": {"lcm_kit/io/own_files.py", "lcm_kit/tiny/world.py", "lcm_kit/api/client.py"},  # a server's
}  # fmt: skip


def test_there_is_no_second_door() -> None:
    found: dict[str, set[str]] = {name: set() for name in FOREIGN}
    for folder in ("lcm_kit", "train", "evaluation"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in found:
                    found[name].add(file.relative_to(ROOT).as_posix())
    assert found == FOREIGN
