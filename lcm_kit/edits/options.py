"""What may be asked of an edit: the tasks, the options of each, and sentences on what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lcm_kit.config.numbers import RANGES, require_in_range
from lcm_kit.edits.given import Given, Upload, given_mask, given_picture
from lcm_kit.edits.tasks import Task
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Sides = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Kind:
    """What a task needs and takes besides the options that all have."""

    doing: str  # at the beginning of a sentence on what is being done
    strength: float  # where none is given
    takes: tuple[str, ...] = ()  # of `OWN`
    by_vae: bool = False  # decoded and encoded after each step, by the base's VAE alone


OWN = "mask", "feather", "grow", "scale", "to", "prompt_to", "frames"  # that not every task takes
TASKS: Mapping[Task, Kind] = {
    "inpaint": Kind("drawing the white of a mask", 1.0, ("mask", "feather")),
    "outpaint": Kind("drawing around", 1.0, ("grow", "feather")),
    "colorize": Kind("colouring", 1.0, by_vae=True),
    "upscale": Kind("drawing larger", 0.5, ("scale",), by_vae=True),
    "sketch": Kind("drawing from a sketch", 0.8),
    "vary": Kind("varying", 0.5),
    "interpolate": Kind("drawing between", 0.5, ("to", "prompt_to", "frames")),
}
_SCALE, _FRAMES = 2, 8  # where none are given


class Wanted(NamedTuple):
    """An edit's own options, checked; pictures are read."""

    task: Task
    picture: Given | None
    strength: float
    mask: Image | None = None  # of inpaint: the one given, or where the picture is transparent
    anew: bool = True  # of inpaint: whether nothing of what lies under the mask is seen
    feather: int | None = None
    grow: Sides = (0, 0, 0, 0)
    scale: int = 1  # how many times as large it is drawn
    to: Given | None = None
    prompt_to: str | None = None
    frames: int = _FRAMES


def checked(
    task: Task,
    picture: str | os.PathLike[str] | Image | Upload | None,
    *,
    strength: float | None = None,
    count: int = 1,
    **own: Any,
) -> Wanted:
    """The options of a task with their defaults, its pictures read; `own`: those of `OWN`, None: not given.

    Raises `UserError` for a task that there is not, and for options that are missing, wrong or of another.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")
    kind, given = TASKS[task], {name: value for name, value in own.items() if value is not None}
    for name in given.keys() - set(kind.takes):
        tasks = " and ".join(each for each, other in TASKS.items() if name in other.takes)
        raise UserError(f"{_option(name)} is of {tasks}, and does nothing for {task}; leave it out")
    require_in_range(strength=strength, **{name: given.get(name) for name in ("feather", "scale", "frames")})
    strength = kind.strength if strength is None else strength
    if task == "interpolate":
        return _between(picture, strength, count, given)
    if picture is None:
        raise UserError(f"{task} needs a picture; give the file of one")
    wanted = Wanted(task, given_picture(picture), strength)
    if task == "inpaint":
        return _masked(wanted, given)
    if task == "outpaint":
        grow: list[int] = [*given.pop("grow", (0, 0, 0, 0))]
        if len(grow) != 4 or min(grow) < 0 or not 0 < max(grow) <= RANGES["width"].high:
            raise UserError(
                f"grow {tuple(grow)} is impossible; give the pixels to add at the left, top, right and "
                "bottom, at least one of them above 0"
            )
        left, top, right, bottom = grow
        return wanted._replace(grow=(left, top, right, bottom), **given)
    if task == "upscale":
        given.setdefault("scale", _SCALE)
    return wanted._replace(**given)


def _masked(wanted: Wanted, given: dict[str, Any]) -> Wanted:
    from PIL import ImageOps

    assert wanted.picture is not None
    own = given.pop("mask", None)
    if own is not None:
        mask = given_mask(own, wanted.picture.image.size)
    elif wanted.picture.opacity is not None:
        mask = ImageOps.invert(wanted.picture.opacity)
    else:
        raise UserError(
            "inpaint needs to know what to draw; give --mask (mask), a picture of the same size that is "
            "white there, or a picture that is transparent there"
        )
    if not sum(mask.histogram()[128:]):
        what = "the mask is black all over" if own is not None else "nothing of the picture is transparent"
        raise UserError(f"{what}, so that there is nothing to draw; make white what is to be drawn anew")
    # what lies under transparency is anybody's guess
    return wanted._replace(mask=mask, anew=own is None or wanted.strength == 1, **given)


def _between(picture: Any, strength: float, count: int, given: dict[str, Any]) -> Wanted:
    if count != 1:
        raise UserError(f"count {count} does nothing for interpolate, which draws frames; leave it out")
    ends = [None if each is None else given_picture(each) for each in (picture, given.pop("to", None))]
    first, last = ends
    if (first is None) != (last is None):
        raise UserError("interpolate goes between two pictures; give both, or none and two prompts")
    if first is None and "prompt_to" not in given:
        raise UserError(
            "interpolate needs two ends; give a picture and --to (to) another, or --prompt and --prompt-to"
        )
    if first is not None and last is not None and first.image.size != last.image.size:
        raise UserError(
            f"the two pictures are of {size_of(first.image.size)} and {size_of(last.image.size)} pixels; cut "
            "them to one size"
        )
    if first is not None and given.get("frames", _FRAMES) < 3:
        raise UserError("frames 2 are the two pictures themselves; give 3 or more")
    return Wanted("interpolate", first, strength, to=last, **given)


def grow_of(text: str) -> Sides:
    """What `--grow` says: one number for all sides, or four. Raises `UserError` for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 4
    if len(numbers) != 4:
        raise UserError(f"--grow {text!r} is no number of pixels; give one, or left,top,right,bottom")
    left, top, right, bottom = numbers
    return left, top, right, bottom


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')} ({name})"


def size_of(size: tuple[int, int]) -> str:
    """(width, height) in words."""
    return f"{size[0]} x {size[1]}"
