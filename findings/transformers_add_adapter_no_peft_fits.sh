#!/usr/bin/env bash
# transformers 5.24.0's own `model.add_adapter` works with no peft that its users can install on the same day: it asks
# for peft >= 0.22.0 when it is called, not when it is installed, and 0.21.2 is the newest release that it was seen
# beside (2026-11-28). peft's `inject_adapter_in_model` makes the same layers on the same model.
# A good guess: two releases that pip installs together work together.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel

config = CLIPTextConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
    bos_token_id=62, eos_token_id=63,
)
lora = LoraConfig(r=2, target_modules=["q_proj"])
try:
    CLIPTextModel(config).add_adapter(lora)
except ValueError as error:
    print("transformers:", error)
    assert "0.22.0" in str(error)
else:
    raise SystemExit("changed: add_adapter works")
model = inject_adapter_in_model(lora, CLIPTextModel(config))
layers = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
print("peft:", layers)
assert len(layers) == 1
PY
