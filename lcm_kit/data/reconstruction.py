"""What a base's own VAE makes of pictures: the best that any adapter of that base can draw.

An adapter works in latents. A colour that the VAE moves, a line that it breaks or small text that it smears
comes out so however well the adapter was trained, so this is measured before anything is: each picture is
encoded, decoded and held against itself, as `encode` sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from lcm_kit import bases, console
from lcm_kit.bases import BaseInfo
from lcm_kit.data.findings import Finding, few, number
from lcm_kit.data.records import Record
from lcm_kit.errors import UserError
from lcm_kit.io import own_files
from lcm_kit.io.files import atomic_folder
from lcm_kit.io.own_shapes import Reconstructed

FOLDER = "reconstruction"  # in a run's folder: reconstruction.json and the worst pictures
MOST = 32  # pictures that are measured: spread over the folder
SHOWN = 4  # the worst of them are kept, beside what became of them
MOVED = 8.0  # CIELAB units by which an ink may move: 2.3 can be just seen, side by side
SMEARED = 0.5  # of fine detail
FAR = 22.0  # dB
_INK = 0.04  # of a picture, at least: what covers less is a letter or a dot, and counts as detail
_INKS = 8
_TILE, _DETAIL = 8, 10.0  # pixels; of 255
_AGAIN = "run `lcm-kit finetune` again, which measures anew"


@dataclass(frozen=True)
class Measured:
    """What became of one picture."""

    id: str
    psnr: float  # dB over RGB; 30 looks the same, at 20 colours and edges are plainly others
    moved: float  # CIELAB difference (CIE 1976) of the ink that moves most, of those with areas
    ink: str  # that ink, as #rrggbb; empty where a picture has no area of one ink
    becomes: str  # and what it is afterwards
    lost: float  # share of the fine detail, of one to three pixels, that is gone or made up: in [0, 1]

    @property
    def trouble(self) -> float:
        """How bad it is: 1 and above deserves a warning."""
        return max(self.moved / MOVED, self.lost / SMEARED, 2 ** ((FAR - self.psnr) / 6))


# -- Measures ------------------------------------------------------------------------------------------------


def lab(rgb: Tensor) -> Tensor:
    """sRGB [..., 3] in [0, 1] -> CIELAB [..., 3] for the white of D65 (IEC 61966-2-1, CIE 15)."""
    rgb = rgb.double().clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ],
        dtype=torch.float64,
    )
    ratio = linear @ to_xyz.T / to_xyz.sum(1)
    root = torch.where(ratio > (6 / 29) ** 3, ratio.clamp_min(1e-12) ** (1 / 3), ratio * 841 / 108 + 4 / 29)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def psnr(picture: Tensor, other: Tensor) -> Tensor:
    """Two batches [B, 3, H, W] in [-1, 1] -> [B], dB; 100 at the most."""
    error = (picture.double() - other.double()).pow(2).mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(4e-10))


def lost_detail(picture: Tensor, other: Tensor) -> Tensor:
    """Two batches [B, 3, H, W] in [-1, 1] -> [B] in [0, 1]: energy of the error in what is finer than 3
    pixels, over that of the picture's own, where it has such detail; 0 where it has none.

    Where: in tiles of 8 pixels whose fine part has a deviation of 10 of 255 and more, so that a line of small
    text counts in a large flat picture, and soft shading does not.
    """

    def fine(x: Tensor) -> Tensor:
        """[B, H / 8, W / 8]: energy by tile."""
        x = x.double()
        rest = x - avg_pool2d(pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return avg_pool2d(rest.pow(2).mean(1, keepdim=True), _TILE, ceil_mode=True)[:, 0]

    own, error = fine(picture), fine(picture - other)
    has = (own >= (_DETAIL / 127.5) ** 2).double()
    kept = ((own * has).sum((1, 2)), (error * has).sum((1, 2)))
    return torch.where(kept[0] > 0, kept[1] / kept[0].clamp_min(1e-12), 0.0).clamp(0, 1)


def moved_ink(picture: Tensor, other: Tensor) -> tuple[float, str, str]:
    """Two pictures [3, H, W] in [-1, 1] -> how far the ink that moves most does, in CIELAB, and both colours.

    Inks: the picture's palette of eight. Each is the mean of the pixels that have it with all their
    neighbours, where these are 4% or more of the picture: what is narrower than three pixels is detail.
    """
    before, after = (((x.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).reshape(-1, 3) for x in (picture, other))
    height, width = picture.shape[1:]
    image = Image.fromarray((before * 255).round().byte().view(height, width, 3).numpy())
    which = torch.tensor(list(image.quantize(_INKS).tobytes())).view(height, width)
    found = (0.0, "", "")
    for ink in which.unique():
        own = pad((which == ink).double()[None, None], (1, 1, 1, 1), mode="replicate")
        mask = avg_pool2d(own, 3, 1).flatten() > 1 - 1e-6
        if mask.double().mean() < _INK:
            continue
        colour, becomes = before[mask].mean(0), after[mask].mean(0)
        shift = float((lab(colour) - lab(becomes)).norm())
        if shift >= found[0]:
            found = (shift, _hex(colour), _hex(becomes))
    return found


def _hex(colour: Tensor) -> str:
    return "#" + "".join(f"{round(float(value) * 255):02x}" for value in colour)


# -- A folder's pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reconstructions:
    """What became of a folder's pictures, the worst first."""

    figures: tuple[Measured, ...]
    worst: tuple[tuple[Tensor, Tensor], ...]  # of the first `SHOWN`: [3, H, W] in [-1, 1], before and after
    of: int  # pictures in all, of which these are a part
    resolution: int

    def findings(self) -> list[Finding]:
        """What is to be said: how near the pictures come back, and of what does not."""
        return findings(self.figures, self.of, self.resolution)


@torch.no_grad()
def measure(base: BaseInfo, records: Sequence[Record], resolution: int, device: str) -> Reconstructions:
    """Encode and decode up to `MOST` of the pictures, one at a time, with the base's VAE in float32.

    `resolution`: pixels of a side, a multiple of the VAE's factor. Pictures that cannot be read are left out;
    the folder's check names them. Raises `UserError` for a base whose VAE cannot be loaded.
    """
    chosen = [records[k * len(records) // MOST] for k in range(MOST)] if len(records) > MOST else records
    vae = bases.load_vae(base).to(device)
    found: list[Measured] = []
    pairs: dict[str, tuple[Tensor, Tensor]] = {}  # of the worst so far
    with console.working(f"drawing {len(chosen)} pictures with the base's VAE"):
        for record in chosen:
            try:
                before = record.pixels(resolution)
            except (UserError, OSError):
                continue
            latents = bases.encode_images(vae, before[None])
            drawn = bases.decode_latents(vae, latents)[0].float().cpu()
            after = drawn.nan_to_num(-1.0).clamp(-1, 1)  # of a broken VAE: black, and far from the picture
            found.append(figures_of(record.id, before, after))
            found.sort(key=lambda each: -each.trouble)
            pairs = {
                each.id: (before, after) if each.id == record.id else pairs[each.id] for each in found[:SHOWN]
            }
    worst = tuple(pairs[each.id] for each in found[:SHOWN])
    return Reconstructions(tuple(found), worst, len(records), resolution)


def figures_of(id: str, before: Tensor, after: Tensor) -> Measured:
    """The figures of one picture, both [3, H, W] in [-1, 1]."""
    pair = before[None], after[None]
    return Measured(id, float(psnr(*pair)), *moved_ink(before, after), float(lost_detail(*pair)))


def findings(figures: Sequence[Measured], of: int, resolution: int) -> list[Finding]:
    """What is to be said of pictures at `resolution`, of which there are `of` in all."""
    if not figures:
        return []
    nearness = sum(each.psnr for each in figures) / len(figures)
    some = "the" if len(figures) == of else f"{len(figures)} of the {of:,}"
    told = [
        Finding(
            "note",
            f"The base's VAE gives {some} pictures back at {nearness:.1f} dB on average; no adapter draws "
            "nearer than that.",
        )
    ]
    told += [_colours(bad)] if (bad := _beyond(figures, "moved", MOVED)) else []
    told += [_detail(bad, resolution)] if (bad := _beyond(figures, "lost", SMEARED)) else []
    far = [each for each in figures if each.psnr < FAR and each.moved <= MOVED and each.lost <= SMEARED]
    told += [_far(far)] if far else []
    return told


def _beyond(figures: Sequence[Measured], name: str, limit: float) -> list[Measured]:
    found = [each for each in figures if getattr(each, name) > limit]
    return sorted(found, key=lambda each: -float(getattr(each, name)))


def _colours(bad: Sequence[Measured]) -> Finding:
    named = few([f"{each.id} ({each.ink} comes back as {each.becomes}, {each.moved:.0f})" for each in bad])
    return Finding(
        "warning",
        f"The base cannot draw a colour of {number(len(bad), 'picture')}: {named}, in units of CIELAB, of "
        f"which {MOVED:g} are plainly seen; no training mends that, so choose another base or VAE, or accept "
        "other colours.",
    )


def _detail(bad: Sequence[Measured], resolution: int) -> Finding:
    named = few([f"{each.id} ({each.lost:.0%})" for each in bad])
    return Finding(
        "warning",
        f"The base smears the fine detail of {number(len(bad), 'picture')} at {resolution} pixels: {named} "
        "of what is one to three pixels wide is lost (small text, thin lines, fine patterns); train at a "
        "higher resolution, or crop so that it is larger.",
    )


def _far(bad: Sequence[Measured]) -> Finding:
    named = few([f"{each.id} ({each.psnr:.1f} dB)" for each in bad])
    return Finding(
        "warning",
        f"The base gives {number(len(bad), 'picture')} back far from what they are: {named}; look at them "
        "before you train.",
    )


# -- In a run's folder ---------------------------------------------------------------------------------------


def write(found: Reconstructions, run: Path) -> None:
    """Write `run/reconstruction/`, unless it is there: figures, and the worst pictures before and after."""
    from lcm_kit.sample import to_pil

    if _is_there(found, run):
        return
    with atomic_folder(run / FOLDER) as inside:
        for k, pair in enumerate(found.worst):
            for name, pixels in zip(("before", "after"), pair, strict=True):
                to_pil(pixels[None])[0].save(inside / f"{k}-{name}.png", optimize=True)
        content = {
            "of": found.of,
            "resolution": found.resolution,
            "pictures": [vars(each) for each in found.figures],
        }
        own_files.write_json(inside / f"{FOLDER}.json", content)


def _is_there(found: Reconstructions, run: Path) -> bool:
    pictures = list((run / FOLDER).glob("*.png"))
    try:
        return len(pictures) == 2 * len(found.worst) and read(run) == replace(found, worst=())
    except own_files.Damaged:
        return False


def read(run: Path) -> Reconstructions | None:
    """What `write` wrote, but for the pictures; None if nothing was measured. Raises `Damaged` for a file
    that is not as it was written.
    """
    file = run / FOLDER / f"{FOLDER}.json"
    if not file.is_file():
        return None
    found = own_files.read_json(file, Reconstructed, _AGAIN)
    figures = (
        Measured(each["id"], each["psnr"], each["moved"], each["ink"], each["becomes"], each["lost"])
        for each in found["pictures"]
    )
    return Reconstructions(tuple(figures), (), found["of"], found["resolution"])
