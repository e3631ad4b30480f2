"""A vision-language model of transformers that says what pictures show."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from lcm_kit.errors import UserError, first_line
from lcm_kit.io.written import tidied

INSTRUCTION = (
    "Describe this picture in one sentence: what it shows, where, from which side. Do not name its style."
)
_QUOTES = "\"'`*“”‘’"  # round a whole answer
_ACTS = "=+-@"  # begins what a spreadsheet takes for a formula


@dataclass(frozen=True)
class Captioner:
    """A model with its processor, and how it is asked."""

    model: Any
    processor: Any
    prompt: str | None  # None: the kit's own instruction, where the model takes any
    most: int  # tokens of an answer

    @staticmethod
    def load(place: str, device: str, dtype: torch.dtype, prompt: str | None, most: int) -> Captioner:
        """The model in a folder, or of that name in the hub's cache or on the hub; from safetensors alone.

        No code that lies beside it is run. Raises `UserError` for what is no such model.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        given = os.path.expanduser(place)
        try:
            processor = AutoProcessor.from_pretrained(given, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(
                given, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        # a name, a type, a part, a file: transformers raises of all kinds, and none is our bug
        except Exception as error:
            raise UserError(
                f"--model {place!r} is no vision-language model that transformers loads from safetensors and "
                f"without code of its own ({first_line(error)}); give the folder of one, as BLIP, LLaVA, "
                "Qwen-VL or SmolVLM"
            ) from error
        if not hasattr(processor, "image_processor"):
            raise UserError(
                f"--model {place!r} has no image processor, so it cannot be shown pictures; give another"
            )
        if not model.config.is_encoder_decoder and hasattr(processor, "tokenizer"):
            processor.tokenizer.padding_side = "left"  # an answer begins where its question ends
        return Captioner(model.to(device).eval(), processor, prompt, most)

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """What the model says of RGB pictures, each on one line; "" where it says nothing that can be used.

        The likeliest words one after another: the same picture has the same caption, alone or among others.
        """
        question, goes_on = self._question()
        if question is None:
            inputs = self.processor(images=list(images), return_tensors="pt")
        else:  # each in a list of its own: it belongs to one of the texts
            shown, asked = [[image] for image in images], [question] * len(images)
            inputs = self.processor(images=shown, text=asked, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)  # floating point parts alone
        with torch.inference_mode():
            most = self._room(inputs)
            found = self.model.generate(**inputs, max_new_tokens=most, do_sample=False, num_beams=1)
        if not goes_on and not self.model.config.is_encoder_decoder:
            asked = inputs["input_ids"]
            repeats = torch.equal(found[:, : asked.shape[1]], asked)  # some give the answer alone
            found = found[:, asked.shape[1] :] if repeats else found
        return [_caption(answer) for answer in self.processor.batch_decode(found, skip_special_tokens=True)]

    def _room(self, inputs: Any) -> int:
        """Tokens of an answer that the model has places for. Raises `UserError` if it has none left."""
        places = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not places or self.model.config.is_encoder_decoder:
            return self.most
        given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
        if given >= places:
            raise UserError(
                f"--prompt and picture take {given} tokens, and the model has places for {places}; shorten it"
            )
        return min(self.most, places - given)

    def _question(self) -> tuple[str | None, bool]:
        """What the model is given beside a picture, and whether its answer repeats that as a beginning."""
        prompt = self.prompt or INSTRUCTION
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            said = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(said, add_generation_prompt=True), False
        if sign := getattr(self.processor, "image_token", None):
            return f"{sign}{prompt}", False
        return self.prompt, True  # BLIP and its like caption as they are, or go on from a beginning


def _caption(answer: str) -> str:
    """An answer as a caption: one line, no quotes round it, nothing that a spreadsheet would compute."""
    text, reason = tidied(answer.replace("\ufffd", " ").strip().strip(_QUOTES))
    return "" if reason else text.lstrip(_ACTS).strip()
