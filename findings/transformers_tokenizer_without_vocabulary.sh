#!/usr/bin/env bash
# transformers 5.24.0 makes a CLIPTokenizer from a folder that has tokenizer_config.json and no vocabulary (a download
# that was cut short): it has three tokens, and every text becomes the same ids. No exception, no warning.
# A good guess: a tokenizer without its vocabulary cannot be loaded, as in transformers 4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet transformers==5.24.0
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
import json
from pathlib import Path

from transformers import CLIPTokenizer

folder = Path("tokenizer")
folder.mkdir()
settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))
tokenizer = CLIPTokenizer.from_pretrained(folder)
ids = tokenizer(["a red car", "blue sky over the sea"], padding="max_length", max_length=8, truncation=True).input_ids
print(len(tokenizer), "tokens;", ids)
assert ids[0] == ids[1], "changed: the texts differ"
PY
