#!/usr/bin/env bash
# datasets 5.2.0's `load_dataset("imagefolder", data_dir=FOLDER)` takes words such as "train" and "test" in picture names
# for splits, and then leaves out every picture without such a word: of four pictures, red_train.png and test_pattern.png
# come back, one in each split, and blue_car.png and green_bus.png are gone without a warning.
# A good guess: a flat folder of pictures is one split with all of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet datasets==5.2.0 pillow==13.0.0
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hub" OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
from pathlib import Path

from datasets import load_dataset
from PIL import Image

folder = Path("pictures")
folder.mkdir()
names = ["red_train.png", "test_pattern.png", "blue_car.png", "green_bus.png"]
for name in names:
    Image.new("RGB", (8, 8)).save(folder / name)
found = load_dataset("imagefolder", data_dir=str(folder))
rows = {split: len(pictures) for split, pictures in found.items()}
print(len(names), "pictures;", rows)
assert rows == {"train": 1, "test": 1}, "changed"
PY
