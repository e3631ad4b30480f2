"""The versions that the project is tested with: write them down, install them, and try others.

    python tools/versions.py lock             # resolve pyproject.toml's ranges anew: requirements/tested.txt
    python tools/versions.py install VENV     # exactly those versions into VENV, and the kit, editable
    python tools/versions.py constraints      # the same versions without hashes, for `pip install -c`
    python tools/versions.py try newest oldest [-- PYTEST ARGUMENTS]

`try` takes the newest and the oldest version that the ranges allow, each in an environment of its own, runs
the tests and says which of the changed packages each failure comes from: the one whose tested version makes
it pass.

torch is locked by its version alone (requirements/torch.txt): which file is right, for a CPU, for CUDA or for
ROCm, is the machine's affair, and so is what only torch's CUDA build needs. `try oldest` therefore leaves
torch as it is tested, unless `--torch VERSION` names another. uv resolves (it is in the extra `dev`); pip
installs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
TESTED, TORCH = FOLDER / "tested.txt", FOLDER / "torch.txt"
MACHINE = re.compile(r"(torch|triton|nvidia-\S+|cuda-\S+)==")  # the machine's affair
HEADER = """\
# The versions that the tests run with: `make install` takes exactly these files. Written by `make lock`.
# Tested on Linux with Python 3.11; lines for other systems and Pythons are resolved, not tested.
# torch and what its CUDA build needs are not here: see torch.txt.
"""
_NODE = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
MOST_BLAMED = 60  # more failures than this are a broken installation, not to be run again package by package


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout, its output to the terminal."""
    print("+", *command, flush=True)
    return subprocess.run([str(word) for word in command], cwd=ROOT, text=True, check=check)


def blocks(lock: str) -> list[str]:
    """The requirements of a lock, each with its hashes and its comments."""
    return re.findall(r"^[A-Za-z0-9][^\n]*\n(?:[ \t]+[^\n]*\n)*", lock, re.MULTILINE)


def pin(block: str) -> str:
    """`name==version ; marker` of a block."""
    return block.partition("\n")[0].removesuffix("\\").strip()


def resolve(*options: str) -> list[str]:
    """pyproject.toml's ranges with the extra `dev` as uv resolves them: blocks."""
    uv = Path(sys.executable).with_name("uv")
    done = subprocess.run(
        [str(uv), "pip", "compile", "--quiet", "--no-header", "--extra", "dev", "pyproject.toml", *options],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"error: uv cannot resolve pyproject.toml's ranges: {done.stderr.strip()}")
    return blocks(done.stdout)


def lock() -> None:
    """Write tested.txt and torch.txt."""
    found = resolve("--universal", "--python-version", "3.11", "--generate-hashes", "--upgrade")
    FOLDER.mkdir(exist_ok=True)
    TESTED.write_text(HEADER + "".join(block for block in found if not MACHINE.match(block)), "utf-8")
    (torch,) = [pin(block) for block in found if block.startswith("torch==")]
    TORCH.write_text(f"# The version that is tested; the build is the machine's choice.\n{torch}\n", "utf-8")
    print(f"wrote {TESTED.relative_to(ROOT)} and {TORCH.relative_to(ROOT)}; now run the tests: make test")


def constraints() -> list[str]:
    """The tested versions without hashes, torch's too."""
    torch = TORCH.read_text("utf-8").splitlines()[-1]
    return [*(pin(block) for block in blocks(TESTED.read_text("utf-8"))), torch]


def install(venv: Path) -> None:
    """Exactly the tested versions, each file by its hash; then torch, and the kit from this checkout."""
    pip = (venv / "bin" / "python", "-m", "pip")
    run(*pip, "install", "--quiet", "--no-deps", "--require-hashes", "-r", TESTED)
    run(*pip, "install", "--quiet", "-r", TORCH)
    run(*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT)
    run(*pip, "check")


# --- other versions ---


def named(*extras: str) -> set[str]:
    """The packages that pyproject.toml names for users and in `extras`, in the spelling of indexes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = sum((project["optional-dependencies"][extra] for extra in extras), start=project["dependencies"])
    return {re.split(r"[^A-Za-z0-9._-]", one)[0].lower().replace("_", "-") for one in asked}


def extras() -> list[str]:
    """Every extra but `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return [extra for extra in project["optional-dependencies"] if extra != "dev"]


def versions(pins: Sequence[str]) -> dict[str, str]:
    """Version by package, of pins that hold for this Python and system."""
    from packaging.requirements import Requirement

    held = [Requirement(one) for one in pins]
    return {one.name: str(one.specifier)[2:] for one in held if not one.marker or one.marker.evaluate()}


def other(which: str, torch: str | None) -> dict[str, str]:
    """The versions to try: the newest or, of the packages that users install, the oldest allowed."""
    tested = versions(constraints())
    own_tools = named("dev") - named(*extras())
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "tools.txt")
        pins.write_text("\n".join(f"{name}=={tested[name]}" for name in own_tools), "utf-8")
        oldest = ("--resolution", "lowest-direct", "--constraint", str(pins))
        options = ("--upgrade",) if which == "newest" else oldest
        found = versions([pin(block) for block in resolve(*options, "--python", sys.executable)])
    kept = {name: version for name, version in found.items() if not MACHINE.match(f"{name}==")}
    return kept | {"torch": torch or (found["torch"] if which == "newest" else tested["torch"])}


def failures(venv: Path, arguments: Sequence[str]) -> list[str]:
    """The tests that fail in `venv`; their output goes to the terminal too."""
    command = [str(venv / "bin" / "python"), "-m", "pytest", "-q", "-rfE", "--tb=line", *arguments]
    print("+", *command, flush=True)
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        ["env", *(f"{k}={v}" for k, v in environment.items()), *command],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        lines = []
        for line in running.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    found = _NODE.findall("".join(lines))
    if running.returncode not in (0, 1) and not found:
        sys.exit(f"error: pytest itself failed in {venv} with code {running.returncode}; its output says why")
    return found


def blamed(venv: Path, failed: Sequence[str], tried: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Of each changed package: the failures that pass with its tested version in its place."""
    pip = (venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps")
    tested = versions(constraints())
    changed = sorted(
        name for name in named("dev") & tried.keys() if tried[name] != tested.get(name, tried[name])
    )
    for name in changed:
        run(*pip, f"{name}=={tested[name]}")
        left = failures(venv, [*failed, "--no-header"])
        run(*pip, f"{name}=={tried[name]}")
        if healed := sorted(set(failed) - set(left)):
            yield f"{name} {tried[name]} (tested: {tested[name]})", healed


def attempt(which: str, arguments: Sequence[str], torch: str | None) -> bool:
    """Install the `which` versions, run the tests and say what breaks; True if nothing does."""
    venv = ROOT / f".venv-{which}"
    tried = other(which, torch)
    tested = versions(constraints())
    moved = {name: version for name, version in sorted(tried.items()) if version != tested.get(name)}
    print(f"== {which}: {len(moved)} packages differ from those that are tested:")
    for name, version in moved.items():
        print(f"   {name} {version} (tested: {tested.get(name, 'none')})")
    run(sys.executable, "-m", "venv", "--clear", venv)
    pip = (venv / "bin" / "python", "-m", "pip", "install", "--quiet")
    run(*pip, "--no-deps", *(f"{name}=={version}" for name, version in tried.items() if name != "torch"))
    run(*pip, f"torch=={tried['torch']}")
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT)
    failed = failures(venv, arguments)
    if not failed:
        print(f"== {which}: nothing breaks")
        return True
    print(f"== {which}: {len(failed)} tests fail")
    if len(failed) <= MOST_BLAMED:
        for package, healed in blamed(venv, failed, tried):
            print(f"== {which}: {package} breaks {len(healed)} of them, such as {healed[0]}")
    return False


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("lock")
    verbs.add_parser("constraints")
    verbs.add_parser("install").add_argument("venv", type=Path)
    trying = verbs.add_parser("try")
    trying.add_argument("which", nargs="+", choices=["newest", "oldest"])
    trying.add_argument("--torch", help="a version of torch to try with it")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:end])
    if arguments.verb == "lock":
        lock()
    elif arguments.verb == "constraints":
        print("\n".join(constraints()))
    elif arguments.verb == "install":
        install(arguments.venv)
    else:
        chosen = words[end + 1 :] or ["-m", "not slow", "--numprocesses", "logical", "--dist", "worksteal"]
        fine = [attempt(which, chosen, arguments.torch) for which in arguments.which]
        sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
