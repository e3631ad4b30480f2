"""What a base's VAE makes of pictures: measures against known values, and a planted failure is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from lcm_kit import assets, bases
from lcm_kit.cli.main import app
from lcm_kit.config.schema import Data
from lcm_kit.data import reconstruction
from lcm_kit.data.reconstruction import Measured, findings, lab, lost_detail, moved_ink, psnr
from lcm_kit.data.records import Record, open_records
from lcm_kit.io.own_files import Damaged

TINY = "asset:tiny-sd"


def cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    ("rgb", "wanted"),  # Lindbloom's calculator, D65, to two digits
    [
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((0.5, 0.5, 0.5), (53.39, 0, 0)),
        ((0.01, 0.01, 0.01), (0.70, 0, 0)),  # the straight part of both curves
    ],
)
def test_lab_of_known_colours(rgb: tuple[float, ...], wanted: tuple[float, ...]) -> None:
    assert lab(torch.tensor(rgb)).tolist() == pytest.approx(wanted, abs=0.015)


def test_psnr_of_a_known_error() -> None:
    picture = torch.zeros(2, 3, 8, 8)
    other = picture + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert psnr(picture, other).tolist() == pytest.approx([20, 40], abs=1e-4)  # 10 log10(4 / 0.04), ...
    assert psnr(picture, picture).tolist() == [100, 100]


def test_detail_that_is_lost_is_what_is_finer_than_three_pixels() -> None:
    lines = torch.ones(1, 3, 32, 32)
    lines[..., ::4] = -1  # lines of one pixel, four apart
    grey = torch.full_like(lines, float(lines.mean()))
    assert lost_detail(lines, lines).item() == 0
    assert lost_detail(lines, grey).item() == pytest.approx(1)
    half = lines.lerp(grey, 0.5)
    assert lost_detail(lines, half).item() == pytest.approx(0.25)  # of energy
    assert lost_detail(lines, lines + 0.3).item() == pytest.approx(0, abs=1e-6)  # a tint is no detail
    corner = grey.clone()
    corner[..., :8, :8] = lines[..., :8, :8]  # small text in a flat picture counts as if it were all
    assert lost_detail(corner, grey).item() == pytest.approx(1)
    flat = grey + torch.randn(grey.shape, generator=torch.Generator().manual_seed(0)) / 127.5 / 4
    assert lost_detail(flat, grey).item() == 0  # a quarter of a value of 255 is none either


def test_the_ink_that_moves_most_is_named_with_what_it_becomes() -> None:
    teal, slate, cream = (
        torch.tensor(rgb) / 127.5 - 1 for rgb in ((108, 178, 158), (128, 144, 160), (250,) * 3)
    )
    before = cream.view(3, 1, 1).expand(3, 32, 32).clone()
    before[:, :10] = teal.view(3, 1, 1)
    after = before.clone()
    after[:, :10] = slate.view(3, 1, 1)
    before[:, 20] = -1  # a line, which the other lost, is no area
    moved, ink, becomes = moved_ink(before, after)
    wanted = float((lab((teal + 1) / 2) - lab((slate + 1) / 2)).norm())
    assert (ink, becomes) == ("#6cb29e", "#8090a0")
    assert moved == pytest.approx(wanted, abs=1e-4) and moved > 20
    assert moved_ink(before, before)[0] == 0


def measured(id: str, psnr: float = 30, moved: float = 1, lost: float = 0.1) -> Measured:
    return Measured(id, psnr, moved, "#6cb29e", "#8090a0", lost)


def test_what_is_said_of_each_trouble() -> None:
    good = [measured("a.png"), measured("b.png", 28)]
    assert [(each.weight, "29.0 dB" in each.sentence) for each in findings(good, 2, 64)] == [("note", True)]
    bad = [measured("c.png", moved=23), measured("d.png", lost=0.8), measured("e.png", psnr=20), *good]
    assert sorted(bad, key=lambda each: -each.trouble)[0].id == "c.png"
    note, colour, detail, far = findings(bad, 9, 64)
    assert "gives 5 of the 9 pictures back" in note.sentence
    assert "a colour of 1 picture: c.png (#6cb29e comes back as #8090a0, 23)" in colour.sentence
    assert "1 picture at 64 pixels: d.png (80%)" in detail.sentence
    assert "1 picture back far from what they are: e.png (20.0 dB)" in far.sentence
    assert {each.weight for each in (colour, detail, far)} == {"warning"}
    assert findings([], 0, 64) == []


def of_shipped(name: str) -> list[Record]:
    records, _ = open_records(Data(path=name))
    return records


def test_of_the_shipped_brand_the_shipped_base_draws_colours_and_lines() -> None:
    """No picture of it was in its training; the base before this one was warned of for all 32."""
    found = reconstruction.measure(bases.inspect_base(TINY), of_shipped("asset:brand"), 64, "cpu")
    assert len(found.figures) == reconstruction.MOST and found.of == 96 and len(found.worst) == 4
    assert sum(each.psnr for each in found.figures) / len(found.figures) >= 26
    assert not [each.sentence for each in found.findings() if each.weight == "warning"]


def test_what_the_base_was_trained_on_comes_back(tmp_path: Path) -> None:
    """A hundred pictures of its own world: most without a warning, and the best four are not warned of."""
    base, own = bases.inspect_base(TINY), of_shipped("asset:general")[:100]
    found = reconstruction.measure(base, own, 64, "cpu")
    assert sum(each.psnr for each in found.figures) / len(found.figures) > 28
    assert sum(each.trouble < 1 for each in found.figures) >= 0.7 * len(found.figures)
    best = {each.id for each in found.figures[-4:]}
    for record in own:
        if record.id in best:
            (tmp_path / record.id).write_bytes(record.read())
            (tmp_path / record.id).with_suffix(".txt").write_text(record.caption)
    done = cli("check", tmp_path, "--base", TINY)
    text = " ".join(done.output.split())
    assert done.exit_code == 0 and "gives the pictures back at" in text and "warning: The base" not in text


def test_pictures_that_the_base_cannot_draw_are_found(tmp_path: Path) -> None:
    """Grain of one pixel in the deepest colours: finer than four pixels a latent."""
    rng = np.random.default_rng(0)
    for k in range(3):
        noise = rng.integers(0, 2, (64, 64, 3), dtype=np.uint8) * 255
        Image.fromarray(noise).save(tmp_path / f"grain-{k}.png")
        (tmp_path / f"grain-{k}.txt").write_text("a carpet of coloured grain\n")
    done = cli("check", tmp_path, "--base", TINY)
    text = " ".join(done.output.split())
    assert (
        done.exit_code == 0 and "warning: The base smears the fine detail of 3 pictures at 64 pixels" in text
    )
    assert "grain-0.png" in text and "dB on average" in text


def test_a_vae_that_draws_nothing_is_found(sd_base: Callable[..., Path]) -> None:
    base = bases.inspect_base(str(sd_base("epsilon")))  # of random weights
    found = reconstruction.measure(base, of_shipped("asset:brand")[:5], 64, "cpu")
    assert any("cannot draw a colour of 5 pictures" in each.sentence for each in found.findings())


def test_what_cannot_be_asked() -> None:
    done = cli("check", "asset:brand", "--base", TINY, "--resolution", "66")
    assert done.exit_code == 2 and "--resolution 66 is not a multiple of 4" in done.output
    done = cli("check", "distill/tiny_quick", "--base", TINY)
    assert done.exit_code == 2 and "which names its base" in done.output
    done = cli("check", "asset:brand", "--variant", "fp16")
    assert done.exit_code == 2 and "give it with --base" in done.output


def test_a_broken_vae_is_found_and_breaks_nothing(
    sd_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases.inspect_base(str(sd_base("epsilon")))
    drawn = bases.decode_latents
    monkeypatch.setattr(bases, "decode_latents", lambda vae, z: drawn(vae, z) * float("nan"))
    found = reconstruction.measure(base, of_shipped("asset:brand")[:2], 64, "cpu")
    assert all(each.becomes == "#000000" for each in found.figures)
    reconstruction.write(found, tmp_path)
    assert reconstruction.read(tmp_path) is not None


def test_what_is_written_is_read_back_and_held_to_its_hash(tmp_path: Path) -> None:
    found = reconstruction.measure(bases.inspect_base(TINY), of_shipped("asset:brand")[:6], 64, "cpu")
    assert reconstruction.read(tmp_path) is None
    reconstruction.write(found, tmp_path)
    again = reconstruction.read(tmp_path)
    assert again is not None and again.of == 6 and again.resolution == 64
    assert again.figures == found.figures and again.findings() == found.findings()
    folder = tmp_path / reconstruction.FOLDER
    assert len(list(folder.glob("*-before.png"))) == len(list(folder.glob("*-after.png"))) == 4
    with Image.open(assets.path("brand") / found.figures[0].id) as picture:
        whole = np.asarray(picture.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS), int)
    with Image.open(folder / "0-before.png") as picture:
        assert np.abs(np.asarray(picture, int) - whole).max() <= 1
    file = folder / "reconstruction.json"
    written = file.stat().st_mtime_ns
    reconstruction.write(found, tmp_path)
    assert file.stat().st_mtime_ns == written  # what is there is not written again
    file.write_text(file.read_text().replace('"of": 6', '"of": 7'))
    with pytest.raises(Damaged, match="measures anew"):
        reconstruction.read(tmp_path)
    reconstruction.write(found, tmp_path)
    assert reconstruction.read(tmp_path) == again
