"""From any key that is in circulation to the module it means: the parser behind reading and fixing.

A key is a module and a role. The module may be in diffusers' or the original spelling, with dots or with
underscores, behind any of the prefixes that trainers put in front; the role (down, up, alpha, ...) in any of
seven styles. Sources: diffusers `loaders/lora_conversion_utils.py` and `utils/state_dict_utils.py`, peft
`get_peft_model_state_dict`, sd-scripts `networks/lora.py`, ComfyUI `comfy/weight_adapter/lora.py`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lcm_kit.lora.names import sgm_names
from lcm_kit.lora.structure import Structure

# Role of a key by its ending: (pattern, style). The first that fits counts.
_ENDINGS = [
    (re.compile(r"(?P<module>.+)\.lora_(?P<role>A|B)(?:\.\w+)?\.weight"), "peft"),
    (re.compile(r"(?P<module>.+)\.lora_(?P<role>down|up|mid)\.weight"), "kohya"),
    (re.compile(r"(?P<module>.+)\.lora\.(?P<role>down|up)\.weight"), "lora.down/up"),
    (re.compile(r"(?P<module>.+)_lora\.(?P<role>down|up)\.weight"), "processor"),
    (re.compile(r"(?P<module>.+)\.lora_linear_layer\.(?P<role>down|up)\.weight"), "lora_linear_layer"),
    (re.compile(r"(?P<module>.+?)(?:\.lora|_lora)?\.(?P<role>alpha|scale)"), ""),
    (re.compile(r"(?P<module>.+)\.(?P<role>hada_(?:w[12]_[ab]|t[12]))(?:\.\w+)?"), "LyCORIS"),
    (re.compile(r"(?P<module>.+)\.(?P<role>lokr_(?:w[12](?:_[ab])?|t2))(?:\.\w+)?"), "LyCORIS"),
    (re.compile(r"(?P<module>.+)\.(?P<role>diff|diff_b|w_norm|b_norm|dora_scale)"), "LyCORIS"),
    (re.compile(r"(?P<module>.+)\.(?P<role>lora_magnitude_vector)(?:\.\w+)?"), "peft"),
    (re.compile(r"(?P<module>.+)\.lora_(?P<role>B|up)(?:\.\w+)?\.bias"), "bias"),
]
_ROLES = {"A": "down", "B": "up"}
STRENGTHS = ("alpha", "scale")  # roles of keys that carry no weights
# What is read of no module, or not read at all, by what the keys hold
_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft": "BOFT",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".a1.weight": "GLoRA",
    "on_input": "IA3",
    "_norm": "norm weights",
    ".diff": "full differences",
    "bias": "biases",
    "set_weight": "whole weights",
}
BUNDLED = "bundle_emb."  # textual inversions that some trainers put into the file of their LoRA
# `base_model.model.` is peft's own wrapper, which must be taken off before saving
_WRAPPERS = ("base_model.model.", "model.")


class Key(NamedTuple):
    """A key of a file, taken apart; `module` is still as the file spells it."""

    module: str
    role: str  # down, up, mid, bias, alpha, scale, or LyCORIS's and peft's own word
    style: str  # peft, kohya, lora.down/up, processor, lora_linear_layer, LyCORIS; "" for a strength


class Place(NamedTuple):
    """The module that a key means, and how it was spelled."""

    name: str  # with its part, as in `lcm_kit.lora.layers`
    spelling: str  # dotted, sgm dotted, joined, sgm joined
    wrapped: bool  # `base_model.model.` stood in front
    processor: bool  # `.processor` stood within


def take_apart(key: str) -> Key | None:
    """The module, role and style of a key; None if it is not one of a LoRA."""
    for pattern, style in _ENDINGS:
        if match := pattern.fullmatch(key):
            role = "bias" if style == "bias" else match["role"]
            return Key(match["module"], _ROLES.get(role, role), style)
    return None


def other_kind(key: str) -> str | None:
    """What else than a LoRA the key belongs to, or None."""
    return next((kind for mark, kind in _OTHER_KINDS.items() if mark in key), None)


class Speller:
    """Looks modules up in the names of one base."""

    def __init__(self, structure: Structure) -> None:
        """Build the tables of joined names: an underscore does not tell what it stood for."""
        norms = [name.removeprefix("unet.") for name in structure.norms if name.startswith("unet.")]
        unet = [*structure.unet, *norms]
        sgm = sgm_names(unet)
        self._unet: dict[str, dict[str, str]] = {
            "dotted": {name: name for name in unet},
            "sgm dotted": {spelled: name for name, spelled in sgm.items()},
            "joined": {name.replace(".", "_"): name for name in unet},
            "sgm joined": {spelled.replace(".", "_"): name for name, spelled in sgm.items()},
        }
        self._text: dict[str, dict[str, str]] = {}
        for name in structure.sizes:
            part, _, module = name.partition(".")
            if part != "unet":
                table = self._text.setdefault(part, {})
                for form in (module, module.removeprefix("text_model.")):
                    table |= {form: name, form.replace(".", "_"): name}

    def find(self, module: str) -> Place | None:
        """The module that `module` means, or None if the base has none such."""
        plain, processor = re.subn(r"\.processor(?=\.|$)", "", module)
        wrapped = "base_model.model." in plain
        for part, rest in self._parts(plain):
            for wrapper in _WRAPPERS:
                rest = rest.removeprefix(wrapper)
            if part == "unet":
                if found := self._in_unet(rest):
                    return Place(f"unet.{found[0]}", found[1], wrapped, bool(processor))
            elif name := self._text.get(part, {}).get(rest):
                return Place(name, "dotted" if "." in rest else "joined", wrapped, bool(processor))
        return None

    def _in_unet(self, module: str) -> tuple[str, str] | None:
        # legacy attention processors had `to_out_lora` for what is `to_out.0`
        for form in (module, f"{module}.0"):
            for spelling, table in self._unet.items():
                if name := table.get(form):
                    return name, spelling
        return None

    @staticmethod
    def _parts(module: str) -> list[tuple[str, str]]:
        """(part, rest) that the prefix of a module says, or what to try where it says nothing."""
        for wrapper in _WRAPPERS:
            module = module.removeprefix(wrapper)
        for prefix, part in _PREFIXES.items():
            if module.startswith(prefix):
                return [(part, module.removeprefix(prefix))]
        return [("unet", module), ("text_encoder", module)]


_PREFIXES = {
    "unet.": "unet",
    "diffusion_model.": "unet",
    "lora_unet_": "unet",
    "lycoris_unet_": "unet",
    "lycoris_": "unet",
    "text_encoder_2.": "text_encoder_2",
    "lora_te2_": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
}
