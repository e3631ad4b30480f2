"""A UNet and all that hangs on it: what is trained, by name, and the frozen LoRA of its teacher.

One UNet plays all parts: with what is trained it is the student, without it (`with adapted.teacher():`) the
base, bit for bit, and with an average of what is trained (`trained_weights.swapped`) an EMA target. Several
things can be trained on one UNet, one at a time in use: LoRAs, each under a name of its own, and the UNet's
own weights in place of the first. The teacher can have a LoRA, which the student then has too or has not.
The base's text encoders can have LoRAs that are trained with the UNet's, as one adapter (`join`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lcm_kit.adapter.fast_path import FastPath
from lcm_kit.adapter.trained_weights import Kind, Lora, OwnWeights, cpu_copy, fill
from lcm_kit.bases import lora_targets
from lcm_kit.config import schema

TRAINED = "adapter"  # the name of what a run trains and saves; peft has its LoRA under it
STYLE = "style"  # peft's name of the teacher's LoRA


class AdaptedUNet:
    """A UNet, frozen but for what is trained on it, of which one is in use: the first, or as `using` says.

    Until something is trained the UNet is its teacher. On the UNet itself lies nothing but peft's layers, and
    after `make_fast` their forward, attention and a hook of ours (`fast_path`).
    """

    def __init__(self, unet: Any) -> None:
        """`unet` has no adapter; it is changed in place and stays the model to call, as `self.unet`."""
        self.unet = unet
        self.text_encoders: dict[str, Any] = {}  # those that were joined, by part, as `text_encoder`
        self.in_use: str | None = None  # name of what is trained and in use; None: nothing is trained
        self._trained: dict[str, Kind] = {}
        self._on_teacher: set[str] = set()  # names of what is trained on top of the teacher's LoRA
        self._style_in_student = False
        # Kept, because walking all of SD1.5's modules in every step would cost more than flipping 278 flags.
        self._layers: list[Any] = []
        self._on: Sequence[str] = ()  # peft's names of the LoRAs that are on
        self._fast: FastPath | None = None

    # -- What hangs on it ------------------------------------------------------------------------------------

    def add_lora(
        self, config: schema.Adapter, *, name: str = TRAINED, seed: int = 0, on_teacher: bool = False
    ) -> list[Parameter]:
        """Add a LoRA of `config` that is trained under `name`, and return its parameters.

        `on_teacher`: where it is in use the teacher's LoRA is on too, whether or not the student has it. They
        are float32 master weights whatever the base's dtype: in bfloat16 most updates at a usual
        learning rate are lost in rounding. B starts at zero, so the output is the base's at first; A is drawn
        from `seed`, and the global random state is left as it was. Raises `ValueError` if the name is taken.
        """
        from peft import LoraConfig

        if name in self._trained:
            raise ValueError(f"something is trained as {name!r} already; give another name")
        self._still_slow()
        targets = lora_targets(config.targets)
        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
        _inject(self.unet, lora, name, seed)
        if on_teacher:
            self._on_teacher.add(name)
        return self._train(name, Lora(name))

    def train_own_weights(self, *, name: str = TRAINED) -> list[Parameter]:
        """Train all weights of the UNet itself, and return them; a frozen copy of them is the base.

        They become float32 and the copy keeps the base's dtype, so that the teacher is the base bit for bit.
        Weights that are sharded over processes have no such copy. Raises `ValueError` if something is trained
        already, which would lie on weights that move, or where weights are in few bits.
        """
        parameters = [p for key, p in self.unet.named_parameters() if ".lora_" not in key]
        if self._trained or not all(p.is_floating_point() for p in parameters):
            raise ValueError("the UNet's own weights are trained before all else, and not in few bits")
        kind = OwnWeights(parameters, [p.detach().clone() for p in parameters])
        for p in parameters:
            p.data = p.data.float()
        return self._train(name, kind)

    def _train(self, name: str, kind: Kind) -> list[Parameter]:
        self._trained[name] = kind
        self._arrange()
        return self.parameters(name)

    def add_teacher_lora(
        self, layers: Mapping[str, tuple[Tensor, Tensor, float]], *, in_student: bool = False
    ) -> None:
        """Give the teacher a LoRA, frozen: (down, up, alpha) by module of the UNet.

        `in_student`: the student has it too, under what is trained; else it is the teacher's alone. Raises
        `UserError` if a module is missing or a shape does not fit.
        """
        from peft import LoraConfig

        self._still_slow()
        ranks = {name: int(down.shape[0]) for name, (down, _, _) in layers.items()}
        alphas = {name: alpha for name, (_, _, alpha) in layers.items()}
        rank = max(set(ranks.values()), key=list(ranks.values()).count)
        alpha = max(set(alphas.values()), key=list(alphas.values()).count)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(layers),
            rank_pattern={name: r for name, r in ranks.items() if r != rank},
            alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        )  # fmt: skip
        _inject(self.unet, config, STYLE, seed=0)
        state = {f"{name}.lora_A.weight": down for name, (down, _, _) in layers.items()}
        state |= {f"{name}.lora_B.weight": up for name, (_, up, _) in layers.items()}
        fill(self._named(Lora(STYLE)), state)
        self._style_in_student = in_student
        self._arrange()

    def join(self, encoders: Mapping[str, Any]) -> None:
        """Make the LoRAs of text encoders (`add_text_lora`; by part, as `text_encoder`) part of the UNet's.

        Then they are off together, and are saved, restored and averaged together, under `TRAINED`.
        """
        self.text_encoders = dict(encoders)
        self._arrange()

    def make_fast(self) -> bool:
        """Train the UNet's LoRAs by our own forward (`fast_path`), from now on: after all were added.

        The same mathematics and the same parameters. Then the UNet, in half precision too, needs no autocast,
        and must not be moved. False, and nothing is changed, where it keeps peft's: where its own weights are
        trained, or it has no LoRA.
        """
        if self._fast or not self._layers:
            return self._fast is not None
        if any(isinstance(kind, OwnWeights) for kind in self._trained.values()):
            return False
        self._fast = FastPath(self.unet, _tuner_layers(self.unet), lambda: self._on)
        return True

    def gradient_bytes(self) -> set[int]:
        """Sizes of the tensors in which the gradients of what is trained come, for `lcm-kit plan`."""
        if self._fast:
            return {size for name in self._trained for size in self._fast.gradient_bytes(name)}
        return {p.nbytes for name in self._trained for p in self.parameters(name)}

    def _still_slow(self) -> None:
        if self._fast:
            raise ValueError("LoRAs are added before `make_fast`, not after it")

    def _arrange(self) -> None:
        """Find peft's layers, freeze all that is not trained, and turn on what is in use."""
        models = [self.unet, *self.text_encoders.values()]
        self._layers = [layer for model in models for layer in _tuner_layers(model)]
        trained = {id(p) for name in self._trained for p in self.parameters(name)}
        for p in self.unet.parameters():
            p.requires_grad_(id(p) in trained)
        self.in_use = next(iter(self._trained), None)
        self._turn_on(self._loras_of(self.in_use))

    # -- What is in use --------------------------------------------------------------------------------------

    def teacher(self, *, styled: bool = True) -> AbstractContextManager[None]:
        """Within the block the UNet is its base, bitwise, or if `styled` its base with the teacher's LoRA.

        With no such LoRA it is the base either way. Afterwards, also after an exception, it is what it was
        before. A backward, and what it recomputes, must not run inside the block.
        """
        return self._only(None, [STYLE] if styled else [])

    def using(self, name: str) -> AbstractContextManager[None]:
        """Within the block what is trained as `name` is in use, and nothing else that is trained.

        For passes with gradient and their backward alike. Raises `ValueError` for a name that is not there.
        """
        if name not in self._trained:
            raise ValueError(f"nothing is trained as {name!r}, only {', '.join(self._trained) or 'nothing'}")
        return self._only(name, self._loras_of(name))

    @contextmanager
    def _only(self, name: str | None, loras: Sequence[str]) -> Iterator[None]:
        """Only peft's flags in each LoRA layer are set for LoRAs (1 ms for the 278 of SD1.5).

        Its own `disable_adapter` is 80 times slower and changes `requires_grad`.
        """
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self._layers]
        used, on = self.in_use, self._on
        with ExitStack() as off:
            for other, kind in self._trained.items():
                if other != name:
                    off.enter_context(kind.off())
            try:
                self.in_use = name
                self._turn_on(loras)
                yield
            finally:
                self.in_use = used
                self._on = on
                for layer, (disabled, active) in zip(self._layers, before, strict=True):
                    layer._disable_adapters, layer._active_adapter = disabled, active

    def _loras_of(self, name: str | None) -> list[str]:
        """Peft's names of what is on where `name` is in use."""
        as_teacher = self._style_in_student or name is None or name in self._on_teacher
        return [*([STYLE] if as_teacher else []), *([name] if name else [])]

    def _turn_on(self, loras: Sequence[str]) -> None:
        self._on = loras
        for layer in self._layers:
            on = [lora for lora in loras if lora in layer.lora_A]
            layer._disable_adapters = not on
            if on:
                layer._active_adapter = on

    # -- Its weights -----------------------------------------------------------------------------------------

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of what is trained."""
        return tuple(self._trained)

    def named(self, name: str = TRAINED) -> dict[str, Parameter]:
        """The parameters that are trained as `name`, under raw peft keys (`...to_q.lora_A.weight`).

        The UNet's have no `unet.` in front; those of text encoders have their part, as
        `text_encoder.text_model...q_proj.lora_A.weight`: but for that as `lcm_kit.lora.layers` names them.
        They are other objects after weights were sharded.
        """
        return self._named(self._trained[name])

    def _named(self, kind: Kind) -> dict[str, Parameter]:
        keys = ((kind.key(name), p) for name, p in self._named_parameters())
        return {key: p for key, p in keys if key is not None}

    def _named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self.unet.named_parameters()
        for part, encoder in self.text_encoders.items():
            for name, p in encoder.named_parameters():
                # transformers 5 dropped `text_model.` from CLIPTextModel; files have it
                yield f"{part}.text_model.{name.removeprefix('text_model.')}", p

    def parameters(self, name: str = TRAINED) -> list[Parameter]:
        """The parameters that are trained as `name`, in the order of `state`."""
        return list(self.named(name).values())

    def state(self, name: str = TRAINED) -> dict[str, Tensor]:
        """A float32 copy on the CPU of the weights that are trained as `name`, by the keys of `named`.

        Whole where they are sharded over processes: all must call it then.
        """
        return {key: cpu_copy(p) for key, p in self.named(name).items()}

    def load_state(self, state: Mapping[str, Tensor], name: str = TRAINED) -> None:
        """Copy `state` (as `state` gives it) into the weights that are trained as `name`.

        Raises `UserError` unless keys and shapes are exactly theirs: weights that fit in part are wrong
        weights.
        """
        fill(self.named(name), state)

    def peft_configs(self) -> dict[str, Any]:
        """The peft config of the LoRA that a run trains, as JSON-ready values, sets as sorted lists.

        "lora_config", which diffusers reads as metadata, and where text encoders were joined
        "text_lora_config", theirs by part.
        """
        configs: dict[str, Any] = {"lora_config": _peft_config(self.unet)}
        if trained := {part: _peft_config(encoder) for part, encoder in self.text_encoders.items()}:
            configs["text_lora_config"] = trained
        return configs


def add_text_lora(
    encoder: Any, modules: Sequence[str], rank: int, alpha: float, *, seed: int
) -> list[Parameter]:
    """Add a LoRA to the named `modules` of a text encoder of transformers, and freeze all else of it.

    Its parameters are returned; otherwise as `AdaptedUNet.add_lora`.
    """
    from peft import LoraConfig

    encoder.requires_grad_(False)
    _inject(encoder, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules)), TRAINED, seed)
    return [p for p in encoder.parameters() if p.requires_grad]


def _inject(model: Any, config: Any, name: str, seed: int) -> None:
    """Inject by peft itself: diffusers' and transformers' `add_adapter` each want a peft of their own choice.

    (transformers 5.24 one that is not published yet.)
    """
    from peft import inject_adapter_in_model

    if name in getattr(model, "peft_config", {}):
        raise ValueError(f"the model has an adapter {name!r} already; add a LoRA to one that has none")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft warns of a second LoRA on one model, which is what is wanted here
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True  # diffusers' and transformers' own flag, as after their `add_adapter`
    for key, p in model.named_parameters():
        if Lora(name).key(key):
            p.data = p.data.float()


def _tuner_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _peft_config(model: Any) -> dict[str, Any]:
    config = model.peft_config[TRAINED].to_dict()
    return json.loads(json.dumps(config, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
