#!/usr/bin/env bash
# peft's `alpha_pattern` holds regular expressions, and the first that matches a module counts, in the order of the dict.
# diffusers writes the config into the file's header with sorted keys, so the order, and with it a layer's strength, can
# change by saving and loading: here attn1.to_q is trained at alpha / r = 2 and comes back at 4, with no word said.
# Seen with diffusers 0.42.1 and peft 0.21.2. A good guess: the most specific pattern counts, whatever the order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel


def small_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
            bos_token_id=62, eos_token_id=63,
        )
    )
    return StableDiffusionPipeline(
        vae=None, text_encoder=text, tokenizer=None, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False,
    )



from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer


def strengths(unet: UNet2DConditionModel) -> dict[str, float]:
    return {
        name.split("transformer_blocks.0.")[1]: next(iter(module.scaling.values()))
        for name, module in unet.named_modules()
        if isinstance(module, LoraLayer) and name.startswith("down_blocks")
    }


pipe = small_pipeline()
patterns = {"to_q": 8, "attn1.to_q": 16}
pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], alpha_pattern=patterns))
trained = strengths(pipe.unet)
pipe.save_lora_weights(
    "lora", unet_lora_layers=get_peft_model_state_dict(pipe.unet),
    unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
)
again = small_pipeline()
again.load_lora_weights("lora")
loaded = strengths(again.unet)
print("trained at", trained, "loaded at", loaded)
assert trained == {"attn1.to_q": 2.0, "attn2.to_q": 2.0}, "changed"
assert loaded == {"attn1.to_q": 4.0, "attn2.to_q": 2.0}, "changed"
PY
