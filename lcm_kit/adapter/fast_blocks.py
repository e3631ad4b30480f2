"""diffusers' blocks with fewer kernels around the LoRA layers: attention, residual blocks, what many share.

Each does what diffusers' own does, bit for bit but for the order of sums in wider products; where it is asked
for something else, diffusers' own answers.

The text goes into every cross-attention and the time into every residual block: what all their first layers
make of it is one product (`Shared`). It is computed before the first block, so that a block which is computed
twice, by gradient checkpointing, does not compute it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lcm_kit.adapter.fast_layers import FastLinear, Together, fit_together

# -- Attention -----------------------------------------------------------------------------------------------


class Attention:
    """diffusers' scaled dot-product attention, of fewer products: a processor in the place of `before`.

    Self-attention asks for q, k and v at once; cross-attention is given k and v.
    """

    def __init__(self, before: Any, together: Together | None = None) -> None:
        """`together`: q, k and v of self-attention; None: of cross-attention, to which k and v are given."""
        self.before, self.together = before, together

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As diffusers' `AttnProcessor2_0`."""
        x, context = hidden_states, encoder_hidden_states
        parts = None
        if attention_mask is None and x.ndim == 3 and not args and not kwargs:
            parts = self._parts(attn, x, context)
        if parts is None:
            found: Tensor = self.before(attn, x, context, attention_mask, temb, *args, **kwargs)
            return found
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](y))

    def _parts(self, attn: Any, x: Tensor, context: Tensor | None) -> Sequence[Tensor] | None:
        """q, k and v; None where they are to be asked for one by one."""
        if context is None:
            if self.together is None or (on := self.together.on(x)) is None:
                return None
            return self.together(x, on)[0]
        if not any(known is context for known, _ in attn.to_k.given):
            return None
        return attn.to_q(x), attn.to_k(context), attn.to_v(context)


def _plain(attn: Any) -> bool:
    """Whether an `Attention` of diffusers has nothing but the layers that ours asks."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    return (
        type(attn.processor) is AttnProcessor2_0
        and attn.spatial_norm is None and attn.group_norm is None and not attn.norm_cross
        and getattr(attn, "norm_q", None) is None and getattr(attn, "norm_k", None) is None
        and not attn.residual_connection and attn.rescale_output_factor == 1
    )  # fmt: skip


# -- Residual blocks -----------------------------------------------------------------------------------------


def make_fast_resnet(block: Any) -> None:
    """Give diffusers' `ResnetBlock2D` a forward that divides nothing by 1; nothing to what is none."""
    from diffusers.models.resnet import ResnetBlock2D

    if (
        type(block) is ResnetBlock2D
        and block.upsample is None and block.downsample is None and block.time_embedding_norm == "default"
        and block.output_scale_factor == 1 and block.dropout.p == 0
    ):  # fmt: skip
        block.__class__ = _resnet()


@lru_cache
def _resnet() -> type:  # where diffusers is loaded already
    from diffusers.models.resnet import ResnetBlock2D

    class FastResnet(ResnetBlock2D):
        def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
            act = self.nonlinearity
            h = self.conv1(act(self.norm1(input_tensor)))
            if self.time_emb_proj is not None:
                h = h + self.time_emb_proj(temb if self.skip_time_act else act(temb))[:, :, None, None]
            h = self.conv2(act(self.norm2(h)))
            return h + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))

    return FastResnet


# -- Transformers --------------------------------------------------------------------------------------------


class _Gated(Function):
    """hidden * gelu(gate) of y = [hidden, gate]: y alone is kept for the backward, gelu computed again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        hidden, gate = y.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        (hidden, gate), dy = y.chunk(2, dim=-1), torch.empty_like(y)
        dhidden, dgate = dy.chunk(2, dim=-1)
        torch.mul(dout, F.gelu(gate), out=dhidden)
        torch.ops.aten.gelu_backward.grad_input(dout * hidden, gate, grad_input=dgate)
        return dy


class _ContiguousGradient(Function):
    """The same; its gradient is made contiguous once, which else each of several products does for itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx.contiguous()


@lru_cache
def _geglu() -> type:
    from diffusers.models.activations import GEGLU

    class FastGEGLU(GEGLU):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if torch.compiler.is_compiling():  # which fuses the plain one
                return super().forward(hidden_states, *args, **kwargs)
            y: Tensor = _Gated.apply(self.proj(hidden_states))
            return y

    return FastGEGLU


def make_fast_transformer(block: Any) -> None:
    """Let a `Transformer2DModel` of diffusers keep less for the backward; nothing of what is none."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    if type(block) is not Transformer2DModel or not block.transformer_blocks:
        return

    for module in block.modules():
        if type(module) is GEGLU:
            module.__class__ = _geglu()
    block.transformer_blocks[-1].register_forward_hook(
        lambda module, args, y: y if torch.compiler.is_compiling() else _ContiguousGradient.apply(y)
    )


# -- What many blocks share ----------------------------------------------------------------------------------


_MOST_PASSES = 16  # whose backward is to come; those of a backward that never came are let go of


class Given(NamedTuple):
    """What all layers of a `Shared` make of one tensor."""

    input: Tensor
    outputs: list[Tensor]
    whose: object  # the pass of the UNet


class Shared:
    """Layers that are asked about one and the same tensor in every pass of the UNet, asked once for all.

    Gradient checkpointing asks again in the backward, when other passes may have been made since. So what was
    computed in a pass with gradient stays until its backward is done.
    """

    def __init__(self, units: Sequence[Sequence[FastLinear]]) -> None:
        """`units` as of `Together`."""
        self.together = Together(units)
        self.passes: list[Given] = []

    def give(self, x: Tensor, whose: object) -> None:
        """What all layers make of x [..., in], with the LoRAs that are on now, in the pass `whose`."""
        on = self.together.on(x)
        if on is not None:
            outputs = [output for unit in self.together(x, on) for output in unit]
            self._keep([*self.passes[1 - _MOST_PASSES :], Given(x, outputs, whose)])

    def forget(self, whose: object) -> None:
        """Let go of what was computed in a pass."""
        self._keep([each for each in self.passes if each.whose is not whose])

    def _keep(self, passes: list[Given]) -> None:
        self.passes = passes
        # in each layer, and not asked for here, since torch.compile makes one code of layers that look alike
        for place, layer in enumerate(self.together.layers):
            layer.given = tuple((each.input, each.outputs[place]) for each in passes)


class _Times(nn.Module):
    """diffusers' `Timesteps`, whose frequencies are the same in every pass: three kernels for eleven."""

    def __init__(self, before: Any, device: torch.device) -> None:
        super().__init__()
        half = before.num_channels // 2
        powers = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=device)
        self.frequencies = (powers / (half - before.downscale_freq_shift)).exp()
        self.flipped: bool = before.flip_sin_to_cos

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None] * self.frequencies.to(timesteps.device)
        found = angles.new_empty(len(angles), 2 * angles.shape[1])
        first, second = found.chunk(2, dim=1)
        sines, cosines = (second, first) if self.flipped else (first, second)
        torch.sin(angles, out=sines)
        torch.cos(angles, out=cosines)
        return found


class _TimeOnce(nn.Module):
    """The activation of the time embedding, once for all blocks, and what their projections make of it."""

    def __init__(self, act: nn.Module, shared: Shared, whose: Callable[[], object]) -> None:
        super().__init__()
        self.act, self.shared, self.whose = act, shared, whose

    def forward(self, emb: Tensor) -> Tensor:
        emb = self.act(emb)
        self.shared.give(emb, self.whose())
        return emb


def time_once(unet: Any, whose: Callable[[], object]) -> Shared | None:
    """Let the residual blocks of `unet` share the time embedding; None where they do not all do the same.

    `whose()`: the pass that is being made.
    """
    from diffusers.models.embeddings import Timesteps
    from diffusers.models.resnet import ResnetBlock2D

    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    if unet.time_embed_act is not None or not blocks:
        return None
    if not all(type(block.nonlinearity) is nn.SiLU and not block.skip_time_act for block in blocks):
        return None
    units = [[block.time_emb_proj] for block in blocks]
    if not fit_together(units):
        return None
    shared = Shared(units)
    proj = unet.time_proj
    if type(proj) is Timesteps and proj.scale == 1 and proj.num_channels % 2 == 0:
        unet.time_proj = _Times(proj, blocks[0].time_emb_proj.base_layer.weight.device)
    unet.time_embed_act = _TimeOnce(blocks[0].nonlinearity, shared, whose)
    for block in blocks:
        block.skip_time_act = True
    return shared


def join_attention(unet: Any) -> tuple[list[Together], Shared | None]:
    """Give the attentions of `unet` our processor: q, k and v together of each, k and v of all contexts."""
    from diffusers.models.attention_processor import Attention as Diffusers

    found = [module for module in unet.modules() if isinstance(module, Diffusers) and _plain(module)]
    own = [attn for attn in found if not attn.is_cross_attention]
    own = [attn for attn in own if fit_together([[attn.to_q, attn.to_k, attn.to_v]])]
    together = [Together([[attn.to_q, attn.to_k, attn.to_v]]) for attn in own]
    for attn, layers in zip(own, together, strict=True):
        attn.processor = Attention(attn.processor, layers)
    cross = [attn for attn in found if attn.is_cross_attention]
    units = [[attn.to_k, attn.to_v] for attn in cross]
    if not fit_together(units):
        return together, None
    shared = Shared(units)
    for attn in cross:
        attn.processor = Attention(attn.processor)
    return together, shared
