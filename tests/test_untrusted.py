"""Files that a stranger made, byte by byte: refused with a sentence, or read as safetensors reads them."""

from __future__ import annotations

import json
import pickle
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from lcm_kit.errors import UserError
from lcm_kit.lora import untrusted

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ONE = struct.pack("<2f", 1.0, 2.0)


def craft(path: Path, header: Any, data: bytes = ONE, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def refused(path: Path) -> str:
    """The sentence, which `inspect` and `read` share."""
    with pytest.raises(UserError) as by_header:
        untrusted.inspect(path)
    with pytest.raises(UserError) as by_read:
        untrusted.read(path)
    sentence = str(by_read.value)
    assert sentence == str(by_header.value)
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence and len(sentence) < 450 + len(str(path))
    return sentence.removeprefix(f"{path}: ")


def all_dtypes() -> dict[str, torch.Tensor]:
    numbers = torch.arange(1, 7)
    made = {f"t.{name}": numbers.to(dtype).reshape(2, 3) for name, dtype in untrusted.DTYPES.items()}
    made |= {"alpha": torch.tensor(8.0), "none": torch.empty(0, 3), "conv": torch.randn(2, 3, 3, 3).half()}
    made["odd"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return made


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("metadata", [None, {"a": '{"b": 1}', "emoji": "🐟", "": ""}])
def test_a_true_file_comes_back_bit_for_bit(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = all_dtypes()
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    found, said = untrusted.read(tmp_path / "a.safetensors")
    assert {k: bits(t) for k, t in found.items()} == {k: bits(t) for k, t in tensors.items()}
    assert said == (metadata or {})
    header = untrusted.inspect(tmp_path / "a.safetensors")
    assert header.metadata == said and list(header.entries) == list(found)
    assert header.entries["conv"] == ("F16", (2, 3, 3, 3)) and header.entries["alpha"] == ("F32", ())
    found["conv"].zero_()  # its own memory, not the file's
    assert bits(untrusted.read(tmp_path / "a.safetensors")[0]["conv"]) == bits(tensors["conv"])


@pytest.mark.parametrize("length", [640, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_or_a_zip(tmp_path: Path, length: int) -> None:
    raw = json.dumps({"a": F32}).encode().ljust(length)
    path = craft(tmp_path / "a.safetensors", raw)
    assert path.read_bytes()[:2] in (b"\x80\x02", b"PK")
    assert torch.equal(untrusted.read(path)[0]["a"], torch.tensor([1.0, 2.0]))


def test_bytes_that_are_not_aligned(tmp_path: Path) -> None:
    header = {
        "b": {**F32, "data_offsets": [3, 11]},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    }
    found, _ = untrusted.read(craft(tmp_path / "a.safetensors", header, b"\1\2\3" + ONE))
    assert (
        list(found) == ["a", "b"] and found["a"].tolist() == [1, 2, 3] and found["b"].tolist() == [1.0, 2.0]
    )
    assert found["b"].data_ptr() % 4 == 0


def test_pickles_are_refused_and_never_loaded(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    for protocol in range(2, 6):
        (tmp_path / "a.safetensors").write_bytes(pickle.dumps({"w": Harm()}, protocol))
        assert "can run code" in refused(tmp_path / "a.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "zip.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("zip.safetensors", "old.safetensors"):
        assert "can run code" in refused(tmp_path / name) and "safetensors" in refused(tmp_path / name)
    for suffix in (".ckpt", ".pt", ".pth", ".bin", ".CKPT"):
        assert "can run code" in refused(craft(tmp_path / f"a{suffix}", {"a": F32}))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><head>", "web page"),
        (b"<html lang=en>", "web page"),
        (b"<?xml version='1.0'?><Error>", "web page"),
        (b'{"error":"Unauthorized","message":"log in"}', "not a safetensors file"),
        (b"hello", "its 5 bytes do not start as one"),
        (b"\xff" * 64, "not a safetensors file"),
        (struct.pack("<Q", 20_000_001) + b"{", "20000001 bytes, and the most that is read is 20000000"),
        (struct.pack("<Q", 2**64 - 1) + b"{", "18446744073709551615 bytes, and the most"),
        (struct.pack("<Q", 20_000_000) + b"{", "ends at byte 20000008, and 9 bytes are there"),
        (struct.pack("<Q", 8), "ends at byte 16, and 8 bytes are there"),
        (struct.pack("<Q", 0) + b"{}", "JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert words in refused(tmp_path / "a.safetensors")


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "missing.safetensors")
    assert "folder" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / ("a" * 300))


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**F32, **changes}}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"a": ', "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b'{"a":' + b"[" * 200_000, "not valid JSON"),
        (b'{"a":' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}', "'a' twice"),
        (b'{"__metadata__": {"x": "1", "x": "2"}}', "'x' twice"),
        (b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}', "'dtype' twice"),
        (b'{"\\ud800": 1}', "'\\ud800', which is not Unicode"),
        ({"__metadata__": {"x": "\ud800"}, **entry()}, "not Unicode"),
        ({}, "0 tensors"),
        ({"__metadata__": {}}, "0 tensors"),
        ({str(k): 0 for k in range(20_001)}, "20001 tensors"),
        (b'{"a":[' + b"[]," * 400_000 + b"[]]}", "more than 400000 lists and objects"),
        ({"__metadata__": {"x": 1}, **entry()}, "'x', whose value is not a string"),
        ({"__metadata__": ["x"], **entry()}, "__metadata__ is not a JSON object"),
        ({"__metadata__": None, **entry()}, "__metadata__ is not a JSON object"),
        ({"a": [1]}, "not given by dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "not given by dtype"),
        (entry(more=1), "not given by dtype"),
        (entry(dtype="F4"), "dtype 'F4'"),
        (entry(dtype="BOOL"), "dtype 'BOOL'"),
        (entry(dtype=["F32"]), "dtype ['F32']"),
        (entry(shape="2"), "shape '2'"),
        (entry(shape=[2.0]), "shape [2.0]"),
        (entry(shape=[True, 2]), "shape [True, 2]"),
        (entry(shape=[-1, -2]), "shape [-1, -2]"),
        (entry(shape=[1, 1, 1, 1, 1, 2]), "up to 5 whole numbers"),
        (entry(data_offsets=[0, 8, 8]), "data_offsets [0, 8, 8]"),
        (entry(data_offsets=[0]), "data_offsets [0]"),
        (entry(data_offsets=[8, 0]), "data_offsets [8, 0]"),
        (entry(data_offsets=[-8, 0]), "data_offsets [-8, 0]"),
        (entry(shape=[3]), "shape [3] and dtype F32 does not fit into its 8 bytes"),
        (entry(dtype="F16"), "dtype F16 does not fit into its 8 bytes"),
        (entry(shape=[2**40, 2**40]), "does not fit into its 8 bytes"),
        (entry(shape=[2**62]), "does not fit"),  # 2**64 bytes: 0 in 64 bits
        (entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "does not fit"),
        (entry(shape=[2**40], data_offsets=[0, 2**42]), "its tensors take 4398046511104 bytes, and 8"),
        (entry(data_offsets=[8, 16]), "'a' starts after a hole"),
        ({**entry(), "b": F32}, "'b' overlaps"),
        ({**entry(), "b": {**F32, "data_offsets": [4, 12]}}, "'b' overlaps"),
        (entry(shape=[1], data_offsets=[0, 4]), "4 bytes follow its last tensor"),
        ({"\x1b[31m" + "x" * 99: 1}, "'\\x1b[31mxxx"),
        ({"x" * 301: F32}, "has a name of 301 characters, above 300"),
        (b'{"a":{"dtype":"F32","data_offsets":[0,8],"shape":' + b"[" * 700 + b"]" * 700 + b"}}", "the shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_headers_that_claim_what_is_not(tmp_path: Path, header: Any, words: str) -> None:
    assert words in refused(craft(tmp_path / "a.safetensors", header))


def test_nothing_is_allocated_for_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("a tensor was made"))
    path = craft(tmp_path / "a.safetensors", entry(shape=[2**33], data_offsets=[0, 2**35]), b"", 19_999_999)
    tracemalloc.start()
    refused(path)  # neither the header's 20 MB ...
    refused(craft(path, entry(shape=[2**33], data_offsets=[0, 2**35])))  # ... nor the tensor's 34 GB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_every_truncation_is_named_with_its_byte_counts(tmp_path: Path) -> None:
    whole = save({"a": torch.ones(4), "b": torch.ones(2, 2)}, {"x": "y"})
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole)
    untrusted.read(path)
    for size in range(8, len(whole)):
        path.write_bytes(whole[:size])
        sentence = refused(path)
        assert "truncated" in sentence and "bytes are there" in sentence
    assert "its tensors take 32 bytes, and 31 bytes are there" in sentence


def test_flipped_and_lost_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    """Either refused, or read exactly as safetensors reads it: 1200 trials."""
    tensors = {"a" * 60: torch.randn(3, 2), "b.alpha": torch.tensor(4.0), "c": torch.ones(5).half()}
    whole = save(tensors, {"k": "some words " * 60})
    end = 8 + int.from_bytes(whole[:8], "little")
    draw, path = random.Random(0), tmp_path / "a.safetensors"
    outcomes = {"refused": 0, "read": 0}
    for trial in range(1200):
        broken = bytearray(whole)
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            place = draw.randrange(end)
            broken[place] = draw.choice(
                (draw.randrange(256), broken[place] ^ (1 << draw.randrange(8)), ord("0"))
            )
        if trial % 4 == 0:
            place = draw.randrange(len(broken))
            del broken[place : place + draw.choice((1, 2, 8, len(broken)))]
        path.write_bytes(broken)
        try:
            found, metadata = untrusted.read(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            outcomes["refused"] += 1
            continue
        theirs = load_file(path)  # raises if safetensors refuses what we accept
        assert {k: bits(t) for k, t in found.items()} == {k: bits(t) for k, t in theirs.items()}
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in metadata.items())
        outcomes["read"] += 1
    assert min(outcomes.values()) >= 100, outcomes


def test_nan_and_inf_are_named() -> None:
    inf, nan = float("inf"), float("nan")
    tensors = {
        "z": torch.tensor([[1.0, nan]]), "b": torch.tensor([inf]).half(),
        "a": torch.tensor([-inf]).bfloat16(), "fine": torch.tensor([65504.0]).half(),
        "whole": torch.tensor([2**40]), "alpha": torch.tensor(nan),
        "none": torch.empty(0), "e4": torch.tensor([nan]).to(torch.float8_e4m3fn),
        "e5": torch.tensor([inf]).to(torch.float8_e5m2), "e5 fine": torch.tensor([2.0]).to(torch.float8_e5m2),
    }  # fmt: skip
    assert untrusted.not_finite(tensors) == ["a", "alpha", "b", "e4", "e5", "z"]
    assert untrusted.not_finite({}) == []
