"""How the frozen UNet is held: 4 or 8 bits, memory format; and the optimizer.

What is float32 stays so: the consistency mathematics is elementwise, which TF32 (matrix products and
convolutions only) does not touch, and the LoRA's weights are added later, in float32 (`AdaptedUNet`).

With `memory.quantize` the LoRA is trained on top of rounded weights and is then used, as every exported
LoRA, on the full ones: QLoRA's practice (arXiv:2305.14314). Of a trained UNet (asset:tiny-sd) the output
moves by 9% with nf4 and 0.2% with int8 (relative, L2, measured on a CPU). On a GPU int8 rounds activations as
well; what that adds is not measured. Teacher, target and student share the same rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from lcm_kit import bases
from lcm_kit.bases import BaseInfo
from lcm_kit.config import schema
from lcm_kit.config.evaluation import Speed
from lcm_kit.errors import UserError, first_line

# Kept in full. The two embeddings are 2% of a UNet's linear weights, but all layers see their output: rounded
# to nf4 they move tiny-sd's output by 9%, as much as all the rest together does
_KEPT = ("time_embedding", "add_embedding")
_MULTIPLE = 16  # of both widths: what int8 tensor cores take; all widths of real bases are multiples of 64
LR_FACTOR = "lr_factor"  # of an optimizer's group: its rate divided by optimizer.lr


def load_unet(base: BaseInfo, config: schema.Training, device: torch.device, dtype: torch.dtype) -> Any:
    """The UNet of `base` as `config.memory` and `config.gradient_checkpointing` say: frozen, in eval mode.

    `dtype` is that of its weights; of quantised layers that of their arithmetic. Its attention is diffusers'
    default, `torch.nn.functional.scaled_dot_product_attention`. Raises `UserError` where the device or the
    installation cannot do what is asked.
    """
    if config.memory.quantize != "none":
        _probe_layer(config.memory.quantize, device)  # before gigabytes are read
    return place(bases.load_unet(base, dtype), config, device)


def place(unet: Any, config: schema.Training | Speed, device: torch.device) -> Any:
    """Make `unet`, on the CPU and without adapters, what `load_unet` returns; changes it and returns it."""
    memory = config.memory
    if memory.quantize != "none":
        _probe_layer(memory.quantize, device)
        _quantize(unet, memory.quantize, device)
    unet.to(device)
    if memory.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    _allow_tf32(device, memory.tf32)
    return unet


def _allow_tf32(device: torch.device, on: bool) -> None:
    """CUDA only: nothing global changes for a run on another device."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = on
        torch.backends.cudnn.allow_tf32 = on


# -- 4 and 8 bits --------------------------------------------------------------------------------------------


def quantizable(name: str, module: nn.Module) -> bool:
    """Whether `memory.quantize` holds this module of a UNet in few bits: linear, not an embedding, not odd.

    Convolutions, conv_in and conv_out among them, stay: bitsandbytes has linear layers only.
    """
    if type(module) is not nn.Linear or any(part in _KEPT for part in name.split(".")):
        return False
    return module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0


def _quantize(unet: Any, kind: str, device: torch.device) -> None:
    """Replace linear layers one by one, so that no more than one is there in both forms."""
    names = [name for name, module in unet.named_modules() if quantizable(name, module)]
    if not names:
        raise UserError(
            f"memory.quantize {kind}: this UNet has no linear layer that is a multiple of {_MULTIPLE} wide; "
            "set memory.quantize to none"
        )
    for name in names:
        unet.set_submodule(name, _quantized(unet.get_submodule(name), kind, device))
    # peft looks here to make its layers for bitsandbytes, which refuse to be merged wrongly
    setattr(unet, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)


def _quantized(layer: nn.Linear, kind: str, device: torch.device) -> Any:
    """`layer` in few bits on `device`, where bitsandbytes rounds; frozen. Takes the weight out of `layer`."""
    bnb = _bitsandbytes(f"memory.quantize {kind}")
    from lcm_kit.bases import few_bits

    shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
    new: Any
    if kind == "nf4":
        # with double quantisation: the blocks' scales in 8 bits as well
        new = few_bits.Linear4bit(
            *shape, bias=bias, quant_type="nf4", compute_dtype=layer.weight.dtype, device="meta"
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
        )
        # On CPUs with AVX512-BF16 a pass without gradient would repack the weights for inference, in bfloat16
        new.support_avx512bf16_for_cpu = False
    else:
        # threshold 0: no columns are left out by what a batch holds, so that a sample's output does not hang
        # on its neighbours, the device is not waited for, and torch.compile has nothing to decide
        new = few_bits.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=0.0, device="meta")
        new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    new = new.to(device).requires_grad_(False)
    layer.weight = None  # type: ignore[assignment]
    if kind == "int8":
        new.init_8bit_state()  # its scales, which a forward reads
    return new.eval()


def _probe_layer(kind: str, device: torch.device) -> None:
    """A small layer there and back: raises `UserError` if bitsandbytes cannot do `kind` on `device`."""
    key = f"memory.quantize {kind}"
    _bitsandbytes(key)
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(64, 64)
        x = torch.randn(4, 64)
    expected = layer(x).detach()
    try:
        new = _quantized(layer, kind, device)
        with torch.enable_grad():  # whatever the caller is in
            x = x.to(device).requires_grad_()
            y = new(x)
            y.sum().backward()
        error = float((y.detach().cpu() - expected).norm() / expected.norm())
        fault = "" if error < 0.25 and x.grad is not None else f"a trial layer is off by {error:.0%}"
    except Exception as reason:  # a missing kernel is of any kind
        fault = first_line(reason)
    if fault:
        raise UserError(f"{key} does not work on this {device.type} device ({fault}); set it to none")


# -- Optimizer -----------------------------------------------------------------------------------------------


def make_optimizer(
    parameters: Iterable[Any], config: schema.Optimizer, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over `parameters` (float32, or groups of them), fused on CUDA and CPU alike, or in 8 bits.

    adamw8bit keeps the moments of tensors of fewer than 4096 values in float32. Raises `UserError` where
    bitsandbytes is missing or has no kernel for the device.
    """
    settings: dict[str, Any] = {
        "lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay,
    }  # fmt: skip
    if config.name == "adamw8bit":
        kind = _bitsandbytes("optimizer.name adamw8bit").optim.AdamW8bit
        _probe_optimizer(kind, device)
        return kind(parameters, **settings)
    if device.type in ("cuda", "cpu"):  # 556 tensors on a CPU: 0.03 s for 0.14
        settings["fused"] = True
    return torch.optim.AdamW(parameters, **settings)


def set_rates(optimizer: Any, rate: float) -> None:
    """Set the learning rate of every group of `optimizer`: `rate`, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(LR_FACTOR, 1.0)


def _probe_optimizer(kind: Any, device: torch.device) -> None:
    weight = Parameter(torch.zeros(64, 64, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        kind([weight], lr=1.0).step()
        off = float((weight.detach() + 1).abs().max())  # Adam's first step is -lr
        fault = "" if off < 0.1 else "a trial step is wrong"
    except Exception as reason:
        fault = first_line(reason)
    if fault:
        raise UserError(
            f"optimizer.name adamw8bit does not work on this {device.type} device ({fault}); set it to adamw"
        )


def _bitsandbytes(key: str) -> Any:
    """The library, loaded only when it is asked for. Raises `UserError` if it is not there."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"{key} needs bitsandbytes; pip install 'lcm-kit[quantize]'") from error
    except Exception as error:  # a library of another CUDA
        raise UserError(
            f"{key} needs bitsandbytes, which does not load here ({first_line(error)}); install another"
        ) from error
    return bitsandbytes
