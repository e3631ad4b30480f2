"""Vision-language models of random weights: BLIP, which captions as it is, and LLaVA, which is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = ("a", "red", "blue", "cup", "picture", "of", "on", "table", "the", "old", "small", "describe", "this")
_CHAT = (
    "{% for said in messages %}USER: {% for part in said['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def blip(folder: Path) -> Path:
    """A BLIP of 16-pixel pictures, whose weights are large enough that pictures matter."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder.mkdir(parents=True, exist_ok=True)
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS, ","]
    (folder / "vocab.txt").write_text("\n".join(known))
    text: dict[str, Any] = {
        "vocab_size": len(known), "max_position_embeddings": 64, "bos_token_id": 5, "sep_token_id": 3,
        "eos_token_id": 3, "pad_token_id": 0, "encoder_hidden_size": 16, "projection_dim": 16, **_LAYERS,
    }  # fmt: skip
    vision = {"image_size": 16, "patch_size": 8, "projection_dim": 16, **_LAYERS}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    model = BlipForConditionalGeneration(config)
    _save(model, folder, model.text_decoder.cls.predictions.bias, 6)
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), bos_token="[DEC]")
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def llava(folder: Path, chat: bool = True) -> Path:
    """A LLaVA of 16-pixel pictures; without `chat` its processor has no template for conversations."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    known = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", *WORDS]
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **_LAYERS)
    text = LlamaConfig(
        vocab_size=len(known),
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **_LAYERS,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    model = LlavaForConditionalGeneration(config)
    _save(model, folder, model.lm_head.weight, 7)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_CHAT if chat else None,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _save(model: Any, folder: Path, scores: torch.Tensor, signs: int) -> None:
    """Save with large random weights; the first `signs` rows of `scores` are low: they stand for no words."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in (each for each in model.parameters() if each.ndim > 1):
            weights.copy_(torch.randn(weights.shape, generator=generator) * 0.5)
        scores[:signs].fill_(0.0 if scores.ndim > 1 else -20.0)
    model.save_pretrained(folder)
