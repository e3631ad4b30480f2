"""Are the numbers those of another revision? Trains, exports and evaluates with both, on one world.

    python tools/same_bits.py                    this checkout, uncommitted changes and all, against HEAD
    python tools/same_bits.py --against REV      against another revision
    python tools/same_bits.py --only losses,sdxl some of the chains, with what they need
    python tools/same_bits.py --new-keys KEY     of exported headers all but what is new on purpose

For changes that must not change what comes out: walls that move. Both revisions see the same paths, bases,
pictures and configs, and nothing but their command lines is used. Compared are, to the last bit, the latents
and embeddings of caches, losses, gradient norms and all else in metrics.jsonl, trained weights, exported and
merged files whole, and the pixels of what is drawn; in two processes and after a stop too. Seconds are not.
Exit code 1 where something differs. Threads: one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.bases import build_sd, build_sdxl  # noqa: E402

SECONDS = ("images_per_second", "hash")  # of a line of metrics: the hash is over the speed too
COMMON: dict[str, Any] = {
    "steps": 3,
    "batch_size": 2,
    "adapter": {"rank": 4, "alpha": 8.0},
    "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 1},
    "checkpoint": {"every": 1},
    "logging": {"every": 1, "trackers": []},
}

# Of one process for each revision: fork for every command, since importing takes longer than running.
RUNNER = """
import json, os, sys
from pathlib import Path
import torch, diffusers, peft, transformers
try:
    import lcm_kit.cli.main as cli
except ImportError:  # before the command line was a package
    from lcm_kit import cli
assert Path(cli.__file__).is_relative_to(sys.argv[1]), cli.__file__
torch.set_num_threads(1)
for name, ranks, port, words in json.loads(sys.argv[2]):
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            if ranks > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }
            code = 70
            try:
                cli.app(words, prog_name="lcm-kit")
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise SystemExit(f"{name} ended with {codes}: lcm-kit {' '.join(words)}")
    for weights in Path().rglob("adapter/lora.safetensors"):
        os.utime(weights, (1.6e9, 1.6e9))  # the date of an exported file
    print(f"  {name}", flush=True)
"""


class Chain(NamedTuple):
    """Commands in order, and the chains that must have run before."""

    commands: Sequence[Sequence[str]]
    after: Sequence[str] = ()
    ranks: int = 1


def chains() -> dict[str, Chain]:
    """What is run, in a folder that `build` filled; configs say what their files say, but for the words."""
    drawn = ["prompts=prompts.txt", "count=2", "batch_size=2", "teacher_steps=2", "pictures=2"]
    small = ["validation.prompts=null", "validation.held_out=0"]
    # regularisation: the name that both revisions know
    styled = ["teacher.adapters=[{path: style, weight: 0.8}]", "data.regularisation=general"]
    train = ["train", "distill.yaml"]
    other = [*train, *small, "data.cache=cache"]
    return {
        "encode": Chain([["encode", "distill.yaml"]]),
        "lcm": Chain([train, ["export", "run"]], ["encode"]),
        "resume": Chain([[*train, "output=gone_on", f"steps={n}"] for n in (1, 3)], ["encode"]),
        "ranks": Chain([[*train, "output=ranks", "batch_size=1"]], ["encode"], ranks=2),
        "losses": Chain(
            [
                [*other, "output=norm", "loss.name=huber_norm", "loss.weighting=interval", "grid.steps=40"],
                [*other, "output=l2", "loss.name=l2", "solver=dpmpp_2s", "grid.steps_start=10"],
                [*other, "output=heun", "solver=heun", "accumulation=2", "adapter.targets=attention"],
                [*other, "output=lcf", "teacher.weight=0.5", "gradient_checkpointing=true"],
            ],
            ["encode"],
        ),
        "style": Chain(
            [
                ["encode", "style.yaml"], ["train", "style.yaml"], ["export", "style"],
                ["train", "style.yaml", "output=text", "text_encoder.rank=4", "loss.noise_offset=0.1"],
                ["export", "text"],
            ],
        ),
        "teachers": Chain(
            [
                ["encode", "distill.yaml", "data.cache=both", *styled],
                [*train, *small, "output=looks", "data.cache=both", *styled],
                [*train, *small, "output=speed", "data.cache=both", *styled, "teacher.in_student=true"],
                [*other, "output=started", "adapter.start=[style]", "adapter.rank=6"],
            ],
            ["encode", "style"],
        ),
        "samples": Chain([["encode", "samples.yaml"], ["train", "samples.yaml"]], ["encode"]),
        "velocity": Chain([["encode", "velocity.yaml"], ["train", "velocity.yaml"]]),
        "sdxl": Chain([["encode", "sdxl.yaml"], ["train", "sdxl.yaml"], ["export", "sdxl"]]),
        "files": Chain(
            [
                ["merge", "run", "style:0.5", "--base", "sd", "--output", "merged"],
                ["convert", "run/export/run.safetensors", "--output", "converted", "--format", "both",
                 "--base", "sd"],
                ["sample", "--prompt", "a cat", "--adapter", "run", "--steps", "2", "--output", "drawn"],
            ],
            ["encode", "lcm", "style"],
        ),
        "quality": Chain(
            [["evaluate", "evaluation/quality", "run=run", *drawn, "student_steps=[1,2]", "unet_calls=[2]"]],
            ["encode", "lcm"],
        ),
    }  # fmt: skip


def build(place: Path) -> None:
    """Bases, pictures, prompts and configs."""
    build_sd(place / "sd")
    build_sd(place / "v", "v_prediction")
    build_sdxl(place / "xl", few=True)
    for folder, seed in (("images", 7), ("general", 8)):
        generator = torch.Generator().manual_seed(seed)
        (place / folder).mkdir()
        for i in range(6):
            pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
            large = Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)
            large.save(place / folder / f"{i}.png")
            (place / folder / f"{i}.txt").write_text(f"{folder} {'abcdef'[i]}")
    (place / "prompts.txt").write_text("a cat\na dog\na bird\n")
    watched = {"prompts": "prompts.txt", "count": 2, "every": 2, "held_out": 0.2}
    data = {"path": "images", "cache": "cache", "resolution": 64, "shard_size": 4}
    distill: dict[str, Any] = {
        "recipe": "train/distill", **COMMON, "output": "run", "ema": 0.5, "base": {"path": "sd"},
        "data": data, "guidance": {"min": 2.0, "max": 6.0}, "validation": watched,
    }  # fmt: skip
    style = {
        "recipe": "train/finetune", **COMMON, "output": "style", "ema": 0.5, "base": {"path": "sd"},
        "data": {**data, "cache": "cache-style"}, "validation": watched,
        "prior": {"prompts": "prompts.txt", "count": 3, "steps": 2},
    }  # fmt: skip
    drawn = {"prompts": "prompts.txt", "count": 4, "steps": 2, "share": 0.5}
    plain = {**distill, "validation": {"prompts": None}, "ema": 0.0}
    configs = {
        "distill": distill,
        "style": style,
        "samples": {
            **plain, "output": "sampled",
            "data": {**data, "cache": "cache-mix", "source": "mix", "samples": drawn},
        },
        "velocity": {
            **plain, "output": "velocity", "base": {"path": "v"}, "data": {**data, "cache": "cache-v"},
        },
        "sdxl": {**plain, "output": "sdxl", "base": {"path": "xl"}, "data": {**data, "cache": "cache-xl"}},
    }  # fmt: skip
    for name, keys in configs.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))


# -- Products ------------------------------------------------------------------------------------------------


def products(place: Path, new_keys: Sequence[str] = ()) -> dict[str, str]:
    """A hash of all that must stay, by the file that it is in, without `new_keys` of exported headers."""
    return {
        _name(path.relative_to(place)): hashlib.sha256(part).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file() and not {"state", "evaluation"} & set(path.parts)  # what is kept is in the pictures
        for part in _parts(path, new_keys)
    }


def _name(path: Path) -> str:
    """A file's path, the same before and after evaluations shared their names of cells."""
    return path.as_posix().replace("pictures/base-", "pictures/plain-").replace("-g1-w1-", "-g1-")


def _parts(path: Path, new_keys: Sequence[str]) -> Iterator[bytes]:
    if path.suffix == ".safetensors" and not {"export", "merged", "converted"} & set(path.parts):
        tensors = load_file(path)
        yield repr(
            [
                (name, str(t.dtype), tuple(t.shape), t.numpy().tobytes())
                for name, t in sorted(tensors.items())
                if "second" not in name
            ]
        ).encode()
    elif path.suffix == ".safetensors":
        yield _without(path.read_bytes(), new_keys) if new_keys else path.read_bytes()
    elif path.suffix == ".png":
        with Image.open(path) as image:
            yield image.tobytes()
    elif path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if key not in SECONDS} for line in lines]
        yield json.dumps(kept, sort_keys=True).encode()


def _without(file: bytes, keys: Sequence[str]) -> bytes:
    """A safetensors file without some keys of its metadata."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = {key: value for key, value in header["__metadata__"].items() if key not in keys}
    return json.dumps(header).encode() + file[start:]


def losses(place: Path) -> dict[str, list[float]]:
    """The losses of every run, for people."""
    return {
        file.parent.name: [
            line["loss"] for line in map(json.loads, file.read_text().splitlines()) if "loss" in line
        ]
        for file in sorted(place.glob("*/metrics.jsonl"))
    }


# -- Sides ---------------------------------------------------------------------------------------------------


def checkout(revision: str, folder: Path) -> Path:
    """The files of a revision, in `folder`."""
    folder.mkdir()
    packed = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    file = folder.with_suffix(".tar")
    file.write_bytes(packed)
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(side: Path, place: Path, wanted: Sequence[str]) -> None:
    """Build the world in `place`, and run the chains there with the kit that is in `side`."""
    place.mkdir()
    build(place)
    known = chains()
    commands = [
        (f"{name} {number}", known[name].ranks, 29_517 + number, list(words))
        for name in wanted
        for number, words in enumerate(known[name].commands, 1)
    ]
    environment = {
        **os.environ, "PYTHONPATH": str(side), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    given = [sys.executable, "-c", RUNNER, str(side), json.dumps(commands)]
    with (place.parent / "log.txt").open("w") as log:
        done = subprocess.run(given, cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit((place.parent / "log.txt").read_text()[-3000:])


def needed(names: Sequence[str]) -> list[str]:
    """The chains of these names with those that they need, in order."""
    known = chains()
    for name in names:
        if name not in known:
            raise SystemExit(f"{name!r} is not a chain; choose of {', '.join(known)}")
    wanted = {each for name in names for each in (*known[name].after, name)}
    return [name for name in known if name in wanted]


def main() -> int:
    """Compare; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", default="HEAD", metavar="REV")
    parser.add_argument("--only", default=",".join(chains()), metavar="CHAIN,...")
    parser.add_argument("--new-keys", default="", metavar="KEY,...")
    arguments = parser.parse_args()
    wanted, found = needed(arguments.only.split(",")), []
    with tempfile.TemporaryDirectory(prefix="same-bits-") as temporary:
        folder = Path(temporary)
        other = checkout(arguments.against, folder / "other")
        for name, side in ((arguments.against, other), ("this checkout", ROOT)):
            place = folder / "place"  # the same for both: paths are in configs and files
            run(side, place, wanted)
            found.append(products(place, arguments.new_keys.split(",") if arguments.new_keys else ()))
            print(f"{name}: {len(found[-1])} files")
            for trained, values in losses(place).items():
                print(f"  {trained}: " + ", ".join(f"{value:.9g}" for value in values), flush=True)
            place.rename(folder / f"place-{len(found)}")
    before, after = found
    differ = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in differ:
        missing = "only before" if name not in after else "only now" if name not in before else "other bits"
        print(f"{name}: {missing}")
    print(f"{len(before.keys() | after.keys()) - len(differ)} files are the same, {len(differ)} are not")
    return int(bool(differ))


if __name__ == "__main__":
    raise SystemExit(main())
