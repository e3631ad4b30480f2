"""The attribute probe: a small CNN that reads object, colour and pattern from a picture of this world.

It judges samples of tiny-sd (attribute accuracy) and gives the features of the Frechet distance. It was
trained by `train/pretrain_tiny.py` on real renders only, blurred and noised a little so that it does not live
on single pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lcm_kit import assets
from lcm_kit.errors import UserError
from lcm_kit.tiny import world

_HIDDEN = 64  # width before the heads
_EARLY = 6  # layers of the trunk behind `features`: two of convolution, norm and SiLU


class Probe(nn.Module):
    """[B, 3, 64, 64] pixels in [-1, 1] -> logits by attribute; `features`: [B, 32]."""

    def __init__(self, classes: dict[str, list[str]]) -> None:
        """`classes`: attribute -> its names, in the order of the logits."""
        super().__init__()
        self.classes = classes
        layers: list[nn.Module] = []
        width = 3
        for out, stride in ((24, 2), (32, 1), (48, 2), (64, 1), (64, 2), (96, 1), (96, 2)):
            layers += [nn.Conv2d(width, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU()]
            width = out
        self.trunk = nn.Sequential(*layers)
        self.neck = nn.Linear(2 * width, _HIDDEN)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(_HIDDEN, len(values)) for name, values in classes.items()}
        )

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, 64, 64] pixels in [-1, 1] -> [B, 32], the channel means of the second stage.

        An early stage sees what accuracy does not: colours, edges, texture, blur. And its means are few and
        vary little from picture to picture, so a Frechet distance of a hundred pictures is not all bias: in
        trials the last stage could not tell 4 steps of a plain sampler from real renders, this one could.
        """
        return self.trunk[:_EARLY](images.float()).mean((2, 3))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits by attribute, each [B, classes]."""
        maps = self.trunk(images.float())
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)  # amax: a small object counts too
        hidden = torch.tanh(self.neck(pooled))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> list[dict[str, str]]:
        """What the probe sees in each picture, as attribute -> name."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(images).items()}
        return [
            {name: self.classes[name][best[name][i]] for name in self.classes} for i in range(images.shape[0])
        ]


def new_probe() -> Probe:
    """An untrained probe for the world as it is now."""
    return Probe(
        {"object": list(world.objects()), "colour": list(world.COLOURS), "pattern": list(world.PATTERNS)}
    )


def save_probe(probe: Probe, folder: Path) -> None:
    """Write `probe.safetensors` (float16) and `probe.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in probe.state_dict().items()},
        folder / "probe.safetensors",
    )
    (folder / "probe.json").write_text(json.dumps({"classes": probe.classes}, indent=1) + "\n")


def load_probe(folder: Path | None = None) -> Probe:
    """The shipped probe, or the one in `folder`; float32, in evaluation mode, no gradients."""
    folder = folder or assets.path("probe")
    if not (folder / "probe.json").is_file():
        raise UserError(
            f"{folder}: there is no probe here (probe.json); train one with train/pretrain_tiny.py"
        )
    probe = Probe(json.loads((folder / "probe.json").read_text())["classes"])
    probe.load_state_dict(
        {name: value.float() for name, value in load_file(folder / "probe.safetensors").items()}
    )
    return probe.eval().requires_grad_(False)
