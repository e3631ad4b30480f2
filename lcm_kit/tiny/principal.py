"""The encoder of tiny-sd's VAE: principal components of 4x4 patches, in the weights of an `AutoencoderKL`.

Learned end to end in the minutes that a CPU has, the encoder kept less of a picture than a linear map does:
from its 16 channels a linear readout gave the shipped brand set back at 18 dB, from 16 principal components
of the same pictures at 25 dB, from 24 at 30. So the encoder is that map. Its latents stay what they are
however long the decoder is trained, and a UNet that was trained on them stays right.

Each component has unit variance. Left larger, as it is in pixels, a patch's mean colour shows through the
most noise that Stable Diffusion's schedule has (its last signal-to-noise ratio is not 0): the UNet learns to
read it there, and from pure noise draws greyish colours that nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

PATCH = 4  # pixels: the VAE's f
_ANCHOR = 512.0  # constant channels, against which the last group norm does not see how much a picture varies
_LOG_VARIANCE = -12.0


@dataclass(frozen=True)
class Components:
    """Latent k of a patch p [3 * PATCH * PATCH] is `rows[k] @ p - shift[k]`."""

    rows: Tensor  # [K, 48]: unit vectors over their components' deviations
    shift: Tensor  # [K]: what the mean patch gives

    @property
    def deviations(self) -> Tensor:
        """[K]: of each component over the pictures, in pixels' units."""
        return 1 / self.rows.norm(dim=1)


def patches(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 48, H / 4, W / 4]: a patch's pixels by channel, row, column."""
    return pixel_unshuffle(images, PATCH)


def components(images: Tensor, count: int) -> Components:
    """The first `count` principal components of the patches of `images` [B, 3, H, W] in [-1, 1]."""
    points = patches(images).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = points.mean(0)
    values, vectors = torch.linalg.eigh((points - mean).T @ (points - mean) / len(points))
    order = values.argsort(descending=True)[:count]
    rows, deviation = vectors[:, order].T, values[order].sqrt()
    # the sign of an eigenvector is the library's whim: another build's latents would be their negatives
    sign = (rows @ torch.cos(1.7 * torch.arange(rows.shape[1], dtype=rows.dtype))).sign()
    rows *= (sign / deviation)[:, None]
    return Components(rows.float(), (rows @ mean).float())


@torch.no_grad()
def of_encoder(vae: Any) -> Components:
    """The components in the encoder of `vae` (float32), to 0.1%: what it makes of unit patches."""
    units = torch.eye(3 * PATCH**2).view(-1, 3, PATCH, PATCH)  # in the order of `patches`
    given = vae.encode(torch.cat([torch.zeros_like(units[:1]), units])).latent_dist.mean.flatten(1)
    return Components((given[1:] - given[0]).T, -given[0])


def encode(found: Components, images: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> latents [B, K, H / 4, W / 4]: what the encoder that is set gives."""
    return torch.einsum("kp,bphw->bkhw", found.rows, patches(images)) - found.shift[:, None, None]


@torch.no_grad()
def set_encoder(vae: Any, found: Components) -> None:
    """Write `found` into the encoder of `models.build_vae()`, exactly but for the last group norm (0.1%).

    Two convolutions of stride 2 gather a patch, the residual branches give nothing, the last shortcut is the
    map, in pairs x and -x, because silu(x) - silu(-x) = x brings them through the last activation.
    """
    encoder, count = vae.encoder, len(found.rows)
    for module in [*encoder.modules(), vae.quant_conv]:
        if isinstance(module, torch.nn.Conv2d):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1.0
    width = 3
    for block in encoder.down_blocks[:2]:
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None:
            shortcut.weight[range(width), range(width), 0, 0] = 1.0
        gather = block.downsamplers[0].conv.weight  # sees rows and columns 2i to 2i + 2
        for k in range(4 * width):
            gather[k, k // 4, k % 4 // 2, k % 2] = 1.0
        width *= 4
    # the patch's pixels in the order in which the two convolutions gathered them
    order = [
        (channel * 4 + 2 * (y % 2) + x % 2) * 4 + 2 * (y // 2) + x // 2
        for channel in range(3)
        for y in range(PATCH)
        for x in range(PATCH)
    ]
    last, groups = encoder.down_blocks[2].resnets[0].conv_shortcut, encoder.conv_norm_out.num_groups
    size = last.out_channels // groups
    pairs = (size - 2) // 2  # of a group's channels, beside its two anchors
    if count > pairs * groups:
        raise ValueError(f"{count} components do not fit; the encoder has room for {pairs * groups}")
    for k in range(count):
        first = k // pairs * size + 2 * (k % pairs)
        for channel, sign in ((first, 1.0), (first + 1, -1.0)):
            last.weight[channel, order, 0, 0] = sign * found.rows[k]
            last.bias[channel] = -sign * found.shift[k]
        encoder.conv_out.weight[k, first, 1, 1] = 1.0
        encoder.conv_out.weight[k, first + 1, 1, 1] = -1.0
    for group in range(groups):
        end = (group + 1) * size
        last.bias[end - 2], last.bias[end - 1] = _ANCHOR, -_ANCHOR
    # a group's deviation is that of its two anchors: their root mean square over all its channels
    encoder.conv_norm_out.weight.fill_(_ANCHOR * (2 / size) ** 0.5)
    encoder.conv_norm_out.bias.zero_()
    encoder.conv_out.bias[count:] = _LOG_VARIANCE
    vae.quant_conv.weight[range(2 * count), range(2 * count), 0, 0] = 1.0
