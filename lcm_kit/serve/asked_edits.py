"""A request for an edit: its JSON, and what is to be drawn by it, by the same code as `lcm-kit edit`."""

from __future__ import annotations

import base64
from typing import Annotated, Any

from PIL import Image
from pydantic import Field

from lcm_kit.bases.emphasis import read
from lcm_kit.config.numbers import RANGES
from lcm_kit.drawing.pictures import png_bytes
from lcm_kit.edits.given import Upload
from lcm_kit.edits.options import OWN, TASKS, checked, size_of
from lcm_kit.edits.plan import Plan, require_edits
from lcm_kit.edits.tasks import Task
from lcm_kit.errors import UserError
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.asked import Counted, EditKey, Order, alike, highest, require_at_most, text
from lcm_kit.serve.limits import Limits

PICTURES = "picture", "mask", "to"
_Side = Annotated[int, Field(ge=0, le=highest("width"))]


def _file(what: str) -> Any:
    return Field(
        None, description=f"{what} A PNG, JPEG or WebP file in base64.",
        json_schema_extra={"contentEncoding": "base64"},
    )  # fmt: skip


class WantedEdit(Counted):
    """An edit of a picture, or frames between two of them or two prompts."""

    task: Task = Field(description="What is done.")
    prompt: str = Field("", description="What the whole picture shows when it is done.")
    picture: str | None = _file("What is edited; interpolate may do without.")
    mask: str | None = _file("Of inpaint: white where it is drawn anew; by default the transparency.")
    to: str | None = _file("Of interpolate: the last picture.")
    prompt_to: str | None = Field(None, description="Of interpolate: the last prompt.")
    strength: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False,
        description="How much noise the drawing begins with; by default "
        + ", ".join(f"{kind.strength:g} of {task}" for task, kind in TASKS.items()) + ".",
    )  # fmt: skip
    feather: int | None = Field(
        None, ge=0, le=highest("feather"),
        description="Of inpaint and outpaint: pixels of the soft edge, within what is drawn.",
    )  # fmt: skip
    grow: list[_Side] | None = Field(
        None, min_length=4, max_length=4,
        description="Of outpaint: pixels to add at the left, top, right and bottom.",
    )  # fmt: skip
    scale: int | None = Field(
        None, ge=int(RANGES["scale"].low), le=highest("scale"),
        description="Of upscale: how many times as large; 2 by default.",
    )  # fmt: skip
    frames: int | None = Field(
        None, ge=int(RANGES["frames"].low), le=highest("frames"),
        description="Of interpolate: pictures in all, the ends among them; 8 by default.",
    )  # fmt: skip


def settled_edit(wanted: WantedEdit, served: Served, limits: Limits) -> Order:
    """What is drawn by a request; its pictures are decoded here.

    Raises `UserError` as `lcm-kit edit` does, and for what is over a limit.
    """
    same = alike(wanted, served, limits)
    given = {name: getattr(wanted, name) for name in OWN}
    files = {name: _upload(name, getattr(wanted, name), limits) for name in PICTURES}
    if wanted.prompt_to is not None:
        given["prompt_to"] = text(wanted.prompt_to, "prompt_to", limits)
    given |= {name: files[name] for name in ("mask", "to")}
    asked = checked(wanted.task, files["picture"], strength=wanted.strength, count=wanted.count, **given)
    if wanted.task == "interpolate":
        require_at_most("frames", asked.frames, limits.frames, 2)
    require_edits(same.use.sampler, {name: each.method for name, each in same.on.items()})
    plan = Plan.of(asked, served.base, same.use.sampler, same.use.steps, wanted.count)
    if max(plan.size) > limits.side:
        raise UserError(
            f"a picture of {size_of(plan.size[::-1])} pixels is more than the {limits.side} a side that this "
            "server draws; make it smaller"
        )
    own = {name: getattr(asked, name) for name in TASKS[wanted.task].takes}
    facts = {
        "task": wanted.task, **same.facts, "strength": asked.strength, **own,
        **{name: _told(files[name]) for name in PICTURES if name == "picture" or name in own},
    }  # fmt: skip
    prompts = [facts["prompt"], *([] if asked.prompt_to is None else [asked.prompt_to])]
    key = EditKey(
        plan, tuple(read(each, None) for each in prompts), same.use.steps, same.use.guidance_scale,
        same.negative, same.weights,
    )  # fmt: skip
    return Order(key, key.prompts[0], wanted.seed, plan.count, facts, (*same.notes, *plan.notes))


def _upload(name: str, sent: str | None, limits: Limits) -> Upload | None:
    if sent is None:
        return None
    try:
        content = base64.b64decode(sent, validate=True)
    except ValueError as error:
        raise UserError(f"{name}: it is no base64; send that of a PNG, JPEG or WebP file") from error
    return Upload(name, content, limits.side)


def _told(upload: Upload | None) -> dict[str, str] | None:
    """Of a picture: not the picture itself."""
    return None if upload is None else {"sha256": upload.sha256}


def _example(colour: str) -> str:
    return base64.b64encode(png_bytes(Image.new("RGB", (16, 16), colour))).decode()


EXAMPLES: dict[str, dict[str, Any]] = {
    "a part drawn anew": {
        "task": "inpaint", "prompt": "a red circle", "picture": _example("navy"), "mask": _example("white"),
    },
    "twice as large": {"task": "upscale", "prompt": "a red circle", "picture": _example("red"), "seed": 7},
    "from one prompt to another": {
        "task": "interpolate", "prompt": "a red circle", "prompt_to": "a blue square", "frames": 3,
    },
}  # fmt: skip
