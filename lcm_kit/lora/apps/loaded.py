"""What an app makes of a LoRA file, and the pieces that the apps' rules share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from lcm_kit.lora.names import sgm_names
from lcm_kit.lora.structure import Shape, Structure

NOT_JUDGED = "not judged"  # a remark: what the app does is known of neither its code nor a trial
_NO_REMARKS: Mapping[str, str] = MappingProxyType({})


class Loaded(NamedTuple):
    """What an app would change, by our names for the modules that it would change for real."""

    modules: dict[str, float]  # module -> what the app multiplies the update with: alpha / rank for a LoRA
    unmatched: list[str]  # keys of the file that have no effect
    refused: str | None = None  # why the app takes nothing of the file, in words; then `modules` is empty
    remarks: Mapping[str, str] = _NO_REMARKS  # module that it changes -> how not as the file means it


class Taken(NamedTuple):
    """The keys that an app takes for one module, by the role that they have at the end of a kohya key."""

    kind: str  # one of NEEDS, or "bias"
    keys: Mapping[str, str]  # role -> the file's key


# What makes an update of each kind: the roles that it needs, and those that it may have
NEEDS: dict[str, tuple[str, ...]] = {
    "LoRA": ("lora_up.weight", "lora_down.weight"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": (),  # `_lokr`
    "full difference": ("diff",),
    "norm": ("w_norm",),
}
MAY: dict[str, tuple[str, ...]] = {
    "LoRA": ("lora_mid.weight",),
    "LoHa": ("hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "full difference": ("diff_b",),
    "norm": ("b_norm",),
}
ROLES = (
    *(role for roles in (*NEEDS.values(), *MAY.values()) for role in roles),
    "alpha",
    "dora_scale",
    "scale",
)


def take(keys: Mapping[str, str], kinds: Sequence[str], extra: Sequence[str] = ()) -> Taken | None:
    """The first of `kinds` whose keys are all there; None if none is. `extra`: what else the app reads."""
    for kind in kinds:
        whole = _lokr(keys) if kind == "LoKr" else all(role in keys for role in NEEDS[kind])
        if whole:
            roles = (*NEEDS[kind], *MAY[kind], "alpha", *extra)
            return Taken(kind, {role: keys[role] for role in roles if role in keys})
    return None


def bias(keys: Mapping[str, str]) -> Taken | None:
    """The change of a bias alone."""
    return Taken("bias", {"diff_b": keys["diff_b"]}) if "diff_b" in keys else None


def _lokr(keys: Mapping[str, str]) -> bool:
    """Both factors, each whole or as two thin ones."""
    return all(f"lokr_{w}" in keys or {f"lokr_{w}_a", f"lokr_{w}_b"} <= keys.keys() for w in ("w1", "w2"))


def refusal(tensors: Mapping[str, Tensor], reason: str) -> Loaded:
    """Nothing of the file is loaded."""
    return Loaded({}, list(tensors), reason)


def load(
    tensors: Mapping[str, Tensor],
    taken: Mapping[str, Taken],
    also_used: Iterable[str] = (),
    remarks: Mapping[str, str] = _NO_REMARKS,
) -> Loaded:
    """The strengths of `taken`: alpha / rank, and 1.0 without alpha, on which all apps agree.

    `also_used`: keys that have an effect without being a module's.
    """
    for one in taken.values():
        if odd := _no_rank(tensors, one):
            words = f"it stops at {odd}, which has no rank or an alpha of several numbers"
            return refusal(tensors, words)
    used = {key for one in taken.values() for key in one.keys.values()} | set(also_used)
    return Loaded(
        {module: strength(tensors, one) for module, one in taken.items()},
        [key for key in tensors if key not in used],
        None,
        remarks,
    )


def _no_rank(tensors: Mapping[str, Tensor], taken: Taken) -> str | None:
    """The key whose rank is asked for and that has none, or whose alpha or scale is no number."""
    rank = _rank_key(taken)
    numbers = [tensors[taken.keys[role]] for role in ("alpha", "scale") if role in taken.keys]
    if rank is not None and (not tensors[rank].ndim or not tensors[rank].shape[0]):
        return rank
    return (rank or next(iter(taken.keys.values()))) if any(n.numel() != 1 for n in numbers) else None


def strength(tensors: Mapping[str, Tensor], taken: Taken) -> float:
    """A `.scale` where the app reads it, else alpha / rank, else 1.0; a full difference has no rank."""
    if "scale" in taken.keys:
        return float(tensors[taken.keys["scale"]])
    rank = _rank_key(taken)
    if rank is None or "alpha" not in taken.keys:
        return 1.0
    return float(tensors[taken.keys["alpha"]]) / int(tensors[rank].shape[0])


def _rank_key(taken: Taken) -> str | None:
    """The key whose first size is the rank; of LoKr the second factor's, as LyCORIS has it."""
    roles = {"LoRA": ("lora_down.weight",), "LoHa": ("hada_w1_b",), "LoKr": ("lokr_w2_b", "lokr_w1_b")}
    return next((taken.keys[role] for role in roles.get(taken.kind, ()) if role in taken.keys), None)


# -- DoRA ----------------------------------------------------------------------------------------------------

LEFT_OUT = "leaves DoRA's magnitudes out"
BY_INPUT = "takes DoRA's magnitudes of the outputs for those of the inputs"
BASE_NORM = "divides DoRA's magnitudes by the base's norm, not by that of the sum"


def dora_remarks(
    tensors: Mapping[str, Tensor],
    taken: Mapping[str, Taken],
    modules: Mapping[str, tuple[int, ...]],
    words: str,
) -> dict[str, str]:
    """`words` for each module whose DoRA is by output: a magnitude for each row of its weight.

    The other form, a magnitude for each column, is what all apps that read DoRA apply exactly.
    """
    found = {}
    for module, one in taken.items():
        if (key := one.keys.get("dora_scale")) is not None and tensors[key].shape[:1] == modules[module][:1]:
            found[module] = words
    return found


# -- Names ---------------------------------------------------------------------------------------------------


def targets(tensors: Mapping[str, Tensor], structure: Structure) -> dict[str, Shape]:
    """The modules that a file can change; norms only where its keys name any, for they take time to find."""
    norms = structure.norms if any("norm" in key for key in tensors) else {}
    return {**structure.modules, **structure.projections, **norms}


def original(structure: Structure, modules: Iterable[str]) -> dict[str, str]:
    """Our name of each of the UNet's `modules` -> the original (sgm) spelling."""
    unet = [name.removeprefix("unet.") for name in modules if name.startswith("unet.")]
    spelled = structure.sgm if len(unet) == len(structure.unet) else sgm_names(unet)  # the first is kept
    return {f"unet.{name}": sgm for name, sgm in spelled.items()}


def joined(dotted: str) -> str:
    """The name with `_` for each dot."""
    return dotted.replace(".", "_")


def groups(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The keys by what stands before their first dot: name -> rest -> key."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        name, _, rest = key.partition(".")
        found.setdefault(name, {})[rest] = key
    return found


def bundled(key: str) -> bool:
    """Whether it is of a textual embedding that the file brings with it."""
    return key.startswith("bundle_emb.")
