"""What the cases of `tools/gpu_check.py` do, each in a process of its own: doors of the kit, and a clock.

A case is a function of `Setting` and `tell`. What it tells is written at once, so that a case that is killed
at its limit leaves the figures that it had by then. Nothing here trains, encodes or draws: the kit's own
recipes do, as a user calls them. A step's time is that between the ends of two steps of the optimizer, by the
device's clock, read without waiting for the device.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.gpu_bases import (
    PICTURES,
    SHARD,
    STRUCTURES,
    Setting,
    config_of,
    given,
    make_base,
    on_cuda,
    pictures,
)

GIB = 2**30
WARMUP = 6  # steps before those that are timed
EVERY = 5  # steps between two tellings
# In a rehearsal
SMALL_TINY = ("steps=2", "optimizer.warmup_steps=0", "adapter.rank=4")
FEW = ("count=4", "teacher_steps=2", "resamples=100", "reference_count=16")
SMALL_PAIR = ("width=0.125", "resolution=64", "batch_size=2", "rank=4", "steps=2", "warmup=0")


Tell = Callable[..., None]
"""Figures by name, in the order in which they become known."""


# -- Clock and memory ----------------------------------------------------------------------------------------


class Steps:
    """Seconds between the ends of an optimizer's steps."""

    def __init__(self, tell: Tell, samples: int, warmup: int) -> None:
        """`samples`: of a step. The first steps, `warmup` of them, are not timed."""
        self.tell, self.samples, self.warmup = tell, samples, warmup
        self.started = time.perf_counter()
        self.optimizer: Any = None
        self.others: list[Any] = []  # that were seen before it: of a fake score, or tried out by the kit
        self.marks: list[Any] = []  # the last end that was turned into seconds, and those after it
        self.seconds: list[float] = []

    def seen(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The hook of `torch.optim`: the end of a step."""
        import torch

        if any(optimizer is other for other in self.others):
            return
        if optimizer is not self.optimizer:  # a step ends with the one that begins last
            self.others.append(self.optimizer)
            self.optimizer, self.marks, self.seconds = optimizer, [], []
        if on_cuda():
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            if not self.marks:
                mark.synchronize()
        else:
            mark = time.perf_counter()
        if not self.marks and not self.seconds:
            self.tell(first_step_after_s=time.perf_counter() - self.started)
        self.marks.append(mark)
        self._read(wait=False)
        if len(self.seconds) > self.warmup and len(self.seconds) % EVERY == 0:
            self._tell()

    def _read(self, wait: bool) -> None:
        """Turn what the device has passed into seconds."""
        while len(self.marks) > 1 and (wait or isinstance(self.marks[1], float) or self.marks[1].query()):
            first, second = self.marks[:2]
            if isinstance(first, float):
                self.seconds.append(second - first)
            else:
                second.synchronize()
                self.seconds.append(first.elapsed_time(second) / 1000)
            del self.marks[0]

    def _tell(self) -> None:
        median = statistics.median(self.seconds[self.warmup :])
        self.tell(samples_per_second=self.samples / median, step_ms=1000 * median, **memory())

    def finish(self) -> None:
        """Tell of all steps. Raises `RuntimeError` if there were too few to time one."""
        self._read(wait=True)
        if len(self.seconds) <= self.warmup:
            raise RuntimeError(f"{len(self.seconds) + 1} steps of an optimizer were seen, too few to time")
        self._tell()
        self.tell(timed_steps=len(self.seconds) - self.warmup)


@contextmanager
def timed(tell: Tell, samples: int, warmup: int) -> Iterator[None]:
    """Time the optimizer's steps within the block."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = Steps(tell, samples, warmup)
    handle = register_optimizer_step_post_hook(steps.seen)
    try:
        yield
    finally:
        handle.remove()
    steps.finish()


def memory() -> dict[str, float]:
    """GiB at the highest until now: allocated and reserved, on a CPU of the whole process."""
    import torch

    from lcm_kit.bench.measure import resident

    if on_cuda():
        most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_gib": most[0] / GIB, "reserved_gib": most[1] / GIB}
    held = resident("VmHWM")
    return {} if held is None else {"process_gib": held / GIB}


# -- Cases ---------------------------------------------------------------------------------------------------


def encode(setting: Setting, tell: Tell) -> None:
    """Pictures a second through `lcm-kit encode`: between the writing of its first shard and its last."""
    import lcm_kit

    started, config = time.perf_counter(), STRUCTURES[setting.base][1]
    make_base(setting)
    loaded = lcm_kit.load_config(config, given(setting))
    pictures(setting, loaded.data.resolution, PICTURES[setting.base])
    tell(base_made_s=time.perf_counter() - started)
    lcm_kit.encode(config, given(setting))
    files = sorted((setting.place / "cache").glob("shard-*.safetensors"))
    written = [file.stat().st_mtime_ns / 1e9 for file in files]
    rows = PICTURES[setting.base] - SHARD
    tell(pictures_per_second=rows / (max(written) - min(written)), **memory())


def train(setting: Setting, tell: Tell) -> None:
    """Samples a second of `lcm-kit train` on the cache that `encode` made; its memory at the highest."""
    import lcm_kit

    config = setting.config
    words = given(setting)
    loaded = lcm_kit.load_config(config, words)
    words.append(f"checkpoint.every={loaded.steps}")
    tell(batch=loaded.batch_size, precision=_precision(loaded.precision), planned=words)
    with timed(tell, loaded.batch_size * loaded.accumulation, 1 if setting.rehearsed else WARMUP):
        lcm_kit.train(config, words)
    tell(**memory())


def _precision(named: str) -> str:
    return named if named != "auto" else "float16" if on_cuda() else "float32"


def sample(setting: Setting, tell: Tell) -> None:
    """Milliseconds of a picture in four steps with an adapter of random weights: one at a time, then four."""
    from lcm_kit.lora import write
    from lcm_kit.lora.provenance import Provenance
    from lcm_kit.lora.structure import of_base
    from lcm_kit.sample import draw_images
    from tests.loras import random_lora

    base, file = str(make_base(setting)), setting.folder / "lora.safetensors"
    rank, side = (4, 64) if setting.rehearsed else (64, None)
    place = of_base(base)
    lora = random_lora(place, ranks=(rank,), alphas=(float(rank),), size=0.01)
    setting.folder.mkdir(parents=True, exist_ok=True)
    write.write(file, lora, place, "diffusers", "float16", Provenance("random"))
    size = None if side is None else (side, side)
    for batch in (1, 4):
        rounds = 3 if setting.rehearsed else 12 // batch + 2
        drawn = draw_images(
            base, ["noise a"] * batch * rounds, adapter=file, steps=4, sampler="lcm", size=size,
            batch_size=batch,
        )  # fmt: skip
        ends = [time.perf_counter() for k, _ in enumerate(drawn) if k % batch == 0]
        spent = [later - earlier for earlier, later in itertools.pairwise(ends)][1 if rounds > 3 else 0 :]
        tell(**{f"ms_of_{batch}": 1000 * statistics.median(spent)}, **memory())


def tiny(setting: Setting, tell: Tell) -> None:
    """A short distillation of asset:tiny-sd, and the share of pictures all right at four steps."""
    import lcm_kit
    from lcm_kit.evaluation import results

    config, run = "distill/tiny_quick", setting.folder / "run"
    words = [f"output={run}", f"data.cache={setting.folder}/cache", "logging.trackers=[]"]
    words += ["validation.prompts=null", *setting.overrides(SMALL_TINY)]
    lcm_kit.encode(config, words)
    loaded = lcm_kit.load_config(config, words)
    tell(batch=loaded.batch_size, precision=_precision(loaded.precision))
    with timed(tell, loaded.batch_size * loaded.accumulation, 0 if setting.rehearsed else WARMUP):
        lcm_kit.train(config, words)
    lcm_kit.export_run(run)
    few = FEW if setting.rehearsed else ("reference_count=128",)
    judged = ["unet_calls=[]", "student_steps=[4]", f"run={run}", "pictures=1", *few]
    found = results.read(lcm_kit.evaluate("evaluation/quality", judged))
    (student,) = results.cells_of(found["cells"], "student")
    tell(
        right_at_4=results.value(student, "prompt_adherence"),
        right_of_teacher=results.value(results.reference(found), "prompt_adherence"),
        judged=results.count(found),
    )


def pair(setting: Setting, tell: Tell) -> None:
    """`lcm-kit bench`: a step of ours and one as public peft scripts make it, in turns in one process."""
    import lcm_kit

    words = [f"output={setting.folder}", *setting.overrides(SMALL_PAIR)]
    found = json.loads(Path(lcm_kit.evaluate("evaluation/speed_sd15", words)).read_text(encoding="utf-8"))
    tell(batch=found["config"]["batch_size"], precision=found["dtype"])
    for side in ("ours", "baseline"):
        tell(**{f"{side}_samples_per_second": found[side]["samples_per_second"]})
        if found[side]["peak_bytes"] is not None:
            tell(**{f"{side}_peak_gib": found[side]["peak_bytes"] / GIB})
    tell(ratio=found["ratio"]["samples_per_second"], memory_ratio=found["ratio"]["peak_bytes"])


def plan(setting: Setting, tell: Tell) -> None:
    """What `lcm-kit plan` says of each training case in `keys`, each a JSON list of name, base and overrides.

    It needs no GPU, and says what a GPU would need wherever it is.
    """
    from lcm_kit.config import shipped
    from lcm_kit.config.load import load
    from lcm_kit.config.schema import Training
    from lcm_kit.plan import base_profile
    from lcm_kit.plan.dry_run import MetaModel
    from lcm_kit.plan.estimate import Planner

    planners: dict[str, Any] = {}
    for line in setting.keys:
        name, base, *words = json.loads(line)
        loaded = load(shipped.config_path(config_of(name, base)), words)
        assert isinstance(loaded, Training)
        if base not in planners:
            found = base_profile.find(loaded.base, None if setting.rehearsed else STRUCTURES[base][0])
            planners[base] = Planner(MetaModel(found, loaded.adapter), "cuda")
        tell(**{f"{name}_gib": planners[base](loaded).peak / GIB})
