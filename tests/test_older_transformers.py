"""What `merge --fuse-into` writes is read by transformers 4 as well as 5: tensors and tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcm_kit import assets
from lcm_kit.lora.merge_files import fuse
from lcm_kit.lora.older_transformers import make_readable


def _of_version_4(family: str) -> set[str]:
    """How the tensors of a CLIPTextModel are called there (transformers 4.57.1, a model of one layer)."""
    layer = ("self_attn.k_proj", "self_attn.q_proj", "layer_norm2", "mlp.fc1")
    return {f"text_model.encoder.layers.0.{name}.weight" for name in layer} | {
        "text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.bias",
    } | ({"text_projection.weight"} if family == "text_encoder_2" else set())  # fmt: skip


def test_text_encoders_and_tokenizers_of_both(sdxl_base: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = Path(shutil.copytree(sdxl_base, tmp_path / "base"))
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    before = {part: kind.from_pretrained(folder / part).state_dict() for part, kind in kinds.items()}
    make_readable(folder)
    for part, kind in kinds.items():
        keys = set(load_file(folder / part / "model.safetensors"))
        assert keys >= _of_version_4(part) and len(keys) == len(before[part])
        assert all(key.startswith(("text_model.", "text_projection.")) for key in keys)
        after = kind.from_pretrained(folder / part).state_dict()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before[part].items())
    vocabulary = (folder / "tokenizer_2" / name for name in ("vocab.json", "merges.txt"))
    own = CLIPTokenizer.from_pretrained(sdxl_base / "tokenizer_2")
    assert CLIPTokenizer(*map(str, vocabulary))("a cab.").input_ids == own("a cab.").input_ids


def test_pieces_and_their_index(sdxl_base: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(sdxl_base / "text_encoder")
    encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
    make_readable(tmp_path)
    index = json.loads((tmp_path / "text_encoder" / "model.safetensors.index.json").read_text())
    for key, name in index["weight_map"].items():
        assert key.startswith("text_model.") and key in load_file(tmp_path / "text_encoder" / name)
    again = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("times", [1, 2])
def test_the_verb_writes_such_a_folder(times: int, tmp_path: Path) -> None:
    """Fused into what was fused: what is spelled so stays so."""
    base = "asset:tiny-sd"
    for k in range(times):
        fuse([(assets.path("tiny-lcm-lora"), 0.5)], base, tmp_path / str(k))
        base = str(tmp_path / str(k))
    merges = (Path(base) / "tokenizer" / "merges.txt").read_text().splitlines()
    own = json.loads((assets.path("tiny-sd") / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert json.loads((Path(base) / "tokenizer" / "vocab.json").read_text()) == own["vocab"]
    assert merges[0] == "#version: 0.2" and [line.split() for line in merges[1:]] == own["merges"]
    before = load_file(assets.path("tiny-sd") / "text_encoder" / "model.safetensors")
    after = load_file(Path(base) / "text_encoder" / "model.safetensors")
    assert after.keys() == {f"text_model.{key}" for key in before}
    assert all(torch.equal(after[f"text_model.{key}"], tensor) for key, tensor in before.items())


def test_a_folder_that_could_not_be_finished_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill between the weights and the tokenizer; it was refused afterwards as there already."""
    from lcm_kit.lora import merge_files

    parts, output = [(assets.path("tiny-lcm-lora"), 1.0)], tmp_path / "fused"

    def stop(folder: Path) -> None:
        assert (folder / "unet").is_dir() and not output.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merge_files, "make_readable", stop)
        fuse(parts, "asset:tiny-sd", output)
    assert list(tmp_path.iterdir()) == []
    fuse(parts, "asset:tiny-sd", output)
    assert [path.name for path in tmp_path.iterdir()] == ["fused"] and (output / "fused.json").is_file()
