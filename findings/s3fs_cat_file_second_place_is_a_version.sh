#!/usr/bin/env bash
# s3fs 2026.9.0 and fsspec 2026.9.0: fsspec's cat_file(path, start, end) has another order in s3fs, cat_file(path,
# version_id, start, end). Called by place, cat_file(path, 0, 5) gives the first five bytes of a file in memory or on
# disk; at s3:// the 0 is taken for no version and the 5 for the start: all bytes but the first five, and no error.
# A good guess: one interface, so the same call reads the same bytes at every address. By keyword it does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet s3fs==2026.9.0 fsspec==2026.9.0 "moto[s3]==5.2.5" flask==3.1.3 flask-cors==6.0.5
export AWS_DEFAULT_REGION=us-east-1
venv/bin/python - 2> log <<'PY'
import fsspec
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
host, port = server.get_host_and_port()
s3 = fsspec.filesystem("s3", key="test", secret="test", client_kwargs={"endpoint_url": f"http://{host}:{port}"})
memory = fsspec.filesystem("memory")
s3.mkdir("bucket")
found = {}
for name, fs in (("memory", memory), ("s3", s3)):
    fs.pipe_file("bucket/digits", b"0123456789")
    found[name] = fs.cat_file("bucket/digits", 0, 5), fs.cat_file("bucket/digits", start=0, end=5)
server.stop()
for name, (by_place, by_keyword) in found.items():
    print(f"{name}: cat_file(path, 0, 5) = {by_place!r}, cat_file(path, start=0, end=5) = {by_keyword!r}")
assert found["memory"] == (b"01234", b"01234"), "changed: fsspec's own order"
assert found["s3"] == (b"56789", b"01234"), "changed: s3fs takes start and end in fsspec's places"
PY
