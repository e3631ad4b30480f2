"""What the kit ships: the base `tiny-sd` and its LCM-LoRA, images (`brand`, `general`), probes, `glyphs`."""

from __future__ import annotations

from pathlib import Path

from lcm_kit.errors import UserError

_FOLDER = Path(__file__).resolve().parent
LONGEST = 20_000  # characters of a caption or a prompt; a text encoder reads some 300
NAMES = ("tiny-sd", "tiny-lcm-lora", "brand", "general", "probe", "brand-probe", "glyphs", "everyday")


def path(name: str) -> Path:
    """The folder of a shipped asset. Raises `UserError` for a name that the kit does not ship."""
    if name not in NAMES:
        raise UserError(f"asset {name!r} is not shipped with lcm-kit; choose one of {', '.join(NAMES)}")
    return _FOLDER / name


def resolve(text: str) -> str:
    """`asset:NAME` as the path of that asset; anything else (a path, a hub id) unchanged."""
    return str(path(text.removeprefix("asset:"))) if text.startswith("asset:") else text


def prompts(text: str) -> list[str]:
    """The prompts of an asset (`asset:tiny-sd`) or of a text file, one a line.

    Blank lines and `#` lines are skipped. Raises `UserError` if the file is missing, is not text or holds no
    prompt.
    """
    source = Path(resolve(text))
    if source.is_dir():
        source = source / "prompts.txt"
    if not source.is_file():
        raise UserError(f"prompts {text!r}: there is no such file; give a text file with one prompt a line")
    try:
        text_in_file = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {text!r}: the file cannot be read ({error}); save it as UTF-8") from error
    lines = [line.strip() for line in text_in_file.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UserError(f"prompts {text!r}: the file holds no prompt; write one a line")
    if longest := next((line for line in found if len(line) > LONGEST), None):
        raise UserError(
            f"prompts {text!r}: a line has {len(longest):,} characters of at most {LONGEST:,}; write one "
            "prompt a line"
        )
    return found
