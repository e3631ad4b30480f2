"""A pipeline folder that transformers 4 reads as well as 5.

transformers 5 saves a CLIPTextModel without `text_model.` in front of its tensors and a tokenizer as
tokenizer.json alone. Version 4 then makes up every weight of the text encoder, with no more than a warning,
and finds no vocabulary; version 5 reads what version 4 wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lcm_kit.bases.source import read_json
from lcm_kit.io.files import atomic_file, atomic_write

_TOPS = ("embeddings.", "encoder.", "final_layer_norm.")


def make_readable(folder: Path) -> None:
    """Respell text encoders and tokenizers of the pipeline in `folder` as transformers 4 writes them."""
    for part in ("text_encoder", "text_encoder_2"):
        for file in sorted((folder / part).glob("*.safetensors")):
            _respell(file)
        for index in sorted((folder / part).glob("*.index*.json")):
            content = read_json(index, str(folder))
            content["weight_map"] = {_spelled(key): name for key, name in content["weight_map"].items()}
            atomic_write(index, json.dumps(content, indent=2) + "\n")
    for part in ("tokenizer", "tokenizer_2"):
        if (folder / part / "tokenizer.json").is_file() and not (folder / part / "vocab.json").is_file():
            _write_vocabulary(folder / part)


def _spelled(key: str) -> str:
    return f"text_model.{key}" if key.startswith(_TOPS) else key


def _respell(file: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as opened:
        keys, header = list(opened.keys()), opened.metadata()
        if all(key == _spelled(key) for key in keys):
            return
        tensors = {_spelled(key): opened.get_tensor(key) for key in keys}
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata=header)


def _write_vocabulary(tokenizer: Path) -> None:
    """vocab.json and merges.txt of tokenizer.json, as CLIP published its own."""
    model: dict[str, Any] = read_json(tokenizer / "tokenizer.json", str(tokenizer.parent))["model"]
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    atomic_write(tokenizer / "merges.txt", "".join(f"{line}\n" for line in ("#version: 0.2", *merges)))
    atomic_write(tokenizer / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
