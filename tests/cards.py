"""Model cards for tests: what goes into one, and how to read one as GitHub and the hub do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import save_file

from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.provenance import Base, Data, Guidance, Method, Provenance
from lcm_kit.lora.structure import Structure
from tests.loras import lcm_modules
from tests.measured import cell, results

HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5"
HOSTILE = 'a|b"c: [x]'
WORSE = HOSTILE + " `d` ``` <b>e</b> *f* _g_ \\ & {{h}} {% i %} # !\n```\n---\n| j |"
BAKED = Guidance(3.0, 8.5)
BOTH = {"diffusers": Path("pytorch_lora_weights.safetensors"), "kohya": Path("house.safetensors")}


def facts(
    base: str = HUB, base_hash: str = "ab12", method: str | None = "lcm", data: Data | None = None,
    guidance: Guidance | None = BAKED, **more: Any,
) -> Provenance:  # fmt: skip
    return Provenance(
        "house", Base(base, base_hash), method=Method(method), step=2000, guidance=guidance,
        data=data or Data("cd34", 512), date="2026-01-31T23:59:58Z", kit_version="0.2.0", **more,
    )  # fmt: skip


def hollow(
    structure: Structure, modules: list[str] | None = None, rank: int = 64, alpha: float = 32.0
) -> Lora:
    """A LoRA with shapes and no weights."""
    layers = {}
    for name in modules or lcm_modules(structure):
        out, *inner = structure.modules[name]
        ones = (1,) * (len(inner) - 1)
        shapes = (rank, *inner), (out, rank, *ones)
        layers[name] = Layer(*(torch.empty(shape, device="meta") for shape in shapes), alpha)
    return Lora(layers)


def front(page: str) -> dict[str, Any]:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", page, re.DOTALL)[1])


def body(page: str) -> str:
    return re.sub(r"^---\n.*?\n---\n", "", page, count=1, flags=re.DOTALL)


def section(page: str, heading: str) -> str:
    """The text below a heading, without line breaks."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return "" if found is None else " ".join(found[1].split())


def tokens(page: str) -> list[Any]:
    """The card as CommonMark and the tables of GitHub read it."""
    return MarkdownIt("commonmark").enable("table").parse(body(page))


def shown(inline: Any) -> str:
    """What a reader sees of an inline token."""
    return "".join(" " if child.type == "softbreak" else child.content for child in inline.children or ())


def headings(page: str) -> list[str]:
    parsed = tokens(page)
    return [shown(parsed[k + 1]) for k, token in enumerate(parsed) if token.type == "heading_open"]


def tables(page: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = []
    for token, following in zip(all_ := tokens(page), [*all_[1:], None], strict=True):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open"):
            found[-1][-1].append(shown(following))
    return found


def snippets(page: str) -> list[str]:
    return [t.content for t in tokens(page) if t.type == "fence" and t.info == "python"]


def evaluated(run: Path, **changed: Any) -> dict[str, Any]:
    """Results of one teacher, plain cells and two students, with pictures of one colour each."""
    (run / "pictures").mkdir(parents=True)

    def row(kind: str, sampler: str, steps: int, guidance: float, right: float, shade: int) -> dict[str, Any]:
        files = [f"pictures/{kind}-{sampler}-{steps}-{k}.png" for k in range(3)]
        for k, file in enumerate(files):
            Image.new("RGB", (16, 12), (shade, 40 * k, 0)).save(run / file)
        figures = {
            "seconds": 0.1 * steps, "pixel_distance": 0.02 * shade, "saturation": 0.987, "clipped": 0.0,
            "prompt_adherence": (right, right - 0.03, right + 0.01), "frechet_biased": 1 - right + 0.0123,
        }  # fmt: skip
        adapter = "student" if kind == "student" else None
        return {**cell(kind, sampler, steps, guidance, adapter, **figures | changed), "pictures": files}

    cells = [
        row("teacher", "ddim", 50, 5.0, 0.99, 10), row("plain", "ddim", 2, 5.0, 0.31, 20),
        row("plain", "dpmpp_2m", 4, 1.0, 0.62, 30), row("plain", "ddim", 8, 1.0, 0.71, 40),
        row("student", "lcm", 4, 1.0, 0.94, 50), row("student", "lcm", 2, 1.0, 0.83, 60),
    ]  # fmt: skip
    return results(
        "evaluation/quality", cells, ["a red fox", HOSTILE, "an owl", "a boat"], frechet_floor=0.0411
    )


def save(lora: Lora, structure: Structure, folder: Path, style: str) -> Path:
    """Write `lora` by hand in one of the formats."""
    tensors, header = {}, None
    for name, layer in lora.layers.items():
        if style == "diffusers":
            tensors |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
        else:
            key = structure.kohya[name]
            tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
            tensors |= {f"{key}.alpha": torch.tensor(layer.alpha)}
    if style == "diffusers":
        modules = [name.removeprefix("unet.") for name in lora.layers]
        about = {"unet.r": 4, "unet.lora_alpha": 8.0, "unet.target_modules": modules}
        header = {"lora_adapter_metadata": json.dumps(about)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / BOTH[style], metadata=header)
    return BOTH[style]
