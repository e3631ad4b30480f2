"""The VAE in half precision where it proves as good as float32 there, and in float32 elsewhere.

Half precision halves a VAE's memory and is faster on a GPU, if its activations stay below 65504 (float16) and
its digits suffice (bfloat16). SDXL's own overflow, those of its repaired copies do not, and no configuration
tells for sure. So the middle of the first picture is decoded, or encoded, both ways, and what is not finite
or not near float32 is not used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcm_kit import bases, console

NEAR_PIXELS = 2 / 255  # RMS of decoded pixels in [-1, 1]: a level of an 8-bit picture
NEAR_LATENTS = 1e-2  # of latents, relative: a tenth of the noise of the least noisy pictures in training
PROOF = 512  # pixels a side of what is computed both ways: float32 of a larger picture would set the peak
Run = Callable[[Any, Tensor], Tensor]


def half_dtypes(device: str | torch.device, overflows: bool) -> tuple[torch.dtype, ...]:
    """What a device computes a VAE in besides float32, the more exact first; a CPU is no faster in any.

    `overflows`: its configuration says so of float16, which then is not tried.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return ()
    bfloat16 = kind == "cuda" and torch.cuda.is_bf16_supported()
    return (*(() if overflows else (torch.float16,)), *((torch.bfloat16,) if bfloat16 else ()))


def near_pixels(found: Tensor, exact: Tensor) -> bool:
    """Whether pixels are finite and those of float32, as an 8-bit picture shows them."""
    distance = found.clamp(-1, 1) - exact.clamp(-1, 1)
    return bool(found.isfinite().all() and distance.square().mean().sqrt() <= NEAR_PIXELS)


def near_latents(found: Tensor, exact: Tensor) -> bool:
    """Whether latents are finite and those of float32, as training sees them."""
    return bool(found.isfinite().all() and (found - exact).norm() <= NEAR_LATENTS * exact.norm())


class ProvenVae(nn.Module):
    """A base's VAE, which is asked for latents or pixels and chooses its precision itself.

    `halves`: the dtypes to try, the first that proves itself is used from then on, and none where none does.
    `settled`: the first of them was proved before. What is not finite in half precision is done again in
    float32, picture by picture, so no picture hangs on those that it came with.
    """

    def __init__(self, vae: Any, halves: Sequence[torch.dtype] = (), *, settled: bool = False) -> None:  # noqa: D107
        super().__init__()
        self.full = vae
        self.fast: Any = None
        self._halves, self._told = tuple(halves), False
        if settled and halves:
            self._use(halves[0])

    @property
    def config(self) -> Any:
        """Of the VAE."""
        return self.full.config

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next((self.full if self.fast is None else self.fast).parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes: float32 until something else has proved itself."""
        return next((self.full if self.fast is None else self.fast).parameters()).dtype

    def decoded(self, latents: Tensor) -> Tensor:
        """As `bases.decode_latents`, float32."""
        return self._run(bases.decode_latents, latents, near_pixels, "decoded")

    def encoded(self, pixels: Tensor) -> Tensor:
        """As `bases.encode_images`, float32."""
        return self._run(bases.encode_images, pixels, near_latents, "encoded")

    @torch.no_grad()
    def prove(self, pixels: Tensor) -> torch.dtype:
        """What pictures like these, [B, 3, H, W], are encoded in: settled by them."""
        self.encoded(pixels)
        return self.dtype

    def _run(self, run: Run, given: Tensor, near: Callable[[Tensor, Tensor], bool], done: str) -> Tensor:
        if self._halves and self.fast is None:
            self._settle(run, given[:1], near, done)
        if self.fast is None:
            return run(self.full, given).float()
        found = run(self.fast, given).float()
        broken = ~found.flatten(1).isfinite().all(1)
        if broken.any():
            self._say(f"some pictures are not finite in {_name(self.dtype)} and are {done} in float32")
            exact = self._exactly(run, given[broken.to(given.device)])
            found[broken] = exact.to(found.device)
        return found

    def _settle(self, run: Run, given: Tensor, near: Callable[[Tensor, Tensor], bool], done: str) -> None:
        side = PROOF if done == "encoded" else PROOF // 8
        given = _middle(given, side)
        exact = run(self.full, given).float()
        if not exact.isfinite().all():
            return  # that is no fault of the precision, and the next picture may tell
        for dtype in self._halves:
            self._use(dtype)
            if near(run(self.fast, given).float().to(exact.device), exact):
                return
            self.full.to(self.fast.device)
            self.fast = None
        tried, self._halves = " or ".join(map(_name, self._halves)), ()
        self._say(f"it is not near float32 in {tried}, so pictures are {done} in float32")

    def _use(self, dtype: torch.dtype) -> None:
        self.fast = nn.Module.to(copy.deepcopy(self.full), dtype)  # diffusers' own `to` warns of nothing
        self.full.to("cpu")  # where it waits for what is not finite

    def _exactly(self, run: Run, given: Tensor) -> Tensor:
        self.full.to(self.fast.device)
        try:
            return run(self.full, given).float()
        finally:
            self.full.to("cpu")

    def _say(self, what: str) -> None:
        if not self._told:
            console.say(f"the base's VAE: {what}", err=True)
        self._told = True


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] as latents, float32; `vae`: a `ProvenVae` or diffusers' own."""
    found = vae.encoded(pixels) if isinstance(vae, ProvenVae) else bases.encode_images(vae, pixels)
    return found.float()


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents as pixels [B, 3, H, W], about [-1, 1] and not clipped, float32; `vae` as in `encode`."""
    found = vae.decoded(latents) if isinstance(vae, ProvenVae) else bases.decode_latents(vae, latents)
    return found.float()


def _middle(given: Tensor, side: int) -> Tensor:
    """At most `side` in height and width of [..., H, W]."""
    top, left = (max(0, (size - side) // 2) for size in given.shape[-2:])
    return given[..., top : top + side, left : left + side]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
