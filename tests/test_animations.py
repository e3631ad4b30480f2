"""Animations: as many frames, as long, in the colours that were drawn, whole or not at all."""

from __future__ import annotations

import io
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from typer.testing import CliRunner

import lcm_kit
from lcm_kit import sample
from lcm_kit.cli.main import app
from lcm_kit.drawing import animations, video
from lcm_kit.drawing.animations import Animation, lengths
from lcm_kit.errors import UserError
from lcm_kit.io.locks import sweep

KINDS = (".gif", ".webp", ".mp4")


@pytest.fixture
def av() -> Any:
    return pytest.importorskip("av", reason="the extra `video` is not installed")


def moving(count: int = 6, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """A smooth sky that drifts, above a fixed ground: bands and flicker show in it."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    made = []
    for k in range(count):
        sky = [
            40 + 60 * y + 30 * np.sin(3 * x + k / 6),
            90 + 80 * y + 20 * x,
            200 - 60 * y + 20 * np.cos(2 * x),
        ]
        ground = [120 + 100 * x, 80 + 60 * y, 60 + 50 * x * y]
        frame = np.where(y[..., None] < 0.4, np.stack(sky, -1), np.stack(ground, -1))
        made.append(Image.fromarray(frame.round().clip(0, 255).astype(np.uint8)))
    return made


def array(frames: list[Image.Image]) -> Any:
    return np.stack([np.asarray(frame.convert("RGB")).astype(int) for frame in frames])


def played(path: Path) -> tuple[Any, list[int], int | None]:
    """The frames that Pillow reads, for how many ms each, and how often (0: for ever; None: once)."""
    found, times = [], []
    with Image.open(path) as opened:
        for k in range(opened.n_frames):  # type: ignore[attr-defined]
            opened.seek(k)
            found.append(opened.convert("RGB"))
            times.append(opened.info["duration"])
        return array(found), times, opened.info.get("loop")


def seen(error: Any) -> float:
    """Root mean square of what is left of an error [n, H, W, 3] in windows of 5 x 5 pixels."""
    return float(np.sqrt((sliding_window_view(error, (5, 5), axis=(1, 2)).mean((-1, -2)) ** 2).mean()))


# -- Time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [0.1, 3, 7, 8, 12.5, 23.976, 24, 30, 50])
@pytest.mark.parametrize("unit", [100, 1000])
def test_rounded_times_add_up(fps: float, unit: int) -> None:
    found = lengths(97, fps, unit)
    assert sum(found) == round(97 * unit / fps) and max(abs(each - unit / fps) for each in found) < 1
    assert all(abs(sum(found[:k]) - k * unit / fps) <= 0.5 for k in range(98))


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_frames_times_and_loop_of_gif_and_webp(tmp_path: Path, kind: str, loop: bool) -> None:
    """By Pillow, and by the bytes that browsers go by."""
    path = tmp_path / f"clip{kind.upper()}"
    assert lcm_kit.save_animation(moving(8), path, fps=12, loop=loop) == path
    frames, times, again = played(path)
    content = path.read_bytes()
    if kind == ".gif":
        assert times == [80, 90, 80, 80, 90, 80, 80, 90] and again == (0 if loop else None)
        assert (b"NETSCAPE2.0\x03\x01\x00\x00\x00" in content) == loop and (b"NETSCAPE" in content) == loop
    else:
        assert times == [83, 84, 83, 83, 84, 83, 83, 84] and again == (0 if loop else 1)
        place = content.index(b"ANIM")
        assert struct.unpack("<I4sH", content[place + 4 : place + 14])[2] == (0 if loop else 1)
    assert len(frames) == 8 and sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fps", [8, 12.5, 23.976, 60, 0.5])
def test_frames_and_times_of_an_mp4(av: Any, tmp_path: Path, fps: float) -> None:
    path = lcm_kit.save_animation(moving(16), tmp_path / "clip.mp4", fps=fps)
    with av.open(str(path)) as opened:
        (stream,) = opened.streams
        rate = Fraction(fps).limit_denominator(1001)
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.average_rate, stream.frames, stream.start_time) == (rate, 16, 0)
        found = [frame.pts * frame.time_base for frame in opened.decode(stream)]
        unit = stream.time_base
        assert max(abs(at - k / rate) for k, at in enumerate(found)) < unit and len(found) == 16
        assert abs(stream.duration * unit - 16 / rate) < unit
    with av.open(str(path)) as opened:
        packets = [packet for packet in opened.demux(video=0) if packet.size]
        assert len(packets) == 16 and all(packet.pts == packet.dts for packet in packets)  # shown as decoded
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # it plays before it is all there


@pytest.mark.parametrize("kind", KINDS)
def test_ping_pong_goes_there_and_back(av: Any, tmp_path: Path, kind: str) -> None:
    """5 frames make 8: neither end is there twice, so that a loop does not stop there."""
    path = lcm_kit.save_animation(moving(5), tmp_path / f"clip{kind}", ping_pong=True)
    frames = decoded(av, path) if kind == ".mp4" else played(path)[0]
    assert len(frames) == 8
    nearest = [int(np.abs(array(moving(5)) - frame).mean((1, 2, 3)).argmin()) for frame in frames]
    assert nearest == [0, 1, 2, 3, 4, 3, 2, 1]


def test_equal_frames_keep_their_time(av: Any, tmp_path: Path) -> None:
    frames = [moving(1)[0]] * 3 + moving(2)[1:]
    for kind in KINDS[:2]:
        _, times, _ = played(lcm_kit.save_animation(frames, tmp_path / f"clip{kind}", fps=10))
        assert sum(times) == 400
    assert len(decoded(av, lcm_kit.save_animation(frames, tmp_path / "clip.mp4"))) == 4


# -- Colours -------------------------------------------------------------------------------------------------


def test_a_webp_has_the_pixels_themselves(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 31, 17, 3), dtype=np.uint8)
    path = lcm_kit.save_animation([*map(Image.fromarray, noise)], tmp_path / "clip.webp")
    assert (played(path)[0] == noise).all()


def test_a_gif_bands_and_flickers_less_than_without_dither_or_with_one_palette(tmp_path: Path) -> None:
    """What a 5 x 5 window sees of the error, and of its change from frame to frame, in levels of 255."""
    frames = moving(6, (160, 120))
    wanted = array(frames)
    mine = played(lcm_kit.save_animation(frames, tmp_path / "clip.gif"))[0] - wanted
    plain = array([frame.quantize(256) for frame in frames]) - wanted
    shared = Image.fromarray(np.concatenate([*map(np.asarray, frames)])).quantize(256)
    one = array([frame.quantize(palette=shared) for frame in frames]) - wanted
    cut = array([frame.quantize(palette=frame.quantize(256)) for frame in frames]) - wanted  # without k-means
    assert (mine**2).mean() < 0.9 * (cut**2).mean()
    for other in (plain, one):
        assert seen(mine) < 0.8 * seen(other) and seen(np.diff(mine, axis=0)) < 0.8 * seen(
            np.diff(other, axis=0)
        )


def decoded(av: Any, path: Path) -> Any:
    """Frames of an MP4 as a player that reads its tags shows them: [n, H, W, 3]."""
    with av.open(str(path)) as opened:
        return np.stack([rgb(frame.to_ndarray(), frame.height) for frame in opened.decode(video=0)])


def rgb(planes: Any, height: int, red: float = 0.2126, blue: float = 0.0722) -> Any:
    """Planes of limited range as RGB by ITU-R BT.709 (or BT.601 with 0.299 and 0.114), each colour 2 x 2."""
    width = planes.shape[1]
    y = (planes[:height].astype(float) - 16) / 219
    small = planes[height:].reshape(2, height // 2, width // 2).repeat(2, 1).repeat(2, 2)
    cb, cr = (small.astype(float) - 128) / 224
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    return (255 * np.stack([r, g, b], -1)).clip(0, 255)


BARS = {
    (255, 255, 255): (235, 128, 128), (0, 0, 0): (16, 128, 128), (255, 0, 0): (63, 102, 240),
    (0, 255, 0): (173, 42, 26), (0, 0, 255): (32, 240, 118), (255, 255, 0): (219, 16, 138),
}  # fmt: skip


@pytest.mark.parametrize(("colour", "bar"), BARS.items())
def test_planes_are_those_of_bt709s_colour_bars(
    colour: tuple[int, int, int], bar: tuple[int, int, int]
) -> None:
    planes = video.yuv420(np.full((4, 6, 3), colour, np.uint8))
    assert planes.shape == (6, 6)
    y, cb, cr = planes[:4], planes[4:5], planes[5:]
    assert (set(y.flat), set(cb.flat), set(cr.flat)) == tuple({each} for each in bar)


def test_colours_stand_where_h264_puts_them() -> None:
    """At the left of two columns: a ramp of blue keeps its place; means of 2 x 2 move it by half a pixel."""
    ramp = np.zeros((2, 32, 3), np.uint8)
    ramp[..., 2] = 8 * np.arange(32)
    cb = video.yuv420(ramp).astype(float)[2, :16]
    wanted = 224 * (8 * np.arange(0, 32, 2) / 255) * (1 - 0.0722) / (2 * (1 - 0.0722)) + 128
    assert np.abs(cb - wanted)[1:].max() <= 0.5


COLOURS = [
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (230, 128, 26), (217, 166, 140), (128, 128, 128), (255, 255, 255),
    (0, 0, 0), (90, 30, 140),
]  # fmt: skip


def test_an_mp4_shows_the_colours_of_the_pictures(av: Any, tmp_path: Path) -> None:
    """Decoded by its tags; read as BT.601, which players do without tags, the pure ones are far off."""
    frames = [Image.new("RGB", (64, 48), colour) for colour in COLOURS]
    path = lcm_kit.save_animation(frames, tmp_path / "clip.mp4")
    with av.open(str(path)) as opened:
        stream = opened.streams.video[0]
        context = stream.codec_context
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
        assert [int(tag) for tag in tags] == [1, 1, 1, 1]
        for frame, colour in zip(opened.decode(stream), COLOURS, strict=True):
            assert np.abs(rgb(frame.to_ndarray(), 48) - colour).max() <= 2.5, colour
            theirs = frame.reformat(format="rgb24", src_colorspace="ITU709", dst_colorspace="ITU709")
            assert np.abs(theirs.to_ndarray().astype(int) - colour).max() <= 4, colour  # by swscale
            wrong = np.abs(rgb(frame.to_ndarray(), 48, 0.299, 0.114) - colour).max()
            assert wrong > 8 or max(colour) - min(colour) < 80, colour
    place = (content := path.read_bytes()).index(b"colrnclx") + 8
    assert struct.unpack(">HHHB", content[place : place + 7]) == (1, 1, 1, 0)  # matrix, ..., not full range


def test_an_mp4_of_odd_size_repeats_an_edge_and_says_so(
    av: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = moving(3, (61, 49))
    path = lcm_kit.save_animation(frames, tmp_path / "clip.mp4", verbose=True)
    assert "61 x 49 pixels are 62 x 50 in clip.mp4" in " ".join(capsys.readouterr().err.split())
    found = decoded(av, path)
    assert found.shape == (3, 50, 62, 3) and np.abs(found[:, :49, :61] - array(frames)).mean() < 3
    lcm_kit.save_animation(moving(3), tmp_path / "clip.mp4", verbose=True)
    assert capsys.readouterr().err == ""


def test_an_mp4_loses_little_but_its_colours_sharpness(av: Any, tmp_path: Path) -> None:
    """Against what 4:2:0 alone leaves, of busy and of smooth frames; above 40 dB of grey ones."""
    rng = np.random.default_rng(0)
    busy = [
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((64, 48)) for _ in range(4)
    ]
    for frames in (busy, moving(4), [frame.convert("L").convert("RGB") for frame in busy]):
        wanted = array(frames)
        left = np.stack([rgb(video.yuv420(np.asarray(frame)), 48) for frame in frames])
        found = decoded(av, lcm_kit.save_animation(frames, tmp_path / "clip.mp4"))
        mine, bound = (10 * np.log10(255**2 / ((each - wanted) ** 2).mean()) for each in (found, left))
        assert mine > min(bound - 1, 40)


# -- Refusals ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("clip.avi", {}, r"clip\.avi is no kind of animation that is written; give a file that ends with"),
    ("clip", {}, "is no kind of animation"),
    ("clip.gif", {"fps": 51}, "a GIF has at most 50 frames a second"),
    ("clip.webp", {"fps": 0}, "fps 0 is out of range; give a number from 0.1 to 60"),
    ("clip.webp", {"fps": float("nan")}, "fps nan is out of range"),
    ("clip.webp", {"frames": moving(1)}, "1 frames make no animation"),
    ("clip.webp", {"frames": [*moving(1), *moving(1, (32, 32))]}, "frames of 64 x 48 and of 32 x 32 pixels"),
    ("clip.webp", {"frames": [*moving(1), Image.new("CMYK", (64, 48))]}, "picture: its colours are CMYK"),
    ("clip.webp", {"frames": ["there/is/none.png"] * 2}, "none.png"),
    ("clip.mp4", {"loop": False}, "an MP4 has no loop of its own"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_is_a_sentence(tmp_path: Path, name: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        lcm_kit.save_animation(given.get("frames", moving(2)), tmp_path / name, **{
            key: value for key, value in given.items() if key != "frames"
        })  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_without_the_library_only_an_mp4_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        UserError, match=r"needs the library av; install it with `pip install 'lcm-kit\[video\]'`"
    ):
        lcm_kit.save_animation(moving(2), tmp_path / "clip.mp4")
    assert lcm_kit.save_animation(moving(2), tmp_path / "clip.gif").is_file()


def test_what_ffmpeg_refuses_is_a_sentence(av: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_QUALITY", {"preset": "no such"})
    with pytest.raises(UserError, match=r"clip\.mp4 cannot be written as MP4 \("):
        lcm_kit.save_animation(moving(2), tmp_path / "clip.mp4")
    assert not any(tmp_path.iterdir())


# -- Whole or not at all -------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from PIL import Image
from lcm_kit.drawing import animations, video
from lcm_kit.drawing.animations import Animation
from pathlib import Path
path, when = Path(sys.argv[1]), sys.argv[2]
calls = []
def die(*given):
    calls.append(given)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*given)
if when == "encoding":
    inner, video.yuv420 = video.yuv420, die
elif when == "written":
    calls += [1, 2]
    inner, os.fsync = os.fsync, die
frames = [Image.new("RGB", (64, 48), (40 * k, 0, 0)) for k in range(6)]
Animation(path).write(frames)
"""


@pytest.mark.parametrize(("kind", "when"), [(".mp4", "encoding"), *((kind, "written") for kind in KINDS)])
@pytest.mark.parametrize("there", [True, False])
def test_killed_it_leaves_nothing_half_written(
    av: Any, tmp_path: Path, kind: str, when: str, there: bool
) -> None:
    """What stood there stays, and what is left is hidden, and swept away by the next who writes there."""
    path = tmp_path / f"clip{kind}"
    if there:
        path.write_bytes(b"before")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), when], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not there or path.read_bytes() == b"before"
    left = [each for each in tmp_path.iterdir() if each != path]
    assert left and all(each.name.startswith(".") for each in left)
    sweep(tmp_path, deep=False)
    assert [*tmp_path.iterdir()] == [path][: int(there)]


def test_a_file_that_cannot_be_finished_is_not_written(tmp_path: Path) -> None:
    def refuse(content: bytes) -> bytes:
        assert Image.open(io.BytesIO(content)).n_frames == 2  # type: ignore[attr-defined]
        raise UserError("no signature")

    with pytest.raises(UserError, match="no signature"):
        Animation(tmp_path / "clip.gif").write(moving(2), refuse)
    assert not any(tmp_path.iterdir())


# -- The verb ------------------------------------------------------------------------------------------------


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("ends", ["pictures", "prompts"])
def test_interpolate_writes_its_frames_as_an_animation(
    sd_base: Callable[..., Path], tmp_path: Path, ends: str
) -> None:
    for name, frame in zip("ab", moving(2, (64, 64)), strict=True):
        frame.save(tmp_path / f"{name}.png")
    given = (
        [tmp_path / "a.png", "--to", tmp_path / "b.png"] if ends == "pictures" else ["--prompt-to", "a dog"]
    )
    done = cli(
        "edit", "interpolate", *given, "--prompt", "a cat", "--frames", "4", "--steps", "2",
        "--base", sd_base("epsilon"), "--device", "cpu", "--output", tmp_path / "out",
        "--animation", tmp_path / "moved" / "clip.webp", "--fps", "5", "--once", "--ping-pong",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [
        str(tmp_path / "out" / "contact-sheet.png"),
        str(tmp_path / "moved" / "clip.webp"),
    ]
    files = [tmp_path / "out" / f"{k:03d}-interpolate.png" for k in (0, 1, 2, 3, 2, 1)]
    frames, times, again = played(tmp_path / "moved" / "clip.webp")
    assert (frames == array([*map(Image.open, files)])).all()
    assert times == [200] * 6 and again == 1
    texts = [Image.open(tmp_path / "out" / f"{k:03d}-interpolate.png").info for k in range(4)]
    drawn = [("parameters" in text, bool(text)) for text in texts]  # pictures that were given say nothing
    assert drawn == [(k in (1, 2) or ends == "prompts",) * 2 for k in range(4)]
    by_files = lcm_kit.save_animation(files, tmp_path / "again.webp", fps=5, loop=False)
    assert by_files.read_bytes() == (tmp_path / "moved" / "clip.webp").read_bytes()


def test_options_of_an_animation_are_checked_before_anything_is_drawn(
    sd_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "pipeline", lambda *a, **k: pytest.fail("weights were loaded"))
    moving(1)[0].save(tmp_path / "a.png")
    between = ["interpolate", "--prompt", "a", "--prompt-to", "b"]
    for words, said in (
        ([*between, "--fps", "5"], "--fps is of an animation; give --animation FILE"),
        ([*between, "--once"], "--once is of an animation"),
        ([*between, "--ping-pong"], "--ping-pong is of an animation"),
        ([*between, "--animation", "clip.mov"], "clip.mov is no kind of animation"),
        ([*between, "--animation", "clip.gif", "--fps", "60"], "a GIF has at most 50 frames a second"),
        ([*between, "--animation", "clip.gif", "--fps", "0"], "--fps 0.0 is out of range"),
        (
            ["vary", tmp_path / "a.png", "--animation", "clip.gif"],
            "is of interpolate, and does nothing for vary",
        ),
    ):
        done = cli("edit", *words, "--base", sd_base("epsilon"), "--output", tmp_path / "out")
        assert done.exit_code == 2 and said in " ".join(done.stderr.split()), (words, done.output)
    assert not (tmp_path / "out").exists()


def test_every_kind_has_a_writer() -> None:
    assert tuple(animations._WRITERS) == KINDS
