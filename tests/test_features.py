"""Feature extractors against transformers' own models and image processors, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.evaluation.metrics.features import PROBE, Extractor, extractor
from lcm_kit.tiny.probe import load_probe
from tests.bases import _tokenizer

VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save(folder: Path, kind: str) -> Any:
    """A random model of `kind` with its image processor and tokenizer; returns the processor."""
    import transformers as t

    torch.manual_seed(0)
    folder.mkdir()
    tokenizer, ends = _tokenizer(folder)
    text = {**VISION, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **ends}
    if kind == "clip":
        vision = {**VISION, "image_size": 32, "patch_size": 8}
        model: Any = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        crop = {"height": 32, "width": 32}
        processor: Any = t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop)
    elif kind == "siglip":
        vision = {**VISION, "image_size": 24, "patch_size": 8}
        words = {**text, "projection_size": 16}
        model = t.SiglipModel(t.SiglipConfig(text_config=words, vision_config=vision))
        processor = t.SiglipImageProcessorPil(size={"height": 24, "width": 24})
    else:
        model = t.Dinov2Model(t.Dinov2Config(image_size=28, patch_size=7, mlp_ratio=2, **{
            key: value for key, value in VISION.items() if key != "intermediate_size"
        }))  # fmt: skip
        processor = t.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 28, "width": 28})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind != "dinov2":
        tokenizer.save_pretrained(folder)
    return processor


def pictures(side: int = 48) -> Tensor:
    """Two pictures with detail at all sizes, 8 bits."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), dtype=np.uint8)
    return torch.from_numpy(np.stack([
        np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC)) for each in noise
    ]))  # fmt: skip


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_pictures_are_seen_as_transformers_sees_them(kind: str, tmp_path: Path) -> None:
    import transformers as t

    processor = save(tmp_path / "model", kind)
    raw = pictures()
    inputs = processor([Image.fromarray(each.numpy()) for each in raw], return_tensors="pt")["pixel_values"]
    model = t.AutoModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        look = model if kind == "dinov2" else model.get_image_features
        output = look(pixel_values=inputs)
    found = extractor(str(tmp_path / "model")).images(raw.permute(0, 3, 1, 2) / 127.5 - 1)
    # PIL rounds to 8 bits between its two directions of the resize, torch does not
    assert torch.nn.functional.cosine_similarity(found, output.pooler_output).min() > 0.9999
    assert float((found - output.pooler_output).abs().max() / output.pooler_output.abs().max()) < 0.02


def test_texts_and_their_score(tmp_path: Path) -> None:
    import transformers as t

    save(tmp_path / "model", "clip")
    seer = extractor(str(tmp_path / "model"))
    prompts = ["a red fox", "a picture a"]
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (t.CLIPModel, t.AutoTokenizer))
    for prompt, found in zip(prompts, seer.texts(prompts), strict=True):  # alone: no padding at all
        with torch.no_grad():
            alone = model.get_text_features(**tokenizer(prompt, return_tensors="pt")).pooler_output[0]
        assert torch.allclose(found, alone, atol=1e-5)
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [-2.0, 1.0]])
    assert Extractor.similarity(a, b).tolist() == pytest.approx([100.0, 0.0])


def test_dinov2_and_the_probe_read_no_text(tmp_path: Path) -> None:
    save(tmp_path / "model", "dinov2")
    assert extractor(str(tmp_path / "model")).texts(["a"]) is None
    probe = extractor(PROBE)
    pixels = pictures(64).permute(0, 3, 1, 2) / 127.5 - 1
    assert probe.texts(["a"]) is None
    assert torch.equal(probe.images(pixels), load_probe().features(pixels))


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_a_model_that_lacks_a_tensor_or_is_a_pickle_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers fills what is missing with random numbers, and would open a pickle."""
    folder = tmp_path / "model"
    save(folder, kind)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in sorted(tensors) if name.endswith("norm1.weight"))
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 of its tensors are not in its files, as .*norm1"):
        extractor(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no file named model.safetensors|cannot be loaded"):
        extractor(str(folder))


def test_what_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    import transformers as t

    with pytest.raises(UserError, match=r"'nobody/nothing'.*check the name, or use asset:probe"):
        extractor("nobody/nothing")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = t.BertConfig(**small, vocab_size=9)
    t.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="is a bert model; give one of clip"):
        extractor(str(tmp_path / "bert"))
    with pytest.raises(UserError, match="needs torch-fidelity"):
        extractor("inception")
