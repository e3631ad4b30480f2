"""What holds the base and its LoRAs on the device and draws batches with them; one thread uses it.

All LoRAs are loaded once and stay. Which are on, and how strongly, is changed by putting the base's own
weights back and fusing others in (`drawing.fused`): no file is read, and several may be on together, which
peft's hot swap (one slot, equal ranks, a file each time) does not offer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL.Image import Image

from lcm_kit import console, sample
from lcm_kit.bases.emphasis import Prompt
from lcm_kit.bases.out_of_memory import free, out_of_memory
from lcm_kit.drawing import vae
from lcm_kit.drawing.batches import AUTO, AfterStep, Batches, at_once
from lcm_kit.drawing.fused import Fused, fuse
from lcm_kit.drawing.how import PLAIN, How
from lcm_kit.drawing.pictures import to_pil
from lcm_kit.drawing.placed import place
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.asked import EditKey, Key, Weights


class Piece(NamedTuple):
    """One picture to draw."""

    prompt: Prompt
    seed: int
    number: int  # within its request


@dataclass
class Drawer:
    """`batch`: pictures at once at most. `device` and `dtype`: None as `sample.placement` chooses."""

    served: Served
    batch: int
    device: str | None = None
    dtype: torch.dtype | None = None
    how: How = PLAIN
    fell_back: str | None = field(default=None, init=False)  # why it is on the CPU where a GPU was to be
    _pipe: Any = field(default=None, init=False)
    _vae: Any = field(default=None, init=False)  # for edits; the pipeline's own where that reads pictures
    _on: Weights = field(default=(), init=False)
    _fused: Fused = field(default_factory=Fused, init=False)
    _batches: dict[tuple[int, int, bool], Batches] = field(default_factory=dict, init=False)

    def open(self) -> None:
        """Load everything and draw once. On the CPU if the GPU, which nobody asked for, has no room."""
        where = sample.placement(self.device, self.dtype)
        try:
            self._load(where)
        except RuntimeError as error:
            if self.device is not None or where["device"] == "cpu" or not out_of_memory(error):
                raise
            self.fell_back = str(error).partition(". ")[0]
        if self.fell_back is not None:  # out of the handler: the exception holds what was loaded
            self._pipe, self._vae, self._on, self._fused = None, None, (), Fused()
            free()
            self._load(sample.placement("cpu", self.dtype))

    def _load(self, where: dict[str, Any]) -> None:
        base = self.served.base
        self._pipe = sample.pipeline(
            base.path, revision=base.revision, variant=base.variant, how=self.how, **where
        )
        self._vae = vae.own(self._pipe.vae)
        for adapter in self.served.adapters:
            sample.load_adapter(self._pipe, adapter.file, name=self._slot(adapter.name))
        if self.served.adapters:
            self._pipe.disable_lora()
        self._warm_up()

    def _warm_up(self) -> None:
        """A picture by the settings of those that say none."""
        first = self.served.adapters[0] if self.served.adapters else None
        use, side = self.served.settings(first), self.served.base.resolution
        on = () if first is None or not first.weight else ((first.name, first.weight),)
        key = Key(side, side, use.sampler, use.steps, use.guidance_scale, None, on)
        self.draw(key, [Piece("", 0, 0)], lambda *_: None)

    @property
    def place(self) -> str:
        """The device, and what it computes in."""
        device, dtype = place(self._pipe)
        return f"{device} in {str(dtype).removeprefix('torch.')}"

    def most(self, key: Key | EditKey) -> int:
        """Pictures of this size that are drawn at once, by the limit and by what memory has shown."""
        return self._batches_of(key).size

    def draw(self, key: Key | EditKey, pieces: Sequence[Piece], after_step: AfterStep) -> list[Image]:
        """The pictures of `pieces`, in their order, by fewer at once where memory runs out.

        What `after_step`, by places in `pieces`, raises ends the drawing. Raises `UserError` where not one
        picture fits.
        """
        self._use(key.weights)
        with console.silent():
            if isinstance(key, EditKey):
                return self._edited(key, pieces, after_step)
            return self._drawn(key, pieces, after_step)

    def _drawn(self, key: Key, pieces: Sequence[Piece], after_step: AfterStep) -> list[Image]:
        drawn: list[Image] = []

        def work(first: int, some: Sequence[Piece]) -> torch.Tensor:
            def stepped(rows: Sequence[int], step: int, steps: int) -> None:
                after_step([first + row for row in rows], step, steps)

            return sample.sample(
                self._pipe, [each.prompt for each in some], sampler=key.sampler, steps=key.steps,
                guidance_scale=key.guidance_scale, seed=[each.seed for each in some],
                first=[each.number for each in some], size=(key.height, key.width),
                negative_prompt=key.negative, after_step=stepped,
            )  # fmt: skip

        for pixels in self._batches_of(key).run(pieces, work):
            drawn += to_pil(pixels)
        return drawn

    def _edited(self, key: EditKey, pieces: Sequence[Piece], after_step: AfterStep) -> list[Image]:
        """By the base's own VAE, which reads pictures, whatever decodes others."""
        decodes, self._pipe.vae = self._pipe.vae, self._vae
        try:
            return list(
                key.plan.draw(
                    self._pipe, key.prompts, guidance_scale=key.guidance_scale, negative=key.negative,
                    seed=pieces[0].seed, batches=self._batches_of(key),
                    numbers=[each.number for each in pieces], after_step=after_step,
                )
            )  # fmt: skip
        finally:
            self._pipe.vae = decodes

    def _batches_of(self, key: Key | EditKey) -> Batches:
        kind = (key.height, key.width, isinstance(key, EditKey))  # an edit takes more memory
        if kind not in self._batches:
            device, size = str(self._pipe.device), (key.height, key.width)
            most = min(self.batch, at_once(AUTO, *size, device))
            if len(self._batches) >= 64:  # of sizes that clients think of: no more than a bounded number
                self._batches.pop(next(iter(self._batches)))
            self._batches[kind] = Batches.of_pictures(most, *size, device)
        return self._batches[kind]

    def _use(self, weights: Weights) -> None:
        """Put the LoRAs into the weights, at these strengths; () draws with the base alone."""
        if weights == self._on:
            return
        self._fused.undo()
        self._on = ()
        if not weights:
            self._pipe.disable_lora()
            return
        self._pipe.enable_lora()
        names, strengths = [self._slot(name) for name, _ in weights], [weight for _, weight in weights]
        self._pipe.set_adapters(names, strengths)
        self._fused = fuse(self._pipe, keep_on=self._pipe.device)
        self._on = weights

    def _slot(self, name: str) -> str:
        """peft's name for a LoRA: no part of a layer's name, which peft would take it for."""
        number = [each.name for each in self.served.adapters].index(name)
        return f"served_{number:03d}"
