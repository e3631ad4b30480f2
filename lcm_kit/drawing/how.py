"""What may be chosen of drawing that changes no sampler: what decodes, whole or in tiles, and compiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lcm_kit import bases, console
from lcm_kit.bases import BaseInfo
from lcm_kit.bases.compiling import allow_graphs, require_compiler
from lcm_kit.drawing import consistency_decoder, decoders
from lcm_kit.drawing.decoders import CONSISTENCY, Decoder
from lcm_kit.drawing.vae import ProvenVae, Replaced, half_dtypes
from lcm_kit.errors import UserError


@dataclass(frozen=True)
class How:
    """How pictures are drawn, whatever they show; `of` makes it of options and keys."""

    decoder: Decoder | None = None  # None: the base's VAE
    tiling: bool = False  # of what is larger than the VAE was made for
    compile: bool = False  # of the UNet

    @classmethod
    def of(cls, base: BaseInfo, decoder: str | None, tiling: bool, compile: bool) -> How:
        """As asked. Raises `UserError` for a decoder that is none, or not for `base`, and for odd pairs."""
        if decoder is not None and tiling:
            raise UserError(
                "tiling is of the base's VAE and does nothing with another decoder; leave out decoder or "
                "tiling"
            )
        return cls(None if decoder is None else decoders.find(decoder, base), tiling, compile)

    def facts(self) -> dict[str, Any]:
        """What pictures and their seconds follow from, as JSON: part of a cell's key."""
        return {
            "decoder": None if self.decoder is None else self.decoder.sha256,
            "tiling": self.tiling, "compile": self.compile, "fused": True,
        }  # fmt: skip

    def load(self, base: BaseInfo, dtype: torch.dtype, device: str | torch.device) -> Any:
        """What decodes for a pipeline in `dtype`: on a GPU in half precision where that serves."""
        if self.decoder is None:
            return self._vae(base, dtype, device)
        if self.decoder.kind == CONSISTENCY:
            model, decode = decoders.load(self.decoder, torch.float32), consistency_decoder.decoded
            halves = () if dtype == torch.float32 else half_dtypes(device, model.config.force_upcast)
            decoder = ProvenVae(model, halves, decode=decode, name=str(self.decoder))
        else:
            decoder = ProvenVae(decoders.load(self.decoder, torch.float32 if _is_cpu(device) else dtype))
        return Replaced(decoder, lambda: self._vae(base, dtype, device))

    def _vae(self, base: BaseInfo, dtype: torch.dtype, device: str | torch.device) -> Any:
        vae = bases.load_vae(base)
        if self.tiling:
            vae.enable_tiling()
        halves = () if dtype == torch.float32 else half_dtypes(device, base.vae_overflows)
        return ProvenVae(vae, halves) if halves else vae

    def compiled(self, unet: Any) -> None:
        """Compile `unet` in place where that was asked for: in its first pass, by its shapes.

        Raises `UserError` if there is no compiler.
        """
        if not self.compile:
            return
        require_compiler(next(unet.parameters()).device, "compile")
        allow_graphs()
        unet.compile()

    def say(self, vae: Any, height: int, width: int) -> None:
        """Name what is not the base's own decoding, for pictures of this size; `vae`: what `load` gave."""
        tile = getattr(getattr(vae, "full", vae), "tile_sample_min_size", 0)
        if self.decoder is not None:
            console.say(f"decoded by {self.decoder}: {self.decoder.means}", err=True)
        if self.tiling and max(height, width) > tile:
            console.say(
                f"decoded in tiles of {tile} pixels, which is not exact: tiles do not see each other, so "
                "colours may differ from one to the next",
                err=True,
            )
        elif self.tiling:
            console.say(
                f"tiling changes nothing: pictures of {width} x {height} pixels are no larger than a tile "
                f"of {tile}",
                err=True,
            )


PLAIN = How()


def _is_cpu(device: str | torch.device) -> bool:
    return torch.device(device).type == "cpu"
