"""The cases of `tools/gpu_check.py`: what is measured, with which keys, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    name: str
    does: str  # MODULE:FUNCTION, called with a `gpu_bases.Setting` and `tell`
    limit: float  # seconds
    base: str = ""  # sd15 or sdxl, whose cache must be there
    keys: tuple[str, ...] = ()  # overrides of the config
    usual: bool = False  # in the default set
    needs: tuple[str, ...] = ()  # libraries besides those that the kit cannot do without
    cpu: bool = False  # runs without a GPU, and sees none

    @property
    def encodes(self) -> bool:
        """Whether it makes the base and its cache for others."""
        return self.name == f"encode-{self.base}"


def case(name: str, limit: float, base: str = "", *keys: str, **more: Any) -> Case:
    """A case that does what its name begins with; names of bases alone train."""
    first = name.split("-")[0]
    does = {"sd15": "train", "sdxl": "train"}.get(first, first)
    return Case(name, f"tools.gpu_work:{does}", limit, base, keys, **more)


SD15 = ("batch_size=8", "gradient_checkpointing=false", "memory.channels_last=true", "steps=26")
SDXL = ("batch_size=4", "gradient_checkpointing=true", "memory.channels_last=true", "steps=16")
FEW_BITS = ("memory.quantize=nf4", "optimizer.name=adamw8bit")
EAGER, COMPILED = "memory.compile=false", "memory.compile=true"
BNB: dict[str, Any] = {"needs": ("bitsandbytes",)}
TINY = ("steps=100",)
PAIR = ("gradient_checkpointing=false", "memory.channels_last=true", "steps=10", "warmup=4")
# The default set comes first, the most telling before the others: where time is short the last are left out
CASES = [
    case("encode-sd15", 60, "sd15", usual=True),
    case("sd15", 50, "sd15", *SD15, EAGER, usual=True),
    case("tiny-float16", 60, "", *TINY, "precision=float16", EAGER, usual=True),
    case("sample-sd15", 45, "sd15", usual=True),
    case("encode-sdxl", 110, "sdxl", usual=True),
    case("sdxl", 75, "sdxl", *SDXL, EAGER, usual=True),
    case("pair-sd15", 120, "", *PAIR, "structure=sd1", "resolution=512", "batch_size=8", EAGER, usual=True),
    case("sd15-compiled", 90, "sd15", *SD15, COMPILED, usual=True),
    case("plan", 60, usual=True, cpu=True),
    case("tiny-bfloat16", 60, "", *TINY, "precision=bfloat16", EAGER),
    case("sd15-checkpointing", 60, "sd15", *SD15, EAGER, "batch_size=12", "gradient_checkpointing=true"),
    case("sd15-dmd", 90, "sd15", *SD15, EAGER),
    case("sd15-large", 75, "sd15", *SD15, EAGER, "batch_size=24"),
    case("sd15-bfloat16", 50, "sd15", *SD15, EAGER, "precision=bfloat16"),
    case("sd15-nf4", 75, "sd15", *SD15, EAGER, *FEW_BITS, **BNB),
    case("sd15-int8", 75, "sd15", *SD15, EAGER, "memory.quantize=int8", **BNB),
    case("sdxl-plain", 75, "sdxl", *SDXL, EAGER, "gradient_checkpointing=false"),
    case("sdxl-compiled", 180, "sdxl", *SDXL, COMPILED),
    case("sdxl-float16", 75, "sdxl", *SDXL, EAGER, "precision=float16"),
    case("sdxl-nf4", 120, "sdxl", *SDXL, EAGER, *FEW_BITS, "batch_size=1", "adapter.rank=32", **BNB),
    case("sdxl-int8", 120, "sdxl", *SDXL, EAGER, "memory.quantize=int8", **BNB),
    case("sdxl-dmd", 150, "sdxl", *SDXL, EAGER, "batch_size=2"),
    case("sample-sdxl", 75, "sdxl"),
    case("pair-sd15-compiled", 240, "", *PAIR, "structure=sd1", "resolution=512", "batch_size=8", COMPILED),
    case(
        "pair-sd15-checkpointing", 150, "", *PAIR, "structure=sd1", "resolution=512", "batch_size=12",
        "gradient_checkpointing=true", EAGER,
    ),
    case("pair-sdxl", 300, "", *PAIR, "structure=sdxl", "resolution=1024", "batch_size=2", EAGER),
    case("tiny-cpu", 600, "", *TINY, "precision=float32", EAGER, cpu=True),
]  # fmt: skip
BY_NAME = {each.name: each for each in CASES}
