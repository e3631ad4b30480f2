"""Where a case of `tools/gpu_check.py` works, and what cases share: bases of random weights, and pictures."""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STRUCTURES = {"sd15": ("sd1", "distill/sd15_lcm"), "sdxl": ("sdxl", "distill/sdxl_lcm")}
PICTURES = {"sd15": 48, "sdxl": 24}  # that are encoded
SHARD = 8  # rows a file of the cache
# What a training case differs in from the config that is shipped: data of its own, and nothing drawn
PLAIN = (
    "accumulation=1", "base.variant=null", "data.flip=false", "data.kind=folder", f"data.shard_size={SHARD}",
    "validation.prompts=null", "validation.control=null", "logging.trackers=[]", "optimizer.warmup_steps=0",
)  # fmt: skip
# In a rehearsal, where everything is as narrow and short as the code paths allow
SMALL = ("data.resolution=64", "batch_size=2", "adapter.rank=4", "steps=4")


def config_of(case: str, base: str) -> str:
    """What a case trains: the base's config, or where its name ends so that of distribution matching."""
    return f"distill/{base}_dmd" if case.endswith("-dmd") else STRUCTURES[base][1]


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

    @property
    def config(self) -> str:
        """Of a case that trains."""
        return config_of(self.name, self.base)

    def overrides(self, small: tuple[str, ...]) -> list[str]:
        """The case's own, and in a rehearsal `small`; a CPU trains in no float16."""
        keys = ["precision=auto" if key == "precision=float16" else key for key in self.keys]
        return [*keys, *small] if self.rehearsed else list(self.keys)


def on_cuda() -> bool:
    """Whether there is a GPU for this process."""
    import torch

    return torch.cuda.is_available()


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
