#!/usr/bin/env bash
# diffusers 0.42.1 loads a kohya LoRA of a text encoder whole only if `out_proj` is among its layers. Without it (a LoRA
# of q, k, v and the MLP, which trainers' options allow) q, k and v get names of an older style, are reported as
# unexpected, and the pipeline goes on with the MLP alone: 4 of 10 layers. No exception is raised.
# A good guess: every layer of a file is looked up by itself.
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



from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

SIZES = {"q_proj": (32, 32), "k_proj": (32, 32), "v_proj": (32, 32), "out_proj": (32, 32), "fc1": (32, 64), "fc2": (64, 32)}


def kohya_file(modules: list[str]) -> None:
    tensors = {}

    def add(name: str, n_in: int, n_out: int) -> None:
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, n_in)
        tensors[f"{name}.lora_up.weight"] = torch.randn(n_out, 4)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)

    add("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 32, 32)
    for block in range(2):
        for module in modules:
            kind = "mlp" if module.startswith("fc") else "self_attn"
            add(f"lora_te_text_model_encoder_layers_{block}_{kind}_{module}", *SIZES[module])
    save_file(tensors, "lora.safetensors")


for modules, expected in ((list(SIZES), 12), ([m for m in SIZES if m != "out_proj"], 4)):
    kohya_file(modules)
    pipe = small_pipeline()
    pipe.load_lora_weights(".", weight_name="lora.safetensors")
    loaded = sum(isinstance(m, LoraLayer) and bool(m.lora_A) for m in pipe.text_encoder.modules())
    print(f"{2 * len(modules)} layers in the file, {loaded} loaded")
    assert loaded == expected, "changed"
PY
