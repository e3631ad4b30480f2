from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lcm_kit import bases
from lcm_kit.bases import inspect_base, sd
from lcm_kit.config.schema import Base, Data, Distill
from lcm_kit.data import cache as module
from lcm_kit.data import encoding, vae_precision
from lcm_kit.data.buckets import cut
from lcm_kit.data.cache import Cache
from lcm_kit.data.encoder import Encoder
from lcm_kit.data.images import encode
from lcm_kit.data.transforms import to_pixels
from lcm_kit.drawing import vae as drawing_vae
from lcm_kit.errors import UserError

N = 7


@pytest.fixture
def config(tmp_path: Path, sd_base: Callable[..., Path]) -> Callable[..., Distill]:
    """`config(**data)`: seven images in shards of three, and a small base."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(N):
        _draw(images / f"{i}.png", i)
        (images / f"{i}.txt").write_text(f"picture {'abcdefg'[i]}")

    def build(base: Path | None = None, **data: object) -> Distill:
        where = {"path": str(images), "cache": str(tmp_path / "cache"), "shard_size": 3, "batch_size": 2}
        return Distill(
            recipe="train/distill",
            output="unused",
            base=Base(path=str(base or sd_base())),
            data=Data(**{**where, **data}),
        )

    return build


def _draw(path: Path, i: int) -> None:
    image = Image.new("RGB", (72, 64), (30 * i, 255 - 30 * i, 128))
    image.paste("black", (0, 0, 8 * i, 64))
    image.save(path)


def _open(config: Distill) -> Cache:
    return Cache.open(Path(config.data.cache), base=inspect_base(config.base.path), data=config.data)


def _times(config: Distill) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(Path(config.data.cache).iterdir())}


def test_rows_are_the_vaes_latents_and_the_text_encoders_embeddings(config):
    report = encode(config(), progress=False)
    assert (report.rows, report.encoded, report.changes, report.skipped) == (N, N, [], [])
    cache, base = _open(config()), inspect_base(config().base.path)
    assert cache.ids == [f"{i}.png" for i in range(N)]
    assert cache.captions[2] == "picture c"
    images = [Image.open(Path(config().data.path) / name).convert("RGB") for name in cache.ids]
    pixels = torch.stack([to_pixels(image, cut(image.size, (64, 64))) for image in images])
    with torch.no_grad():
        vae = bases.load_vae(base)
        expected = vae.encode(pixels).latent_dist.mode() * 0.5
    found = cache.latents(list(range(N)))
    assert found.shape == (N, 4, 16, 16) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    text = bases.load_text(base)
    torch.testing.assert_close(
        cache.condition([5, 0]).embeds, sd.encode_text(text, ["picture f", "picture a"]).embeds
    )
    torch.testing.assert_close(cache.empty(3).embeds, sd.encode_text(text, [""] * 3).embeds)
    assert torch.equal(cache.latents(4), found[4:5])


def test_files_and_manifest(config):
    encode(config(), progress=False)
    folder = Path(config().data.cache)
    names = ["empty.safetensors", "manifest.json", "pictures.csv"]
    names += [*(f"shard-0000{k}.safetensors" for k in range(3)), "worst.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert load_file(folder / names[3])["latents"].shape == (3, 4, 16, 16)
    assert load_file(folder / names[5])["embeds"].shape == (1, 24, 32)
    text = json.loads((folder / "manifest.json").read_text())
    assert text["settings"]["vae"] == inspect_base(config().base.path).hash_of("vae")
    assert text["data"]["resolution"] == 64 and len(text["records"]) == N
    assert {"lcm-kit", "torch", "diffusers"} <= text["versions"].keys()


def test_a_second_run_does_nothing_and_says_so(config, capsys, monkeypatch):
    encode(config(), progress=False)
    before = _times(config())
    monkeypatch.setattr(bases, "load_vae", lambda base: pytest.fail("the VAE was loaded"))
    report = encode(config(), progress=True)
    assert report.encoded == 0 and _times(config()) == before
    assert f"{N} images, up to date, nothing to encode" in " ".join(capsys.readouterr().out.split())


def test_an_interrupted_run_continues_at_the_first_missing_shard(config, tmp_path, monkeypatch):
    whole = config(cache=str(tmp_path / "whole"))
    encode(whole, progress=False)
    real, calls = encoding.write_shard, []

    def interrupted(*args):
        calls.append(args[2].file)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(encoding, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(config(), progress=False)
    with pytest.raises(UserError, match="no finished cache in .*; run `lcm-kit encode`"):
        _open(config())
    report = encode(config(), progress=False)
    assert report.encoded == N - 3
    assert calls == [f"shard-0000{k}.safetensors" for k in (0, 1, 1, 2)]
    for k in range(3):  # bit for bit what the uninterrupted run wrote
        name = f"shard-0000{k}.safetensors"
        assert (Path(config().data.cache) / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_changed_image_or_caption_re_encodes_its_shard_only(config):
    encode(config(), progress=False)
    before = _open(config())
    old, old_text = before.latents(list(range(N))), before.condition(list(range(N))).embeds
    _draw(Path(config().data.path) / "1.png", 5)
    (Path(config().data.path) / "6.txt").write_text("another thing")
    report = encode(config(), progress=False)
    assert report.encoded == 3 + 1
    assert report.changes == ["1 image changed", "1 caption changed"]
    assert "made from other inputs: 1 image changed; 1 caption changed" in report.message
    cache = _open(config())
    new, new_text = cache.latents(list(range(N))), cache.condition(list(range(N))).embeds
    assert [i for i in range(N) if not torch.equal(old[i], new[i])] == [1]
    assert [i for i in range(N) if not torch.equal(old_text[i], new_text[i])] == [6]
    torch.testing.assert_close(new[1], new[5], atol=1e-6, rtol=1e-5)


def test_added_and_removed_images(config):
    encode(config(), progress=False)
    folder = Path(config().data.path)
    for i in range(3, N):
        (folder / f"{i}.png").unlink()
    _draw(folder / "8.png", 2)
    (folder / "8.txt").write_text("new")
    report = encode(config(), progress=False)
    assert report.changes == ["1 image added", "4 images removed"] and report.encoded == 1
    assert _open(config()).ids == ["0.png", "1.png", "2.png", "8.png"]
    assert not (Path(config().data.cache) / "shard-00002.safetensors").exists()


def test_flip_adds_the_mirror_image(config):
    encode(config(), progress=False)
    report = encode(config(flip=True), progress=False)
    assert report.changes == ["data.flip (False there, True here)"] and report.rows == 2 * N
    cache = _open(config(flip=True))
    assert cache.ids[:4] == ["0.png", "0.png (mirrored)", "1.png", "1.png (mirrored)"]
    vae = bases.load_vae(inspect_base(config().base.path))
    with Image.open(Path(config().data.path) / "3.png") as image:
        expected = bases.encode_images(
            vae, to_pixels(image.convert("RGB"), cut(image.size, (64, 64))).flip(-1)[None]
        )
    torch.testing.assert_close(cache.latents(7), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("part", "word"), [("vae", "the VAE of the base"), ("text_encoder", "the text encoder of the base")]
)
def test_train_refuses_a_cache_of_another_base_until_it_is_encoded_again(
    config, tmp_path, sd_base, part, word
):
    encode(config(), progress=False)
    other = tmp_path / "other"
    shutil.copytree(sd_base(), other)
    weights = next((other / part).glob("*.safetensors"))
    save_file({k: v * 1.01 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(
        UserError, match=rf"was made for another config \({word}\); run `lcm-kit encode`"
    ) as caught:
        _open(config(base=other))
    assert "\n" not in str(caught.value)
    report = encode(config(base=other), progress=False)
    assert report.changes == [word] and report.encoded == N
    assert len(_open(config(base=other))) == N


def test_another_unet_with_the_same_vae_and_text_keeps_the_cache(config, tmp_path, sd_base):
    encode(config(), progress=False)
    other = tmp_path / "other"
    shutil.copytree(sd_base(), other)
    (other / "unet" / "diffusion_pytorch_model.safetensors").touch()
    config_file = other / "scheduler" / "scheduler_config.json"
    config_file.write_text(config_file.read_text().replace("epsilon", "v_prediction"))
    assert encode(config(base=other), progress=False).encoded == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution": 32}, "data.resolution (64 there, 32 here)"),
        ({"flip": True}, "data.flip (False there, True here)"),
    ],
)
def test_train_refuses_other_settings(config, change, words):
    encode(config(), progress=False)
    with pytest.raises(UserError) as caught:
        _open(config(**change))
    assert words in str(caught.value) and "run `lcm-kit encode` with this config first" in str(caught.value)


def test_train_refuses_a_cache_of_other_images_and_a_damaged_one(config, tmp_path):
    encode(config(), progress=False)
    shutil.copytree(config().data.path, tmp_path / "elsewhere")
    moved = config(path=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="data.path"):
        _open(moved)
    assert encode(moved, progress=False).encoded == 0  # the same images: only the manifest is new
    assert len(_open(moved)) == N
    (Path(config().data.cache) / "shard-00001.safetensors").write_bytes(b"junk")
    with pytest.raises(
        UserError, match="unfinished or damaged at shard-00001.safetensors; run `lcm-kit encode`"
    ):
        _open(moved)
    assert encode(moved, progress=False).encoded == 3


def test_bad_records_stop_the_run_with_all_reasons_or_are_left_out(config):
    folder = Path(config().data.path)
    (folder / "1.txt").unlink()
    (folder / "3.png").write_bytes(b"not an image")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:80])
    with pytest.raises(UserError) as caught:
        encode(config(), progress=False)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"3 of {N} records of") and "data.skip_bad=true" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["  - 1.png", "  - 3.png", "  - 4.png"]
    assert lines[2].endswith("unreadable image: not an image, or broken")
    assert not Path(config().data.cache).exists()
    report = encode(config(skip_bad=True), progress=False)
    assert report.rows == N - 3 and [id for id, _ in report.skipped] == ["1.png", "3.png", "4.png"]
    assert "3 left out:\n  1.png: no caption" in report.message
    assert _open(config(skip_bad=True)).ids == ["0.png", "2.png", "5.png", "6.png"]
    assert encode(config(skip_bad=True), progress=False).encoded == 0


def test_nothing_usable_is_an_error_even_with_skip_bad(config):
    for path in Path(config().data.path).glob("*.txt"):
        path.write_text("")
    with pytest.raises(UserError, match="no record of .* can be used"):
        encode(config(skip_bad=True), progress=False)


def test_latents_that_are_not_finite_name_their_images(config, monkeypatch):
    real = bases.encode_images

    def broken(vae, pixels):
        latents = real(vae, pixels)
        latents[pixels.mean((1, 2, 3)) < -0.99] = float("nan")
        return latents

    Image.new("RGB", (64, 64), "black").save(Path(config().data.path) / "5.png")
    monkeypatch.setattr(bases, "encode_images", broken)
    with pytest.raises(UserError, match="not finite for 5.png; remove"):
        encode(config(), progress=False)


def test_a_full_disk_is_a_sentence_and_leaves_no_half_shard(config, monkeypatch):
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "shard-00001" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        UserError, match="shard-00001.safetensors: cannot be written .No space left on device"
    ):
        encode(config(), progress=False)
    monkeypatch.undo()
    assert sorted(p.name for p in Path(config().data.cache).iterdir()) == [
        "empty.safetensors",
        "shard-00000.safetensors",
    ]
    assert encode(config(), progress=False).encoded == N - 3


def test_a_foreign_manifest_is_left_alone(config):
    folder = Path(config().data.cache)
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(
        UserError, match=r"manifest.json is damaged \(settings is missing\); choose another data.cache"
    ):
        encode(config(), progress=False)
    assert (folder / "manifest.json").read_text() == '{"name": "a web app"}'


@pytest.mark.parametrize("what", ["deleted", "broken", "replaced"])
def test_a_picture_that_changes_while_it_is_encoded_is_named(config, monkeypatch, what):
    config = config()
    last = Path(config.data.path) / "6.png"
    real = Encoder.load

    def load(*arguments, **more):  # after all were looked at, before the first is encoded
        if what == "deleted":
            last.unlink()
        else:
            last.write_bytes(b"x" if what == "broken" else (last.parent / "1.png").read_bytes())
        return real(*arguments, **more)

    monkeypatch.setattr(Encoder, "load", load)
    with pytest.raises(
        UserError, match=r"6.png of .* changed while it was being encoded \(.+\); put it back"
    ):
        encode(config)
    assert (Path(config.data.cache) / "shard-00000.safetensors").is_file()  # what was encoded stays


# -- Damage --------------------------------------------------------------------------------------------------


def flip(file: Path, place: int) -> None:
    """One bit of one byte, as a failing disk or memory leaves it."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_noticed_and_that_file_alone_is_made_anew(config):
    config = config()
    encode(config)
    data, folder, base = config.data, Path(config.data.cache), inspect_base(config.base.path)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    whole = {name: (folder / name).read_bytes() for name in files}
    assert len(files) >= 3 and "empty.safetensors" in files
    for name in files:
        for place in (-1, -1000, len(whole[name]) - 5):
            flip(folder / name, place)
            module.mapped.cache_clear()  # another process: what is open already is not looked at again
            cache = Cache.open(folder, base=base, data=data)
            with pytest.raises(UserError, match=rf"damaged at {name}; run `lcm-kit encode`"):
                cache.latents(range(len(cache)))
                cache.empty()
            before = {other: (folder / other).stat().st_mtime_ns for other in files if other != name}
            encode(config)
            assert {n: (folder / n).read_bytes() for n in files} == whole
            assert {other: (folder / other).stat().st_mtime_ns for other in before} == before


@pytest.mark.parametrize("field", ["records", "shards", "settings", "skipped"])
def test_a_manifest_that_lost_something_is_noticed_and_written_anew(config, field):
    config = config()
    encode(config)
    file, base = Path(config.data.cache) / "manifest.json", inspect_base(config.base.path)
    whole = file.read_text()
    held = json.loads(whole)
    if isinstance(held[field], list) and held[field]:
        held[field].pop()
    elif isinstance(held[field], list):
        held[field].append({"id": "x", "reason": "y"})
    else:
        held[field]["family"] = "other"
    file.write_text(json.dumps(held))
    with pytest.raises(
        UserError, match=r"manifest.json is damaged .*encode|made for another config|no manifest"
    ):
        Cache.open(Path(config.data.cache), base=base, data=config.data)
    if held["records"] and held["shards"]:
        assert encode(config).encoded == 0
        assert json.loads(file.read_text())["records"] == json.loads(whole)["records"]
        Cache.open(Path(config.data.cache), base=base, data=config.data)


# -- The VAE's precision, and memory -------------------------------------------------------------------------


def test_half_precision_is_a_setting_of_the_cache_and_never_mixed(config, tmp_path):
    encode(config(), progress=False)
    exact = _open(config()).latents(list(range(N)))
    half = config(cache=str(tmp_path / "half"), vae_precision="float16")
    encode(half, progress=False)
    found = _open(half).latents(list(range(N)))
    off = float((found - exact).norm() / exact.norm())
    assert 1e-6 < off < 2e-3 and found.dtype == torch.float32
    text = json.loads((Path(half.data.cache) / "manifest.json").read_text())
    assert text["settings"]["data.vae_precision"] == "float16"
    auto = config(cache=half.data.cache)  # auto keeps what the cache was begun in
    assert torch.equal(_open(auto).latents(0), found[:1])
    assert encode(auto, progress=False).encoded == 0
    full = config(cache=half.data.cache, vae_precision="float32")
    with pytest.raises(UserError, match=r"data.vae_precision \('float16' there, 'float32' here\)"):
        _open(full)
    assert encode(full, progress=False).encoded == N
    assert torch.equal(_open(full).latents(list(range(N))), exact)
    with pytest.raises(UserError, match=r"data.vae_precision \('float32' there, 'float16' here\)"):
        _open(half)


def test_what_the_first_picture_proved_holds_for_a_run_that_goes_on(config, monkeypatch):
    """As on a GPU that is gone when the run goes on: its shards are kept, in one precision."""
    monkeypatch.setattr(vae_precision, "half_dtypes", lambda device, overflows: (torch.float16,))
    assert encode(config(), progress=False).encoded == N
    folder = Path(config().data.cache)
    assert json.loads((folder / "vae.json").read_text())["precision"] == "float16"
    before = _open(config()).latents(list(range(N)))
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.safetensors").unlink()
    monkeypatch.setattr(vae_precision, "half_dtypes", lambda device, overflows: ())
    again = encode(config(), progress=False)
    assert 0 < again.encoded < N
    assert torch.equal(_open(config()).latents(list(range(N))), before)


def test_a_vae_that_is_not_near_in_half_precision_encodes_in_float32(config, monkeypatch):
    encode(config(), progress=False)
    exact = _open(config()).latents(list(range(N)))
    shutil.rmtree(config().data.cache)
    monkeypatch.setattr(vae_precision, "half_dtypes", lambda device, overflows: (torch.float16,))
    monkeypatch.setattr(drawing_vae, "NEAR_LATENTS", 0.0)
    encode(config(), progress=False)
    assert not (Path(config().data.cache) / "vae.json").exists()
    assert torch.equal(_open(config()).latents(list(range(N))), exact)


@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_rows_are_the_same_where_memory_runs_out(config, tmp_path, monkeypatch, capsys, batch_size):
    encode(config(), progress=False)
    wanted = _open(config()).latents(list(range(N)))
    real = bases.encode_images

    def encode_images(vae, pixels):
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. ")
        return real(vae, pixels)

    monkeypatch.setattr(bases, "encode_images", encode_images)
    small = config(cache=str(tmp_path / "small"), batch_size=batch_size)
    encode(small, progress=False)
    torch.testing.assert_close(_open(small).latents(list(range(N))), wanted, atol=1e-5, rtol=1e-5)
    assert "at once while encoding a picture of 64 x 64 pixels; going on with 1" in capsys.readouterr().err
    monkeypatch.setattr(bases, "encode_images", lambda vae, pixels: encode_images(vae, [0, 0]))
    with pytest.raises(UserError, match="one at a time .*; choose a smaller data.resolution"):
        encode(config(cache=str(tmp_path / "none"), batch_size=batch_size), progress=False)
