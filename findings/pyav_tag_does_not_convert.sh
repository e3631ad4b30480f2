#!/usr/bin/env bash
# PyAV 18.1.0: RGB frames become YUV by BT.601, and the file does not say so. `colorspace`, `color_primaries` and
# `color_trc` = 1 (BT.709) on the stream's codec context write the tag and convert as before: red (255, 0, 0) is the
# same Y, U, V of 81, 90, 240 with and without it, and what is read from the tagged file is (255, 23, 0). It comes back
# as red if each frame is converted to BT.709 too, by `frame.reformat(format="yuv420p", dst_colorspace=1)`. So with
# libx264 and mpeg4 in an MP4, at 64x64 and at 1280x720.
# A good guess: the encoder is told the colour space, so the frames that it is given as RGB are converted to it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet av==18.1.0 numpy==2.4.6
venv/bin/python - <<'PY'
import av
import numpy as np

BT709 = 1


def write(codec, width, height, tagged, converted):
    with av.open("red.mp4", "w") as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if tagged:
            for name in ("colorspace", "color_primaries", "color_trc"):
                setattr(stream.codec_context, name, BT709)
        red = np.zeros((height, width, 3), np.uint8)
        red[..., 0] = 255
        frame = av.VideoFrame.from_ndarray(red, "rgb24")
        if converted:
            frame = frame.reformat(format="yuv420p", dst_colorspace=BT709)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def read():
    with av.open("red.mp4") as file:
        tag = int(file.streams.video[0].codec_context.colorspace)
        frame = next(file.decode(video=0))
        yuv = tuple(bytes(plane)[0] for plane in frame.planes)
        return tag, yuv, tuple(int(value) for value in frame.to_ndarray(format="rgb24")[5, 5])


for codec in ("libx264", "mpeg4"):
    for size in ((64, 64), (1280, 720)):
        found = []
        for tagged, converted in ((False, False), (True, False), (True, True)):
            write(codec, *size, tagged, converted)
            found.append(read())
            print(codec, size, "tagged:", tagged, "converted:", converted, "-> tag, YUV, RGB:", *found[-1])
        plain, tag_only, both = found
        assert (plain[0], tag_only[0], both[0]) == (2, BT709, BT709), found
        assert plain[1] == tag_only[1] == (81, 90, 240) and both[1] == (63, 102, 240), found
        for seen, meant in ((plain, (253, 0, 0)), (tag_only, (255, 23, 0)), (both, (254, 0, 0))):
            assert np.abs(np.subtract(seen[2], meant)).max() <= 2, found
PY
