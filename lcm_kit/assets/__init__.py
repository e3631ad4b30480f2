"""What the kit ships: small bases, decoders, an LCM-LoRA, images (`brand`, `general`), probes, `glyphs`."""

from __future__ import annotations

import os
from pathlib import Path

from lcm_kit.errors import UserError
from lcm_kit.io.written import decoded, tidied

_FOLDER = Path(__file__).resolve().parent
_MOST_BYTES = 2**26  # of a file of prompts: a million lines
NAMES = (
    "tiny-sd", "tiny-sd-v", "tiny-sd-preview", "tiny-sd-consistency", "tiny-lcm-lora", "brand", "general",
    "probe", "brand-probe", "glyphs", "everyday",
)  # fmt: skip


def path(name: str) -> Path:
    """The folder of a shipped asset. Raises `UserError` for a name that the kit does not ship."""
    if name not in NAMES:
        raise UserError(f"asset {name!r} is not shipped with lcm-kit; choose one of {', '.join(NAMES)}")
    return _FOLDER / name


def resolve(text: str) -> str:
    """`asset:NAME` as the path of that asset; anything else (a path, a hub id) unchanged."""
    return str(path(text.removeprefix("asset:"))) if text.startswith("asset:") else text


def place(text: str) -> Path:
    """Where `text` is: an asset's path, or that path with a `~` of somebody known written out."""
    return Path(os.path.expanduser(resolve(text)))  # where pathlib raises for a user who is not known


def prompts(text: str) -> list[str]:
    """The prompts of an asset (`asset:tiny-sd`) or of a text file, one a line, their white space tidied.

    Blank lines and `#` lines are skipped. Raises `UserError` if the file is missing, is not text or holds no
    prompt, and for a line that is none.
    """
    source = place(text)
    if source.is_dir():
        source = source / "prompts.txt"
    if not source.is_file():
        raise UserError(f"prompts {text!r}: there is no such file; give a text file with one prompt a line")
    lines = _lines(source, text)
    found = [tidied(line, "prompt") for line in lines]
    for number, (line, (_, reason)) in enumerate(zip(lines, found, strict=True), start=1):
        if reason and line.strip():
            raise UserError(f"prompts {text!r}, line {number}: {reason}; take it out")
    usable = [prompt for prompt, _ in found if prompt and not prompt.startswith("#")]
    if not usable:
        raise UserError(f"prompts {text!r}: the file holds no prompt; write one a line")
    return usable


def _lines(source: Path, text: str) -> list[str]:
    try:
        with source.open("rb") as handle:
            content = handle.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UserError(
                f"prompts {text!r}: more than {_MOST_BYTES:,} bytes, which no file of prompts has; give a "
                "text file with one prompt a line"
            )
        return decoded(content).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {text!r}: the file cannot be read ({error}); save it as UTF-8") from error
