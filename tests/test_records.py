from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lcm_kit.config.schema import Data
from lcm_kit.data.buckets import cut
from lcm_kit.data.records import decode, open_records, prompts
from lcm_kit.data.transforms import to_pixels, to_rgb
from lcm_kit.errors import UserError


def _save(
    path: Path, colour: str = "red", caption: str | None = None, size: tuple[int, int] = (8, 8)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def _open(path: Path, **kwargs) -> tuple[dict[str, str], dict[str, str]]:
    good, bad = open_records(Data(path=str(path), **kwargs))
    return {record.id: record.caption for record in good}, dict(bad)


def test_captions_from_txt_and_metadata_in_subfolders(tmp_path: Path):
    _save(tmp_path / "b.png", caption="  a red\n square ")
    _save(tmp_path / "sub" / "a.JPG")
    _save(tmp_path / "sub" / "c.webp", caption="from the txt")
    _save(tmp_path / ".hidden" / "d.png", caption="never seen")
    rows = [{"file_name": "a.JPG", "text": "Größe"}, {"file_name": "c.webp", "text": "from the metadata"}]
    (tmp_path / "sub" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "prompts.txt").write_text("not a caption of any image")
    good, bad = _open(tmp_path)
    assert good == {"b.png": "a red square", "sub/a.JPG": "Größe", "sub/c.webp": "from the txt"}
    assert list(good) == sorted(good) and bad == {}


def test_bad_captions_come_with_their_reason(tmp_path: Path):
    _save(tmp_path / "good.png", caption="x")
    _save(tmp_path / "empty.png", caption=" \n")
    _save(tmp_path / "none.png")
    _save(tmp_path / "latin.png").with_suffix(".txt").write_bytes(b"gr\xfcn")
    rows = [
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "null.png"},
        {"file_name": "list.png", "text": ["x", 3]},
    ]
    _save(tmp_path / "null.png")
    _save(tmp_path / "list.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    good, bad = _open(tmp_path)
    assert list(good) == ["good.png"]
    assert bad.pop("latin.png").startswith("caption file latin.txt cannot be read")
    assert bad == {
        "empty.png": "empty caption",
        "none.png": "no caption: there is neither none.txt nor a line for it in metadata.jsonl",
        "null.png": "no caption",
        "list.png": "caption is not text but int (of a list of 2)",
        "gone.png": "is named in metadata.jsonl, but there is no such image",
    }


@pytest.mark.parametrize("line", ["{not json", '{"text": "x"}', '"text"', '{"file_name": 3}'])
def test_a_broken_metadata_line_is_named(tmp_path: Path, line: str):
    _save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    with pytest.raises(UserError, match="metadata.jsonl, line 2: not a JSON object with file_name and text"):
        _open(tmp_path)


def test_missing_and_empty_folders(tmp_path: Path):
    with pytest.raises(UserError, match="holds no image; put images"):
        _open(tmp_path)
    with pytest.raises(UserError, match="holds no image; put images"):
        _open(tmp_path, kind="folder")
    with pytest.raises(UserError, match="there is no such folder"):
        _open(tmp_path / "nowhere", kind="folder")
    with pytest.raises(UserError, match="neither a folder of images nor a data set that can be opened"):
        _open(tmp_path / "nowhere")


def test_unreadable_images(tmp_path: Path):
    whole = _save(tmp_path / "a.png", size=(64, 64)).read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        with pytest.raises(UserError, match="unreadable image: .+") as caught:
            decode(content)
        assert "0x" not in str(caught.value)


def test_a_local_data_set_saved_or_as_files(tmp_path: Path):
    import datasets

    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    rows = datasets.Dataset.from_dict(
        {"picture": images, "caption": ["red", None, " blue "]},
        features=datasets.Features({"picture": datasets.Image(), "caption": datasets.Value("string")}),
    )
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    rows.to_parquet(str(tmp_path / "files" / "train.parquet"))
    columns = {"image_column": "picture", "caption_column": "caption"}
    for name in ("saved", "splits", "files"):
        good, bad = open_records(Data(path=str(tmp_path / name), **columns))
        assert [(r.id, r.caption) for r in good] == [("row 0", "red"), ("row 2", "blue")], name
        assert bad == [("row 1", "no caption")]
        assert good[1].load().getpixel((3, 3)) == (0, 0, 255)
    with pytest.raises(
        UserError, match=r"data.caption_column 'text' is no column of .*; it has picture, caption"
    ):
        open_records(Data(path=str(tmp_path / "saved"), image_column="picture"))
    with pytest.raises(UserError, match="split 'test'"):
        open_records(Data(path=str(tmp_path / "splits"), split="test", **columns))


def test_orientation_transparency_and_deep_grey():
    sideways = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))  # red, blue
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    file = io.BytesIO()
    sideways.save(file, "PNG", exif=exif)
    upright = decode(file.getvalue())
    assert upright.size == (1, 2)
    assert [upright.getpixel((0, y)) for y in (0, 1)] == [(255, 0, 0), (0, 0, 255)]

    glass = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    glass.putpixel((1, 0), (255, 0, 0, 128))
    assert [to_rgb(glass).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 127, 127)]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)

    grey = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [to_rgb(grey).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_pixels_are_the_centre_square_in_minus_one_to_one():
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (0, 0, 48, 32))
    pixels = to_pixels(wide, cut(wide.size, (16, 16)))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert pixels[:, :, :6].min() > 0.9 and pixels[:, :, 10:].max() < -0.9
    assert pixels.max() == 1 and pixels.min() == -1
    assert torch.equal(to_pixels(wide, cut(wide.size, (16, 16)), mirrored=True), pixels.flip(-1))
    tall = to_pixels(
        Image.new("RGB", (33, 301), (255, 0, 127)), cut((33, 301), (64, 64))
    )  # odd sizes, enlarged
    assert tall.shape == (3, 64, 64)
    assert torch.allclose(tall.mean((1, 2)), torch.tensor([1, -1, 127 / 127.5 - 1]), atol=1e-6)


def test_regularisation_pictures_follow_under_their_own_names(tmp_path: Path):
    _save(tmp_path / "brand" / "a.png", caption="ours")
    _save(tmp_path / "general" / "a.png", caption="general")
    _save(tmp_path / "general" / "b.png")
    good, bad = _open(tmp_path / "brand", regularization=str(tmp_path / "general"))
    assert good == {"a.png": "ours", "regularisation/a.png": "general"}
    assert list(bad) == ["regularisation/b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="data.regularization .*empty.* no image"):
        _open(tmp_path / "brand", regularization=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="data.regularization .*nowhere.* no such folder"):
        _open(tmp_path / "brand", regularization=str(tmp_path / "nowhere"))


def test_prompts_are_lines_or_captions(tmp_path: Path) -> None:
    """One reader for every key that takes prompts to draw from."""
    assert prompts("asset:tiny-sd")[0].startswith("a small cactus")
    captions = prompts("asset:general")
    assert len(captions) == 384
    assert captions[0] == "a pineapple on a plain orange background, in the middle"
    with pytest.raises(UserError, match="no picture there has a caption"):
        prompts(str(tmp_path))
