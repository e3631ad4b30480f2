"""The LoRA on a UNet: add it, turn it off for the teacher, read and write its weights.

One UNet plays all parts: with the adapter on it is the student, with the adapter off (`with teacher(unet):`)
it is the base, bit for bit, and with an average of the LoRA weights (`with swapped(...)`) it is an EMA
target. The teacher can have a style LoRA, frozen, which the student then has too or has not (`add_style`).
The base's text encoders can have a LoRA that is trained with it, as one adapter (`join`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lcm_kit import own_files, provenance
from lcm_kit.config import schema
from lcm_kit.errors import UserError
from lcm_kit.families import lora_targets
from lcm_kit.files import atomic_folder

NAME = "default"  # peft's name of the adapter that is trained
STYLE = "style"  # and of the teacher's
WEIGHTS, FACTS = "lora.safetensors", "adapter.json"  # the files of an adapter folder


def add_lora(unet: Any, config: schema.Adapter, *, seed: int = 0) -> list[Parameter]:
    """Add a LoRA of `config` to `unet`, freeze everything else and return the LoRA's parameters.

    They are float32 master weights whatever the base's dtype: in bfloat16 most updates at a usual learning
    rate are lost in rounding. B starts at zero, so the output is the base's at first; A is drawn from
    `seed`, and the global random state is left as it was. Raises `ValueError` if `unet` has an adapter
    already.
    """
    from peft import LoraConfig

    targets = lora_targets(config.targets)
    return _add(unet, LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets), seed)


def _add(unet: Any, config: Any, seed: int, name: str = NAME) -> list[Parameter]:
    """Inject by peft itself: diffusers' and transformers' `add_adapter` each want a peft of their own choice.

    (transformers 5.24 one that is not published yet.)
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if name in getattr(unet, "peft_config", {}):
        raise ValueError(f"the model has an adapter {name!r} already; add a LoRA to one that has none")
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, unet, name)
    unet._hf_peft_config_loaded = True  # so that diffusers and transformers know of it, as after their own
    # Kept, because walking all of SD1.5's modules in every step would cost more than flipping 278 flags.
    unet._lora_layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    for layer in unet._lora_layers:
        layer.set_adapter(name)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    if getattr(unet, "_style_in_student", False):
        for layer in unet._lora_layers:
            layer._active_adapter = [STYLE, NAME]
    return parameters


def add_style(
    unet: Any, layers: Mapping[str, tuple[Tensor, Tensor, float]], *, in_student: bool = False
) -> None:
    """Give the teacher a LoRA: (down, up, alpha) by module of `unet`; to be called before `add_lora`.

    It is frozen. `in_student`: the student has it too, under the LoRA that is trained; else it is the
    teacher's alone. Raises `UserError` if a module is missing or a shape does not fit.
    """
    from peft import LoraConfig

    ranks = {name: int(down.shape[0]) for name, (down, _, _) in layers.items()}
    alphas = {name: alpha for name, (_, _, alpha) in layers.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(layers),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
    )  # fmt: skip
    _add(unet, config, seed=0, name=STYLE)
    state = {f"{name}.lora_A.weight": down for name, (down, _, _) in layers.items()}
    state |= {f"{name}.lora_B.weight": up for name, (_, up, _) in layers.items()}
    load_lora_state(unet, state, STYLE)
    unet.requires_grad_(False)
    unet._style_in_student = in_student


def add_text_lora(
    encoder: Any, modules: Sequence[str], rank: int, alpha: float, *, seed: int
) -> list[Parameter]:
    """Add a LoRA to the named `modules` of a text encoder of transformers; otherwise as `add_lora`."""
    from peft import LoraConfig

    return _add(encoder, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules)), seed)


def join(unet: Any, encoders: Mapping[str, Any]) -> None:
    """Make the LoRAs of text encoders (by part, as `text_encoder`) and of `unet` one adapter.

    Then they are off together (`teacher`), and are saved, restored and averaged together.
    """
    unet._text_encoders = dict(encoders)
    unet._lora_layers = [*unet._lora_layers, *(x for e in encoders.values() for x in e._lora_layers)]


def text_encoders(unet: Any) -> dict[str, Any]:
    """The text encoders that were joined to `unet`, by part; none if none were."""
    return getattr(unet, "_text_encoders", {})


def named_parameters(unet: Any) -> Iterator[tuple[str, Parameter]]:
    """The parameters of `unet`, then those of its text encoders, named as `lcm_kit.export.lora` names them.

    Except that the UNet's own have no part in front.
    """
    yield from unet.named_parameters()
    for part, encoder in text_encoders(unet).items():
        for name, p in encoder.named_parameters():
            # transformers 5 dropped `text_model.` from CLIPTextModel; files have it
            yield f"{part}.text_model.{name.removeprefix('text_model.')}", p


def trained_parameters(unet: Any) -> list[Parameter]:
    """The parameters that are trained, in the order of `lora_state`."""
    return [p for _, p in named_parameters(unet) if p.requires_grad]


@contextlib.contextmanager
def teacher(unet: Any, *, styled: bool = True) -> Iterator[None]:
    """Within the block `unet` is its base, bitwise, or if `styled` its base with the teacher's LoRA.

    With no such LoRA (`add_style`) it is the base either way.

    Afterwards, also after an exception, it is what it was before. Only peft's flags in each LoRA layer are
    set (1 ms for the 278 of SD1.5): its own `disable_adapter` is 80 times slower and changes `requires_grad`.
    A backward, and what it recomputes, must not run inside the block.
    """
    layers = unet._lora_layers
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            if styled and STYLE in layer.lora_A:
                layer._active_adapter = [STYLE]
            else:
                layer._disable_adapters = True
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


@contextlib.contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Within the block `parameters` hold `values`; then, also after an exception, their own storage again.

    References are exchanged and nothing is copied: the parameters stay the same objects, and the versions
    that autograd counts on the live weights do not change. The block is for passes under `torch.no_grad`.
    """
    live = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value.data
        yield
    finally:
        for p, data in zip(parameters, live, strict=True):
            p.data = data


@torch.no_grad()
def update_ema(average: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """In place: average = decay * average + (1 - decay) * parameters."""
    torch._foreach_lerp_(list(average), [p.data for p in parameters], 1.0 - decay)


def _named(unet: nn.Module, adapter: str = NAME) -> dict[str, Parameter]:
    """The LoRA's parameters by raw peft key (`...to_q.lora_A.weight`), without the adapter's name."""
    name = f".{adapter}."
    return {key.replace(name, "."): p for key, p in named_parameters(unet) if ".lora_" in key and name in key}


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """A float32 copy of the LoRA's weights on the CPU, under raw peft keys (no `unet.` prefix).

    Those of text encoders have their part in front: `text_encoder.text_model...q_proj.lora_A.weight`.
    """
    return {key: p.detach().float().cpu().clone().contiguous() for key, p in _named(unet).items()}


def load_lora_state(unet: nn.Module, state: Mapping[str, Tensor], adapter: str = NAME) -> None:
    """Copy `state` (as `lora_state` gives it) into the LoRA of `unet`.

    Raises `UserError` unless keys and shapes are exactly the LoRA's: weights that fit in part are wrong
    weights.
    """
    named = _named(unet, adapter)
    wrong = sorted(named.keys() ^ state.keys()) or [k for k, p in named.items() if p.shape != state[k].shape]
    if wrong:
        raise UserError(
            f"LoRA weights do not fit this UNet: {len(wrong)} keys differ, such as {wrong[0]}; use the base "
            "and the rank that they were trained with"
        )
    with torch.no_grad():
        for key, p in named.items():
            p.copy_(state[key])


def lora_config(unet: Any) -> dict[str, Any]:
    """The LoRA's peft config as JSON-ready values, sets as sorted lists: metadata that diffusers reads."""
    config = unet.peft_config[NAME].to_dict()
    return json.loads(json.dumps(config, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def save_adapter(folder: Path, unet: Any, facts: provenance.Provenance) -> None:
    """Write `lora.safetensors` (`lora_state`) and `adapter.json`: how it was made, and peft's configs."""
    texts = {part: lora_config(encoder) for part, encoder in text_encoders(unet).items()}
    with atomic_folder(folder) as temporary:
        own_files.write_tensors(temporary / WEIGHTS, lora_state(unet))
        own_files.write_json(temporary / FACTS, provenance.trained(facts, lora_config(unet), texts))


def read_facts(folder: Path) -> provenance.Trained:
    """`adapter.json` of an adapter folder.

    Raises `UserError` if the folder holds no finished adapter, or one of a kit that says more.
    """
    if not (folder / FACTS).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: there is no trained adapter; run `lcm-kit train` to its end first")
    return own_files.read_json(folder / FACTS, provenance.Trained, _again(folder))


def base_of(facts: provenance.Trained) -> dict[str, Any]:
    """`path`, `revision` and `variant` of the base that an adapter was trained on."""
    base = facts.base
    return {"path": base.path, "revision": base.revision, "variant": base.variant}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of an adapter folder, as `lora_state` gave them. Raises `UserError` if they are damaged."""
    return own_files.read_tensors(folder / WEIGHTS, _again(folder))


def _again(folder: Path) -> str:
    """What makes an adapter folder anew: that of a run, or of the steps of it that were best."""
    if folder.name == "adapter":
        run, then = folder.parent, "makes it anew from the last state"
    else:
        run, then = folder.parent.parent, "keeps another step's weights"
    return f"remove {folder} and run `lcm-kit train {run / 'config.yaml'}`, which {then}"


def load_adapter(folder: Path, unet: Any) -> provenance.Trained:
    """Add the adapter that `save_adapter` wrote to `unet` (which has none) and return its facts.

    What it holds for text encoders is left out.
    """
    from peft import LoraConfig

    facts = read_facts(folder)
    said = facts.lora_config
    config = LoraConfig(r=said["r"], lora_alpha=said["lora_alpha"], target_modules=said["target_modules"])
    _add(unet, config, seed=0)
    state = read_weights(folder)
    load_lora_state(unet, {key: t for key, t in state.items() if not key.startswith("text_encoder")})
    return facts
