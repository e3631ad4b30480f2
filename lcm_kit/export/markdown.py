"""Foreign text in Markdown: shown as it is, and obeyed in nothing."""

from __future__ import annotations

import json
import re


def text(value: object) -> str:
    """`value` as Markdown that shows it as it is, on one line, in a table's cell too."""
    line = re.sub(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+\s*", " ", str(value)).strip()
    line = re.sub(r"[\\`*_~\[\]#!]", r"\\\g<0>", line)
    line = re.sub(r"^(\d*)([-+.)])(?=[\s-]|$)", r"\1\\\2", line)  # else a list in a list
    # A table splits its rows before it looks for escapes, so these become entities
    return re.sub(r"[<>&|]", lambda found: f"&#{ord(found[0])};", line)


def code(value: object) -> str:
    """`value` as code in Markdown, also within a table: between backticks if they can hold it."""
    plain = str(value)
    if plain and plain == plain.strip() and plain.isprintable() and not set(plain) & set("`|"):
        return f"`{plain}`"
    return f"<code>{text(plain)}</code>"


def literal(value: object) -> str:
    """`value` as a JSON literal on one line, which Python and YAML read as well."""
    return json.dumps(value, ensure_ascii=False)
