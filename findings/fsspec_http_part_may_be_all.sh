#!/usr/bin/env bash
# fsspec 2026.9.0 with aiohttp 3.14.5: cat_file(url, start=2, end=5) asks an HTTP server for three bytes. One that knows
# no ranges (as Python's own http.server) answers with the whole file, and cat_file and cat_ranges give all of it, with
# no error and no warning, where fs.open, seek and read raise a ValueError that says so.
# A good guess: cat_file gives the bytes that were asked for, or raises.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${server:-}" 2> /dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet fsspec==2026.9.0 aiohttp==3.14.5
mkdir served
printf 0123456789 > served/digits
venv/bin/python - <<'PY'
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import fsspec


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory="served"))
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/digits"
fs = fsspec.filesystem("http")
part, parts = fs.cat_file(url, start=2, end=5), fs.cat_ranges([url], [2], [5])
try:
    with fs.open(url) as file:
        file.seek(2)
        said = file.read(3)
except ValueError as error:
    said = str(error).split(".")[0]
print(f"cat_file(url, start=2, end=5): {part!r}; cat_ranges: {parts!r}; open, seek(2), read(3): {said}")
assert (part, parts) == (b"0123456789", [b"0123456789"]), "changed: a part is a part"
assert "range requests" in said, "changed: open reads parts without ranges, or says it otherwise"
PY
