"""Drawing the cells of any evaluation: plain diffusers with the files that users load."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lcm_kit import __version__, assets, sample
from lcm_kit.bases import BaseInfo, emphasis
from lcm_kit.config.brand import Brand
from lcm_kit.config.evaluation import Quality
from lcm_kit.config.resolution import Resolution, height_width, plain
from lcm_kit.config.sweep import Compose, GuidanceSweep
from lcm_kit.console import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn, Words, say
from lcm_kit.drawing.batches import Batches, at_once
from lcm_kit.drawing.fused import Fused, fuse
from lcm_kit.drawing.how import PLAIN, How
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.evaluation.kept import Rows, kept
from lcm_kit.evaluation.metrics.energy import Energy
from lcm_kit.evaluation.swept_adapters import SweptAdapter
from lcm_kit.io.files import sha256_bytes
from lcm_kit.share import Share

C = TypeVar("C", bound=Cell)
_LIBRARIES = ("torch", "diffusers", "peft", "transformers")


@dataclass(frozen=True)
class Samples:
    """What every cell draws: sample i has prompt i // images_per_prompt and the noise of (seed, i)."""

    prompts: tuple[str, ...]
    images_per_prompt: int
    seed: int
    resolution: Resolution
    batch_size: int | Literal["auto"]
    pictures: int  # prompts of which the first picture is shown
    keep_all: bool = False  # keep every picture, to compare pixels; else only those that are shown
    how: How = PLAIN

    @classmethod
    def of(cls, config: GuidanceSweep | Compose, base: BaseInfo) -> Samples:
        """What `config` asks for. Raises `UserError` as `resolution_of` and `How.of`."""
        prompts = tuple(islice(assets.prompts(config.prompts), config.count))
        resolution = resolution_of(config, base)
        return cls(
            prompts, config.images_per_prompt, config.seed, resolution, config.batch_size, config.pictures,
            how=how_of(config, base),
        )  # fmt: skip

    def __len__(self) -> int:
        """Samples a cell."""
        return len(self.prompts) * self.images_per_prompt

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        return height_width(self.resolution)

    @property
    def texts(self) -> list[str]:
        """The prompt of every sample."""
        return [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]

    @property
    def shown(self) -> list[int]:
        """The samples whose pictures are shown."""
        return [p * self.images_per_prompt for p in range(min(self.pictures, len(self.prompts)))]

    @property
    def kept(self) -> list[int]:
        """The samples whose pictures are kept in a cell's rows, in the order in which they lie there."""
        return list(range(len(self))) if self.keep_all else self.shown

    def pictures_of(self, rows: Rows) -> Tensor:
        """Of a cell's rows: the pictures that are shown, [shown, 3, H, W], pixels in [-1, 1]."""
        place = {sample: k for k, sample in enumerate(self.kept)}
        return _of(rows["pictures"], [place[sample] for sample in self.shown]) / 127.5 - 1


def resolution_of(
    config: Quality | Brand | GuidanceSweep | Compose, base: BaseInfo, trained: int | None = None
) -> Resolution:
    """The size of what `config` draws: what it asks for, else what was `trained` at, else the base's own.

    Raises `UserError` for one that the base's VAE has no latents of.
    """
    found = config.resolution or trained or base.resolution
    base.require_resolution(found, "resolution")
    return found


def how_of(config: Quality | Brand | GuidanceSweep | Compose, base: BaseInfo) -> How:
    """How `config` has its pictures drawn. Raises `UserError` as `How.of`."""
    return How.of(base, config.decoder, config.tiling, config.compile)


def versions() -> dict[str, str]:
    """Of what draws and measures, by name."""
    return {"lcm_kit": __version__, **{name: version(name) for name in _LIBRARIES}}


def repeated(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` prompts from the top, again from there where there are fewer."""
    return tuple(islice(cycle(prompts), count))


def inputs(base: BaseInfo, samples: Samples, look: FeatureExtractor, device: str) -> list[Any]:
    """What the rows of all cells follow from besides the adapters, as JSON."""
    size, n = plain(samples.resolution), samples.images_per_prompt
    asked = [samples.prompts, n, samples.seed, size, samples.batch_size]
    return [base.base_hash, *asked, samples.kept, look.reads(), versions(), device, samples.how.facts()]


def opened(base: BaseInfo, samples: Samples) -> Any:
    """The base's pipeline, which draws as `samples` says."""
    pipe = sample.pipeline(
        base.path, revision=base.revision, variant=base.variant, how=samples.how, **sample.placement()
    )
    samples.how.say(pipe.vae, *samples.size)
    for note in emphasis.notes(samples.prompts):
        say(note, err=True)
    return pipe


@dataclass
class Pipes:
    """The base's pipeline, opened when something is to be drawn, with one adapter or none in its weights."""

    base: BaseInfo
    subjects: dict[str, SweptAdapter]
    samples: Samples  # those that are drawn
    _pipe: Any = field(default=None, init=False)
    _on: tuple[str | None, float] | None = field(default=None, init=False)
    _fused: Fused = field(default_factory=Fused, init=False)

    def get(self, cell: Cell) -> Any:
        """A pipeline for `cell`."""
        if self._pipe is None:
            self._pipe = opened(self.base, self.samples)
        wanted = (cell.adapter, cell.lora_weight) if cell.adapter else (None, 1.0)
        if self._on != wanted:
            self._fused.undo()
            if self._on and self._on[0]:
                self._pipe.unload_lora_weights()
            if cell.adapter:
                sample.load_adapter(self._pipe, self.subjects[cell.adapter].file, cell.lora_weight)
                self._fused = fuse(self._pipe)
            self._on = wanted
            warm_up(self._pipe, self.samples)
        return self._pipe

    def weights_of(self, cell: Cell) -> str | None:
        """Hash of the adapter that draws `cell`; None: the base alone."""
        return self.subjects[cell.adapter].weights if cell.adapter else None


def warm_up(pipe: Any, samples: Samples) -> None:
    """Draw once with a new pipeline, so that the clock sees warm code only."""

    def draw_one(first: int, prompts: Sequence[str]) -> Tensor:
        told = [emphasis.read(prompt) for prompt in prompts]
        return sample.sample(pipe, told, sampler="ddim", steps=1, size=samples.size)

    batches = Batches.of_pictures(1, *samples.size, str(pipe.device))
    list(batches.run(samples.prompts[:1], draw_one))


def draw_all(
    cells: Sequence[C],
    folder: Path,
    pipe: Callable[[C], Any],
    samples: Samples,
    look: FeatureExtractor,
    made_from: Callable[[C], Any],
    share: Share,
) -> dict[C, Rows]:
    """Every cell's rows: those in `folder` if `made_from(cell)` and the settings are the same, else drawn.

    `pipe` gives the pipeline for a cell, `made_from` what its samples follow from besides the settings, as
    JSON. Shows progress and the time left on the first process.
    """
    drawn: dict[C, Rows] = {}
    share.require_shared(folder.parent)
    if samples.how.decoder is not None:  # apart, so that a preview takes none of the VAE's cells away
        folder = folder / f"decoder-{samples.how.decoder.sha256[:12]}"
    batches = Batches.of_pictures(samples.batch_size, *samples.size, sample.placement()["device"])
    total = 0  # UNet calls
    columns = (Words("{task.description:<44}"), BarColumn(), TimeElapsedColumn(), Words("left"))
    with Progress(*columns, TimeRemainingColumn(), disable=not share.first) as bar:
        task = bar.add_task("", total=sum(cell.unet_calls for cell in cells) * len(samples))
        for number, cell in enumerate(cells, start=1):
            bar.update(task, description=f"{number}/{len(cells)} {cell.id}", completed=total)
            key = sha256_bytes(json.dumps([made_from(cell), cell.settings()]).encode())[:12]

            def make(cell: C = cell) -> list[Rows]:
                return draw(pipe(cell), cell, samples, look, share, batches, partial(bar.advance, task))

            drawn[cell] = kept(folder / f"{cell.id}-{key}.safetensors", make, share)
            total += cell.unet_calls * len(samples)
        bar.update(task, completed=total)
    return drawn


def draw(
    pipe: Any,
    cell: Cell,
    samples: Samples,
    look: FeatureExtractor,
    share: Share,
    batches: Batches,
    advance: Callable[[int], None],
) -> list[Rows]:
    """This process's batches: all of `look`, `latents` [B, C, h, w], `seconds` and `joules` [B] (of text
    encoder, UNet and VAE, an even share of the batch's; NaN joules where the device does not say), and
    `pictures` [kept, 3, H, W], 8 bits, of those of `samples.kept` that lie in the batch.

    Which process draws what is settled by the size that was planned; where memory runs out, `batches` draws
    a batch in several.
    """
    texts, kept_pictures, tables = samples.texts, set(samples.kept), []
    planned = at_once(samples.batch_size, *samples.size, str(pipe.device))

    def rows(first: int, prompts: Sequence[str]) -> Rows:
        told = [emphasis.read(prompt) for prompt in prompts]
        started = time.perf_counter()
        with Energy(str(pipe.device)) as energy:
            latents = sample.latents(
                pipe, told, sampler=cell.sampler, steps=cell.steps, guidance_scale=cell.guidance_scale,
                seed=samples.seed, first=first, size=samples.size,
            )  # fmt: skip
            pixels = sample.decode(pipe, latents, seed=samples.seed, first=first)
        seconds, n = time.perf_counter() - started, len(prompts)
        eight_bit = ((pixels + 1) * 127.5).round().to(torch.uint8)
        joules = float("nan") if energy.joules is None else energy.joules
        return {
            **look(eight_bit / 127.5 - 1, [emphasis.words(prompt) for prompt in told]),
            "latents": latents,
            "seconds": torch.full((n,), seconds / n),
            "joules": torch.full((n,), joules / n),
            "pictures": _of(eight_bit, [i - first for i in range(first, first + n) if i in kept_pictures]),
        }

    for first in share.of(range(0, len(samples), planned)):
        found = []
        for part in batches.run(texts[first : first + planned], rows, first):
            found.append(part)
            advance(cell.unet_calls * len(part["latents"]))
        tables.append({name: torch.cat([part[name] for part in found]) for name in found[0]})
    return tables


def _of(pictures: Tensor, rows: list[int]) -> Tensor:
    return pictures[torch.tensor(rows, dtype=torch.long)]
