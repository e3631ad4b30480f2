"""Folders as studios have them: links, odd endings, tables of captions, archives, and what is left out."""

from __future__ import annotations

import io
import json
import os
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lcm_kit import assets
from lcm_kit.config.schema import Data
from lcm_kit.data import image_files, records, transforms
from lcm_kit.data.buckets import cut
from lcm_kit.data.folder import check_folder
from lcm_kit.data.image_files import decode
from lcm_kit.data.records import Record, list_source, open_records
from lcm_kit.data.transforms import to_rgb, to_shape
from lcm_kit.errors import UserError


def picture(seed: int = 0, size: tuple[int, int] = (12, 10)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


def smooth(size: tuple[int, int]) -> Image.Image:
    """Waves: nothing in it is sharp, so that rounding between two passes of a filter stays rounding."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = [127 + 60 * np.sin(x / a) + 60 * np.cos(y / b) for a, b in ((9, 40), (15, 25), (30, 70))]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def put(file: Path, caption: str | None = "a noisy thing", seed: int = 0, format: str = "PNG") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded(picture(seed), format))
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, "utf-8")
    return file


def opened(folder: Path, **keys: str) -> tuple[dict[str, str], dict[str, str]]:
    good, bad = open_records(Data(path=str(folder), **keys))
    return {record.id: record.caption for record in good}, dict(bad)


# --- links, endings, what is left out ---


def test_linked_folders_are_followed_once_and_dead_links_are_named(tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere" / "b.png", "behind a link").parent
    folder = put(tmp_path / "brand" / "a.png").parent
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "round").symlink_to(folder)
    (elsewhere / "up").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    good, bad = opened(folder)
    assert good == {"a.png": "a noisy thing", "again/b.png": "behind a link"}
    assert list(bad) == ["gone.png"] and bad["gone.png"].startswith("link to nothing")
    assert sorted(list_source(Data(path=str(folder))).left_out.linked_twice) == [
        "again/up",
        "linked",
        "round",
    ]
    found = check_folder(str(folder), resolution=8)
    assert any("gone.png" in sentence for sentence in found.errors)
    assert any("3 links lead to a folder that is read already" in sentence for sentence in found.notes)


def test_pictures_are_told_by_their_content(tmp_path: Path) -> None:
    names = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c": "PNG", "d.data": "WEBP", "e.ppm": "PPM", "f.apng": "PNG"}
    for name, format in names.items():
        put(tmp_path / name, f"caption of {name}", format=format)
    (tmp_path / "c.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (tmp_path / "notes.md").write_text("# notes")
    (tmp_path / "README.md").write_text("about the set")
    (tmp_path / "lonely.txt").write_text("the caption of nothing")
    listing = list_source(Data(path=str(tmp_path)))
    assert {record.id: record.caption for record in listing.good} == {n: f"caption of {n}" for n in names}
    assert all(record.load().size == (12, 10) for record in listing.good)
    left = listing.left_out
    assert (left.captions, left.pictures, left.others) == (["lonely.txt"], ["c.eps"], ["notes.md"])
    found = check_folder(str(tmp_path), resolution=8)
    assert any("1 caption file has no picture: lonely.txt" in sentence for sentence in found.warnings)
    assert any("c.eps" in sentence for sentence in found.warnings)
    assert any("left out: notes.md" in sentence for sentence in found.notes)


def test_only_formats_of_the_list_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PostScript file under a picture's name would have Pillow start another program."""
    Image.init()

    def never(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setitem(Image.OPEN, "EPS", (never, None))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    with pytest.raises(UserError, match="unreadable image: a PostScript file"):
        decode(postscript)
    with pytest.raises(UserError, match="unreadable image: an empty file"):
        decode(b"")
    with pytest.raises(UserError, match="git-lfs keeps; run `git lfs pull`"):
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


# --- captions ---


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
@pytest.mark.parametrize("name", ["img/a.png", "img\\a.png", "./img/a.png", "absolute"])
def test_a_line_of_a_table_is_read_as_people_write_it(tmp_path: Path, key: str, name: str) -> None:
    put(tmp_path / "img" / "a.png", None)
    named = str(tmp_path / "img" / "a.png") if name == "absolute" else name
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": named, key: "as told"}))
    assert opened(tmp_path) == ({"img/a.png": "as told"}, {})


def test_tables_of_other_kinds(tmp_path: Path) -> None:
    for name in ("csv", "utf16", "list"):
        put(tmp_path / name / "a.png", None)
    (tmp_path / "csv" / "metadata.csv").write_text('file_name,text\na.png,"red, green"\n')
    line = json.dumps({"file_name": "a.png", "text": "sechzehn"})
    (tmp_path / "utf16" / "metadata.jsonl").write_text(line, "utf-16")
    (tmp_path / "list" / "metadata.jsonl").write_text(f"[\n{line}\n]")
    found = [opened(tmp_path / name)[0]["a.png"] for name in ("csv", "utf16", "list")]
    assert found == ["red, green", "sechzehn", "sechzehn"]


def test_accents_in_either_spelling_are_the_same_name(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "café.png")
    put(tmp_path / decomposed, None)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "café.png", "text": "a cup"}))
    assert opened(tmp_path) == ({decomposed: "a cup"}, {})


@pytest.mark.parametrize("beside", ["a.caption", "a.png.txt", "a.TXT"])
def test_caption_files_of_other_trainers(tmp_path: Path, beside: str) -> None:
    put(tmp_path / "a.png", None)
    (tmp_path / beside).write_text("beside it")
    assert opened(tmp_path) == ({"a.png": "beside it"}, {})


def test_two_lines_for_one_picture_are_not_the_last_one(tmp_path: Path) -> None:
    put(tmp_path / "a.png", None)
    lines = [json.dumps({"file_name": "a.png", "text": text}) for text in ("one", "two")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert opened(tmp_path)[1]["a.png"].startswith("two captions: metadata.jsonl, line 1 and metadata.jsonl")
    (tmp_path / "metadata.jsonl").write_text("\n".join([lines[0]] * 2))
    assert opened(tmp_path)[0] == {"a.png": "one"}


def test_a_second_caption_that_differs_is_told(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "from the text file")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "from the table"}))
    assert opened(tmp_path)[0] == {"a.png": "from the text file"}
    warnings = check_folder(str(tmp_path), resolution=8).warnings
    assert any("1 image has a second caption that says something else: a.png" in each for each in warnings)


def test_paths_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    for name, words in (("/elsewhere/b.png", "not a path below"), ("../b.png", "leads out of the folder")):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        with pytest.raises(UserError, match=f"metadata.jsonl, line 1: .*{words}"):
            opened(tmp_path)


def test_keys_for_data_sets_without_effect_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    for keys in ({"caption_column": "words"}, {"image_column": "picture"}, {"split": "validation"}):
        (key, value) = next(iter(keys.items()))
        with pytest.raises(UserError, match=f"data.{key} '{value}' has no effect"):
            opened(tmp_path, **keys)
    row = {"file_name": "a.png", "text": "not this", "words": "this one"}
    (tmp_path / "a.txt").unlink()
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert opened(tmp_path, caption_column="words")[0] == {"a.png": "this one"}


@pytest.mark.parametrize(
    ("caption", "reason"),
    [("word " * 2_000_000, "caption is too long"), ("red\x1b[31m cat", "caption holds a control character")],
)
def test_what_is_no_caption(tmp_path: Path, caption: str, reason: str) -> None:
    put(tmp_path / "a.png", caption)
    assert opened(tmp_path)[1]["a.png"].startswith(reason)
    assert "\x1b" not in str(check_folder(str(tmp_path), resolution=8))


# --- archives ---


def archive(file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as packed:
        for k in range(2):
            packed.writestr(f"set/p{k}.png", encoded(picture(k)))
            packed.writestr(f"set/p{k}.txt", f"number {k}")
        packed.writestr("__MACOSX/set/._p0.png", b"x")
    return file


def test_a_zip_is_a_folder(tmp_path: Path) -> None:
    packed = archive(tmp_path / "brand.zip")
    assert opened(packed) == ({"set/p0.png": "number 0", "set/p1.png": "number 1"}, {})
    good, _ = open_records(Data(path=str(packed)))
    assert good[1].load().tobytes() == picture(1).tobytes()
    assert opened(tmp_path)[0] == {"brand.zip/set/p0.png": "number 0", "brand.zip/set/p1.png": "number 1"}
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"broken.zip: not a zip file that can be read"):
        opened(tmp_path / "broken.zip")


def test_data_sets_read_pictures_in_a_zip(tmp_path: Path) -> None:
    """`datasets` names them by an address within the archive, which is no file's path."""
    import datasets

    packed = archive(tmp_path / "brand.zip")
    addresses = [f"zip://set/p{k}.png::{packed}" for k in range(2)]
    rows = datasets.Dataset.from_dict({"image": addresses, "text": ["one", "two"]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    assert [records._read_row(rows, k, "image") for k in range(2)] == [encoded(picture(k)) for k in range(2)]
    far = datasets.Dataset.from_dict({"image": ["http://localhost:9/p.png"]})
    far = far.cast_column("image", datasets.Image(decode=False))
    with pytest.raises(UserError, match="an address in place of an image, 'http://localhost:9/p.png'"):
        records._read_row(far, 0, "image")


def test_a_parquet_file_alone(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"image": [picture(4)], "text": ["one row"]})
    rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "one.parquet"))
    good, _ = open_records(Data(path=str(tmp_path / "one.parquet")))
    assert [record.caption for record in good] == ["one row"] and good[0].load().size == (12, 10)
    assert (
        "is a data set; check a config" in check_folder(str(tmp_path / "one.parquet"), resolution=8).errors[0]
    )
    (tmp_path / "list.xlsx").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file that is not read"):
        opened(tmp_path / "list.xlsx")


def test_words_in_names_are_no_splits(tmp_path: Path) -> None:
    names = ["blue_car.png", "red_train.png", "test_pattern.png"]
    for k, name in enumerate(names):
        put(tmp_path / name, f"number {k}", seed=k)
    assert list(opened(tmp_path)[0]) == names


# --- pixels within bounds ---


def test_text_and_profiles_beyond_pillows_bounds_are_left_out() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    for options in ({"pnginfo": text}, {"icc_profile": bytes(3_000_000)}):
        assert decode(encoded(picture(5), **options)).tobytes() == picture(5).tobytes()


def test_more_pixels_than_are_read_is_said_with_the_size() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 14000, 13000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(UserError, match="14000 x 13000 pixels are more than .*; make it smaller"):
        decode(content)


def test_heic_and_jxl_with_and_without_what_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif, _ = pytest.importorskip("pillow_heif"), pytest.importorskip("pillow_jxl")
    pillow_heif.register_heif_opener()
    grey = Image.new("RGB", (32, 32), (90, 90, 90))
    for format in ("HEIF", "JXL"):
        found = np.asarray(decode(encoded(grey, format)), dtype=int)
        assert found.shape == (32, 32, 3) and np.abs(found - 90).max() <= 4

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(image_files, "import_module", missing)
    for format, extra in (("HEIF", "heif"), ("JXL", "jxl")):
        with pytest.raises(UserError, match=rf"whatever its name ends in; .*lcm-kit\[{extra}\]"):
            decode(encoded(grey, format))


@pytest.mark.parametrize("size", [(96, 64), (64, 131), (640, 480), (33, 301)])
def test_ordinary_pictures_become_what_they_always_became(size: tuple[int, int]) -> None:
    """Resized whole, then cropped: the same bytes, so that no cache changes."""
    image, side = picture(6, size), 32
    scale = side / min(size)
    whole = image.resize(tuple(max(side, round(each * scale)) for each in size), Image.Resampling.LANCZOS)
    top, left = cut(size, (side, side)).framing().corner
    assert (
        to_shape(image, cut(image.size, (side, side))).tobytes()
        == whole.crop((left, top, left + side, top + side)).tobytes()
    )


@pytest.mark.parametrize("size", [(230, 170), (90, 700)])
def test_strips_give_the_same_but_for_rounding(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = smooth(size).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    wanted = to_rgb(image).resize((51, 40), Image.Resampling.LANCZOS)
    monkeypatch.setattr(transforms, "_WHOLE", size[0] * 4 * 8)
    found = np.asarray(transforms.resized(image, (51, 40)), dtype=int)
    assert np.abs(found - np.asarray(wanted, dtype=int)).max() <= 1


@pytest.mark.parametrize("size", [(4, 900), (900, 4), (50, 4000)])
def test_a_long_picture_is_cropped_before_it_is_resized(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of 1 by 6000 at 512 pixels would be 512 by three million: gigabytes for one square."""
    image = smooth(size)
    wanted = np.asarray(to_shape(image, cut(image.size, (32, 32))), dtype=int)
    monkeypatch.setattr(transforms, "_RESIZED", 1)
    found = np.asarray(to_shape(image, cut(image.size, (32, 32))), dtype=int)
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 2


def test_what_a_run_draws_is_no_data(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "run" / "validation" / "step.png", None)
    (tmp_path / "run" / "config.yaml").write_text("recipe: train/finetune\n")
    assert list(opened(tmp_path)[0]) == ["a.png"] and opened(tmp_path)[1] == {}
    notes = check_folder(str(tmp_path), resolution=8).notes
    assert any("this kit's own, a run or a cache, and left out: run" in sentence for sentence in notes)
    assert os.listdir(tmp_path / "run")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_very_large_jpeg_is_reduced_while_it_is_decoded(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same square but for what an average of 2 x 2 changes, and the framing of the whole picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.linear_gradient("L").rotate(30).resize((701, 503)).convert("RGB").save(file, "JPEG", exif=exif)
    whole = Record("a.jpg", (), file.getvalue).pixels(32)
    monkeypatch.setattr(transforms, "_WHOLE", 1000)
    with Image.open(file) as image:
        reduced, size = transforms.upright_for(image, 32)
        assert min(reduced.size) == 252 and size == ((701, 503) if orientation < 5 else (503, 701))
    assert float((Record("a.jpg", (), file.getvalue).pixels(32) - whole).abs().mean()) < 0.01


def test_formats_that_are_copied_whole_have_a_bound_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MOST_COPIED", 1_000_000)
    for kind in ("WEBP", "PNG"):
        file = io.BytesIO()
        Image.new("RGB", (1001, 1000)).save(file, kind)
        if kind == "PNG":
            image_files.try_to_read(file.getvalue())
            continue
        with pytest.raises(UserError, match="1001 x 1000 pixels are more than the 1 million .* of WEBP"):
            image_files.try_to_read(file.getvalue())


def test_a_large_picture_is_gone_before_the_next_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of 13,000 x 13,000 took 5 GiB when it was not (docs/reliability.md)."""
    kept: list[Image.Image] = []
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    image_files.of_image(file.getvalue(), lambda image: kept.append(image))
    with pytest.raises(ValueError, match="closed"):
        kept[0].load()
    assert Image.core.get_block_size() == 64 << 20


@pytest.mark.parametrize("word", ["word ", "\u4e00"])
def test_a_prompt_of_megabytes_is_refused(tmp_path: Path, word: str) -> None:
    (tmp_path / "prompts.txt").write_text(word * 2_000_000, encoding="utf-8")
    with pytest.raises(UserError, match="characters of at most 20,000; take it out"):
        assets.prompts(str(tmp_path / "prompts.txt"))


def test_pictures_are_opened_at_few_places() -> None:
    """A stranger's by `data/image_files.py` alone; the others open what the kit itself drew or ships."""
    # api/client.py: a server's answer, as PNG alone
    ours = {"report/shared.py", "export/card.py", "tiny/world.py", "io/own_files.py", "api/client.py"}
    root = Path(image_files.__file__).parents[1]
    found = {
        str(path.relative_to(root)) for path in root.rglob("*.py") if "Image.open(" in path.read_text("utf-8")
    }
    assert found <= ours
