"""What the study of methods draws: the teacher's pictures once, and those of every state of a training.

All of it is the kit's drawing for evaluations: plain diffusers with the exported file of a state, rows kept
by what they follow from. Sample i of a set has the noise of (0, i) whoever draws it, so all are paired.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lcm_kit import assets, bases, sample
from lcm_kit.adapter import folder as adapter
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.draw import Pipes, Samples, draw_all, inputs
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.evaluation.kept import Rows, kept
from lcm_kit.evaluation.metrics.features import PROBE
from lcm_kit.evaluation.recommended import method_of, weights_hash
from lcm_kit.evaluation.results import QUALITY
from lcm_kit.evaluation.swept_adapters import SweptAdapter
from lcm_kit.export import trained
from lcm_kit.io import own_files
from lcm_kit.io.files import atomic_folder, sha256_bytes, sha256_file
from lcm_kit.lora import verify
from lcm_kit.lora.diffusers_format import FILE
from lcm_kit.lora.write import write
from lcm_kit.share import ALONE
from lcm_kit.tiny import world
from lcm_kit.training.run_files import step_of
from studies.methods_plan import TEACHER, Entry, Plan

BASE = "asset:tiny-sd"
MAIN, CURVE, SPREAD, GUIDED, NEGATIVE = "main", "curve", "diversity", "guidance", "negative"
SHOWN = 8  # prompts in the sheet
BATCH = 16
UNSAID = "grey"  # what the base draws where a prompt names no colour; the negative prompt names it


def uncoloured(prompt: str) -> str:
    """A prompt of the embedded world with its colour left out."""
    scene = world.parse(prompt)
    assert scene is not None
    return prompt.replace(f" {scene.colour} background", " background")


def export_state(run: Path, state: Path, folder: Path, against: verify.Against) -> Path:
    """The LoRA file of a state of `run` as users load it, `folder/pytorch_lora_weights.safetensors`, float16.

    What else a state trains beside the run's own adapter has a name and a slash in front, and is left out.
    """
    if not (folder / FILE).is_file():
        weights = {
            key: value for key, value in load_file(state / "lora.safetensors").items() if "/" not in key
        }
        with atomic_folder(folder) as temporary:
            own_files.write_tensors(temporary / "adapter" / adapter.WEIGHTS, weights)
            shutil.copy(run / "adapter" / adapter.FACTS, temporary / "adapter" / adapter.FACTS)
            facts = adapter.read_provenance(temporary / "adapter")
            lora = trained.read(temporary / "adapter", against.structure)
            about = replace(facts.of_file(run.parent.name, ""), step=step_of(state))
            write(temporary / FILE, lora, against.structure, "diffusers", "float16", about)
    return folder / FILE


@dataclass
class Studio:
    """The base's pipeline and the sets of samples."""

    plan: Plan
    output: Path
    subjects: dict[str, SweptAdapter] = field(default_factory=dict)

    @cached_property
    def prompts(self) -> list[str]:
        """All prompts of the study: the main set, then those of diversity, then the uncoloured ones."""
        found = list(assets.prompts(BASE))
        wanted = self.plan.prompts + self.plan.diversity.prompts + self.plan.negative
        assert wanted <= len(found), f"{wanted} prompts are asked for, and there are {len(found)}"
        return found

    def samples(self, of: str) -> Samples:
        """A set by its name."""
        plan, first = self.plan, self.plan.prompts
        counts = {MAIN: first, CURVE: plan.curve.prompts, GUIDED: plan.guidance_prompts}
        if of in counts:
            return Samples(
                tuple(self.prompts[: counts[of]]), 1, 0, world.SIZE, BATCH, SHOWN if of == MAIN else 0
            )
        chosen = tuple(self.prompts[first : first + plan.diversity.prompts])
        if of == SPREAD:
            return Samples(chosen, plan.diversity.images, 0, world.SIZE, BATCH, 0)
        first += plan.diversity.prompts
        colourless = tuple(map(uncoloured, self.prompts[first : first + plan.negative]))
        return Samples(colourless, 1, 0, world.SIZE, BATCH, 0)

    @cached_property
    def base(self) -> bases.BaseInfo:
        """The base of all."""
        return bases.inspect_base(BASE)

    @cached_property
    def against(self) -> verify.Against:
        """Its structure, for LoRA files."""
        return verify.base_of(BASE)

    @cached_property
    def pipes(self) -> Pipes:
        """Its pipeline, with a state's LoRA or none."""
        return Pipes(self.base, self.subjects, self.samples(MAIN))

    @cached_property
    def look(self) -> FeatureExtractor:
        """What reads pictures: of the metric table's columns, features and the probe's attributes."""
        return FeatureExtractor.of(QUALITY, self.prompts, world.SIZE, "cpu", features=PROBE)

    # -- The teacher -----------------------------------------------------------------------------------------

    def teacher(self, guidance: float | None = None) -> Cell:
        """Its cell, at the guidance that others are compared with or at another."""
        wanted = self.plan.teacher
        return Cell("teacher", None, "ddim", wanted.steps, wanted.guidance if guidance is None else guidance)

    def teacher_jobs(self) -> list[Callable[[], Any]]:
        """What of the teacher is drawn, each part on its own so that processes can share it."""
        at, scales = self.teacher(), self.plan.teacher
        others = [scale for scale in scales.guidances if scale != scales.guidance]
        return [
            lambda: self.rows(MAIN, at),
            lambda: self.rows(SPREAD, at),
            lambda: self.negative_rows(at),
            *(lambda scale=scale: self.rows(GUIDED, self.teacher(scale)) for scale in others),  # type: ignore[misc]
        ]

    # -- Any cell --------------------------------------------------------------------------------------------

    def folder(self, cell: Cell, of: str) -> Path:
        """Where the rows of a cell lie."""
        if cell.adapter is None:
            return self.output / TEACHER / of
        return self.output / cell.adapter.rpartition("-")[0] / "drawn" / of

    def rows(self, of: str, cell: Cell) -> Rows:
        """The rows of a set that `cell` draws, kept."""
        samples = self.samples(of)
        made_by = inputs(self.base, samples, self.look, "cpu")
        return draw_all(
            [cell], self.folder(cell, of), self.pipes.get, samples, self.look,
            lambda each: [made_by, self.pipes.weights_of(each)], ALONE,
        )[cell]  # fmt: skip

    def negative_rows(self, cell: Cell) -> Rows:
        """`plain` and `negative` [N]: whether the ground is UNSAID, without a negative prompt and with one
        that names it; `object` and `object_negative` [N]: whether the object is right.
        """
        samples = self.samples(NEGATIVE)
        made_by = [*inputs(self.base, samples, self.look, "cpu"), self.pipes.weights_of(cell), UNSAID]
        key = sha256_bytes(json.dumps([made_by, cell.settings()]).encode())[:12]

        def seen(first: int, batch: Sequence[str], negative: str | None) -> list[tuple[bool, bool]]:
            pictures = sample.sample(
                self.pipes.get(cell), batch, sampler=cell.sampler, steps=cell.steps, first=first,
                guidance_scale=cell.guidance_scale, size=world.SIZE, negative_prompt=negative,
            )  # fmt: skip
            assert self.look.probe is not None
            read = self.look.probe.read((pictures + 1).mul(127.5).round() / 127.5 - 1)
            nouns = [{word for word in text.replace(",", " ").split()} for text in batch]
            pairs = zip(read, nouns, strict=True)
            return [(each["colour"] == UNSAID, each["object"] in words) for each, words in pairs]

        def make() -> list[Rows]:
            tables = []
            for first in range(0, len(samples), BATCH):
                batch = samples.texts[first : first + BATCH]
                plain, other = (torch.tensor(seen(first, batch, neg)).float() for neg in (None, UNSAID))
                tables.append({
                    "plain": plain[:, 0], "negative": other[:, 0],
                    "object": plain[:, 1], "object_negative": other[:, 1],
                })  # fmt: skip
            return tables

        return kept(self.folder(cell, NEGATIVE) / f"{cell.id}-{key}.safetensors", make, ALONE)

    # -- States ----------------------------------------------------------------------------------------------

    def subject(self, folder: Path, run: Path, state: Path) -> str:
        """Make the state's file known to the pipeline; its name there: CELL-STEP."""
        name = f"{folder.name}-{step_of(state):06d}"
        if name not in self.subjects:
            file = export_state(run, state, run.parent / "points" / state.name, self.against)
            self.subjects[name] = SweptAdapter(
                name, file, sha256_file(file), weights_hash(file), 0, None, method_of(file)
            )
        return name

    def students(self, name: str, entry: Entry) -> list[Cell]:
        """The cells of a state: one for each number of steps.

        What the entry leaves open says the method that the file names: steps, sampler, and guidance, which is
        the teacher's where none is baked in.
        """
        method = self.subjects[name].method
        sampler, steps = entry.sampler or method.sampler, entry.steps or method.judged_steps
        guidance = entry.guidance or method.guidance_beside(self.plan.teacher.guidance)
        return [Cell("student", name, sampler, n, guidance) for n in steps]

    def draw_point(self, folder: Path, run: Path, state: Path, entry: Entry, end: bool) -> None:
        """Draw a state: the curve's prompts, or where the training ends all sets."""
        name = self.subject(folder, run, state)
        for cell in self.students(name, entry):
            if end:
                self.rows(MAIN, cell)
                self.rows(SPREAD, cell)
                if cell.guidance_scale > 1:
                    self.negative_rows(cell)
            elif cell.steps in self.plan.curve.steps:
                self.rows(CURVE, cell)
