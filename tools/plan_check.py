"""Estimated against measured: the table of docs/plan.md.

    OMP_NUM_THREADS=1 python tools/plan_check.py [--returning] [NAME ...]

Each case is `lcm-kit encode` and `lcm-kit train` of two steps, in processes of their own, on a base of
random weights with a published base's blocks, narrower; or a shipped config on the embedded base. Measured is
the resident memory at its highest, as the kernel tells it to the parent (ru_maxrss), less that of the same
command on a base of next to nothing: Python and its libraries. Each is run twice: with glibc told to give
back what is freed (the columns `measured`), and as it is, which --returning leaves out if it is not there
yet. Linux only; an hour. PLAN_CHECK names a folder that keeps bases and what was measured, else a temporary
one is used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from lcm_kit.config import shipped
from lcm_kit.config.load import load
from lcm_kit.config.schema import Training
from lcm_kit.lora import write
from lcm_kit.lora.provenance import Provenance
from lcm_kit.lora.structure import known, of_base
from lcm_kit.plan import base_profile, show, style
from lcm_kit.plan.dry_run import MetaModel
from lcm_kit.plan.estimate import Estimate, Planner
from lcm_kit.quiet import quiet
from tests.bases import _SCHEDULER, _tokenizer, build_sd
from tests.loras import random_lora

ROOT = Path(__file__).parents[1]
MIB = 2**20
ENOUGH = 200 * MIB  # below, it is Python's own memory that is measured
# What glibc is told: nothing, or to give back what is freed
MALLOC: dict[str, dict[str, str]] = {"default": {}, "returning": {show.RETURNING: "65536"}}
# channels and heads of these are a share of the published ones
SCALED = ("block_out_channels", "attention_head_dim", "norm_num_groups", "cross_attention_dim")
CLIP = {"num_hidden_layers": 2, "intermediate_size": 512, "max_position_embeddings": 77}
CONFIG = """\
recipe: train/distill
output: {work}/run
steps: 2
base: {{path: "{base}"}}
data: {{path: "{images}", cache: "{work}/cache", batch_size: 4}}
validation: {{prompts: null}}
logging: {{trackers: []}}
"""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    structure: str  # sd1, sdxl, or a shipped config, which names its base
    width: float  # of the published channels
    overrides: tuple[str, ...]
    loras: tuple[str, ...] = ()  # keys that name a LoRA: one of random weights

    @property
    def shipped(self) -> bool:
        """Whether it is a config of the kit's."""
        return "/" in self.structure

    @property
    def title(self) -> str:
        """What the table calls its base."""
        return self.structure if self.shipped else f"{self.structure} x {self.width}"


CASES = [
    Case("plain", "sd1", 0.25, ("data.resolution=256", "batch_size=4")),
    Case("larger pictures", "sd1", 0.25, ("data.resolution=512", "batch_size=1")),
    Case(
        "checkpointing", "sd1", 0.25,
        ("data.resolution=256", "batch_size=8", "gradient_checkpointing=true"),
    ),
    Case("accumulation", "sd1", 0.25, ("data.resolution=256", "batch_size=2", "accumulation=2")),
    Case("weights rule", "sd1", 0.5, ("data.resolution=64", "batch_size=1")),
    Case("ema", "sd1", 0.5, ("data.resolution=64", "batch_size=1", "ema=0.9")),
    Case("nf4", "sd1", 0.5, ("data.resolution=128", "batch_size=1", "memory.quantize=nf4")),
    Case(
        "nf4 and all savings", "sdxl", 0.25,
        ("data.resolution=256", "batch_size=2", "memory.quantize=nf4", "gradient_checkpointing=true",
         "optimizer.name=adamw8bit"),
    ),
    Case("int8", "sdxl", 0.25, ("data.resolution=128", "batch_size=1", "memory.quantize=int8")),
    Case("sdxl", "sdxl", 0.25, ("data.resolution=256", "batch_size=2")),
    # not looked at while the model of memory was made
    Case("new, plain", "sd1", 0.25, ("data.resolution=384", "batch_size=3", "adapter.rank=16")),
    Case(
        "new, checkpointing", "sdxl", 0.25,
        ("data.resolution=384", "batch_size=4", "adapter.rank=8", "gradient_checkpointing=true"),
    ),
    Case("bfloat16", "sd1", 0.125, ("data.resolution=256", "batch_size=4", "precision=bfloat16")),
    Case(
        "validation", "sd1", 0.125,
        ("data.resolution=256", "batch_size=1", "gradient_checkpointing=true", "validation.count=4",
         "validation.prompts={images}/prompts.txt"),
    ),
    Case("style", "finetune/tiny_brand", 1, ("data.resolution=64", "batch_size=64")),
    Case(
        "prior", "finetune/tiny_brand", 1,
        ("data.resolution=64", "batch_size=48", "prior.prompts=asset:general", "prior.count=48",
         "prior.steps=2"),
    ),
    Case(
        "style, checkpointing", "finetune/tiny_brand", 1,
        ("data.resolution=64", "batch_size=80", "gradient_checkpointing=true"),
    ),
    Case("lcf", "lcf/tiny_brand", 1, ("data.resolution=64", "batch_size=64"), ("adapter.start",)),
    Case(
        "styled", "distill/tiny_styled", 1,
        ("data.resolution=64", "batch_size=64", "data.batch_size=64", "data.source=teacher",
         "data.samples.count=64", "data.samples.steps=2", "data.regularization=null",
         "data.regularization_share=null", "adapter.start=null"),
        ("teacher.adapters",),
    ),
]  # fmt: skip


# -- Bases and pictures --------------------------------------------------------------------------------------


def scaled(config: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The configuration with a share of its channels."""

    def share(value: Any) -> Any:
        return type(value)(map(share, value)) if isinstance(value, tuple) else round(value * width)

    return {key: share(value) if key in SCALED else value for key, value in config.items()}


def build(folder: Path, structure: str, width: float) -> Path:
    """A diffusers folder of random weights: a UNet of `width`, a VAE of half the published one's."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if (folder / "model_index.json").is_file():
        return folder
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"block_out_channels": (320, 640, 1280, 1280), "norm_num_groups": 32}
    config = scaled({**plain, **known(structure).unet_config}, width)
    tokenizer, ends = _tokenizer(folder)
    tokenizer.model_max_length = 77
    xl = structure == "sdxl"
    side = config["cross_attention_dim"] // (2 if xl else 1)
    size = {"hidden_size": side, "num_attention_heads": side // 32}
    text = {**CLIP, **ends, "vocab_size": len(tokenizer), **size}
    if xl:
        config["projection_class_embeddings_input_dim"] = 64 + 6 * config["addition_time_embed_dim"]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 128, 256, 256), layers_per_block=2, norm_num_groups=16,
    )  # fmt: skip
    parts = {
        "unet": UNet2DConditionModel.from_config(config), "vae": vae, "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)), "scheduler": DDIMScheduler(**_SCHEDULER),
    }  # fmt: skip
    if xl:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**text, projection_dim=64))
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    else:
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **unused)
    pipe.save_pretrained(folder)
    return folder


def pictures(folder: Path) -> Path:
    """Eight pictures of noise with captions, and prompts."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    noise = torch.randint(
        0, 256, (8, 512, 512, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for k, picture in enumerate(noise.numpy()):
        Image.fromarray(picture).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("noise")
    (folder / "prompts.txt").write_text("".join(f"{word}\n" for word in ("one", "two", "three", "four")))
    return folder


# -- Measuring -----------------------------------------------------------------------------------------------


# The kernel gives a process the peak of the one that it was forked from, so a small one stands between
LAUNCHER = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def highest(verb: str, config: Path, overrides: Sequence[str], malloc: str) -> int:
    """Bytes of `lcm-kit verb config overrides` at its highest."""
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-m", "lcm_kit", verb, str(config), *overrides]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **MALLOC[malloc]}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"lcm-kit {verb} {' '.join(overrides)}: {done.stderr}")
    return int(done.stdout) * 1024


def write_config(folder: Path, case: Case, work: Path, base: str) -> tuple[Path, list[str]]:
    """The config of a case in `folder`, and the overrides."""
    images, file = pictures(work / "images"), folder / "config.yaml"
    overrides = [override.format(images=images) for override in case.overrides]
    if not case.shipped:
        file.write_text(CONFIG.format(work=folder, base=base, images=images))
        return file, overrides
    file.write_text(shipped.config_path(case.structure).read_text())
    given = (f"output={folder}/run", f"data.cache={folder}/cache", "steps=2", f"base.path={base}")
    rest = ("logging.trackers=[]", *(f"validation.{key}=null" for key in ("prompts", "control")))
    rest += ("optimizer.warmup_steps=0",)
    loras = [f"{key}={_lora(folder, base, key)}" for key in case.loras]
    return file, [*given, *rest, *overrides, *loras]


def _lora(folder: Path, base: str, key: str) -> str:
    """What to write for `key`: a LoRA of rank 16 on all layers."""
    place, file = of_base(base), folder / "lora.safetensors"
    lora = random_lora(place, ranks=(16,), alphas=(16.0,), size=0.01)
    write.write(file, lora, place, "kohya", "float32", Provenance("lora"))
    return f"[{{path: {file}}}]" if key == "teacher.adapters" else str(file)


def both(work: Path, base: str, case: Case, malloc: str) -> dict[str, int]:
    """What `encode` and `train` need on `base`."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        config, overrides = write_config(Path(folder), case, work, base)
        return {verb: highest(verb, config, overrides, malloc) for verb in ("encode", "train")}


@cache
def nothing(work: Path, case: Case, malloc: str) -> dict[str, int]:
    """Python and its libraries: the same commands on a base of next to nothing."""
    base = work / "nothing"
    if not base.is_dir():
        build_sd(base)
    return both(work, str(base), case, malloc)


def least(case: Case) -> Case:
    """The same kind of run with next to nothing in it; shipped configs share one, they load the same."""
    few = ("data.resolution=64", "batch_size=1", "adapter.rank=1", "data.batch_size=1")
    if case.shipped:
        return Case("", "finetune/tiny_brand", 1, few)
    kept = ("optimizer.", "memory.", "validation.prompts")
    extra = tuple(override for override in case.overrides if override.startswith(kept))
    return Case("", case.structure, 1, (*few, *extra))


def base_of(work: Path, case: Case) -> str:
    """The base of a case: built, or the embedded one."""
    if case.shipped:
        return "asset:tiny-sd"
    return str(build(work / f"{case.structure}-{case.width}", case.structure, case.width))


def _file(work: Path, case: Case, malloc: str) -> Path:
    return work / f"{case.name.replace(' ', '-')}.{malloc}.json"


def measure(work: Path, case: Case, malloc: str) -> dict[str, int]:
    """Bytes of a case beyond those of Python, by verb; what was measured before is kept in `work`."""
    file = _file(work, case, malloc)
    if not file.is_file():
        few, most = nothing(work, least(case), malloc), both(work, base_of(work, case), case, malloc)
        file.write_text(json.dumps({verb: most[verb] - few[verb] for verb in most}))
    return json.loads(file.read_text())


def estimated(work: Path, case: Case) -> Estimate:
    """What `lcm-kit plan --device cpu` says of a case."""
    with tempfile.TemporaryDirectory() as folder:
        config, overrides = write_config(Path(folder), case, work, base_of(work, case))
        loaded = load(config, overrides)
        assert isinstance(loaded, Training)
        found = base_profile.find(loaded.base)
        worn, _ = style.find(loaded, found.structure)
    return Planner(MetaModel(found, loaded.adapter, worn), "cpu")(loaded)


def pair(found: int | None, expected: int) -> str:
    """Three cells of the table."""
    if found is None:
        return f"- | {expected / MIB:.0f} | "
    return f"{found / MIB:.0f} | {expected / MIB:.0f} | {expected / found - 1:+.0%}"


def row(work: Path, case: Case, told: Estimate, verb: str, *, once: bool) -> str:
    """Measured and estimated, told to give back and as it is; `once`: that only if it is there."""
    expected = (told.peak, told.resident) if verb == "train" else (told.encode_peak,) * 2
    back = measure(work, case, "returning")[verb]
    left_out = once and not _file(work, case, "default").is_file()
    default = None if left_out else measure(work, case, "default")[verb]
    return f"{pair(back, expected[0])} | {pair(default, expected[1])}"


def main() -> None:
    """Measure the cases that are named, or all."""
    quiet()
    work = Path(os.environ.get("PLAN_CHECK") or tempfile.mkdtemp(prefix="plan-check-"))
    work.mkdir(parents=True, exist_ok=True)
    names = [name for name in sys.argv[1:] if name != "--returning"]
    once = "--returning" in sys.argv
    print("| case | highest phase | measured, MiB | estimated | | default malloc | estimated | |")
    print("|" + " --- |" * 8)
    encoded: set[str] = set()
    titles = []
    for case in CASES:
        if names and case.name not in names:
            continue
        told, size = estimated(work, case), case.overrides[0]
        changes = " ".join(case.overrides).replace(" validation.prompts={images}/prompts.txt", "")
        title = f"{case.title}, `{changes}`"
        titles.append(f"- {case.name}: {title}")
        print(f"| {case.name} | {told.phase} | {row(work, case, told, 'train', once=once)} |", flush=True)
        # nothing but the pictures' size changes what encoding needs there
        kind = title if case.shipped else size
        if measure(work, case, "returning")["encode"] > ENOUGH and kind not in encoded:
            encoded.add(kind)
            cells = row(work, case, told, "encode", once=once)
            print(f"| {case.name}: encode | {told.encode_phase} | {cells} |", flush=True)
    print("\nThe cases (`encode`: four pictures at a time):\n", *titles, sep="\n")


if __name__ == "__main__":
    main()
