"""LoRA files of any header, keys, shapes, values and metadata: read to numbers, or refused."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lcm_kit.errors import UserError
from lcm_kit.lora import convert, metadata, reading, structure, untrusted, verify
from lcm_kit.lora.apps import able
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.spelling import BUNDLED
from tests.fuzz.doors import answer, anything, check_sentence, fuzz, numbers, text

SD1 = structure.known("sd1")
# Small ones, so that many can be tried
NAMES = [
    "unet.conv_in",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
]
_ROLES = """
    lora_A.weight lora_B.weight lora_A.default.weight lora_down.weight lora_up.weight lora_mid.weight
    lora.down.weight lora.up.weight alpha scale lora.alpha hada_w1_a hada_w1_b hada_w2_a hada_w2_b
    hada_t1 lokr_w1 lokr_w2 lokr_w1_a lokr_w1_b lokr_t2 diff diff_b w_norm b_norm dora_scale
    lora_magnitude_vector lora_B.bias oft_blocks a1.weight on_input weight
"""
ROLES = st.sampled_from([*_ROLES.split(), ""])
PREFIXES = st.sampled_from(
    (
        "",
        "lora_unet_",
        "unet.base_model.model.",
        "base_model.model.",
        "lora_te_",
        "bundle_emb.",
        "transformer.",
    )
)
DTYPES = st.sampled_from([*untrusted.DTYPES.values()])
_HEADERS = """
    lora_adapter_metadata ss_network_alpha ss_network_args ss_output_name ss_sd_model_name ss_resolution
    ss_base_model_version ss_steps ss_tag_frequency modelspec.architecture modelspec.merged_from
    modelspec.date modelspec.title modelspec.resolution modelspec.trigger_phrase lcm_kit.metadata
    lcm_kit.modules lcm_kit.base lcm_kit.method lcm_kit.steps lcm_kit.guidance_min lcm_kit.guidance_max
    lcm_kit.parents lcm_kit.provenance format
"""
HEADERS = st.sampled_from(_HEADERS.split())
SETTINGS = st.dictionaries(
    st.sampled_from(
        (
            "unet.r",
            "unet.lora_alpha",
            "unet.alpha",
            "unet.alpha_pattern",
            "unet.rank_pattern",
            "unet.use_rslora",
            "unet.init_lora_weights",
            "conv_alpha",
            "conv_dim",
            "text_encoder.r",
        )
    ),
    st.one_of(
        numbers,
        st.dictionaries(st.one_of(text, st.sampled_from(("to_q", "a*", "to_[qk]"))), anything, max_size=2),
        anything,
    ),
    max_size=4,
)
VALUES = st.sampled_from((1.0, 1.0, 0.5, -1.0, 8.0, 0.0, math.nan, math.inf, 1e30))
SAID = st.dictionaries(
    st.one_of(HEADERS, text),
    st.one_of(
        text, numbers.map(str), SETTINGS.map(json.dumps), anything.map(json.dumps), st.just("[" * 5000)
    ),
    max_size=5,
)


def _filled(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> torch.Tensor:
    return torch.full(shape, value if dtype.is_floating_point else 1.0, dtype=torch.float64).to(dtype)


# Roles of one module that belong together, by the shapes of a weight [out, *inner] and a rank
KINDS: list[Callable[[int, list[int], int], dict[str, tuple[int, ...]]]] = [
    lambda out, inner, r: {
        "lora_down.weight": (r, *inner),
        "lora_up.weight": (out, r, *[1] * (len(inner) - 1)),
        "alpha": (),
    },
    lambda out, inner, r: {"lora_A.weight": (r, *inner), "lora_B.weight": (out, r, *[1] * (len(inner) - 1))},
    lambda out, inner, r: {"diff": (out, *inner)},
    lambda out, inner, r: {"lokr_w1": (2, 2), "lokr_w2": (out // 2, inner[0] // 2, *inner[1:]), "alpha": ()},
    lambda out, inner, r: {
        "hada_w1_a": (out, r),
        "hada_w1_b": (r, math.prod(inner)),
        "hada_w2_a": (out, r),
        "hada_w2_b": (r, math.prod(inner)),
    },
    lambda out, inner, r: {},
]


@st.composite
def modules(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of a module or more: what belongs together, in a style, now and then with something wrong."""
    found: dict[str, torch.Tensor] = {}
    spelled = draw(st.sampled_from((lambda name: f"{name}.", lambda name: f"{SD1.kohya.get(name, name)}.")))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(NAMES))
        out, *inner = SD1.modules[name]
        for role, shape in draw(st.sampled_from(KINDS))(
            out, inner, draw(st.sampled_from((1, 1, 2, 0)))
        ).items():
            dtype = draw(st.one_of(st.just(torch.float32), st.just(torch.float16), DTYPES))
            found[spelled(name) + role] = _filled(shape, dtype, draw(VALUES))
    for _ in range(draw(st.sampled_from((0, 0, 1, 2)))):
        name = draw(st.one_of(st.sampled_from(NAMES), text))
        key = draw(PREFIXES) + draw(st.sampled_from((name, name.replace(".", "_")))) + "." + draw(ROLES)
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=5)))
        found[draw(st.one_of(st.just(key), st.sampled_from(sorted(found) or [key])))] = _filled(
            shape, draw(DTYPES), draw(VALUES)
        )
    return found


def plausible(found: reading.Reading) -> None:
    """What a reading promises of a file that is whole, and that its words act on no terminal when shown."""
    for words in (*found.findings, *found.problems):
        check_sentence(str(UserError(words)))
    if found.problems:
        return
    for name, update in found.lora.updates.items():
        assert name in SD1.sizes and math.isfinite(update.scale), (name, update.scale)
    for app in able(SD1):
        check_sentence(str(UserError(verify._app_row(app, found).verdict)))
    told = provenance_from_header(found.lora.metadata, "title")
    if found.lora.layers:
        said = metadata.build(found.lora, SD1, told)
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in said.items())
    convert.own_dtype(found)


@fuzz(
    st.tuples(modules(), SAID),
    small=50,
    large=5000,
    examples=[
        ({"lora_unet_x.alpha": torch.tensor(1.0)}, {"ss_network_args": "[" * 100_000}),
    ],
)
def test_any_keys_shapes_and_metadata(
    folder: Path, given: tuple[dict[str, torch.Tensor], dict[str, str]]
) -> None:
    tensors, said = given
    path = folder / "a.safetensors"
    try:
        save_file(tensors, path, {key: value for key, value in said.items()})
    except Exception:  # what safetensors does not write is not read either
        return
    found = answer(lambda: reading.read(path, SD1), str(path))
    if isinstance(found, reading.Reading):
        plausible(found)
        answer(lambda: convert.read_complete(path, verify.Against(SD1)), str(path))


JSON = st.dictionaries(
    st.one_of(text, st.just("__metadata__")),
    st.one_of(
        anything,
        st.fixed_dictionaries(
            {
                "dtype": st.one_of(st.sampled_from([*untrusted.DTYPES]), anything),
                "shape": st.one_of(st.lists(st.integers(0, 3), max_size=5), anything),
                "data_offsets": st.one_of(st.tuples(st.integers(0, 9), st.integers(0, 9)), anything),
            }
        ),
    ),
    max_size=4,
)


@fuzz(
    st.tuples(
        st.one_of(
            JSON.map(lambda made: json.dumps(made).encode()), st.binary(max_size=60), text.map(str.encode)
        ),
        st.binary(max_size=16),
    ),
    small=50,
    large=5000,
)
def test_any_header(folder: Path, given: tuple[bytes, bytes]) -> None:
    header, data = given
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    found = answer(lambda: untrusted.read(path), str(path))
    if not isinstance(found, UserError):
        tensors, said = found
        assert untrusted.inspect(path).metadata == said
        assert sum(tensor.nbytes for tensor in tensors.values()) == len(data)


WHOLE = save(
    {
        f"{NAMES[0]}.lora_A.weight": torch.ones(1, 3),
        f"{BUNDLED}a.b": torch.zeros(2),
        "x.alpha": torch.tensor(2.0),
    },
    {"ss_network_alpha": "4", "lora_adapter_metadata": '{"unet.r": 1}'},
)


@fuzz(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    small=60,
    large=5000,
)
def test_any_bytes_changed(folder: Path, changes: list[tuple[int, int]]) -> None:
    broken, path = bytearray(WHOLE), folder / "a.safetensors"
    for place, value in changes:
        broken[place] = value
    path.write_bytes(broken)
    answer(lambda: reading.read(path, SD1), str(path))
