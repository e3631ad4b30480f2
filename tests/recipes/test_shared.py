"""Two processes share encoding and evaluating, and write what one would, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lcm_kit.bases import inspect_base
from lcm_kit.config import shipped
from lcm_kit.config.evaluation import Quality
from lcm_kit.config.load import dump
from lcm_kit.data.cache import Cache
from lcm_kit.data.images import encode
from lcm_kit.export.run import export_run
from tests.recipes.small import configure, launch
from tests.runs import build_run

# What each rank runs, with an eye on how many there are and what this one did.
RANK = """
import sys, json, os
from pathlib import Path
import torch
torch.set_num_threads(1)
from lcm_kit import sample
from lcm_kit.config import shipped
from lcm_kit.training import processes
from lcm_kit.config.load import load
from lcm_kit.data import encoding, images

share = processes.share()
assert torch.distributed.get_world_size() == share.world == 2
real, did = encoding.write_shard, []
encoding.write_shard = lambda folder, maker, shard, *rest: (
    did.append(shard.file), real(folder, maker, shard, *rest)
)[1]
images.encode(load(Path(sys.argv[1])), progress=False, share=share)
drawn, draw = [], sample.latents
sample.latents = lambda pipe, prompts, **k: (drawn.append(k.get("first")), draw(pipe, prompts, **k))[1]
quality = shipped.load_recipe("evaluation/quality")
quality.main(load(Path(sys.argv[2])))
Path(sys.argv[3], f"rank-{share.rank}.json").write_text(json.dumps([did, drawn]))
"""


@pytest.mark.slow  # processes that import torch anew
def test_two_processes_encode_and_evaluate_as_one(
    distill_keys: dict[str, Any], sd_base: Any, tmp_path: Path
) -> None:
    import torch

    data = distill_keys["data"]
    one, two = (
        configure(
            distill_keys, tmp_path / "none", data={**data, "cache": str(tmp_path / name), "shard_size": 3}
        )
        for name in ("one", "two")
    )
    runs = {name: build_run(tmp_path / name / "run", sd_base("epsilon")) for name in ("a", "b")}
    for run in runs.values():
        export_run(run, "diffusers", "float32")
        (run / "prompts.txt").write_text("a cat\na dog\nan owl")

    def quality(run: Path) -> Quality:
        return Quality(
            recipe="evaluation/quality", run=str(run), prompts=str(run / "prompts.txt"), count=5,
            batch_size=2, teacher_steps=3, student_steps=(1,), unet_calls=(2,), pictures=1,
            samplers=("ddim",),
        )  # fmt: skip

    (tmp_path / "encode.yaml").write_text(dump(two))
    (tmp_path / "quality.yaml").write_text(dump(quality(runs["b"])))
    launch(RANK, tmp_path, tmp_path / "encode.yaml", tmp_path / "quality.yaml", tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on it in their last bits
    try:
        encode(one, progress=False)
        shipped.load_recipe("evaluation/quality").main(quality(runs["a"]))
    finally:
        torch.set_num_threads(threads)

    did, drawn = zip(
        *(json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)), strict=True
    )
    # the first made the empty condition too, which is a part of its own
    assert did == (["shard-00001.safetensors"], ["shard-00000.safetensors", "shard-00002.safetensors"])
    for name in [*did[0], *did[1], "empty.safetensors"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    base = inspect_base(str(sd_base("epsilon")))
    assert len(Cache.open(two.data.cache, base=base, data=two.data)) == 8

    assert set(drawn[0]) - {None} == {0, 4} and set(drawn[1]) - {None} == {2}
    kept = {name: sorted((run / "evaluation").iterdir()) for name, run in runs.items()}
    assert [f.name.rpartition("-")[0] for f in kept["a"]] == [f.name.rpartition("-")[0] for f in kept["b"]]
    for a, b in zip(kept["a"], kept["b"], strict=True):
        assert load_file(a)["pictures"].equal(load_file(b)["pictures"])
    cells = [json.loads((run / "results.json").read_text())["cells"] for run in runs.values()]
    for a, b in zip(*cells, strict=True):
        a["metrics"].pop("seconds"), b["metrics"].pop("seconds")
        assert a == b
