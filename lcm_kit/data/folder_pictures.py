"""The check of a folder's pictures: what `encode` will make of each, and which of them show the same."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from lcm_kit.data.buckets import Cut, Shaper, cut
from lcm_kit.data.findings import Finding, Weight, few, groups, number
from lcm_kit.data.image_files import decode, of_image
from lcm_kit.data.near_duplicates import Thumbnail, near_duplicates, thumbnail
from lcm_kit.data.records import Record
from lcm_kit.data.transforms import ON_THE_SIDE, resized, to_rgb
from lcm_kit.errors import UserError
from lcm_kit.io.files import sha256_bytes

_DRAFT = 128  # pixels of the shorter side are enough to look at; JPEG decodes to about that at once
_BLANK = 3.0  # of 255: standard deviation of a picture that shows nothing
_CROPPED = 0.25  # of a picture cut away: buckets take less of most, a square 44% of 16:9
_MIXED = 4.0  # largest shorter side over the smallest
_MOVED = 8  # of 255: a colour profile that moves no colour by more is as good as sRGB
_AVERAGED = ("L", "LA", "RGB", "RGBA", "CMYK")  # modes in which neighbouring pixels may be averaged


@dataclass(frozen=True)
class Look:
    """What the check keeps of an image."""

    id: str
    content: str  # SHA-256 of the file
    size: tuple[int, int]  # width, height of the upright picture
    small: Thumbnail
    blank: bool
    traits: frozenset[str]  # keys of _SAYS


def look(record: Record) -> Look:
    """Decode a record's image, once. Raises `UserError` with the reason if `encode` could not read it."""
    content = record.read()
    try:
        size, traits, small = of_image(content, _seen)
    except UserError:  # `decode` has the last word, and the words
        small = decode(content)
        size, traits = small.size, frozenset()
    blank = np.asarray(small, dtype=np.float32).std(axis=(0, 1)).max() < _BLANK
    return Look(record.id, sha256_bytes(content), size, thumbnail(small), bool(blank), traits)


def _seen(image: Image.Image) -> tuple[tuple[int, int], frozenset[str], Image.Image]:
    """Upright size, traits and a small RGB picture of an opened file: what `to_rgb` makes of it."""
    width, height = image.size
    traits = _traits(image)
    image.draft(None, (_DRAFT, _DRAFT))
    if image.getexif().get(ExifTags.Base.Orientation) in ON_THE_SIDE:
        width, height = height, width
    ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data and _lowest_alpha(image) < 255:
        traits.add("transparent")
    small, factor = image, min(image.size) // _DRAFT
    keyed = image.has_transparency_data and not image.mode.endswith("A")
    if factor > 1 and image.mode in _AVERAGED and not keyed:
        small = image.reduce(factor)
    elif factor > 1:  # the whole of a very large one would be in memory four times
        small = resized(image, (image.width // factor, image.height // factor))
    return (width, height), frozenset(traits), to_rgb(small)


def _lowest_alpha(image: Image.Image) -> int:
    alpha = image if image.mode.endswith("A") else image.convert("RGBA")
    return int(np.asarray(alpha.getchannel("A")).min())


def _frames(image: Image.Image) -> bool:
    """More than one frame; the second one of a camera's MPO is a preview or the other eye."""
    return image.format != "MPO" and getattr(image, "n_frames", 1) > 1


def _coloured(image: Image.Image) -> bool:
    profile = image.info.get("icc_profile")
    return image.mode in ("RGB", "RGBA") and bool(profile) and _moves(profile)


@lru_cache(maxsize=64)
def _moves(profile: bytes) -> bool:
    """Whether a colour profile means other colours than sRGB does, which is what `encode` takes all for."""
    patches = np.array([[[a, b, c] for a in (64, 160, 224) for b in (64, 160, 224) for c in (64, 160, 224)]])
    before = Image.fromarray(patches.astype(np.uint8))
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        after = ImageCms.profileToProfile(before, source, ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError):  # a broken profile changes nothing: `encode` does not look at it
        return False
    return bool(np.abs(np.asarray(after, dtype=int) - patches).max() > _MOVED)


def _traits(image: Image.Image) -> set[str]:
    """What a studio should know about an opened file, before its pixels are there: keys of `_SAYS`."""
    has = {
        "cmyk": image.mode == "CMYK",
        "deep": image.mode.startswith("I"),
        "float": image.mode == "F",
        "frames": _frames(image),
        "profile": _coloured(image),
    }
    return {trait for trait, there in has.items() if there}


_SAYS: dict[str, tuple[Weight, str]] = {
    "cmyk": (
        "warning",
        "in CMYK: {}; `encode` turns it into RGB without a colour profile, so that colours shift; export as "
        "sRGB.",
    ),
    "float": (
        "warning",
        "in floating point: {}; `encode` takes 0 to 255 for black to white and clips the rest; export as "
        "8-bit PNG.",
    ),
    "profile": (
        "warning",
        "in a colour space other than sRGB (Display P3, Adobe RGB or the like): {}; `encode` takes the "
        "numbers for sRGB, so that your colours are learned too dull; export as sRGB.",
    ),
    "transparent": (
        "note",
        "partly transparent: {}; `encode` puts white behind it; where the style needs another ground, put it "
        "there.",
    ),
    "frames": (
        "note",
        "of several frames or pages: {}; only the first is used.",
    ),
    "deep": ("note", "in grey of more than 8 bits: {}; `encode` keeps the upper 8 of 16."),
}


def findings(looks: Sequence[Look], shaper: Shaper, resolution: int) -> Iterator[Finding]:
    """All that is worth saying about the pictures, for training at `resolution` pixels, in these shapes."""
    for trait, (weight, text) in _SAYS.items():
        if ids := [look.id for look in looks if trait in look.traits]:
            yield Finding(weight, f"{_are(ids)} {text.format(few(ids))}")
    if ids := [look.id for look in looks if look.blank]:
        yield Finding(
            "warning", f"{_are(ids)} of nearly one colour: {few(ids)}; nothing is to be seen, remove."
        )
    yield from _sizes(looks, shaper, resolution)
    yield from _copies(looks)


def _are(ids: Sequence[object]) -> str:
    return number(len(ids), "image", after=("is", "are"))


def _sizes(looks: Sequence[Look], shaper: Shaper, resolution: int) -> Iterator[Finding]:
    """Pictures that are scaled up or left out, lose much to the crop, or differ much in size."""
    cuts: list[tuple[Look, Cut]] = []
    dropped = []
    for look in looks:
        try:
            cuts.append((look, cut(look.size, shaper.target(look.size))))
        except UserError:
            dropped.append(f"{look.id} ({look.size[0]} x {look.size[1]})")
    if dropped:
        yield Finding(
            "warning",
            f"{_are(dropped)} too small for {resolution} pixels and left out, as data.shapes.small says: "
            f"{few(dropped)}.",
        )
    if small := sorted((each for each in cuts if each[1].scale > 1), key=lambda each: -each[1].scale):
        named = few(
            [f"{look.id} ({look.size[0]} x {look.size[1]}, {cut.scale:.1f} times)" for look, cut in small]
        )
        yield Finding(
            "warning",
            f"{_are(small)} smaller than what is trained at, about {resolution} pixels a side: {named}; "
            "scaled up, they teach blur; bring larger ones, or train at a lower resolution.",
        )
    if much := sorted((each for each in cuts if each[1].lost > _CROPPED), key=lambda each: -each[1].lost):
        named = few(
            [
                f"{look.id} ({look.size[0]} x {look.size[1]} cut to {cut.target[0]} x {cut.target[1]}, "
                f"{cut.lost:.0%} lost)"
                for look, cut in much
            ]
        )
        yield Finding(
            "warning",
            f"{number(len(much), 'image', after=('loses', 'lose'))} more than {_CROPPED:.0%} to the shape "
            f"that is trained on: {named}; crop by hand what matters, or set data.shapes.crop to subject.",
        )
    sides = sorted(looks, key=lambda look: min(look.size))
    if looks and min(sides[-1].size) >= _MIXED * min(sides[0].size):
        least, most = (f"{look.id} {look.size[0]} x {look.size[1]}" for look in (sides[0], sides[-1]))
        yield Finding(
            "note",
            f"The sizes are very mixed (from {least} to {most}): all are brought to {resolution} pixels, and "
            "what is fine in one is coarse in another.",
        )


def _copies(looks: Sequence[Look]) -> Iterator[Finding]:
    """The same file twice, the same picture twice, and the same picture mirrored."""
    same: dict[str, list[str]] = {}
    for look in looks:
        same.setdefault(look.content, []).append(look.id)
    if exact := [ids for ids in same.values() if len(ids) > 1]:
        yield Finding(
            "warning",
            f"{_several(exact)} the same file more than once: {groups(exact)}; each counts again in "
            "training, so keep one.",
        )
    first = {ids[0] for ids in same.values()}
    shown = [look for look in looks if look.id in first and not look.blank]
    near = near_duplicates([look.small for look in shown])
    for found, what, act in (
        (near.alike, "nearly the same picture", ""),
        (near.mirrored, "the same picture mirrored", "; with data.flip each has its mirror image anyway"),
    ):
        if found:
            ids = [[shown[i].id for i in group] for group in found]
            yield Finding(
                "warning",
                f"{_several(ids)} {what}: {groups(ids)}; keep one of each: where one is held out and another "
                f"trained on, the held-out loss promises too much{act}.",
            )


def _several(found: Sequence[Sequence[str]]) -> str:
    return number(sum(map(len, found)), "image", after=("shows", "show"))
