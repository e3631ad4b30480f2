"""Frames into one file that plays them: GIF, WebP or MP4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lcm_kit.api.calls import call
from lcm_kit.api.stages import Place
from lcm_kit.config.numbers import require_in_range
from lcm_kit.edits.given import given_picture
from lcm_kit.edits.tasks import Task
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcm_kit.drawing.animations import Animation


def save_animation(
    frames: Sequence[Place | Image],
    path: Place,
    *,
    fps: float = 8.0,
    loop: bool = True,
    ping_pong: bool = False,
    verbose: bool = False,
) -> Path:
    """Write pictures of one size as an animation, whole or not at all; returns its path.

    `frames`: files, or PIL's; 2 or more. `path` ends with .gif (256 colours a frame), .webp (the pixels as
    they are) or .mp4 (H.264 in 4:2:0 and BT.709; needs the extra `video`; odd sides are one pixel longer).
    `fps`: frames a second, from 0.1 to 60; each is shown as long as the format's unit of time allows (1/100 s
    in a GIF, 1/1000 s in a WebP), so that all together they take the time asked. `loop`: play for ever; False
    once. An MP4 does not say. `ping_pong`: to the last frame and back again, without either end twice.

    Raises `UserError` for another suffix, frames that are no pictures or of several sizes, more frames a
    second than a GIF has, `loop=False` with an MP4, and where a library is missing or the disk is full.

        frames = lcm_kit.edit("interpolate", None, "a fox", prompt_to="a bear", adapter="runs/mine")
        lcm_kit.save_animation(frames, "fox-to-bear.mp4", ping_pong=True)
    """
    with call(verbose, models=False):
        from lcm_kit.drawing.animations import Animation

        require_in_range(fps=fps)
        animation = Animation(Path(path), fps, loop, ping_pong)
        animation.require()
        return animation.write([given_picture(frame).image for frame in frames])


def animation_of(
    task: Task, path: Path | None, *, fps: float | None, once: bool, ping_pong: bool
) -> Animation | None:
    """The animation that `lcm-kit edit TASK` writes beside its frames, if any.

    Raises `UserError` for options without a file, for a task without frames, and as `save_animation`.
    """
    from lcm_kit.drawing.animations import FPS, Animation

    if path is None:
        for option, given in (("--fps", fps is not None), ("--once", once), ("--ping-pong", ping_pong)):
            if given:
                raise UserError(f"{option} is of an animation; give --animation FILE, or leave it out")
        return None
    if task != "interpolate":
        raise UserError(f"--animation is of interpolate, and does nothing for {task}; leave it out")
    animation = Animation(path, FPS if fps is None else fps, not once, ping_pong)
    animation.require()
    return animation
