#!/usr/bin/env bash
# PyAV 16.1.0: `VideoFrame.to_ndarray(format="rgb24")` and `to_image()` of a video that says that its colours are BT.709
# make RGB of them by BT.601: pure red, (255, 0, 0), coded without loss, is read as (232, 0, 1), though the frame's own
# `colorspace` says 1, which is BT.709. PyAV 18.1.0 reads (254, 0, 0) from the same file.
# A good guess: a decoder that knows the tag goes by it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for version in 16.1.0 18.1.0; do
    python3 -m venv "$version"
    "$version"/bin/python -m pip install --quiet av==$version numpy==2.3.5 pillow==12.0.0
done
cat > write.py <<'PY'
import av
import numpy as np

# red in BT.709, limited range: Y = 16 + 219 * 0.2126, Cb = 128 - 224 * 0.2126 / 1.8556, Cr = 128 + 224 / 2
frame = av.VideoFrame(64, 64, "yuv420p")
for plane, value in zip(frame.planes, (63, 102, 240), strict=True):
    plane.update(np.full((plane.height, plane.line_size), value, np.uint8).tobytes())
with av.open("red.mp4", "w") as file:
    stream = file.add_stream("libx264", rate=1, options={"qp": "0"})
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.colorspace, context.color_primaries, context.color_trc, context.color_range = 1, 1, 1, 1
    for packet in [*stream.encode(frame), *stream.encode(None)]:
        file.mux(packet)
PY
cat > read.py <<'PY'
import av

with av.open("red.mp4") as file:
    frame = next(file.decode(video=0))
planes = [bytes(plane)[0] for plane in frame.planes]
array = frame.to_ndarray(format="rgb24")[32, 32].tolist()
print(av.__version__, int(frame.colorspace), planes, array, list(frame.to_image().getpixel((32, 32))))
PY
18.1.0/bin/python write.py
old=$(16.1.0/bin/python read.py)
new=$(18.1.0/bin/python read.py)
printf '%s\n' "$old" "$new"
[[ $old == "16.1.0 1 [63, 102, 240] [232, 0, 1] [232, 0, 1]" ]]
[[ $new == "18.1.0 1 [63, 102, 240] [254, 0, 0] [254, 0, 0]" ]]
