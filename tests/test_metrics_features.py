"""Preprocessing against transformers' PIL processors, SigLIP 2, Inception, and mistakes as sentences."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.evaluation.metrics.features import PROBE, Extractor, extractor
from lcm_kit.evaluation.metrics.preprocessing import preparation, pressed, seen, target
from tests.bases import _tokenizer

VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def random_pictures(height: int, width: int) -> np.ndarray:
    """[2, H, W, 3] 8 bits, every pixel on its own: the hardest for a resize, which overshoots everywhere."""
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


def pixels(raw: np.ndarray) -> Tensor:
    return torch.from_numpy(raw).permute(0, 3, 1, 2) / 127.5 - 1


def processors() -> dict[str, Any]:
    import transformers as t

    cut = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 36}}
    return {
        "clip": t.CLIPImageProcessorPil(**cut),
        "dinov2": t.BitImageProcessorPil(**cut, resample=2),
        "siglip": t.SiglipImageProcessorPil(size={"height": 33, "width": 40}),
        "siglip2": t.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20),
    }


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip", "siglip2"])
@pytest.mark.parametrize("size", [(64, 64), (40, 90), (384, 256), (20, 24)])  # smaller ones are enlarged
def test_inputs_are_those_of_the_pil_processor(kind: str, size: tuple[int, int]) -> None:
    processor, raw = processors()[kind], random_pictures(*size)
    wanted = processor([Image.fromarray(each) for each in raw], return_tensors="pt")
    found = preparation(kind, processor.to_dict())(pixels(raw))
    assert found.keys() == wanted.keys()
    level = 1 / 255 / min(processor.image_std)  # one of 255, once divided by the standard deviation
    off = (found["pixel_values"] - wanted["pixel_values"]).abs()
    assert float(off.max()) <= 2.01 * level
    assert float((off > 0.5 * level).float().mean()) < 0.04  # ties only
    assert float((off > 1e-5).float().mean()) < 0.04  # and nothing else differs at all
    for name in found.keys() - {"pixel_values"}:
        assert torch.equal(found[name], wanted[name].to(found[name].dtype)), name


def test_a_file_that_leaves_things_out_means_transformers_defaults() -> None:
    import transformers as t

    raw = random_pictures(60, 80)
    for kind, processor in (("clip", t.CLIPImageProcessorPil()), ("siglip", t.SiglipImageProcessorPil())):
        wanted = processor([Image.fromarray(each) for each in raw], return_tensors="pt")["pixel_values"]
        found = preparation(kind, {})(pixels(raw))["pixel_values"]
        assert found.shape == wanted.shape and float((found - wanted).abs().max()) < 0.016
    old = preparation("clip", {"size": 48, "crop_size": 40, "image_mean": None})(pixels(raw))
    assert old["pixel_values"].shape == (2, 3, 40, 40)
    plain = {"do_resize": False, "do_center_crop": False, "do_normalize": False}
    assert torch.allclose(
        preparation("clip", plain)(pixels(raw))["pixel_values"], (pixels(raw) + 1) / 2, atol=1e-6
    )


def siglip2(folder: Path) -> Any:
    """A random SigLIP 2 with its processor and a tokenizer."""
    import transformers as t

    torch.manual_seed(0)
    folder.mkdir()
    tokenizer, ends = _tokenizer(folder)
    text = {
        **VISION,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "projection_size": 16,
        **ends,
    }
    vision = {**VISION, "patch_size": 8, "num_patches": 16}
    model = t.Siglip2Model(t.Siglip2Config(text_config=text, vision_config=vision))
    processor = t.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20)
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    return processor


def test_a_size_in_one_number_is_the_shorter_edge_or_both() -> None:
    """As files of old versions have it: of CLIP the shorter edge, of SigLIP height and width."""
    assert target("clip", {"size": 224}, 300, 600) == (224, 448)
    assert target("clip", {"size": 224}, 600, 300) == (448, 224)
    assert target("siglip", {"size": 224}, 300, 600) == (224, 224)
    assert target("siglip", {"size": {"height": 96, "width": 64}}, 300, 600) == (96, 64)


def test_siglip2_sees_pictures_of_any_shape_as_transformers_does(tmp_path: Path) -> None:
    import transformers as t

    processor = siglip2(tmp_path / "model")
    model, seer = t.AutoModel.from_pretrained(tmp_path / "model"), extractor(str(tmp_path / "model"))
    raw = random_pictures(40, 64)
    tokens = t.AutoTokenizer.from_pretrained(tmp_path / "model")(
        ["a fox", "an owl"], padding="max_length", max_length=24, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(
            **processor([Image.fromarray(each) for each in raw], return_tensors="pt"),
            input_ids=tokens["input_ids"],
        )
    images, texts = seer.images(pixels(raw)), seer.texts(["a fox", "an owl"])
    assert texts is not None
    assert torch.allclose(torch.nn.functional.normalize(images), output.image_embeds, atol=5e-3)
    assert torch.allclose(torch.nn.functional.normalize(texts), output.text_embeds, atol=1e-5)
    cosines = (output.image_embeds * output.text_embeds).sum(1)
    score = seer.adherence(images, ["a fox", "an owl"])
    assert score.tolist() == pytest.approx((100 * cosines).clamp(min=0).tolist(), abs=0.3)


def test_dinov2_with_registers_and_a_nested_processor_file(tmp_path: Path) -> None:
    """transformers 5 may keep the processor's settings within processor_config.json."""
    import transformers as t

    torch.manual_seed(0)
    config = t.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, mlp_ratio=2
    )
    model = t.Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = t.BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": processor.to_dict()}, default=str)
    )
    raw = random_pictures(48, 48)
    with torch.no_grad():
        wanted = model(
            **processor([Image.fromarray(each) for each in raw], return_tensors="pt")
        ).pooler_output
    seer = extractor(str(tmp_path))
    assert torch.allclose(seer.images(pixels(raw)), wanted, atol=0.02)
    with pytest.raises(UserError, match="reads no text; name a CLIP or SigLIP model"):
        seer.adherence(wanted, ["a", "b"])


class _Inception(torch.nn.Module):
    """What torch-fidelity's extractor takes and gives; it sees the mean of each channel."""

    def __init__(self, name: str, features: list[str]) -> None:
        super().__init__()
        assert features == ["2048"]

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert images.dtype == torch.uint8
        return (images.float().mean((2, 3)),)


def test_inception_is_given_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch_fidelity.feature_extractor_inceptionv3"
    module = ModuleType(name)
    module.FeatureExtractorInceptionV3 = _Inception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, module)
    found = extractor("inception").images(torch.tensor([-1.2, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4))
    assert found.tolist() == [[0.0, 128.0, 255.0]]

    def offline(*_: object) -> None:
        raise OSError("no route to host")

    module.FeatureExtractorInceptionV3 = offline  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route to host\); check the connection"):
        extractor("inception")


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    for name in ("./nothing", "/no/such/folder", "a/b/c", "asset:clip"):
        with pytest.raises(
            UserError, match="there is no such folder; check the path, or use the folder or hub id"
        ):
            extractor(name)
    with pytest.raises(UserError, match="has no revisions, so 'main' means nothing; remove it"):
        extractor(PROBE, revision="main")
    siglip2(tmp_path / "model")
    settings = tmp_path / "model" / "preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "resample": 1}))
    with pytest.raises(UserError, match="resample 1 of preprocessor_config.json is unknown"):
        extractor(str(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="or it cannot be loaded .*check the name"):
        extractor(str(tmp_path / "model"))


def test_similarity_is_a_cosine_of_a_hundred() -> None:
    a = torch.tensor([[1.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    b = torch.tensor([[3.0, 0.0], [0.0, 0.1], [-1.0, 0.0]])
    assert Extractor.similarity(a, b).tolist() == pytest.approx([100 / 2**0.5, 100, 0])


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip", "siglip2"])
@pytest.mark.parametrize("size", [(48, 96), (90, 40), (64, 64)])
def test_what_is_seen_is_what_changes_the_inputs(kind: str, size: tuple[int, int]) -> None:
    """Noise beyond the part that is named, and beyond a filter's reach around it, changes nothing."""
    processor = processors()[kind].to_dict()
    height, width = size
    told, prepare = seen(kind, processor, height, width), preparation(kind, processor)
    if kind == "siglip":  # 33 x 40, whatever comes
        assert told == "them pressed to 40 × 33"
        assert tuple(prepare(pixels(random_pictures(*size)))["pixel_values"].shape[2:]) == (33, 40)
        return
    if kind == "siglip2":
        assert told is None
        return
    found = re.fullmatch(r"the middle (\d+) × (\d+)", told or "")
    assert found is not None
    across, down = int(found[1]), int(found[2])
    short = min(size)  # becomes 40, of which 36 x 32 are kept
    assert (across, down) == (round(short * 36 / 40), round(short * 32 / 40))
    raw, reach = random_pictures(*size), 2 * max(1, -(-short // 40)) + 1
    other = 255 - raw
    left, top = (width - across) // 2 - reach, (height - down) // 2 - reach
    inner = (slice(None), slice(max(top, 0), height - max(top, 0)), slice(max(left, 0), width - max(left, 0)))
    other[inner] = raw[inner]
    a, b = prepare(pixels(raw))["pixel_values"], prepare(pixels(other))["pixel_values"]
    assert torch.equal(a, b)
    assert (other != raw).any() == (top > 0 or left > 0)


def test_inception_sees_pictures_pressed_to_squares() -> None:
    assert pressed((299, 299), 64, 96) == "them pressed to 299 × 299"
    assert pressed((299, 299), 64, 66) is None  # by 3%: nobody sees it
    assert pressed((100, 95), 100, 100) is None and pressed((95, 100), 100, 100) is None  # 5% still
    assert pressed((100, 94), 100, 100) == "them pressed to 94 × 100"
    assert pressed((94, 100), 100, 100) == "them pressed to 100 × 94"


def test_a_picture_that_is_not_resized_is_seen_whole_or_in_its_middle() -> None:
    kept = {"do_resize": False, "do_center_crop": False}
    assert seen("clip", kept, 30, 90) is None
    assert seen("clip", {"do_resize": False, "crop_size": 24}, 30, 90) == "the middle 24 × 24"
    assert seen("clip", {"do_resize": False, "crop_size": 24}, 20, 90) == "the middle 24 × 20"
    nearly = {"do_resize": False, "crop_size": {"height": 100, "width": 95}}
    assert seen("clip", nearly, 100, 100) is None and seen("clip", nearly, 100, 101) is not None
    assert seen("clip", {}, 200, 100) == "the middle 100 × 100"
    assert seen("clip", {"do_resize": None}, 200, 100) == "the middle 100 × 100"
