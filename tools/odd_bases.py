"""Spoils bases in a thousand ways and asks every verb: is it one sentence, or the very same output?

    python tools/odd_bases.py                        # 1,131 bases, drawn by --seed: an hour on two idle cores
    python tools/odd_bases.py --only "unet/config.json act_fn" --count 0   # all that begin so

The shipped base and a small one of SDXL's family, each time with one field or file spoiled
(tests/odd_bases.py). Each runs in a process of its own, with a bound on time and memory, forked from one that
has imported everything; Linux alone. What comes out, by verb: `same`, an equal output; `said`, code 2 and
a line that names the part; `meant`, another output of a field that the kit reads, with a value that it may
have; else a fault, and exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))

from lcm_kit.assets import path as asset
from tests import odd_bases
from tests.bases import build_sdxl
from tests.odd_bases import Case

SECONDS, MEMORY = 10, 2 * 2**30  # of CPU, and beyond what the process begins with
_CONFIG = """\
recipe: train/distill
output: {out}/run
steps: 2
batch_size: 1
base: {{path: {base}}}
data: {{path: {images}, cache: {out}/cache, resolution: 64}}
validation: {{prompts: null}}
"""


class Fault(Exception):
    """What a verb must not do."""


def cli(*words: str) -> str:
    """What a verb prints. Raises `ValueError` with its sentence on exit code 2, and `Fault`."""
    from lcm_kit.cli.main import app

    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            app(list(words), prog_name="lcm-kit")
    except SystemExit as end:
        said = err.getvalue()
        if end.code == 2 and said.count("error: ") == 1:
            raise ValueError(said[said.index("error: ") + 7 :].strip()) from None
        if end.code not in (0, None):
            raise Fault(f"exit code {end.code}: {said[-300:]}") from None
    return out.getvalue()


def digest(*files: Path) -> str:
    """Of the content of files; of safetensors their tensors alone, since a header names the base."""
    from safetensors import safe_open

    found = hashlib.sha256()
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                for key in sorted(handle.keys()):  # noqa: SIM118
                    found.update(key.encode() + handle.get_tensor(key).numpy().tobytes())
        else:
            found.update(file.read_bytes())
    return found.hexdigest()


def check(base: Path, out: Path, images: Path) -> str:
    """`lcm-kit check`."""
    return cli("check", str(config(base, out, images)))


def encode(base: Path, out: Path, images: Path) -> str:
    """`lcm-kit encode` of one picture: its latents and embeddings."""
    cli("encode", str(config(base, out, images)))
    return digest(*sorted((out / "cache").rglob("*.safetensors")))


def plan(base: Path, out: Path, images: Path) -> str:
    """What `lcm-kit plan` takes a base for; its rehearsal would take twenty seconds."""
    from lcm_kit.config.schema import Base
    from lcm_kit.plan.base_profile import find

    found = find(Base(str(base)))
    return repr((found.structure.modules, found.tokens, found.pooled, found.vae_config, found.words))


def sample(base: Path, out: Path, images: Path) -> str:
    """`lcm-kit sample`: the picture."""
    cli("sample", "--base", str(base), "--prompt", "a cat", "--steps", "1", "--output", str(out / "drawn"))
    return digest(*sorted((out / "drawn").glob("*.png")))


def verify(base: Path, out: Path, images: Path) -> str:
    """What `verify`, `convert` and `merge` take a base for."""
    from lcm_kit.lora.verify import base_of

    found = base_of(str(base))
    return repr((found.structure.modules, found.structure.generation.name, found.structure.prediction_type))


VERBS: tuple[Callable[[Path, Path, Path], str], ...] = (check, encode, plan, verify, sample)
LATER = (encode, sample)


def config(base: Path, out: Path, images: Path) -> Path:
    """The config of a small run on `base`."""
    file = out / "config.yaml"
    file.write_text(_CONFIG.format(base=base, out=out, images=images))
    return file


def outcomes(base: Path, out: Path, images: Path) -> dict[str, list[str]]:
    """By verb: `done` and the output's hash, `said` and the sentence, or `fault` and the reason."""
    found: dict[str, list[str]] = {}
    for verb in VERBS:
        if verb in LATER and found["check"][0] == "said":  # they begin with the same door
            continue
        try:
            output = verb(base, out, images).replace(str(base), "BASE").replace(str(out), "OUT")
            found[verb.__name__] = ["done", hashlib.sha256(output.encode()).hexdigest()]
        except ValueError as error:  # `cli` raises it, and the kit's own door a UserError, which is one
            own = type(error).__name__ in ("ValueError", "UserError")
            found[verb.__name__] = ["said" if own else "fault", str(error)]
        except Fault as fault:
            found[verb.__name__] = ["fault", str(fault)]
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            found[verb.__name__] = ["fault", f"{type(error).__name__} at {where}: {str(error)[:200]}"]
    return found


def forked(work: Callable[[], Any]) -> Any:
    """What `work` gives, in a child with bounds; a sentence about its end if it has none."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS * len(VERBS), SECONDS * len(VERBS) + 1))
        signal.alarm(6 * SECONDS * len(VERBS))  # for one that sleeps, on a machine that others work on
        with os.fdopen(write, "w") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else f"ended by {os.waitstatus_to_exitcode(status)}"


def verdict(case: Case, was: list[str], now: list[str]) -> str:
    """`same`, `said`, `meant`, or a fault in words."""
    kind, text = now
    if kind == "fault":
        return f"fault: {text}"
    if kind == "said":
        return said_well(case, text)
    if was == now:
        return "same"
    return "meant" if odd_bases.listed(case) else "fault: another output without a word"


def said_well(case: Case, sentence: str) -> str:
    """`said` for one line that names the part, else a fault."""
    part = case.file.partition("/")[0]
    if "\n" in sentence or re.search("[\x00-\x1f]", sentence):
        return f"fault: more than a line: {sentence[:300]!r}"
    if len(sentence) > 1500:
        return f"fault: {len(sentence)} characters: {sentence[:200]!r}"
    named = part in sentence or (case.field.partition(".")[0] or case.file) in sentence
    return "said" if named else f"fault: names neither part nor field: {sentence}"


def main() -> int:
    """Run them, print each fault and the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1131, help="bases; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", choices=("sd", "sdxl"), help="one of the two")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument(
        "--log", type=Path, help="a line of JSON for each case; those that are there are not run"
    )
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return run(wanted, Path(folder))


def run(wanted: argparse.Namespace, folder: Path) -> int:
    """All cases of both bases, within `folder`."""
    from PIL import Image

    images = folder / "images"
    images.mkdir()
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(images / "a.png")
    (images / "a.txt").write_text("a cat")
    bases = {"sd": asset("tiny-sd"), "sdxl": folder / "sdxl"}
    forked(lambda: str(build_sdxl(bases["sdxl"], few=True)))
    for name in forked(lambda: imports(bases["sd"], folder / "first", images)):
        with suppress(Exception):  # a library's optional parts
            importlib.import_module(name)
    lines = wanted.log.read_text().splitlines() if wanted.log and wanted.log.exists() else []
    known = {(line["base"], line["case"]): line["found"] for line in map(json.loads, lines)}
    counts: Counter[str] = Counter()
    for name, base in bases.items():
        if wanted.base not in (None, name):
            continue
        whole = forked(lambda base=base: outcomes(base, made(folder / "whole"), images))
        shutil.rmtree(folder / "whole")
        if isinstance(whole, str) or any(kind != "done" for kind, _ in whole.values()):
            raise SystemExit(f"the unspoiled {name} base: {whole}")
        half = (wanted.count + 1) // 2
        chosen = odd_bases.some(base, half, wanted.seed) if wanted.count else odd_bases.cases(base)
        for case in (each for each in chosen if each.name.startswith(wanted.only)):
            found = known.get((name, case.name))
            if found is None:
                found = one(case, base, folder / "odd", images, whole)
                if wanted.log:
                    with wanted.log.open("a") as handle:
                        handle.write(json.dumps({"base": name, "case": case.name, "found": found}) + "\n")
            counts["bases"] += 1
            bad = {verb: v for verb, v in found.items() if v not in ("same", "said", "meant")}
            counts["faulty" if bad else "fine"] += 1
            counts.update(v.partition(":")[0] for v in found.values())
            for verb, words in bad.items():
                print(f"{name} {case.name} [{verb}] {words}", flush=True)
    print(", ".join(f"{key} {count}" for key, count in counts.items()))
    return 1 if counts["faulty"] else 0


def imports(base: Path, out: Path, images: Path) -> list[str]:
    """What the verbs import."""
    outcomes(base, made(out), images)
    return sorted(sys.modules)


def made(folder: Path) -> Path:
    """`folder`, made."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def one(case: Case, base: Path, folder: Path, images: Path, whole: dict[str, list[str]]) -> dict[str, str]:
    """The verdicts on one spoiled base, by verb."""
    spoiled = odd_bases.spoil(base, case, folder / "base")
    started = time.monotonic()
    now = forked(lambda: outcomes(spoiled, made(folder / "out"), images))
    shutil.rmtree(folder)
    if isinstance(now, str):
        return {"all": f"fault: {now} after {time.monotonic() - started:.0f} s"}
    return {verb: verdict(case, whole[verb], found) for verb, found in now.items()}


if __name__ == "__main__":
    sys.exit(main())
