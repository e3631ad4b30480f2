#!/usr/bin/env bash
# Pillow 13.0.0: an animation of six pictures, of which some follow an equal one (red, red, blue, blue, blue, red), has
# three frames as GIF, WebP and PNG, with the durations of equal ones summed, and six as AVIF. Without a duration PNG
# has six too, GIF and WebP three: there nothing is left of the others. GIF cuts every sum to whole hundredths: of six
# times 33 ms 180 are left of 198. Of four equal pictures GIF, WebP and PNG make a still, and only GIF keeps a
# duration.
# A good guess: as many frames are read as were written, or the format decides it and not the duration.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet pillow==13.0.0
venv/bin/python - <<'PY'
from PIL import Image


def durations(frames, suffix, **given):
    name = f"frames.{suffix}"
    frames[0].save(name, save_all=True, append_images=frames[1:], **given)
    found = []
    with Image.open(name) as picture:
        for place in range(getattr(picture, "n_frames", 1)):
            picture.seek(place)
            picture.load()
            found.append(picture.info.get("duration"))
    return found


red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
frames = [red, red, blue, blue, blue, red]
summed = {suffix: durations(frames, suffix, duration=33) for suffix in ("gif", "webp", "png", "avif")}
counted = {suffix: len(durations(frames, suffix)) for suffix in ("gif", "webp", "png", "avif")}
still = {suffix: durations([red] * 4, suffix, duration=100) for suffix in ("gif", "webp", "png")}
print("33 ms each:", summed, "frames without a duration:", counted, "four equal ones of 100 ms:", still)
assert summed == {"gif": [60, 90, 30], "webp": [66, 99, 33], "png": [66, 99, 33], "avif": [33] * 6}, summed
assert counted == {"gif": 3, "webp": 3, "png": 6, "avif": 6}, counted
assert still == {"gif": [400], "webp": [0], "png": [None]}, still
PY
