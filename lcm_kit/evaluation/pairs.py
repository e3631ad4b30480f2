"""Two adapters on one base, a style and an acceleration: the cells of their weights, and which serves."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from lcm_kit import sample
from lcm_kit.bases import BaseInfo
from lcm_kit.config.sweep import Compose
from lcm_kit.core.methods import MethodInfo
from lcm_kit.drawing.fused import Fused, fuse
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.draw import Samples, opened, warm_up
from lcm_kit.evaluation.measure import Figures, compare
from lcm_kit.evaluation.metric_table import METRICS
from lcm_kit.io.files import atomic_write
from lcm_kit.samplers import in_file_name


@dataclass(frozen=True)
class Pair(Cell):
    """A cell with both adapters on: `lora_weight` is the acceleration's."""

    style_weight: float = 1.0

    @property
    def id(self) -> str:
        """The cell as a file name."""
        who = "styled" if self.kind == "teacher" else "pair"
        weights = f"-style{self.style_weight:g}" + (f"-speed{self.lora_weight:g}" if self.adapter else "")
        sampler = in_file_name(self.sampler)
        return f"{who}-{sampler}-{self.steps}-g{self.guidance_scale:g}{weights}"


def plan(config: Compose, method: MethodInfo) -> list[Pair]:
    """The styled teacher first, then every pair of weights."""
    teacher = Pair(
        "teacher", None, "ddim", config.teacher_steps, config.teacher_guidance,
        style_weight=config.teacher_weight,
    )  # fmt: skip
    sampler = config.sampler or method.sampler
    scale = config.guidance_scale or method.guidance_beside(config.teacher_guidance)
    pairs = [
        Pair("student", "pair", sampler, config.steps, scale, speed, style_weight=style)
        for style, speed in product(config.style_weights, config.speed_weights)
    ]
    return [teacher, *dict.fromkeys(pairs)]


@dataclass
class PairPipes:
    """The base's pipeline with both adapters loaded, opened when something is to be drawn.

    What a cell asks for of them is in the weights, until the next one is asked for.
    """

    base: BaseInfo
    style: Path
    speed: Path
    samples: Samples  # those that are drawn
    _pipe: Any = field(default=None, init=False)
    _fused: Fused = field(default_factory=Fused, init=False)

    def get(self, cell: Pair) -> Any:
        """A pipeline with the weights of `cell`; the acceleration is off for the teacher."""
        if self._pipe is None:
            self._pipe = opened(self.base, self.samples)
            sample.load_adapter(self._pipe, self.style, name="style")
            sample.load_adapter(self._pipe, self.speed, name="speed")
            warm_up(self._pipe, self.samples)
        self._fused.undo()
        if cell.adapter is None:
            self._pipe.set_adapters(["style"], [cell.style_weight])
        else:
            self._pipe.set_adapters(["style", "speed"], [cell.style_weight, cell.lora_weight])
        self._fused = fuse(self._pipe)
        return self._pipe


def choose(cells: Mapping[Pair, Figures], confidence: float) -> tuple[Pair, list[str]]:
    """The pair to use, and why in words.

    Of the pairs that follow their prompts as well as the styled teacher or the best pair does, whichever does
    it less, beyond the interval of the paired difference, the one whose pictures are nearest to the styled
    teacher's: the least kernel distance of their features, and where that cannot tell two apart, the one
    whose likeness to the brand is nearest to the teacher's. (Asked for the best pair's prompts alone, the
    weights at which no style is left would win: a style costs prompts, and the styled teacher says how many.
    Asked for the most likeness, those at which the style drowns the object would.)
    """
    pairs = [cell for cell in cells if cell.kind == "student"]
    (teacher,) = (cell for cell in cells if cell.kind == "teacher")
    key, reasons = "prompt_adherence", []
    if all(key in cells[pair] for pair in pairs):
        best = max(pairs, key=lambda pair: cells[pair][key].value)
        bar, who = min(
            ((cell, name) for cell, name in ((teacher, "the styled teacher"), (best, "the best one"))),
            key=lambda each: cells[each[0]][key].value,
        )

        def as_good(pair: Pair) -> bool:
            found = compare(cells[bar][key], cells[pair][key], confidence)
            return pair == bar or found is None or found["low"] <= 0

        able = [pair for pair in pairs if as_good(pair)]
        left = len(pairs) - len(able)
        most = f"{cells[bar][key].value:.3g}"
        reasons.append(f"{left} of {len(pairs)} pairs follow their prompts less than {who} ({most})")
    else:
        able = pairs
    nearest = min(able, key=lambda pair: cells[pair]["kernel_teacher"].value)
    near = [nearest]
    for pair in able:
        found = compare(cells[pair]["kernel_teacher"], cells[nearest]["kernel_teacher"], confidence)
        if pair != nearest and found is not None and found["low"] <= 0:
            near.append(pair)
    chosen = nearest
    if "brand_similarity" in cells[nearest]:
        look = {cell: cells[cell]["brand_similarity"].value for cell in (teacher, *near)}
        chosen = min(near, key=lambda pair: abs(look[pair] - look[teacher]))
    for name in ("prompt_adherence", "kernel_teacher", "brand_similarity", "saturation", "diversity"):
        if name in cells[chosen]:
            low, high = cells[chosen][name].interval(confidence)
            reasons.append(
                f"{METRICS[name].label}: {cells[chosen][name].value:.3g} ({low:.3g} to {high:.3g})"
            )
    return chosen, reasons


def write_map(cells: Mapping[Pair, Figures], chosen: Pair, file: Path) -> Path:
    """A PNG: a square for each pair of weights and each metric that was measured, the chosen pair framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    pairs = [cell for cell in cells if cell.kind == "student"]
    styles, speeds = (sorted({getattr(p, name) for p in pairs}) for name in ("style_weight", "lora_weight"))
    wanted = (
        "prompt_adherence",
        "kernel_teacher",
        "brand_similarity",
        "saturation",
        "sharpness",
        "diversity",
    )
    shown = [key for key in wanted if all(key in cells[pair] for pair in pairs)]
    figure = Figure(figsize=(3.1 * min(len(shown), 3), 3.0 * -(-len(shown) // 3)), layout="constrained")
    for k, key in enumerate(shown):
        axes = figure.add_subplot(-(-len(shown) // 3), min(len(shown), 3), k + 1)
        values = {(p.style_weight, p.lora_weight): cells[p][key].value for p in pairs}
        grid = [[values[style, speed] for speed in speeds] for style in styles]
        image = axes.imshow(grid, origin="lower", cmap="cividis")
        middle = (min(map(min, grid)) + max(map(max, grid))) / 2
        for row, column in product(range(len(styles)), range(len(speeds))):
            value = grid[row][column]
            colour = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
        place = speeds.index(chosen.lora_weight) - 0.5, styles.index(chosen.style_weight) - 0.5
        axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="#D55E00", linewidth=3))
        axes.set_xticks(range(len(speeds)), [f"{weight:g}" for weight in speeds])
        axes.set_yticks(range(len(styles)), [f"{weight:g}" for weight in styles])
        axes.set_xlabel("weight of the acceleration")
        axes.set_ylabel("weight of the style")
        axes.set_title(METRICS[key].label, fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.75)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    atomic_write(file, buffer.getvalue())
    return file
