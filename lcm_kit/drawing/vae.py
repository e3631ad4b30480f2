"""The VAE in half precision where it proves as good as float32 there, and in float32 elsewhere.

Half precision halves a VAE's memory and is faster on a GPU, if its activations stay below 65504 (float16) and
its digits suffice (bfloat16). SDXL's own overflow, those of its repaired copies do not, and no configuration
tells for sure. So the middle of the first picture is decoded, or encoded, both ways, and what is not finite
or not near float32 is not used. Another decoder may stand in the VAE's place (`Replaced`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcm_kit import bases, console
from lcm_kit.drawing.noise import Picture, pictures

NEAR_PIXELS = 2 / 255  # RMS of decoded pixels in [-1, 1]: a level of an 8-bit picture
NEAR_LATENTS = 1e-2  # of latents, relative: a tenth of the noise of the least noisy pictures in training
PROOF = 512  # pixels a side of what is computed both ways: float32 of a larger picture would set the peak
Decode = Callable[[Any, Tensor, Sequence[Picture]], Tensor]
"""(model, latents, their pictures) -> pixels: the last are for a decoder that draws with noise."""
_Run = Callable[[Any, Tensor, Sequence[int]], Tensor]  # of some rows of what was given


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


def _by_vae(vae: Any, latents: Tensor, _: Sequence[Picture]) -> Tensor:
    """As `bases.decode_latents`: what is decoded follows from the latents alone."""
    return bases.decode_latents(vae, latents)


class ProvenVae(nn.Module):
    """A base's VAE, which is asked for latents or pixels and chooses its precision itself.

    `halves`: the dtypes to try, the first that proves itself is used from then on, and none where none does.
    `settled`: the first of them was proved before. `decode`: how the model decodes, if it is no VAE, which
    is called `name` then. What is not finite in half precision is done again in float32, picture by picture,
    so no picture hangs on those that it came with.
    """

    def __init__(  # noqa: D107
        self,
        vae: Any,
        halves: Sequence[torch.dtype] = (),
        *,
        settled: bool = False,
        decode: Decode = _by_vae,
        name: str = "the base's VAE",
    ) -> None:
        super().__init__()
        self.full = vae
        self.fast: Any = None
        self._halves, self._told = tuple(halves), False
        self._decode, self._name = decode, name
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
        """In which it computes: as it was loaded until something else has proved itself."""
        return next((self.full if self.fast is None else self.fast).parameters()).dtype

    def decoded(self, latents: Tensor, of: Sequence[Picture] | None = None) -> Tensor:
        """As `bases.decode_latents`, float32; `of` as in `decode`."""
        each = pictures(len(latents)) if of is None else of

        def run(model: Any, given: Tensor, rows: Sequence[int]) -> Tensor:
            return self._decode(model, given, [each[row] for row in rows])

        return self._run(run, latents, near_pixels, "decoded")

    def encoded(self, pixels: Tensor) -> Tensor:
        """As `bases.encode_images`, float32."""
        return self._run(
            lambda vae, given, _: bases.encode_images(vae, given), pixels, near_latents, "encoded"
        )

    @torch.no_grad()
    def prove(self, pixels: Tensor) -> torch.dtype:
        """What pictures like these, [B, 3, H, W], are encoded in: settled by them."""
        self.encoded(pixels)
        return self.dtype

    def _run(self, run: _Run, given: Tensor, near: Callable[[Tensor, Tensor], bool], done: str) -> Tensor:
        if self._halves and self.fast is None:
            self._settle(run, given[:1], near, done)
        rows = range(len(given))
        if self.fast is None:
            return run(self.full, given, rows).float()
        found = run(self.fast, given, rows).float()
        broken = ~found.flatten(1).isfinite().all(1)
        if broken.any():
            self._say(f"some pictures are not finite in {_name(self.dtype)} and are {done} in float32")
            exact = self._exactly(run, given[broken.to(given.device)], broken.nonzero().flatten().tolist())
            found[broken] = exact.to(found.device)
        return found

    def _settle(self, run: _Run, given: Tensor, near: Callable[[Tensor, Tensor], bool], done: str) -> None:
        side = PROOF if done == "encoded" else PROOF // 8
        given = _middle(given, side)
        exact = run(self.full, given, [0]).float()
        if not exact.isfinite().all():
            return  # that is no fault of the precision, and the next picture may tell
        for dtype in self._halves:
            self._use(dtype)
            if near(run(self.fast, given, [0]).float().to(exact.device), exact):
                return
            self.full.to(self.fast.device)
            self.fast = None
        tried, self._halves = " or ".join(map(_name, self._halves)), ()
        self._say(f"it is not near float32 in {tried}, so pictures are {done} in float32")

    def _use(self, dtype: torch.dtype) -> None:
        self.fast = nn.Module.to(copy.deepcopy(self.full), dtype)  # diffusers' own `to` warns of nothing
        self.full.to("cpu")  # where it waits for what is not finite

    def _exactly(self, run: _Run, given: Tensor, rows: Sequence[int]) -> Tensor:
        self.full.to(self.fast.device)
        try:
            return run(self.full, given, rows).float()
        finally:
            self.full.to("cpu")

    def _say(self, what: str) -> None:
        if not self._told:
            console.say(f"{self._name}: {what}", err=True)
        self._told = True


class Replaced(nn.Module):
    """Another decoder in the VAE's place; what is encoded, its VAE encodes.

    `load`: gives the base's VAE, when it is first asked for.
    """

    def __init__(self, decoder: ProvenVae, load: Callable[[], Any]) -> None:  # noqa: D107
        super().__init__()
        self.decoder = decoder
        self._load = load
        self._vae: list[Any] = []  # no part of this module: a pipeline that is moved needs no VAE for it

    @property
    def config(self) -> Any:
        """Of the decoder."""
        return self.decoder.config

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the decoder computes."""
        return self.decoder.dtype

    @property
    def vae(self) -> Any:
        """The base's own."""
        if not self._vae:
            self._vae.append(self._load().to(self.device))
        return self._vae[0]

    def decoded(self, latents: Tensor, of: Sequence[Picture] | None = None) -> Tensor:
        """Pixels, as `decode`."""
        return self.decoder.decoded(latents, of)


def own(vae: Any) -> Any:
    """The base's VAE of a pipeline, whatever decodes in its place."""
    return vae.vae if isinstance(vae, Replaced) else vae


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] as latents, float32; `vae`: diffusers' own, `ProvenVae`, `Replaced`."""
    vae = own(vae)
    found = vae.encoded(pixels) if isinstance(vae, ProvenVae) else bases.encode_images(vae, pixels)
    return found.float()


def decode(vae: Any, latents: Tensor, of: Sequence[Picture] | None = None) -> Tensor:
    """Latents as pixels [B, 3, H, W], about [-1, 1] and not clipped, float32; `vae` as in `encode`.

    `of`: whose pictures they are, for a decoder that draws with noise; None: the first ones of seed 0.
    """
    if isinstance(vae, ProvenVae | Replaced):
        return vae.decoded(latents, of).float()
    return bases.decode_latents(vae, latents).float()


def _middle(given: Tensor, side: int) -> Tensor:
    """At most `side` in height and width of [..., H, W]."""
    top, left = (max(0, (size - side) // 2) for size in given.shape[-2:])
    return given[..., top : top + side, left : left + side]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
