"""The check of a folder of brand images: every finding appears where it should, and nowhere else."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageEnhance, ImageOps
from scipy.fft import dctn
from typer.testing import CliRunner

from lcm_kit.cli.main import app
from lcm_kit.config.schema import Data
from lcm_kit.data import near_duplicates as near
from lcm_kit.data.folder import FolderCheck, _amount, check_data, check_folder
from lcm_kit.data.folder_pictures import look
from lcm_kit.data.records import Record, decode
from lcm_kit.errors import UserError

BRAND = sorted((Path(near.__file__).parents[1] / "assets" / "brand").glob("*.png"))
Edit = Callable[[Image.Image], Image.Image]


def picture(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A colourful picture of soft blobs, unlike that of any other seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pictures with captions, and nothing to be said about them."""
    for i in range(20):
        picture(i).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(f"subject{i} near{i} ground{i}")
    return tmp_path


def check(folder: Path, resolution: int = 64, trigger: str | None = None) -> FolderCheck:
    return check_folder(str(folder), resolution=resolution, trigger=trigger)


def only(found: FolderCheck) -> tuple[str, str]:
    """The weight and the text of the one thing that was found."""
    said = {"error": found.errors, "warning": found.warnings, "note": found.notes}
    [(weight, sentence)] = [(weight, each) for weight, them in said.items() for each in them]
    return weight, sentence


def test_a_good_folder_gives_no_finding(folder: Path) -> None:
    assert check(folder) == FolderCheck(20, (), (), ())


def test_a_good_folder_with_metadata_and_subfolders_gives_none(folder: Path) -> None:
    (folder / "more").mkdir()
    rows = []
    for i in range(20):
        (folder / f"{i:02}.png").rename(folder / "more" / f"{i:02}.png")
        rows.append({"file_name": f"{i:02}.png", "text": (folder / f"{i:02}.txt").read_text()})
        (folder / f"{i:02}.txt").unlink()
    (folder / "more" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert check(folder) == FolderCheck(20, (), (), ())


def test_the_brand_set_gives_no_finding() -> None:
    """96 pictures in one layout, many of one subject in several colours, some of one subject in two sizes."""
    assert check_folder("asset:brand", resolution=64) == FolderCheck(96, (), (), ())


@pytest.mark.parametrize(
    ("count", "weight"), [(1, "warning"), (9, "warning"), (10, "note"), (19, "note"), (20, None), (500, None)]
)
def test_few_and_many_pictures(count: int, weight: str | None) -> None:
    looks = [SimpleNamespace(content=str(i)) for i in [*range(count), 0, 0]]  # copies of a file count once
    found = list(_amount(looks))  # type: ignore[arg-type]
    assert [each.weight for each in found] == ([weight] if weight else [])
    if found:
        are = "is 1 different image that" if count == 1 else f"are {count} different images that"
        assert are in found[0].sentence
    assert [each.weight for each in _amount([*looks, *_others(501 - count)])] == ["note"]  # type: ignore[list-item]


def _others(count: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(content=f"other {i}") for i in range(count)]


def test_no_folder_no_image_and_kinds_that_are_not_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "there is no such folder" in only(check(tmp_path / "nowhere"))[1]
    assert "holds no image" in only(check(tmp_path / "empty"))[1]
    assert "not shipped" in only(check_folder("asset:nothing", resolution=64))[1]
    (tmp_path / "empty" / "IMG_1.HEIC").write_bytes(b"x")
    found = check(tmp_path / "empty")
    assert len(found.errors) == 1 and "IMG_1.HEIC" in found.warnings[0] and found.count == 0
    weight, sentence = only(check(folder))
    assert weight == "warning" and sentence.startswith("1 file is of a kind that is not read")


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("TIFF", {}), ("GIF", {})],
)
def test_check_and_encode_agree_on_what_can_be_read(format: str, options: dict[str, bool]) -> None:
    content = saved(picture(0, (700, 500)), format, **options)
    verdicts = set()
    for share in (0, 0.02, 0.3, 0.7, 0.95, 0.999, 1):
        cut = content[: int(share * len(content))]
        can = [readable(partial(decode, cut)), readable(partial(look, Record("a", (), lambda cut=cut: cut)))]
        assert can[0] == can[1], share
        verdicts.add(can[0])
    assert verdicts == {True, False}


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def readable(act: Callable[[], object]) -> bool:
    try:
        act()
    except UserError:
        return False
    return True


def test_broken_images_are_named(folder: Path) -> None:
    for name in ("03.png", "05.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
    found = check(folder)
    assert found.count == 20 and not found.warnings
    assert found.errors[0].startswith("2 images cannot be read: 03.png (") and "05.png (" in found.errors[0]
    assert found.notes[0].startswith("There are 18 different images")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_looked_at_is_what_encode_sees(orientation: int) -> None:
    """A large JPEG is decoded at an eighth of its size; still upright, and the same thumbnail."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(picture(3, (1600, 1100)), "JPEG", exif=exif)
    seen, whole = look(Record("a.jpg", (), lambda: content)), decode(content)
    assert seen.size == whole.size == ((1600, 1100) if orientation < 5 else (1100, 1600))
    assert np.abs(seen.small.astype(float) - near.thumbnail(whole)).mean() < 1


def other_space() -> bytes:
    """sRGB's profile with the primaries of red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {}
    for i in range(int.from_bytes(profile[128:132], "big")):
        entry = 132 + 12 * i
        places[bytes(profile[entry : entry + 4])] = int.from_bytes(profile[entry + 4 : entry + 8], "big")
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    profile[red : red + 20], profile[green : green + 20] = (
        profile[green : green + 20],
        profile[red : red + 20],
    )
    return bytes(profile)


def half_transparent(image: Image.Image) -> Image.Image:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def sixteen(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FRAMES = {"save_all": True, "append_images": [picture(31)]}


@pytest.mark.parametrize(
    ("name", "edit", "options", "expected"),
    [
        ("x.jpg", lambda im: im.convert("CMYK"), {}, ("warning", "1 image is in CMYK: x.jpg; ")),
        (
            "x.png",
            half_transparent,
            {},
            ("note", "1 image is partly transparent: x.png; `encode` puts white"),
        ),
        ("x.png", lambda im: im.convert("RGBA"), {}, None),  # an alpha channel, and nothing seen through
        ("x.gif", lambda im: im, FRAMES, ("note", "1 image is of several frames or pages: x.gif; only the")),
        ("x.gif", lambda im: im, {}, None),
        ("x.jpg", lambda im: im, FRAMES | {"format": "MPO"}, None),
        ("x.png", sixteen, {}, ("note", "1 image is in grey of more than 8 bits: x.png; `encode` keeps")),
        ("x.png", lambda im: im.convert("L"), {}, None),
        ("x.tiff", lambda im: im.convert("F"), {}, ("warning", "1 image is in floating point: x.tiff; ")),
        ("x.png", lambda im: im, {"icc_profile": SRGB}, None),
        ("x.png", lambda im: im, {"icc_profile": b"broken"}, None),
        (
            "x.jpg",
            lambda im: im,
            {"icc_profile": other_space()},
            ("warning", "1 image is in a colour space "),
        ),
        ("x.png", lambda im: Image.new("RGB", im.size, "navy"), {}, ("warning", "1 image is of nearly one")),
        ("x.png", lambda im: ImageEnhance.Contrast(im).enhance(0.15), {}, None),  # pale is not blank
    ],
)
def test_what_becomes_of_a_kind_of_file(
    folder: Path, name: str, edit: Edit, options: dict[str, object], expected: tuple[str, str] | None
) -> None:
    edit(picture(30)).save(folder / name, **options)
    (folder / "x.txt").write_text("a thing of another kind")
    found = check(folder)
    assert found.count == 21
    if expected is None:
        assert found == FolderCheck(21, (), (), ())
    else:
        weight, sentence = only(found)
        assert weight == expected[0] and sentence.startswith(expected[1])


def test_16_bits_become_the_upper_8_and_transparent_becomes_white() -> None:
    """What the notes promise of `encode`."""
    deep = decode(saved(Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16)), "PNG"))
    clear = decode(saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"))
    assert (deep.getpixel((1, 1)), clear.getpixel((1, 1))) == ((128, 128, 128), (255, 255, 255))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), None),
        (
            (50, 60),
            (
                "warning",
                "1 image is smaller than what is trained at, about 64 pixels a side: 00.png (50 x 60",
            ),
        ),
        ((150, 100), None),  # 3:2
        ((160, 90), None),  # 80 x 48
        (
            (96, 260),
            (
                "warning",
                "1 image loses more than 25% to the shape that is trained on: 00.png (96 x 260 cut to "
                "32 x 128, 32% lost)",
            ),
        ),
        ((383, 383), None),
        ((384, 384), ("note", "The sizes are very mixed (from 01.png 96 x 96 to 00.png 384 x 384)")),
    ],
)
def test_sizes(folder: Path, size: tuple[int, int], expected: tuple[str, str] | None) -> None:
    picture(0, size).save(folder / "00.png")
    if expected is None:
        assert check(folder) == FolderCheck(20, (), (), ())
    else:
        weight, sentence = only(check(folder))
        assert weight == expected[0] and sentence.startswith(expected[1])


def test_the_same_file_twice(folder: Path) -> None:
    for copy in ("x", "y"):
        (folder / f"{copy}.png").write_bytes((folder / "04.png").read_bytes())
        (folder / f"{copy}.txt").write_text("the fourth thing again")
    weight, sentence = only(check(folder))
    assert (
        weight == "warning"
        and "3 images show the same file more than once: 04.png = x.png = y.png;" in sentence
    )


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(saved(image, "JPEG", quality=quality))).convert("RGB")


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


COPIES: dict[str, Edit] = {
    "half the size": lambda image: image.resize((64, 64), Image.Resampling.BICUBIC),
    "JPEG 50": partial(jpeg, quality=50),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "cropped": partial(cropped, left=0.05, top=0.0, right=0.08, bottom=0.03),
    "a corner": partial(cropped, left=0.1, top=0.1, right=0.0, bottom=0.0),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_brand_pictures_are_found_and_nothing_else(kind: str) -> None:
    originals = [Image.open(path).convert("RGB") for path in BRAND[::8]]
    n = len(originals)
    both = [near.thumbnail(image) for image in [*originals, *map(COPIES[kind], originals)]]
    assert near.near_duplicates(both) == near.Copies([(i, n + i) for i in range(n)], [])


def test_mirrored_copies_of_brand_pictures_are_found_as_such() -> None:
    originals = [Image.open(path).convert("RGB") for path in BRAND[::8]]
    n = len(originals)
    mirrored = [jpeg(ImageOps.mirror(image), 70) for image in originals]
    found = near.near_duplicates([near.thumbnail(image) for image in [*originals, *mirrored]])
    symmetric = {pair[0] for pair in found.alike}
    assert set(found.alike) | set(found.mirrored) == {(i, n + i) for i in range(n)}
    assert not set(found.alike) & set(found.mirrored) and len(symmetric) <= 2


def test_copies_are_told_with_what_they_do_to_the_held_out_loss(folder: Path) -> None:
    picture(7, (200, 150)).save(folder / "07.png")
    jpeg(picture(7, (100, 75)), 60).save(folder / "x.jpg")
    ImageOps.mirror(picture(8)).save(folder / "y.png")
    for name in "xy":
        (folder / f"{name}.txt").write_text(f"a thing once more, {name}")
    found = check(folder)
    assert not found.errors and not found.notes and len(found.warnings) == 2
    assert found.warnings[0].startswith("2 images show nearly the same picture: 07.png = x.jpg; keep one")
    assert found.warnings[1].startswith("2 images show the same picture mirrored: 08.png = y.png; keep one")
    assert all("the held-out loss promises too much" in each for each in found.warnings)


def test_another_colour_is_another_picture() -> None:
    """The grey hash cannot tell the two apart; the comparison in colour can."""
    image = Image.open(BRAND[0]).convert("RGB")
    red, green, blue = image.split()
    pair = [near.thumbnail(image), near.thumbnail(Image.merge("RGB", (blue, green, red)))]
    grey = [near.thumbnail(each.convert("RGB")) for each in (image.convert("L"), image.convert("L"))]
    assert near.near_duplicates(pair).alike == [] and near.near_duplicates(grey).alike == [(0, 1)]


def test_the_cosines_are_the_discrete_cosine_transform() -> None:
    small = near.thumbnail(picture(1))
    own = near.cosines(0.0, 1.0, 64) @ small @ near.cosines(0.0, 1.0, 64).T
    assert np.abs(own - dctn(small, axes=(1, 2), norm="ortho")).max() < 0.02  # of some 10 000
    lowest = dctn(np.tensordot([0.299, 0.587, 0.114], small, 1), norm="ortho")[:8, :8].ravel()[1:]
    assert (near.hashes(small)[0] == np.where(lowest > np.median(lowest), 1, -1)).all()


def test_the_cosines_of_a_window_are_those_of_the_cropped_picture() -> None:
    image = picture(2, (640, 640))
    window = near.thumbnail(cropped(image, 0.1, 0.05, 0.0, 0.08))
    fits = near.outline(window) @ near.outline(near.thumbnail(image), (0.1, 0.05, 1.0, 0.92))
    assert fits > 0.999 > 0.9 > near.outline(window) @ near.outline(near.thumbnail(image))
    places = near._windows(near._MARGINS)
    hashed = near.hashes(near.thumbnail(image), near._MARGINS)
    corner = places.index((0.1, 0.05, 1.0, 0.9))
    exact = near.hashes(near.thumbnail(cropped(image, 0.1, 0.05, 0.0, 0.1)))[0]
    assert (63 - hashed[corner] @ exact) / 2 <= 2 < 10 < (63 - hashed[0] @ exact) / 2


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a thing of another kind", None),
        ("lumo style", '1 caption has fewer than 3 words: 00.png (00.png: "lumo style")'),
        ("three words only", None),
        ("\u8d64\u3044\u5bb6", None),  # a red house, in Japanese
        ("IMG_2041 a red chair", "1 caption holds a file name, number or address: 00.png"),
        ("DSC01234 on the table", "1 caption holds a file name, number or address: 00.png"),
        ("our_logo-final.png on a wall", "1 caption holds a file name, number or address: 00.png"),
        ("picture 4 of a dsc player from 1984", None),
        (" ".join(["word"] * 180), None),
        (
            " ".join(["word"] * 181),
            "1 caption of more than about 225 tokens: 00.png; a text encoder reads 3 times 75",
        ),
        (", ".join(["tag"] * 100), None),
        (", ".join(["tag"] * 101), "1 caption of more than about 225 tokens: 00.png"),  # with 100 commas
    ],
)
def test_captions(folder: Path, caption: str, expected: str | None) -> None:
    (folder / "00.txt").write_text(caption, encoding="utf-8")
    if expected is None:
        assert check(folder) == FolderCheck(20, (), (), ())
    else:
        weight, sentence = only(check(folder))
        assert weight == ("note" if "225" in expected else "warning") and sentence.startswith(expected)


def test_captions_that_are_all_the_same(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.write_text("lumo style")
    weight, sentence = only(check(folder))
    assert weight == "warning" and sentence.startswith('All 20 captions are the same ("lumo style")')


@pytest.mark.parametrize(
    ("number", "expected"),
    [(20, None), (19, "19 of 20 captions have"), (12, "12 of 20 captions have"), (11, None)],
)
def test_a_phrase_that_most_captions_have(folder: Path, number: int, expected: str | None) -> None:
    for i in range(20):
        end = "in the Lumo style" if i < number else "with no name"
        (folder / f"{i:02}.txt").write_text(f"{'abcdefghijklmnopqrst'[i]}{i} seen{i}, {end}")
    if expected is None:
        assert check(folder) == FolderCheck(20, (), (), ())
    else:
        weight, sentence = only(check(folder))
        assert weight == "note" and sentence.startswith(f'{expected} "lumo style", and not {number:02}.png')


def test_the_trigger(folder: Path) -> None:
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(
            f"thing number {i}, " + ("LUMO style" if i < 15 else "lumo, in style")
        )
    assert check(folder, trigger=None).warnings == ()
    weight, sentence = only(check(folder, trigger="Lumo style"))
    assert weight == "warning"
    assert sentence.startswith(
        "5 captions lack the trigger 'Lumo style' (of 20): 15.png, 16.png, 17.png and 2 more;"
    )
    assert check(folder, trigger="thing number") == FolderCheck(20, (), (), ())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "2 images have no caption: 03.png, 04.png; write one"),
        (b" \n", "2 images have an empty caption: 03.png, 04.png; write down"),
        (b"gr\xfcn und rot", "2 images have a caption file that cannot be read: 03.png, 04.png; save it as"),
    ],
)
def test_captions_that_cannot_be_used(folder: Path, content: bytes | None, expected: str) -> None:
    for name in ("03.txt", "04.txt"):
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    weight, sentence = only(check(folder))
    assert weight == "error" and sentence.startswith(expected) and check(folder).count == 20


def test_metadata_that_names_what_is_not_there_or_is_no_text(folder: Path) -> None:
    (folder / "05.txt").unlink()
    rows = [{"file_name": "05.png", "text": 3}, {"file_name": "gone.png", "text": "a thing"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = check(folder)
    assert [each.split(";")[0] for each in found.errors] == [
        "1 image has a caption in metadata.jsonl that is not text: 05.png",
        "1 image is named in metadata.jsonl but not there: gone.png",
    ]
    (folder / "metadata.jsonl").write_text("{")
    assert "metadata.jsonl, line 1: not a JSON object" in only(check(folder))[1]


def test_what_skip_bad_leaves_out_is_a_warning_unless_nothing_is_left(folder: Path) -> None:
    (folder / "03.txt").unlink()
    found = check_data(Data(path=str(folder), skip_bad=True))
    weight, sentence = only(found)
    assert weight == "warning" and sentence.endswith("Left out, as data.skip_bad says.")
    for path in folder.glob("*.txt"):
        path.unlink()
    assert only(check_data(Data(path=str(folder), skip_bad=True)))[0] == "error"


def cli(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_verb_takes_a_folder(folder: Path) -> None:
    assert cli("check", folder, "--resolution", 64) == (0, f"data: {folder}, 20 images\nok: {folder}\n", "")
    code, out, _ = cli("check", folder, "--trigger", "lumo", "--resolution", 104)
    assert code == 0 and [line.split(":")[0] for line in out.splitlines()] == [
        "data",
        "warning",
        "warning",
        "ok",
    ]
    (folder / "03.txt").unlink()
    code, out, error = cli("check", folder, "--resolution", 64)
    assert (code, out) == (2, f"data: {folder}, 20 images\n") and error.startswith(
        "error: 1 image has no caption"
    )
    assert "has no keys; give --resolution" in cli("check", folder, "steps=3")[2]


def test_the_verb_says_of_a_config_what_it_says_of_its_folder(folder: Path) -> None:
    picture(0, (32, 32)).save(folder / "00.png")
    code, out, _ = cli("check", "distill/tiny_quick", f"data.path={folder}", "data.regularization=null")
    assert code == 0 and f"data: {folder}, 20 images with captions\n  warning: 1 image is smaller than" in out
    (folder / "03.txt").unlink()
    code, _, error = cli("check", "distill/tiny_quick", f"data.path={folder}")
    assert code == 2 and "1 image has no caption: 03.png" in error and "data.skip_bad=true" in error
