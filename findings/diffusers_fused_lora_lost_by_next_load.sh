#!/usr/bin/env bash
# `fuse_lora` is undone by the next `load_lora_weights`. After load(A), fuse(A), load(B) the UNet's output is that of B
# alone, to 1e-6, and neither A's nor that of both: the layer that holds A as merged is switched to B, and unmerges A.
# With `unload_lora_weights()` between, A stays. No warning in either case. diffusers 0.42.1 with peft 0.21.2.
# A good guess: what was fused into the weights stays there.
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


def save_lora(seed: int, name: str) -> None:
    pipe = small_pipeline()
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    pipe.save_lora_weights(
        name, unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )


@torch.no_grad()
def output(pipe: StableDiffusionPipeline) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 4, 32, generator=g)
    return pipe.unet(x, torch.tensor(500), text).sample


def loaded(*names: str) -> torch.Tensor:
    pipe = small_pipeline()
    for name in names:
        pipe.load_lora_weights(name, adapter_name=name)
    pipe.set_adapters(list(names))
    return output(pipe)


def after_fusing(unload: bool) -> torch.Tensor:
    pipe = small_pipeline()
    pipe.load_lora_weights("A", adapter_name="A")
    pipe.fuse_lora(adapter_names=["A"])
    if unload:
        pipe.unload_lora_weights()
    pipe.load_lora_weights("B", adapter_name="B")
    return output(pipe)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


save_lora(1, "A")
save_lora(2, "B")
both, only_b = loaded("A", "B"), loaded("B")
print("fused A, loaded B: to both", difference(after_fusing(False), both), "to B alone", difference(after_fusing(False), only_b))
print("with unload between: to both", difference(after_fusing(True), both))
assert difference(after_fusing(False), only_b) < 1e-5 < 1e-2 < difference(after_fusing(False), both), "changed"
assert difference(after_fusing(True), both) < 1e-5, "changed"
PY
