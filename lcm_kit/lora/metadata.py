"""What a LoRA file says of itself: the string metadata of a safetensors header, in the keys that apps read.

Three families of keys. `ss_*` is kohya's (sd-scripts, `train_network.py`; A1111 and Forge tell the base by
`ss_base_model_version` and `ss_v2`, and a name by `ss_output_name`: `extensions-builtin/Lora/network.py`).
`modelspec.*` is Stability AI's ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec). `lcm_kit.*` holds
what only this kit knows. What is not known has no key.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lcm_kit import samplers
from lcm_kit.config.resolution import width_height
from lcm_kit.core.methods import METHODS, MethodInfo
from lcm_kit.lora import inherited
from lcm_kit.lora.layers import Lora
from lcm_kit.lora.metadata_reading import PREFIX, REST, sampler_name, without_none_strings
from lcm_kit.lora.provenance import Data, Guidance, Provenance, Recommended
from lcm_kit.lora.structure import Structure

VERSION = "1"  # of the keys under PREFIX
CONVENTION = (
    "diffusers' guidance_scale, where 1 means no guidance; the LCM paper's w (arXiv:2310.04378) is "
    "guidance_scale - 1"
)
_SGM = "https://github.com/Stability-AI/generative-models"
# A maker's own words, which a converted file keeps; the second row speaks for a few-step LoRA better itself
_KEPT = (
    "ss_clip_skip", "ss_tag_frequency", "modelspec.author", "modelspec.license", "modelspec.tags",
    "modelspec.trigger_phrase", "modelspec.encoder_layer",
)  # fmt: skip
_KEPT_IF_PLAIN = ("modelspec.description", "modelspec.usage_hint")


def build(lora: Lora, structure: Structure, facts: Provenance, *, style: str = "kohya") -> dict[str, str]:
    """The metadata of a file that holds `lora`, in `style` ("kohya" or "diffusers").

    What `lora.metadata` says of author, licence, trigger words and the like is kept. The hashes are not in
    it: they need the tensors as they are written (`tensor_hash`).
    """
    kept = _KEPT + (_KEPT_IF_PLAIN if facts.method.name is None else ())
    return {
        **_kohya(lora, structure, facts),
        **_modelspec(structure, facts, style),
        **{PREFIX + key: value for key, value in _own(facts).items()},
        **_rest(facts),
        PREFIX + "modules": str(len(lora.layers)),
        **{key: value for key, value in without_none_strings(lora.metadata).items() if key in kept},
    }


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of what follows the header in a safetensors file of `tensors`.

    ModelSpec has it as `modelspec.hash_sha256` ("0x" in front), sd-scripts and A1111 as `sshs_model_hash`
    (sd-scripts, `library/train_util.py`, `addnet_hash_safetensors`).
    """
    digest = hashlib.sha256()
    for name in _file_order(tensors):
        content = tensors[name].detach().cpu().contiguous()
        digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """safetensors sorts by dtype and name; a file with one element for each tensor tells how."""
    from safetensors.torch import save

    small = save({name: torch.empty(1, dtype=tensor.dtype) for name, tensor in tensors.items()})
    header = json.loads(small[8 : 8 + int.from_bytes(small[:8], "little")])
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def _known(**values: Any) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value is not None}


def _kohya(lora: Lora, structure: Structure, facts: Provenance) -> dict[str, str]:
    asked = facts.data.resolution
    return _known(
        ss_base_model_version=_base_version(structure),
        ss_v2=structure.generation.kohya_v2,
        ss_network_module="networks.lora",
        **_sizes(lora),
        ss_output_name=facts.title,
        ss_sd_model_name=_public(facts.base.path),
        ss_resolution=asked and "({}, {})".format(*width_height(asked)),
        **_buckets(facts.data),
        ss_steps=facts.optimizer_steps,
    )


def _buckets(data: Data) -> dict[str, str]:
    """Shapes as sd-scripts tells of them (`library/train_util.py`, make_buckets): width, height, pictures."""
    if not data.shapes:
        return {}
    buckets = {
        str(k): {"resolution": size, "count": data.shapes[f"{size[0]}x{size[1]}"]}
        for k, size in enumerate(data.sizes)
    }
    return {"ss_enable_bucket": "True", "ss_bucket_info": json.dumps({"buckets": buckets})}


def _base_version(structure: Structure) -> str:
    """By sd-scripts: `library/model_util.py`, get_model_version_str_for_sd1_sd2, and `sdxl_model_util.py`."""
    return structure.generation.kohya_version[structure.prediction_type == "v_prediction"]


def _sizes(lora: Lora) -> dict[str, str]:
    """Rank and alpha; sd-scripts' `conv_dim` and `conv_alpha` are those of the kernels above 1x1.

    "Dynamic" where they differ by module, as sd-scripts' `networks/resize_lora.py` and `merge_lora.py` write
    it. Nothing reads these keys back: sd-scripts and the apps take ranks and alphas from the tensors.
    """

    def is_conv(shape: tuple[int, ...]) -> bool:
        return math.prod(shape[2:]) > 1

    conv = [layer for layer in lora.layers.values() if is_conv(layer.shape)]
    plain = [layer for layer in lora.layers.values() if not is_conv(layer.shape)] or conv
    found = {}
    if plain:
        found["ss_network_dim"] = _common(layer.rank for layer in plain)
        found["ss_network_alpha"] = _common(float(layer.alpha) for layer in plain)
    if conv:
        sizes = {
            "conv_dim": _common(layer.rank for layer in conv),
            "conv_alpha": _common(float(layer.alpha) for layer in conv),
        }
        found["ss_network_args"] = json.dumps(sizes)
    return found


def _common(values: Iterable[float]) -> str:
    different = set(values)
    return str(different.pop()) if len(different) == 1 else "Dynamic"


def _modelspec(structure: Structure, facts: Provenance, style: str) -> dict[str, str]:
    size = width_height(facts.data.resolution or structure.resolution)
    prediction = structure.prediction_type
    keys = _known(
        sai_model_spec="1.0.1",
        architecture=_architecture(structure),
        implementation=_SGM if style == "kohya" and structure.family.kohya_original else "diffusers",
        title=facts.title,
        description=_description(structure, facts),
        date=facts.date,
        resolution=f"{size[0]}x{size[1]}",
        prediction_type="v" if prediction == "v_prediction" else prediction,
        usage_hint=_usage_hint(structure, facts),
        trigger_phrase=facts.data.trigger,
        license=inherited.sentence(facts),
        merged_from=", ".join(facts.parents) if len(facts.parents) > 1 else None,
    )
    return {f"modelspec.{key}": value for key, value in keys.items()}


def _architecture(structure: Structure) -> str | None:
    """One of ModelSpec's names. Where a generation has two, it is unknown if the prediction type is."""
    known = structure.generation.modelspec
    if structure.prediction_type is None and len(set(known)) > 1:
        return None
    return f"{known[structure.prediction_type == 'v_prediction']}/lora"


def _description(structure: Structure, facts: Provenance) -> str:
    label = structure.generation.title
    base = _public(facts.base.path) or label
    if info := facts.distilled:
        steps = "" if facts.optimizer_steps is None else f" in {facts.optimizer_steps} optimizer steps"
        text = f"A LoRA for few-step sampling with {base}, distilled by {_method(info)}{steps}."
    else:
        text = f"A LoRA for {base}."
    if not structure.published:
        text += (
            f" Its base is a {label} in small, with text embeddings of width {structure.width}: it fits none "
            "of the published bases."
        )
    return text


def _method(info: MethodInfo) -> str:
    """Within a sentence: a name of the kit's by its letters, or of another method its title."""
    letters = info.name.upper()
    short = info.name in METHODS and letters in info.title
    return letters if short or info.title == info.name else info.title


def _usage_hint(structure: Structure, facts: Provenance) -> str | None:
    if facts.recommended is not None and facts.recommended.steps is not None:
        use = facts.recommended
        return (
            f"Sampler {sampler_name(use)}, {use.steps} steps, guidance_scale / CFG {use.guidance_scale:g}"
            f"{_baked(facts.guidance)}. LoRA strength {use.lora_weight:g}. "
            + (f"Measured for {use.part} alone" if use.part else "Chosen by measurement")
            + (f" at {use.at} pixels." if use.at else ".")
            + _instead(use.sampler)
        )
    info = facts.distilled
    if info is None:
        return (
            "Sampler, steps and guidance_scale / CFG as usual for its base, unless its maker says otherwise. "
            "LoRA strength 1.0, less for a weaker effect."
        )
    if not info.samplers:
        return None
    hint = (
        f"Sampler {_samplers(info)}, {_steps(info)}, guidance_scale / "
        f"CFG {info.usual_guidance:.1f}{_baked(facts.guidance)}. LoRA strength 1.0."
    )
    if info.guidance_scale is not None:
        hint += " Negative prompts work."
    if structure.prediction_type == "v_prediction":
        zsnr = "on" if structure.zero_terminal_snr else "off"
        lcm = "; A1111's LCM sampler is for epsilon bases only, Forge's is not" * (info.sampler == "lcm")
        hint += (
            " The base predicts v: in ComfyUI add ModelSamplingDiscrete with sampling v_prediction and zsnr "
            f"{zsnr}{lcm}."
        )
    return hint + _instead(info.sampler)


def _instead(sampler: str | None) -> str:
    found = samplers.sampler_of(sampler).instead if sampler else None
    return f" {found}" if found else ""


def _steps(info: MethodInfo) -> str:
    """`4 steps (1 to 8)`, or `4 steps (no other number)` where a method serves one alone."""
    one = " (no other number)" if info.only_steps else ""
    n = info.usual_steps
    return f"{n} step{'s'[: n != 1]}{_range(info, ' ({} to {})')}{one}"


def _samplers(info: MethodInfo) -> str:
    """`LCM (TCD also works), scheduler / schedule type Simple`."""
    first, *others = (samplers.sampler_of(name).name_in_apps for name in info.samplers)
    also = f" ({' and '.join(others)} also {'works' if len(others) == 1 else 'work'})" if others else ""
    schedule = samplers.sampler_of(info.sampler).schedule
    return f"{first}{also}{f', scheduler / schedule type {schedule}' if schedule else ''}"


def _range(info: MethodInfo, form: str) -> str:
    """The least and the most steps that a method serves, in `form`; nothing where they are one number."""
    low, high = min(info.judged_steps), max(info.judged_steps)
    return form.format(low, high) if low != high else ""


def _baked(guidance: Guidance | None) -> str:
    if guidance is None:
        return ""
    low, high = guidance.min, guidance.max
    if high <= 1:
        return ": no guidance is baked in"
    return (
        f": the guidance of {low} is baked in"
        if low == high
        else f": the guidance of {low} to {high} is baked in"
    )


def _own(facts: Provenance) -> dict[str, str]:
    baked, info = facts.guidance, facts.distilled
    fast = info is not None and bool(info.samplers)
    return (
        {"metadata": VERSION}
        | _known(
            method=facts.method.name,
            steps=facts.optimizer_steps,
            guidance_min=baked and baked.min,
            guidance_max=baked and baked.max,
            guidance_convention=CONVENTION if baked else None,
            base=_public(facts.base.path),
            base_hash=facts.base.hash,
            data_fingerprint=facts.data.fingerprint,
            kit_version=facts.kit_version,
            parents=json.dumps(facts.parents) if facts.parents else None,
            sampling_steps=(_range(info, "{}-{}") or info.usual_steps) if info and fast else None,
            sampling_guidance_scale=f"{info.usual_guidance:g}" if info and fast else None,
        )
        | _measured(facts.recommended)
    )


# Sections, or their fields, that have keys of their own; the others are in `REST`, but for the path of a
# method's Python file, which tells about its owner's machine
_KEYED: dict[str, tuple[str, ...]] = {
    "base": ("path", "hash"), "method": ("name", "path"), "data": ("fingerprint", "resolution", "trigger"),
}  # fmt: skip
_KEYED_WHOLE = ("kit_version", "date", "step", "guidance", "recommended", "parents")


def _rest(facts: Provenance) -> dict[str, str]:
    """The one key of all that no other key has, `facts.provenance_from_header` puts both together again."""
    rest = {key: value for key, value in facts.to_json().items() if key not in _KEYED_WHOLE}
    for section, names in _KEYED.items():
        kept = {key: value for key, value in rest.pop(section, {}).items() if key not in names}
        if kept:
            rest[section] = kept
    return {REST: json.dumps(_published(rest), sort_keys=True)} if rest else {}


def _published(value: Any) -> Any:
    """Of a JSON value, with the names alone of what lies in folders."""
    if isinstance(value, dict):
        return {
            key: _public(each) if key in ("path", "prompts") and isinstance(each, str) else _published(each)
            for key, each in value.items()
        }
    return [_published(each) for each in value] if isinstance(value, list) else value


def _measured(use: Recommended | None) -> dict[str, str]:
    """What a sweep recommends, in place of what holds for the method in general."""
    if use is None:
        return {}
    if use.steps is None:
        return {"recommended": use.sentence}
    return {
        "sampler": str(use.sampler), "sampling_steps": str(use.steps), "lora_weight": f"{use.lora_weight:g}",
        "sampling_guidance_scale": f"{use.guidance_scale:g}", "recommended": use.sentence,
        **_known(recommended_for=use.part or None, recommended_at=use.at or None),
    }  # fmt: skip


def _public(base: str | None) -> str | None:
    """A hub id or an asset as it is, of a folder its name alone: a path tells about its owner's machine."""
    if base is None or base.startswith("hub:"):
        return base
    parts = [part for part in re.split(r"[/\\]", base) if part]
    is_path = base[0:1] in ("/", "~", ".") or "\\" in base or len(parts) > 2
    return parts[-1] if is_path and parts else base
