"""Text that people wrote, a caption or a prompt: decoded, on one line, and without what is no text."""

from __future__ import annotations

from typing import Any
from unicodedata import category

from lcm_kit.errors import UserError

LONGEST = 20_000  # characters of a caption or a prompt; a text encoder reads some 300


def decoded(content: bytes) -> str:
    """Text in UTF-8, or in UTF-16 where a mark at its begin says so. Raises `UnicodeDecodeError`."""
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def tidied(text: Any, what: str = "caption") -> tuple[str, str]:
    """A caption, or `what` it is, with its white space tidied, and why it is of no use ("" if it is)."""
    if text is None:
        return "", f"no {what}"
    if not isinstance(text, str):
        return "", f"{what} is not text but {type(text).__name__}"
    if len(text) > LONGEST:
        return "", f"{what} is too long: {len(text):,} characters of at most {LONGEST:,}"
    tidy = " ".join(text.split())
    if found := next((sign for sign in tidy if category(sign) in ("Cc", "Cs")), None):
        return "", f"{what} holds a control character, {found!r}"
    return tidy, "" if tidy else f"empty {what}"


def from_command(prompt: str) -> str:
    """A prompt of the command line, tidied. Raises `UserError` for what is none; it may be empty."""
    tidy, reason = tidied(prompt, "prompt")
    if reason and prompt.strip():
        raise UserError(f"--prompt {prompt[:60]!r}: {reason}; write it without")
    return tidy
