"""Edits over HTTP: the pictures of `lcm_kit.edit`, its refusals, and uploads of strangers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from PIL import Image

import lcm_kit
from lcm_kit.errors import UserError
from lcm_kit.io.files import sha256_bytes
from lcm_kit.serve import routes
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.asked import Order, parsed
from lcm_kit.serve.asked_edits import WantedEdit, settled_edit
from lcm_kit.serve.drawer import Drawer, Piece
from lcm_kit.serve.limits import Limits
from lcm_kit.serve.run import App
from tests.decoders import build_tiny
from tests.serve.small import (
    ADAPTER,
    PATIENCE,
    USUAL,
    FakeDrawer,
    application,
    ask,
    detail,
    events,
    figure,
    get,
    going,
)

STREAM = {"Accept": "text/event-stream"}
SECRET = "zanzibar"


def noise(seed: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Image.Image:
    """Blocks of random colours, so that nothing is flat."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    small = numpy.random.default_rng(seed).integers(0, 256, (8, 8, bands), dtype=numpy.uint8)
    return Image.fromarray(small.squeeze(), mode).resize(size, Image.Resampling.BICUBIC)


def hole(size: tuple[int, int] = (64, 64)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (16, 8, 48, 40))
    return mask


def file_of(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **how)
    return content.getvalue()


def sent(content: bytes | Image.Image) -> str:
    return base64.b64encode(file_of(content) if isinstance(content, Image.Image) else content).decode()


def post(app: App, asked: dict[str, Any], **headers: str) -> Any:
    return ask(app, {"json": asked, "url": "/v1/edits", "headers": headers})[0]


def drawn(answer: Any) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(each["base64"]))) for each in answer.json()["pictures"]]


def pixels(images: list[Image.Image]) -> Any:
    return numpy.stack([numpy.asarray(each.convert("RGB")) for each in images]).astype(int)


def settle(what: Served, limits: Limits = USUAL, **asked: Any) -> Order:
    return settled_edit(parsed(json.dumps(asked).encode(), WantedEdit), what, limits)


@pytest.fixture(scope="module")
def real(tiny: Served) -> Iterator[App]:
    """The embedded base with its LoRA, two pictures at once."""
    with application(tiny, limits=Limits(batch=2)) as app:
        yield app


TRANSPARENT = noise(4)
TRANSPARENT.putalpha(Image.eval(hole(), lambda value: 255 - value))
EDITS: dict[str, dict[str, Any]] = {
    "inpaint": {"task": "inpaint", "picture": noise(1), "mask": hole(), "count": 3},
    "inpaint at 0.7": {
        "task": "inpaint", "picture": noise(1), "mask": hole(), "strength": 0.7, "feather": 1,
    },
    "inpaint what is transparent": {"task": "inpaint", "picture": TRANSPARENT, "seed": 5},
    "outpaint": {"task": "outpaint", "picture": noise(1, (40, 56)), "grow": [8, 0, 16, 8]},
    "colorize": {"task": "colorize", "picture": noise(2).convert("L")},
    "upscale": {"task": "upscale", "picture": noise(3, (30, 32)), "scale": 2},
    "sketch": {"task": "sketch", "picture": noise(6), "sampler": "ddim", "steps": 5, "count": 2},
    "vary": {
        "task": "vary", "picture": noise(6, (61, 50)), "guidance_scale": 2.0, "negative_prompt": "blue",
    },
    "interpolate": {
        "task": "interpolate", "picture": noise(7), "to": noise(8), "prompt_to": "a dog", "frames": 5,
    },
    "interpolate prompts": {"task": "interpolate", "prompt_to": "a blue square", "frames": 3, "seed": 9},
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_what_the_command_line_draws(real: App, name: str) -> None:
    asked = {"prompt": "a red circle", **EDITS[name]}
    files = {key: each for key, each in asked.items() if isinstance(each, Image.Image)}
    answer = post(real, {**asked, **{key: sent(each) for key, each in files.items()}})
    found = drawn(answer)
    theirs = {**asked, "grow": tuple(asked["grow"])} if "grow" in asked else asked
    wanted = lcm_kit.edit(**theirs, adapter=ADAPTER, base="asset:tiny-sd", device="cpu", batch_size=2)
    assert [each.size for each in found] == [each.size for each in wanted]
    assert abs(pixels(found) - pixels(wanted)).max() <= 1
    told = answer.json()
    assert len(found) == asked.get("frames", asked.get("count", 1)) == len(told["batches"])
    assert [each["index"] for each in told["pictures"]] == list(range(len(found)))
    settings = told["settings"]
    for key, each in files.items():
        assert settings[key] == {"sha256": sha256_bytes(file_of(each))}
    assert {key: settings[key] for key in asked if key not in files} == {
        key: each for key, each in asked.items() if key not in files
    }
    again = post(real, {**settings, **{key: sent(each) for key, each in files.items()}})
    assert pixels(drawn(again)).tolist() == pixels(found).tolist()
    if asked["task"] == "inpaint":
        before = pixels([asked["picture"]])
        outside = numpy.asarray(hole()) == 0
        assert (pixels(found)[:, outside] == before[:, outside]).all()
        assert abs(pixels(found) - before)[:, ~outside].mean() > 5


def test_what_is_not_as_asked_is_a_note(real: App) -> None:
    asked = {"task": "vary", "picture": sent(noise(1, (61, 50))), "strength": 0.4}
    assert post(real, {**asked, "sampler": "ddim", "steps": 2}).json()["notes"] == [
        "strength 0.4: begun at 0.5 with 1 of 2 steps, the nearest of those that ddim has",
        "61 x 50 pixels are drawn as 64 x 64, multiples of 16, and cut back",
    ]


def test_an_edit_as_a_stream_and_as_a_file(real: App) -> None:
    """The steps are those that are left of it, and the pictures that are given are frames too."""
    asked = {"task": "interpolate", "picture": sent(noise(7)), "to": sent(noise(8)), "frames": 5, "steps": 3}
    found = events(post(real, asked, **STREAM).text)
    two = ["step"] * 3 + ["picture"] * 2  # the first of the first two, and the last of all, are given
    assert [name for name, _ in found] == [*two, *two, "picture", "done"]
    assert [data["index"] for name, data in found if name == "picture"] == [0, 1, 2, 3, 4]
    assert {data["steps"] for name, data in found if name == "step"} == {3}
    assert found[-1][1]["settings"]["frames"] == 5
    asked = {"task": "vary", "picture": sent(noise(6)), "sampler": "ddim", "steps": 10, "strength": 0.3}
    told = [data for name, data in events(post(real, asked, **STREAM).text) if name == "step"]
    assert told == [{"step": k, "steps": 3} for k in (1, 2, 3)]
    file = post(real, asked, Accept="image/png")
    assert file.headers["content-type"] == "image/png"
    (picture,) = drawn(post(real, asked))
    assert pixels([Image.open(io.BytesIO(file.content))]).tolist() == pixels([picture]).tolist()
    assert json.loads(file.headers["lcm-kit-settings"])["strength"] == 0.3


def test_edits_are_drawn_with_no_others(tiny: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even with the same again: what is known of a picture is known of all of a batch."""
    drawer = going()
    asked = {"task": "vary", "picture": sent(noise(1)), "prompt": SECRET, "count": 2}
    with application(tiny, drawer, Limits(window=0.05)) as app:
        edits, picture = [{"json": asked, "url": "/v1/edits"}] * 2, {"json": {"prompt": "a", "count": 2}}
        answers = ask(app, *edits, picture, together=True)
        assert [each.status_code for each in answers] == [200] * 3
        counted = get(app, "/metrics").text
    assert [len(pieces) for _, pieces in drawer.batches] == [2, 2, 2]
    assert figure(counted, 'lcm_kit_requests_total{method="POST",route="/v1/edits",status="200"}') == 2.0
    said = capsys.readouterr().err
    assert SECRET not in said and '"task": "vary"' in said


def test_a_step_that_ends_it_leaves_a_whole_drawer(tiny: Served) -> None:
    drawer = Drawer(tiny, 2)
    drawer.open()
    edit = settle(tiny, task="inpaint", picture=sent(noise(1)), mask=sent(hole()), count=4)
    pieces = [Piece(edit.prompt, edit.seed, number) for number in range(4)]
    whole = drawer.draw(edit.key, pieces, lambda *_: None)
    told: list[tuple[list[int], int, int]] = []

    def third(places: Any, step: int, steps: int) -> None:
        told.append((list(places), step, steps))
        if len(told) == 6:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        drawer.draw(edit.key, pieces, third)
    assert told == [([0, 1], step, 4) for step in (1, 2, 3, 4)] + [([2, 3], step, 4) for step in (1, 2)]
    some = drawer.draw(edit.key, pieces[1:3], lambda *_: None)
    assert abs(pixels(some) - pixels(whole[1:3])).max() <= 1
    assert abs(pixels(whole[:1]) - pixels(whole[1:2])).max() > 10


# -- What is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"task": "inpaint"}, {"task": "inpaint", "picture": noise(1)}, {"task": "vary"},
        {"task": "vary", "picture": noise(1), "mask": hole()},
        {"task": "upscale", "picture": noise(1), "frames": 3},
        {"task": "inpaint", "picture": noise(1), "mask": hole((32, 64))},
        {"task": "inpaint", "picture": noise(1), "mask": Image.new("L", (64, 64), 127)},
        {"task": "outpaint", "picture": noise(1)},
        {"task": "outpaint", "picture": noise(1), "grow": [0, 0, 0, 0]},
        {"task": "interpolate"}, {"task": "interpolate", "picture": noise(1)},
        {"task": "interpolate", "picture": noise(1), "to": noise(1, (32, 64))},
        {"task": "interpolate", "picture": noise(1), "to": noise(2), "frames": 2},
        {"task": "interpolate", "prompt_to": "a", "count": 2},
        {"task": "vary", "picture": noise(1), "sampler": "dpmpp_2m"},
        {"task": "vary", "picture": noise(1), "sampler": "lcm:399", "steps": 1},
        {"task": "vary", "picture": noise(1), "strength": 0.02, "steps": 4},
        {"task": "vary", "picture": noise(1), "strength": 0.02, "steps": 4, "sampler": "ddim"},
        {"task": "vary", "picture": noise(1), "negative_prompt": "blue"},
    ],
)  # fmt: skip
def test_what_the_command_line_refuses_is_refused_in_its_words(tiny: Served, asked: dict[str, Any]) -> None:
    theirs = {**asked, "grow": tuple(asked["grow"])} if "grow" in asked else asked
    with pytest.raises(UserError) as refused:
        lcm_kit.edit(**theirs, adapter=ADAPTER, base="asset:tiny-sd")
    drawer = going()
    with application(tiny, drawer) as app:
        files = {key: sent(each) for key, each in asked.items() if isinstance(each, Image.Image)}
        found = detail(post(app, {**asked, **files}))
    assert found == str(refused.value).replace(ADAPTER, "tiny-lcm-lora") and not drawer.batches


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"task": "draw"}, "task: 'draw' is not allowed; it must be 'inpaint', 'outpaint'"),
        ({"task": "vary", "picture": "x", "strength": 0}, "strength: 0 is not allowed; it must be greater"),
        ({"task": "vary", "picture": "x", "strength": 1.1}, "strength: 1.1 is not allowed"),
        ({"task": "outpaint", "picture": "x", "grow": [1, 2]}, "grow: "),
        ({"task": "outpaint", "picture": "x", "grow": [1, 2, -1, 3]}, "grow.2: -1 is not allowed"),
        ({"task": "upscale", "picture": "x", "scale": 9}, "scale: 9 is not allowed"),
        ({"task": "vary", "picture": "x", "width": 64}, "width: unknown key"),
        ({"task": "vary", "picture": {"sha256": "ab"}}, "picture: "),
        ({"task": "vary", "picture": ["x"] * 1000}, "picture: "),
        ({"prompt": "a"}, "task: missing; it must be given"),
        # over a limit of this server
        ({"task": "vary", "picture": noise(1, (104, 8))}, "picture: it has 104 x 8 pixels, and this server "
         "takes 96 a side; make it smaller"),
        ({"task": "inpaint", "picture": noise(1), "mask": hole((64, 104))}, "mask: it has 64 x 104 pixels"),
        ({"task": "interpolate", "picture": noise(1), "to": noise(1, (8, 104))}, "to: it has 8 x 104 pixels"),
        ({"task": "upscale", "picture": noise(1), "scale": 2},
         "a picture of 128 x 128 pixels is more than the 96 a side that this server draws; make it smaller"),
        ({"task": "outpaint", "picture": noise(1), "grow": [40, 0, 0, 0]}, "a picture of 112 x 64 pixels is"),
        ({"task": "outpaint", "picture": noise(1), "grow": [8192, 0, 0, 0]}, "is more than the 8192 a side"),
        ({"task": "vary", "picture": noise(1), "count": 4}, "count 4 is more than this server draws"),
        ({"task": "vary", "picture": noise(1), "steps": 11}, "steps 11 is more than this server draws"),
        ({"task": "interpolate", "prompt_to": "a", "frames": 10}, "frames 10 is more than this server draws; "
         "give 2 to 9"),
        ({"task": "interpolate", "prompt_to": "a" * 21}, "prompt_to has 21 characters; this server takes 20"),
        ({"task": "interpolate", "prompt_to": "\x00"}, "prompt_to holds a control character"),
    ],
)  # fmt: skip
def test_every_limit_is_a_sentence(tiny: Served, asked: dict[str, Any], said: str) -> None:
    drawer = going()
    with application(tiny, drawer, Limits(side=96, steps=10, count=3, frames=9, prompt=20)) as app:
        files = {key: sent(each) for key, each in asked.items() if isinstance(each, Image.Image)}
        found = detail(post(app, {**asked, **files}))
    assert found.startswith(said) or said in found
    assert len(found) < 400 and not drawer.batches


def test_the_body_of_an_edit_has_a_limit_of_its_own(tiny: Served) -> None:
    picture = numpy.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    asked = {"task": "vary", "picture": sent(Image.fromarray(picture))}
    length = len(json.dumps(asked))
    for upload, status in ((length + 100, 200), (length // 2, 413)):
        with application(tiny, going(), Limits(body=300, upload=upload)) as app:
            answer = post(app, asked)
            assert answer.status_code == status
            assert ask(app, {"json": {"prompt": "a" * 300}})[0].status_code == 413
    assert detail(answer, 413) == f"the body of this request is larger than {upload:,} bytes"


def test_several_pictures_are_no_file(tiny: Served) -> None:
    asked = {"task": "interpolate", "prompt_to": "b"}
    with application(tiny, going()) as app:
        assert "count 8: a PNG file holds one picture" in detail(post(app, asked, Accept="image/png"))


# -- Uploads of strangers ------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of few bytes, all of whose pixels are black."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + 3 * side)) for _ in range(side)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def huge(side: int) -> bytes:
    """As it says of itself; there is nothing in it."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + rows + chunk(b"IEND", b"")


def scans(count: int) -> bytes:
    """A JPEG whose last scan is said again and again: each is a pass over all of its pixels."""
    content = file_of(Image.new("RGB", (1024, 1024), "teal"), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + content[-2:]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "picture: it is no picture; send a PNG, JPEG or WebP file"),
    "text": (lambda: b"hello", "picture: it is no picture; send"),
    "broken": (lambda: b"\x89PNG\r\n\x1a\n" + b"\x01" * 100, "picture: unreadable image: "),
    "a head alone": (lambda: file_of(noise(1))[:40], "picture: unreadable image: "),
    "a truncated PNG": (lambda: file_of(noise(1))[:-200], "picture: unreadable image: "),
    "a truncated JPEG": (lambda: file_of(noise(1), "JPEG")[:-300], "picture: unreadable image: "),
    "a truncated WebP": (lambda: file_of(noise(1), "WEBP")[:-100], "picture: unreadable image: "),
    "a wrong sum": (lambda: file_of(noise(1)).replace(b"IDAT", b"IDAX"), "picture: unreadable image: "),
    "SVG": (lambda: SVG, "picture: an SVG file is not taken; send"),
    "PDF": (lambda: b"%PDF-1.7", "picture: a PDF file is not taken"),
    "PostScript": (lambda: b"%!PS-Adobe", "picture: a PostScript file is not taken"),
    "GIF": (lambda: file_of(noise(1), "GIF"), "picture: GIF is not taken"),
    "TIFF": (lambda: file_of(noise(1), "TIFF"), "picture: TIFF is not taken"),
    "BMP": (lambda: file_of(noise(1), "BMP"), "picture: BMP is not taken"),
    "an animated PNG": (
        lambda: file_of(noise(1), save_all=True, append_images=[noise(2)]), "picture: it has 2 frames; give"
    ),
    "an animated WebP": (
        lambda: file_of(noise(1), "WEBP", save_all=True, append_images=[noise(2)]), "picture: it has 2 frames"
    ),
    "CMYK": (lambda: file_of(noise(1).convert("CMYK"), "JPEG"), "picture: its colours are CMYK"),
    "huge": (lambda: huge(2**31 - 1), "picture: unreadable image: 2147483647 x 2147483647 pixels are more"),
    "huge, and under every other bound": (
        lambda: huge(8192), "picture: it has 8192 x 8192 pixels, and this server takes 1024 a side"
    ),
    "a bomb": (lambda: bomb(8000), "picture: it has 8000 x 8000 pixels, and this server takes 1024"),
    "a JPEG of many scans": (lambda: scans(100_000), "picture: it is a JPEG of more than 100 scans"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_is_one_sentence(tiny: Served, name: str) -> None:
    content, said = BAD[name][0](), BAD[name][1]
    with pytest.raises(UserError) as refused:
        settle(tiny, task="vary", picture=sent(content))
    found = str(refused.value)
    assert found.startswith(said) and "\n" not in found and len(found) < 300, found
    with pytest.raises(UserError, match=f"^mask{found.removeprefix('picture')[:20]}"):
        settle(tiny, task="inpaint", picture=sent(noise(1)), mask=sent(content))


LARGE = [file_of(Image.new("RGB", (1500, 40), "teal"), kind) for kind in ("JPEG", "WEBP")]


def test_a_bomb_is_refused_before_it_is_decoded(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    for content in (bomb(2000), *LARGE):
        with pytest.raises(UserError, match="it has .* pixels, and this server takes 1024 a side"):
            settle(tiny, task="vary", picture=sent(content))


@pytest.mark.parametrize("picture", ["data:image/png;base64,AAAA", "AAA", "%%%%", "é", "AAAA\nAAAA"])
def test_what_is_no_base64_is_a_sentence(tiny: Served, picture: str) -> None:
    with pytest.raises(UserError, match="^picture: it is no base64; send that of a PNG, JPEG or WebP file$"):
        settle(tiny, task="vary", picture=picture)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return file_of(noise(1, (48, 32)).rotate(90, expand=True), exif=exif)


def grey16() -> bytes:
    return file_of(Image.fromarray(numpy.arange(0, 65536, 16, dtype=numpy.uint16).reshape(64, 64)))


def palette() -> bytes:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    image.paste(0, (0, 0, 8, 16))
    image.paste(2, (0, 8, 16, 16))
    return file_of(image, transparency=0)


def test_odd_uploads_are_seen_as_a_person_sees_them(tiny: Served) -> None:
    def seen(content: bytes) -> Any:
        key: Any = settle(tiny, task="vary", picture=sent(content)).key
        return numpy.asarray(key.plan.wanted.picture.image).astype(int)

    assert (seen(turned()) == pixels([noise(1, (48, 32))])[0]).all()
    assert (seen(grey16())[..., 0] == (numpy.arange(0, 65536, 16) // 256).reshape(64, 64)).all()
    found = seen(palette())
    assert found[0, 0].tolist() == [255, 255, 255] and found[0, 15].tolist() == [0, 0, 255]
    assert found[15, 0].tolist() == [0, 255, 0]
    interlaced = file_of(noise(1), "JPEG", progressive=True, quality=95)
    assert abs(seen(interlaced) - pixels([noise(1)])[0]).mean() < 6
    assert (seen(file_of(noise(1), "WEBP", lossless=True)) == pixels([noise(1)])[0]).all()
    assert (seen(file_of(noise(1).convert("LA"))) == pixels([noise(1).convert("L")])[0]).all()
    assert (seen(file_of(noise(1).convert("1"))) == pixels([noise(1).convert("1")])[0]).all()


def test_a_mask_of_16_bits_is_white_from_the_middle_on(tiny: Served) -> None:
    """Pillow would clip it, so that all but the darkest were white."""
    values = numpy.repeat(numpy.array([0, 1000, 32767, 32768, 65535], numpy.uint16), 16)[None].repeat(64, 0)
    picture = noise(1, (80, 64))
    key: Any = settle(
        tiny, task="inpaint", picture=sent(picture), mask=sent(Image.fromarray(values))
    ).key  # fmt: skip
    found = numpy.asarray(key.plan.wanted.mask)[0, ::16].tolist()
    assert found == [0, 3, 127, 128, 255]


# -- What it is drawn with -----------------------------------------------------------------------------------


def test_a_tiny_decoder_decodes_no_edit(tiny: Served, tmp_path: Path) -> None:
    """It reads no pictures; edits are drawn by the base's own VAE, as ever."""
    from lcm_kit.drawing.how import How

    folder = build_tiny(tmp_path / "tiny", tiny.base.latent_channels, tiny.base.factor.bit_length())
    how = How.of(tiny.base, str(folder), False, False)
    asked = {"task": "inpaint", "picture": sent(noise(1)), "mask": sent(hole())}
    with application(tiny, Drawer(tiny, 1, how=how)) as app, application(tiny, Drawer(tiny, 1)) as plain:
        found, other = drawn(post(app, asked)), drawn(post(plain, asked))
        assert pixels(found).tolist() == pixels(other).tolist()
        assert "decoder" not in json.loads(found[0].info["lcm_kit"])
        first, second = (ask(each, {"json": {"prompt": "a"}})[0].json() for each in (app, plain))
        assert first["pictures"][0]["base64"] != second["pictures"][0]["base64"]
        again = ask(app, {"json": {"prompt": "a"}})[0].json()
        assert again["pictures"] == first["pictures"]


def test_a_picture_that_no_memory_can_read_is_a_sentence_and_the_next_is_drawn(
    tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from lcm_kit.drawing import editing

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    asked = {"task": "vary", "picture": sent(noise(1)), "steps": 2}
    with application(tiny) as app:
        with monkeypatch.context() as patch:
            patch.setattr(editing, "encode", full)
            said = detail(post(app, asked), 503)
        assert said.startswith("memory ran out while reading a picture of 64 x 64 pixels (CUDA out")
        assert len(drawn(post(app, asked))) == 1


def test_what_cannot_be_edited_with_is_refused_whichever_of_the_adapters_it_is(
    tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from lcm_kit.core.methods import METHODS, MethodInfo

    (lora,) = tiny.adapters
    pcm = MethodInfo.of(METHODS["pcm"](), "pcm")
    both = replace(tiny, adapters=(lora, replace(lora, name="phased", method=pcm)))
    asked = {"task": "vary", "picture": sent(noise(1)), "sampler": "lcm"}
    with pytest.raises(UserError, match="^phased cannot edit with sampler lcm: .* choose ddim$"):
        settle(both, **asked, adapters={"tiny-lcm-lora": 1.0, "phased": 0.5})
    assert settle(both, **asked, adapters={"tiny-lcm-lora": 1.0, "phased": 0.0}).settings["adapters"]


def test_an_edit_is_kept_where_that_is_asked(tiny: Served, tmp_path: Path) -> None:
    asked = {"task": "vary", "picture": sent(noise(1)), "count": 2, "keep": True}
    with application(tiny, going(), data=tmp_path) as app:
        told = post(app, asked).json()
        second, first = get(app, "/v1/history").json()["pictures"]
    assert told["kept"] == [first["id"], second["id"]]
    for index, each in enumerate((first, second)):
        assert (each["kind"], each["index"], each["settings"]) == ("edit", index, told["settings"])
    with application(tiny, going()) as app:
        assert detail(post(app, asked)).startswith("keep: this server keeps no pictures")


def test_a_full_queue_takes_no_edit(tiny: Served) -> None:
    with application(tiny, FakeDrawer(), Limits(queue=4)) as app:
        answer = post(app, {"task": "interpolate", "prompt_to": "b"})
        assert detail(answer, 429).startswith("the queue is full") and answer.headers["retry-after"]


def test_uploads_that_take_their_time_hold_up_no_pictures(
    tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many at once, of which few are decoded; another client's picture goes past them."""
    let_go, inside, most = threading.Event(), threading.Semaphore(routes._DECODED), []
    real = routes.settled_edit

    def slow(*given: Any) -> Order:
        most.append(inside.acquire(blocking=False))
        let_go.wait(PATIENCE)
        inside.release()
        return real(*given)

    monkeypatch.setattr(routes, "settled_edit", slow)
    with application(tiny, going(), Limits(queue=64)) as app:

        async def scene() -> list[int]:
            transport = httpx.ASGITransport(app.asgi, client=("127.0.0.1", 5000))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                body = {"task": "interpolate", "prompt": "a", "prompt_to": "b", "frames": 2, "steps": 1}
                post = partial(client.post, timeout=PATIENCE)
                edits = [asyncio.create_task(post("/v1/edits", json=body)) for _ in range(30)]
                while len(most) < routes._DECODED:
                    await asyncio.sleep(0.001)
                picture = await asyncio.wait_for(post("/v1/pictures", json={"prompt": "a"}), PATIENCE / 2)
                let_go.set()
                return [picture.status_code, *(each.status_code for each in await asyncio.gather(*edits))]

        assert asyncio.run(scene()) == [200] * 31
    assert most == [True] * 30
