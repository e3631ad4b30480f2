"""What editing by jumps to x0 keeps and reaches, against plain image-to-image at equal UNet calls.

    OMP_NUM_THREADS=2 python -m studies.editing [SCENES] [--sheet FILE.png]

On tiny-sd with the shipped LCM-LoRA in 4 steps. Pictures are rendered scenes of the embedded world, of which
every attribute is known; its probe reads those of the results. The baseline is image-to-image by diffusers'
own pipeline and LCMScheduler (the timesteps and the noising of its image-to-image class, which itself takes
latents of 4 channels alone): the same LoRA, steps, strength, start and noise, and at the end the same paste
(outside the mask; the greys; the means of blocks). So only what is put back between the steps differs.

Of each row: the largest difference in what must be kept (levels of 255; of greys and means also the rounding
to 8 bits), which attributes the probe finds as asked, all three of them with a 95% interval (bootstrap over
scenes), and the mean distance to the true picture in what was drawn, in levels (of inpainting in the
background beside the new object). The last column is the difference of that
distance to the baseline's, with its interval. All scenes share the noise of pictures 0 .. EACH - 1, so that
intervals speak of other scenes alone. The figures stand in docs/editing.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from lcm_kit import sample
from lcm_kit.core.editing import Grey, Pooled, Walk
from lcm_kit.drawing import editing
from lcm_kit.drawing.batches import Batches
from lcm_kit.drawing.canvas import Canvas, grown
from lcm_kit.drawing.noise import streams
from lcm_kit.drawing.pictures import contact_sheet, save_png
from lcm_kit.evaluation.metrics.accuracy import attributes_right
from lcm_kit.evaluation.metrics.bootstrap import Resamples, paired_difference, percentiles
from lcm_kit.quiet import quietly
from lcm_kit.tiny import world
from lcm_kit.tiny.probe import load_probe

STEPS, EACH, SHOWN = 4, 1, 8  # pictures of each scene; scenes on the sheet
MASK = (8, 8, 56, 56)  # of inpainting, over nearly all of an object
CUT = 16  # columns that outpainting draws at the right
SIDE = 4  # of a block of upscaling: 16 x 16 pixels to 64 x 64


@dataclass
class Row:
    """What one way of one task did over all scenes."""

    task: str
    strength: float
    way: str
    right: list[Tensor] = field(default_factory=list)  # [EACH, 3] bool of each scene
    kept: float = 0.0
    distances: list[float] = field(default_factory=list)
    shown: list[Image.Image] = field(default_factory=list)


@dataclass
class Try:
    """One task on one scene."""

    edit: editing.Edit
    wanted: world.Scene
    truth: Image.Image | None  # None: there is no one truth
    drawn: Any  # bool [H, W], where its distance to the truth is taken
    kept: Callable[[Image.Image], float]  # the largest difference in what must be kept


def levels(picture: Image.Image) -> Any:
    """8-bit values as float64."""
    return np.array(picture.convert("RGB")).astype(float)


def scenes(count: int) -> Iterable[tuple[world.Scene, world.Scene]]:
    """A scene, and another one to go to: of another object, colour and pattern."""
    rng = np.random.default_rng(2026)
    while count:
        one, two = (world.random_scene(rng) for _ in range(2))
        if one.object != two.object and one.colour != two.colour and one.pattern != two.pattern:
            count -= 1
            yield replace(one, size="large", place="in the middle"), two


def inpaint(pipe: Any, one: world.Scene, two: world.Scene) -> Try:
    """Another object in the middle; all around it stays, and the background goes on beside the object."""
    picture, mask = world.render(one), Image.new("L", (world.SIZE,) * 2)
    mask.paste(255, MASK)
    wanted = replace(one, object=two.object)
    canvas = Canvas.of(picture, 8)
    edit = editing.inpainted(pipe, canvas, canvas.hole(mask), wanted.prompt, EACH, feather=2)
    new, truth = np.array(mask) > 0, world.render(wanted)
    ground = (levels(truth) == levels(world.background(wanted))).all(-1)
    kept = lambda made: abs(levels(made) - levels(picture))[~new].max()  # noqa: E731
    return Try(edit, wanted, truth, new & ground, kept)


def outpaint(pipe: Any, one: world.Scene, two: world.Scene) -> Try:
    """The right quarter, of which the pattern goes on and the object may."""
    truth = world.render(one)
    left = truth.crop((0, 0, world.SIZE - CUT, world.SIZE))
    picture, mask = grown(left, 0, 0, CUT, 0)
    canvas = Canvas.of(picture, 8)
    edit = editing.inpainted(pipe, canvas, canvas.hole(mask), one.prompt, EACH, feather=2)
    new = np.array(mask) > 0
    return Try(edit, one, truth, new, lambda made: abs(levels(made) - levels(truth))[~new].max())


def colorize(pipe: Any, one: world.Scene, two: world.Scene) -> Try:
    """The greys of a scene, in its own colours."""
    truth = world.render(one)
    edit = editing.colorized(pipe, Canvas.of(truth.convert("L").convert("RGB"), 8), one.prompt, EACH)
    return Try(edit, one, truth, np.ones((64, 64), bool), _off(Grey(), truth.convert("L").convert("RGB")))


def upscale(pipe: Any, one: world.Scene, two: world.Scene) -> Try:
    """A scene of 16 x 16 pixels."""
    truth = world.render(one)
    small = truth.reduce(SIDE)
    edit = editing.upscaled(pipe, Canvas.of(small, 2), SIDE, one.prompt, EACH)
    large = small.resize(truth.size, Image.Resampling.NEAREST)
    return Try(edit, one, truth, np.ones((64, 64), bool), _off(Pooled(SIDE), large))


def _off(measure: Any, like: Image.Image) -> Callable[[Image.Image], float]:
    def off(made: Image.Image) -> float:
        a, b = (measure.of(Canvas.of(each, 1).pixels) for each in (made, like))
        return float((a - b).abs().max()) * 127.5

    return off


def sketch(pipe: Any, one: world.Scene, two: world.Scene) -> Try:
    """The scene in two flat colours: a disc on a ground."""
    sprite = np.array(world.glyph(one.object).resize((46, 46)))
    colour = sprite[sprite[..., 3] > 128][:, :3].mean(0).astype(np.uint8)
    drawn = np.array(Image.new("RGB", (64, 64), world.COLOURS[one.colour]))
    x, y = world.centre(one)
    down, across = np.mgrid[:64, :64]
    drawn[(down - y) ** 2 + (across - x) ** 2 < 20**2] = colour
    edit = editing.redrawn(pipe, Canvas.of(Image.fromarray(drawn), 8), one.prompt, EACH)
    return Try(edit, one, None, np.ones((64, 64), bool), lambda made: 0.0)


def vary(pipe: Any, one: world.Scene, two: world.Scene) -> Try:
    """The scene itself, again."""
    truth = world.render(one)
    edit = editing.redrawn(pipe, Canvas.of(truth, 8), one.prompt, EACH)
    return Try(edit, one, truth, np.ones((64, 64), bool), lambda made: 0.0)


TASKS: dict[str, tuple[Callable[..., Try], tuple[float, ...]]] = {
    "inpaint": (inpaint, (1.0, 0.8)),
    "outpaint": (outpaint, (1.0, 0.8)),
    "colorize": (colorize, (1.0, 0.8)),
    "upscale": (upscale, (0.5,)),
    "sketch": (sketch, (0.8,)),
    "vary": (vary, (0.5,)),
}


class Models:
    """The pipeline with its LoRA, and diffusers' scheduler of the baseline."""

    def __init__(self) -> None:  # noqa: D107
        self.pipe = sample.adapted("asset:tiny-sd", "asset:tiny-lcm-lora")
        self.theirs = sample.scheduler("lcm", self.pipe.scheduler.config)

    def ours(self, edit: editing.Edit, strength: float) -> list[Image.Image]:
        """By jumps to x0, with what is known put back."""
        walk = Walk.of(editing.schedule_of(self.pipe), "lcm", STEPS, strength)
        how = editing.Settings(walk)
        return [each for some in editing.drawn(self.pipe, edit, how, Batches(8, "", "")) for each in some]

    def plain(self, edit: editing.Edit, strength: float) -> list[Image.Image]:
        """By image-to-image from the same start and noise; what is known is pasted at the end."""
        assert edit.start is not None
        count, of = len(edit.numbers), streams((0, number) for number in edit.numbers)
        start = edit.start.expand(count, -1, -1, -1)
        noise = torch.stack([torch.randn(start.shape[1:], generator=each) for each in of])
        self.theirs.set_timesteps(STEPS, strength=strength)
        points = self.theirs.timesteps
        own, self.pipe.scheduler = self.pipe.scheduler, self.theirs
        try:
            latents = self.pipe(
                prompt=[edit.prompts[0]] * count, latents=self.theirs.add_noise(start, noise, points[:1]),
                timesteps=points.tolist(), guidance_scale=1.0, generator=of, output_type="latent",
            ).images  # fmt: skip
        finally:
            self.pipe.scheduler = own
        return edit.finish(editing.decode(self.pipe, latents).cpu())


def measure(models: Models, count: int) -> list[Row]:
    """Both ways of every task at each strength, the baseline last."""
    probe, rows = load_probe(), []
    for task, (make, strengths) in TASKS.items():
        ways = [(s, way) for s in strengths for way in ("put back", "image-to-image")]
        some = [Row(task, strength, way) for strength, way in ways]
        for one, two in scenes(count):
            tried = make(models.pipe, one, two)
            for row in some:
                draw = models.ours if row.way == "put back" else models.plain
                made = draw(tried.edit, row.strength)
                seen = torch.cat([Canvas.of(each, 1).pixels for each in made])
                row.right.append(attributes_right(probe, seen, [tried.wanted] * EACH))
                row.kept = max(row.kept, *(tried.kept(each) for each in made))
                if tried.truth is not None:
                    off = [abs(levels(each) - levels(tried.truth))[tried.drawn].mean() for each in made]
                    row.distances.append(float(np.mean(off)))
                row.shown.append(made[0])
        rows += some
        show(some)
    return rows


def show(rows: list[Row]) -> None:
    """A line each, as a table in Markdown."""
    resamples = Resamples.draw(len(rows[0].right), EACH)
    for ours, plain in zip(rows[::2], rows[1::2], strict=True):
        wholes = [torch.cat(row.right).all(1).double() for row in (ours, plain)]
        gain = "-"
        if ours.distances:
            off = [torch.tensor(row.distances).repeat_interleave(EACH) for row in (ours, plain)]
            difference = paired_difference(*off, resamples)
            gain = f"{difference.difference:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
        for row, whole in zip((ours, plain), wholes, strict=True):
            low, high = percentiles(resamples.means(whole), 0.95)
            each = torch.cat(row.right).double().mean(0).tolist()
            distance = f"{np.mean(row.distances):.1f}" if row.distances else "-"
            print(
                f"| {row.task} | {row.strength:g} | {row.way} | {row.kept:.1f} | "
                f"{' | '.join(f'{share:.2f}' for share in each)} | "
                f"{float(whole.mean()):.2f} [{low:.2f}, {high:.2f}] | {distance} | "
                f"{gain if row is ours else '-'} |",
                flush=True,
            )


def frames(models: Models, count: int, strength: float = 0.5, inner: int = 3) -> None:
    """Frames between two pictures: of latents on the sphere, against image-to-image of a cross-fade.

    Both from the same noise. Told of each: the share of frames whose object the probe reads as that of an
    end, and the largest step between neighbours over the mean one (1: all are even), in levels.
    """
    probe = load_probe()
    walk = Walk.of(editing.schedule_of(models.pipe), "lcm", STEPS, strength)
    found: dict[str, list[tuple[float, float]]] = {"latents on the sphere": [], "cross-fade": []}
    for one, two in scenes(count):
        ends = [world.render(one), world.render(two)]
        made = editing.interpolated(
            models.pipe, (Canvas.of(ends[0], 8), Canvas.of(ends[1], 8)), [one.prompt, two.prompt], inner
        )
        faded = [Image.blend(*ends, place) for place in made.between]
        start = torch.cat([editing.encode(models.pipe, Canvas.of(each, 8).pixels) for each in faded])
        for name, edit in zip(found, (made, replace(made, start=start)), strict=True):
            batches = editing.drawn(models.pipe, edit, editing.Settings(walk), Batches(8, "", ""))
            drawn = [each for some in batches for each in some]
            read = probe.read(torch.cat([Canvas.of(each, 1).pixels for each in drawn]))
            share = np.mean([each["object"] in (one.object, two.object) for each in read])
            path = [levels(each) for each in (ends[0], *drawn, ends[1])]
            lengths = [abs(b - a).mean() for a, b in zip(path, path[1:], strict=False)]
            found[name].append((float(share), float(max(lengths) / np.mean(lengths))))
    resamples = Resamples.draw(count)
    print("\n| frames | object of an end | largest step over the mean |\n| --- | --- | --- |")
    for name, values in found.items():
        told = []
        for column in torch.tensor(values).T:
            low, high = percentiles(resamples.means(column), 0.95)
            told.append(f"{float(column.mean()):.2f} [{low:.2f}, {high:.2f}]")
        print(f"| {name} | {' | '.join(told)} |")


def seams(models: Models, count: int) -> None:
    """How visible the edge of a mask is, by the width over which what is drawn goes over into the picture.

    Of outpainting from amid a cell of the latents, on the ground, whose truth is known on both sides: the
    mean difference, in levels, between the step across the edge and that of the truth, and between the truth
    and the four columns beside the edge.
    """
    walk = Walk.of(editing.schedule_of(models.pipe), "lcm", STEPS, 1.0)
    widths, edge = (0, 2, 4, 8), world.SIZE - CUT - 3
    steps: dict[int, list[float]] = {width: [] for width in widths}
    beside: dict[int, list[float]] = {width: [] for width in widths}
    for one, _ in scenes(count):
        truth = levels(world.render(one))
        ground = (truth == levels(world.background(one))).all(-1)
        left = world.render(one).crop((0, 0, edge, world.SIZE))
        picture, mask = grown(left, 0, 0, world.SIZE - edge, 0)
        canvas = Canvas.of(picture, 8)
        for width in widths:
            edit = editing.inpainted(models.pipe, canvas, canvas.hole(mask), one.prompt, 1, feather=width)
            made = next(editing.drawn(models.pipe, edit, editing.Settings(walk), Batches(8, "", "")))[0]
            off = levels(made) - truth
            across = abs(off[:, edge] - off[:, edge - 1])[ground[:, edge] & ground[:, edge - 1]]
            steps[width] += across.ravel().tolist()
            beside[width] += abs(off[:, edge : edge + 4])[ground[:, edge : edge + 4]].ravel().tolist()
    print("\n| feather | step at the edge | beside it |\n| --- | --- | --- |")
    for width in widths:
        print(f"| {width} | {np.mean(steps[width]):.1f} | {np.mean(beside[width]):.1f} |")


def main() -> None:
    """Print the tables; with --sheet also write pictures of the first scenes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scenes", nargs="?", type=int, default=64)
    parser.add_argument("--sheet", type=Path)
    asked = parser.parse_args()
    logging.set_verbosity_error()  # of timesteps that begin below the last: that is what strength is
    with quietly():
        models = Models()
        print(
            "| task | strength | way | kept | object | colour | pattern | all | distance | to the baseline |"
        )
        print(f"|{' --- |' * 10}")
        rows = measure(models, asked.scenes)
        frames(models, asked.scenes)
        seams(models, asked.scenes)
    if asked.sheet is not None:
        best = [row for row in rows if row.strength == TASKS[row.task][1][0]]
        save_png(contact_sheet([each for row in best for each in row.shown[:SHOWN]], SHOWN), asked.sheet)


if __name__ == "__main__":
    main()
