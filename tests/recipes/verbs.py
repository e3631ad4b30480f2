"""Every verb that writes, on a small world of its own: what is run, and what must have run before.

For those who kill it (`tools/kill_runs.py`) and those whose disk refuses (`tests/recipes/test_faults.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lcm_kit.config.load import dump
from lcm_kit.config.schema import Training
from tests.recipes.small import configure, prepare

STORY = [
    f"{stage}.{key}"
    for stage, keys in {
        "style": ["validation.control=null"],
        "distill": ["data.samples.count=4", "data.samples.steps=1"],
    }.items()
    for key in [
        "steps=2", "batch_size=2", "adapter.rank=4", "optimizer.warmup_steps=0", "checkpoint.every=1",
        "logging.trackers=[]", "validation.every=0", "validation.prompts=null", "data.regularization=null",
        "data.regularization_share=null", *keys,
    ]
] + [
    "brand.control=null", "brand.count=3", "brand.teacher_steps=2", "brand.steps=[1]",
    "brand.resamples=100", "brand.pictures=1",
]  # fmt: skip


class Verb(NamedTuple):
    """What is run, what must have run before, and what of the folder it makes."""

    words: Sequence[str]
    after: Sequence[str] = ()
    ranks: int = 1
    dated: bool = False  # files that it reads again have the date in them: of tensors and pictures then
    done: str = ""  # what it says where it was done already, and exit code 2 is right


def verbs(place: Path, base: Path) -> dict[str, Verb]:
    """All verbs, on the configs that `build` writes into `place`."""
    run, style, prompts = place / "run", place / "style", f"prompts={place}/prompts.txt"
    few = ["batch_size=6", prompts, "images_per_prompt=2", "count=3", "resamples=100", "pictures=1"]
    trained = ["encode", "train", "export"]
    both = [*trained, "style", "export_style"]
    return {
        "encode": Verb(["encode", f"{place}/distill.yaml"]),
        "again": Verb(["encode", f"{place}/distill.yaml", "data.shard_size=8"], ["encode"]),
        "train": Verb(["train", f"{place}/distill.yaml"], ["encode"]),
        "longer": Verb(["train", f"{place}/distill.yaml", "steps=4"], ["encode", "train"]),
        "ranks": Verb(["train", f"{place}/distill.yaml"], ["encode"], ranks=2),
        "style": Verb(["train", f"{place}/style.yaml"], ["encode"]),
        "export": Verb(["export", f"{run}"], ["encode", "train"]),
        "once_more": Verb(["export", f"{run}", "--dtype", "float32"], trained),
        "export_style": Verb(["export", f"{style}"], ["encode", "style"]),
        "quality": Verb(
            ["evaluate", "evaluation/quality", f"run={run}", prompts, "count=2", "batch_size=2",
             "teacher_steps=2", "student_steps=[1]", "unet_calls=[2]", "pictures=1"],
            trained,
        ),
        "brand": Verb(
            ["evaluate", "evaluation/brand", f"run={run}", f"style={style}", f"brand={place}/images",
             "control=null", *few, "teacher_steps=2", "steps=[1]"],
            both,
        ),
        "sweep": Verb(
            ["evaluate", "evaluation/guidance_sweep", f"adapters=[{run}]", f"brand={place}/images",
             f"control={place}/images", *few, "teacher.steps=2", "teacher.guidance_scales=[1,5]",
             "student=[{samplers: [lcm], steps: [1, 2], guidance_scales: [1.0]}]",
             "plain={samplers: [ddim], unet_calls: [2], guidance_scales: [1.0]}"],
            trained,
        ),
        "compose": Verb(
            ["evaluate", "evaluation/compose", f"style={style}", f"speed={run}", f"output={place}/composed",
             *few, "teacher_steps=2", "steps=1", "style_weights=[1.0]", "speed_weights=[0.5,1.0]"],
            both,
        ),
        "report": Verb(["report", f"{run}"], [*trained, "quality"]),
        "merge": Verb(
            ["merge", f"{run}", f"{style}:0.5", "--output", f"{place}/merged", "--base", f"{base}"], both
        ),
        "fuse": Verb(
            ["merge", f"{run}:0.8", "--output", f"{place}/fused", "--fuse-into", f"{base}"], trained,
            done="exists already; choose another output",
        ),
        "convert": Verb(
            ["convert", f"{run}/export/run.safetensors", "--output", f"{place}/out", "--format", "both",
             "--base", f"{base}"],
            trained,
        ),
        "sample": Verb(
            ["sample", "--prompt", "a cat", "--prompt", "a dog", "--adapter", f"{run}", "--steps", "2",
             "--output", f"{place}/drawn"],
            trained,
        ),
        "samples": Verb(["encode", f"{place}/samples.yaml"]),
        "prior": Verb(["encode", f"{place}/prior.yaml"]),
        "story": Verb(
            ["finetune", f"{place}/images", "--base", f"{base}", "--output", f"{place}/story", *STORY],
            dated=True,
        ),
    }  # fmt: skip


def build(place: Path, base: Path) -> None:
    """Pictures, prompts and configs: a distillation and a style, with all that is kept switched on."""
    keys = prepare(place, base)
    shutil.rmtree(place / "cache")
    (place / "prompts.txt").write_text("a cat\na dog\na bird\n")
    prompts = f"{place}/prompts.txt"
    kept: dict[str, Any] = {
        "validation": {"prompts": prompts, "count": 2, "every": 2, "held_out": 0.25},
        "checkpoint": {"every": 1, "keep": 2}, "data": {"shard_size": 2}, "steps": 3,
    }  # fmt: skip
    _write(configure(keys, place / "run", ema=0.5, **kept), place / "distill.yaml")
    plain = {key: keys[key] for key in keys.keys() - {"guidance"}} | {"recipe": "train/finetune"}
    _write(configure(plain, place / "style", **kept), place / "style.yaml")
    drawn = {"prompts": prompts, "count": 9, "steps": 2}
    samples = {"source": "teacher", "samples": drawn, "shard_size": 2}
    _write(configure(keys, place / "sampled", data=samples), place / "samples.yaml")
    prior = {**plain, "prior": drawn, "data": {**plain["data"], "shard_size": 2}}
    _write(configure(prior, place / "with_prior"), place / "prior.yaml")


def _write(config: Training, file: Path) -> None:
    file.write_text(dump(config))
