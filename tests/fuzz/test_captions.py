"""Captions, their tables and files of prompts of any bytes: usable text, a reason for each, or a sentence."""

from __future__ import annotations

import csv
import io
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from lcm_kit import assets
from lcm_kit.config.data import Data
from lcm_kit.data import folder, records
from lcm_kit.errors import UserError
from tests.fuzz.doors import answer, anything, check_sentence, fuzz, mutations, text


def _png() -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(made, "PNG")
    return made.getvalue()


PNG = _png()
LONGEST = 20_000  # characters of a caption
NAMES = st.sampled_from(
    ("a.png", "b.png", "c/d.png", "../a.png", "/etc/passwd", "c\\d.png", "gone.png", "C:/a.png")
)
VALUES = st.one_of(text, text, anything)
ROWS = st.dictionaries(
    st.sampled_from(("file_name", "text", "caption", "prompt", "image", "tags", "weight")),
    st.one_of(NAMES, VALUES),
    max_size=4,
)
NAMED = st.fixed_dictionaries({"file_name": st.one_of(NAMES, text), "text": VALUES})
JSONL = st.lists(st.one_of(NAMED, NAMED, ROWS, anything), max_size=4)
CONTENT = st.one_of(
    text.map(lambda made: made.encode("utf-8", "surrogatepass")),
    text.map(lambda made: made.encode("utf-16", "surrogatepass")),
    st.binary(max_size=40),
    st.sampled_from(
        (b"", b"\xef\xbb\xbf", b"\xff\xfe\x00", b"a fox\x1b[2J", b"word " * 5000, b"x" * 200_000)
    ),
)


def _table(rows: list[Any]) -> str:
    made = io.StringIO()
    writer = csv.writer(made)
    writer.writerow(("file_name", "text"))
    writer.writerows(
        [str(each) for each in (row.values() if isinstance(row, dict) else [row])] for row in rows
    )
    return made.getvalue()


TABLES = st.one_of(
    st.tuples(st.just("metadata.jsonl"), JSONL.map(lambda rows: "\n".join(map(json.dumps, rows)))),
    st.tuples(st.just("metadata.jsonl"), JSONL.map(json.dumps)),
    st.tuples(st.just("metadata.jsonl"), mutations('{"file_name": "a.png", "text": "a fox"}\n' * 2)),
    st.tuples(st.just("metadata.csv"), JSONL.map(_table)),
    st.tuples(st.just("metadata.csv"), mutations('file_name,text\na.png,"a fox"\nb.png,a cat\n')),
    st.tuples(st.sampled_from(("metadata.json", "a.json", "c/d.png.json")), JSONL.map(json.dumps)),
    st.tuples(
        st.sampled_from(("metadata.json", "a.json", "c/meta_cap.json")),
        st.one_of(
            st.dictionaries(st.one_of(NAMES, text), st.one_of(ROWS, anything), max_size=3).map(json.dumps),
            mutations('{"a": {"caption": "a fox", "tags": "red"}, "b.png": {"tags": ["old"]}}'),
            ROWS.map(json.dumps),
        ),
    ),
    st.tuples(
        st.sampled_from(("metadata.csv", "c/metadata.jsonl", "metadata.json", "metadata.parquet")),
        st.one_of(text, st.just("[" * 100_000)),
    ),
)
# A name that a file system takes
FILES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda name: not name.startswith(".")
)


def _folder(place: Path, files: dict[str, bytes]) -> Path:
    """A fresh folder with three pictures and `files`."""
    shutil.rmtree(place, ignore_errors=True)
    for name, content in {"a.png": PNG, "b.png": PNG, "c/d.png": PNG, **files}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def _check(place: Path, lines: str = "joined") -> None:
    """Each picture has a caption that can be used or a reason, and what is said of them can be shown."""
    found = answer(
        lambda: records.open_records(Data(path=str(place), kind="folder", captions={"lines": lines})),
        str(place),
    )
    if not isinstance(found, UserError):
        good, bad = found
        assert {"a.png", "b.png", "c/d.png"} <= {record.id for record in good} | {id for id, _ in bad}
        for record in good:
            assert record.captions and all(weight > 0 for _, weight in record.captions)
            for caption, _ in record.captions:
                assert 0 < len(caption) <= LONGEST and caption == " ".join(caption.split())
                assert not any(unicodedata.category(sign) in ("Cc", "Cs") for sign in caption)
        for id, reason in bad:
            assert len(reason) < 500
            check_sentence(str(UserError(f"{id}: {reason}")))
    said = folder.check_folder(str(place), resolution=64)
    if lines == "joined":
        assert said.errors if isinstance(found, UserError) else bool(said.errors) == bool(bad)
    for sentence in (*said.errors, *said.warnings, *said.notes):
        check_sentence(str(UserError(sentence)))


@fuzz(st.tuples(CONTENT, CONTENT, CONTENT, st.lists(TABLES, max_size=1)), small=35, large=2500)
def test_any_captions(place: Path, given: tuple[bytes, bytes, bytes, list[tuple[str, str]]]) -> None:
    a, b, d, tables = given
    files = {"a.txt": a, "b.caption": b, "c/d.png.txt": d}
    _check(
        _folder(place / "x", files | {name: said.encode("utf-8", "surrogatepass") for name, said in tables})
    )


@fuzz(
    st.lists(TABLES, min_size=1, max_size=2), small=35, large=2500,
    examples=[[("metadata.csv", f"file_name,text\n{'1' * 400},x\n")]],  # a name that no file system holds
)  # fmt: skip
def test_any_tables(place: Path, tables: list[tuple[str, str]]) -> None:
    _check(_folder(place / "x", {name: said.encode("utf-8", "surrogatepass") for name, said in tables}))
    _check(place / "x", "each")


@fuzz(
    st.lists(st.tuples(FILES, st.sampled_from(("", ".png", ".txt", ".PNG"))), max_size=4),
    small=40,
    large=1500,
)
def test_any_names(place: Path, names: list[tuple[str, str]]) -> None:
    _check(_folder(place / "x", {name + ending: b"a fox" for name, ending in names}))


@fuzz(CONTENT, small=80, large=3000)
def test_any_prompts(place: Path, content: bytes) -> None:
    file = place / "prompts.txt"
    file.write_bytes(content)
    found = answer(lambda: assets.prompts(str(file)), str(file))
    if not isinstance(found, UserError):
        assert found and all(line == line.strip() and line and not line.startswith("#") for line in found)
        assert all(len(line) <= LONGEST for line in found)
        assert not any(
            unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for line in found for sign in line
        )
