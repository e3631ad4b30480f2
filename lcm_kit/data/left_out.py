"""What lies in a folder of pictures and is not trained on: without a word it would seem to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath

from lcm_kit.data.caption_files import Captions
from lcm_kit.data.caption_review import HEAD, REVIEW, is_review
from lcm_kit.data.folder_files import Files
from lcm_kit.data.image_files import UNREAD
from lcm_kit.errors import UserError

PROMPTS = "prompts.txt"  # in a folder: what is drawn from, no picture's caption (`assets.prompts`)
_ABOUT = ("readme", "license", "licence", "notice")  # files about a set, of whatever ending


@dataclass
class LeftOut:
    """What lies in a folder and is not trained on, by path."""

    pictures: list[str] = field(default_factory=list)  # of a kind that is not read
    captions: list[str] = field(default_factory=list)  # without a picture
    written: list[str] = field(default_factory=list)  # folders that this kit wrote
    linked_twice: list[str] = field(default_factory=list)  # links to folders that are read already
    unlike: list[str] = field(default_factory=list)  # pictures of which a second caption says otherwise
    review: list[str] = field(default_factory=list)  # tables of a model's captions that a person is to see
    others: list[str] = field(default_factory=list)  # all other files


def left_out(files: Files, captions: Captions, found: set[str]) -> LeftOut:
    """What of `files` is neither one of the pictures `found` nor a caption that one of them has."""

    def meant(name: str) -> bool:
        path = PurePosixPath(name.lower())
        return path.stem not in _ABOUT and path.name != PROMPTS

    read = captions.used | captions.tables
    unused = [name for name in captions.files_beside if name not in read and meant(name)]
    others = files.found.keys() - found - set(captions.files_beside) - read
    rest = [name for name in others if meant(name)]
    review = [name for name in rest if _is_review(files, name)]
    unread = [name for name in rest if PurePosixPath(name).suffix.lower() in UNREAD]
    return LeftOut(
        pictures=sorted(unread),
        captions=sorted(unused),
        written=files.written,
        linked_twice=files.linked_twice,
        unlike=captions.unlike,
        review=sorted(review),
        others=sorted(set(rest) - set(unread) - set(review)),
    )


def _is_review(files: Files, name: str) -> bool:
    if name.rpartition("/")[2].lower() != REVIEW:
        return False
    try:
        return is_review(files.found[name].read(HEAD))
    except (OSError, UserError):
        return False
