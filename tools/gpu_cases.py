"""What the cases of `tools/gpu_check.py` do, each in a process of its own: doors of the kit, and a clock.

A case is a function of `Setting` and `tell`. What it tells is written at once, so that a case that is killed
at its limit leaves the figures that it had by then. Nothing here trains, encodes or draws: the kit's own
recipes do, as a user calls them. A step's time is that between the ends of two steps of the optimizer, by the
device's clock, read without waiting for the device.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
WARMUP = 6  # steps before those that are timed
EVERY = 5  # steps between two tellings
STRUCTURES = {"sd15": ("sd1", "distill/sd15_lcm"), "sdxl": ("sdxl", "distill/sdxl_lcm")}
PICTURES = {"sd15": 48, "sdxl": 24}  # that are encoded
SHARD = 8  # rows a file of the cache
# What a training case differs in from the config that is shipped: data of its own, and nothing drawn
PLAIN = (
    "accumulation=1", "base.variant=null", "data.flip=false", "data.kind=folder", f"data.shard_size={SHARD}",
    "validation.prompts=null", "validation.control=null", "logging.trackers=[]", "optimizer.warmup_steps=0",
)  # fmt: skip
# In a rehearsal everything is as narrow and short as the code paths allow
SMALL = ("data.resolution=64", "batch_size=2", "adapter.rank=4", "steps=4")
SMALL_TINY = ("steps=2", "optimizer.warmup_steps=0", "adapter.rank=4")
FEW = ("count=4", "teacher_steps=2", "resamples=100", "reference_count=16")
SMALL_PAIR = ("width=0.125", "resolution=64", "batch_size=2", "rank=4", "steps=2", "warmup=0")


Tell = Callable[..., None]
"""Figures by name, in the order in which they become known."""


@dataclass(frozen=True)
class Setting:
    """Which case it is, and where."""

    name: str
    base: str  # sd15, sdxl, or none of them
    keys: tuple[str, ...]  # overrides of the config
    work: Path  # bases, caches and runs; another one in a rehearsal
    rehearsed: bool

    @property
    def folder(self) -> Path:
        """Of the case alone; it is empty when the case begins."""
        return self.work / "cases" / self.name

    @property
    def place(self) -> Path:
        """Of a base of random weights, its pictures and its cache: cases share it."""
        return self.work / self.base

    def overrides(self, small: tuple[str, ...]) -> list[str]:
        """The case's own, and in a rehearsal `small`; a CPU trains in no float16."""
        keys = ["precision=auto" if key == "precision=float16" else key for key in self.keys]
        return [*keys, *small] if self.rehearsed else list(self.keys)


# -- Clock and memory ----------------------------------------------------------------------------------------


def on_cuda() -> bool:
    """Whether there is a GPU for this process."""
    import torch

    return torch.cuda.is_available()


class Steps:
    """Seconds between the ends of an optimizer's steps."""

    def __init__(self, tell: Tell, samples: int, warmup: int) -> None:
        """`samples`: of a step. The first steps, `warmup` of them, are not timed."""
        self.tell, self.samples, self.warmup = tell, samples, warmup
        self.started, self.marks, self.seconds = time.perf_counter(), [], []  # type: ignore[var-annotated]
        self.optimizer: Any = None

    def seen(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The hook of `torch.optim`: the end of a step."""
        import torch

        if optimizer is not self.optimizer:  # the kit tries 8-bit ones out first
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


# -- A base of random weights --------------------------------------------------------------------------------


def make_base(setting: Setting) -> Path:
    """A diffusers folder of the published structure, random, in half precision; made once.

    In a rehearsal an eighth of its width, in float32. Its tokenizer knows letters only.
    """
    import torch
    from diffusers import DDIMScheduler
    from transformers import CLIPTextConfig

    from lcm_kit.bench.models import settings
    from lcm_kit.config.evaluation import Speed
    from lcm_kit.families import PARTS, generation_of
    from tests.bases import _SCHEDULER, _tokenizer

    structure, folder = STRUCTURES[setting.base][0], setting.place / "base"
    if (folder / "model_index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    width = 0.125 if setting.rehearsed else 1.0
    unet, vae, texts = settings(Speed(recipe="evaluation/speed", structure=structure, width=width))  # type: ignore[arg-type]
    family = generation_of(structure).family
    tokenizer, ends = _tokenizer(folder)
    tokenizer.model_max_length = 77
    parts: dict[str, Any] = {"scheduler": DDIMScheduler(**_SCHEDULER), **family.pipeline_off}
    device, dtype = ("cuda", torch.float16) if on_cuda() else ("cpu", torch.float32)
    made = {"unet": unet, "vae": vae, "text_encoder": texts[0], "text_encoder_2": texts[-1]}
    torch.manual_seed(0)
    own = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # in full SDXL would not fit on a small card
    try:
        with torch.device(device):  # a GPU draws the weights in no time
            for name in family.parts:
                if name.startswith("tokenizer"):
                    parts[name] = tokenizer
                elif name.startswith("text_encoder"):
                    size = {"projection_dim": made[name]["hidden_size"]}
                    parts[name] = PARTS[name].kind()(CLIPTextConfig(**{**made[name], **ends, **size}))
                elif name in made:
                    parts[name] = PARTS[name].kind().from_config(made[name])
    finally:
        torch.set_default_dtype(own)
    family.pipeline_class()(**parts).save_pretrained(folder)
    del parts
    gc.collect()
    if on_cuda():  # what is measured later is not this
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return folder


def pictures(setting: Setting, side: int, count: int) -> Path:
    """A folder of `count` coarse pictures of noise with captions; made once."""
    import torch
    from PIL import Image

    folder = setting.place / "images"
    if folder.is_dir():
        return folder
    folder.mkdir(parents=True)
    noise = torch.randint(
        0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for k, (a, b) in zip(range(count), itertools.product("abcdefgh", repeat=2), strict=False):
        picture = Image.fromarray(noise[k].numpy()).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{k:03d}.jpg", quality=95)
        (folder / f"{k:03d}.txt").write_text(f"noise {a} {b}")
    return folder


def given(setting: Setting) -> list[str]:
    """Overrides that name the shared base, pictures and cache, then the case's own."""
    place = setting.place
    paths = (f"base.path={place}/base", f"data.path={place}/images", f"data.cache={place}/cache")
    return [*PLAIN, *paths, f"output={setting.folder}/run", *setting.overrides(SMALL)]


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

    config = STRUCTURES[setting.base][1]
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
        loaded = load(shipped.config_path(STRUCTURES[base][1]), words)
        assert isinstance(loaded, Training)
        if base not in planners:
            found = base_profile.find(loaded.base, None if setting.rehearsed else STRUCTURES[base][0])
            planners[base] = Planner(MetaModel(found, loaded.adapter), "cuda")
        tell(**{f"{name}_gib": planners[base](loaded).peak / GIB})
