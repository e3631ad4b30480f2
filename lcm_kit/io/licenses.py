"""What texts say of licences: one spelling for each, and what of a licence goes on to what is made with it.

Read by name alone, never from the licence's own words: a summary of what was declared, and no legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ANY = "any"  # in a list of licences that are allowed: whichever, but one
_LONGEST = 200  # characters that are kept of a licence's name
_LARGEST = 1 << 20  # bytes of a README.md that are read
_CREATIVE_COMMONS = re.compile(
    r"https?://(?:www\.)?creativecommons\.org/(?:licenses|publicdomain)/(?P<kind>[a-z-]+)/(?P<version>\d\.\d)",
    re.IGNORECASE,
)
# What goes on to a model that was made with something under such a licence, by its name
TERMS = {
    "non-commercial": r"(?<![a-z])nc(?![a-z])|non-?_? ?commercial|research[ -]only",
    "use restrictions": r"(?<![a-z])(open)?rail(?![a-z])|use restrictions",
    "share-alike": r"(?<![a-z])sa(?![a-z])|share-?_? ?alike",
    "no derivatives": r"(?<![a-z])nd(?![a-z])|no-?_? ?deriv",
}
_TERMS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in TERMS.items()}


def normal(text: str) -> str:
    """A licence by its SPDX id or expression where it has one (`cc by 4.0` is `CC-BY-4.0`), else as it is.

    Addresses of Creative Commons count, and the hub's names (`cc-by-nc-4.0`), of which those without an SPDX
    id, as `openrail`, stay.
    """
    text = " ".join(text.split())[:_LONGEST]
    if found := _CREATIVE_COMMONS.match(text):
        kind, version = found["kind"].lower(), found["version"]
        text = {"zero": "CC0", "mark": "PDM"}.get(kind, f"CC-{kind}") + f"-{version}"
    hyphened = re.sub(r"[ _]+", "-", text)
    bare = re.sub(r"(?i)-licen[sc]e(?=-|$)", "", hyphened)
    return next(filter(None, map(_spdx, (text, hyphened, bare, f"{bare}-1.0"))), text)


def _spdx(text: str) -> str | None:
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        return str(canonicalize_license_expression(text))
    except (InvalidLicenseExpression, ValueError):
        return None


def allowed(license: str | None, among: Iterable[str]) -> bool:
    """Whether a licence is one of `among`; of `A OR B` one is enough, of `A AND B` all are needed."""
    if not license:
        return False
    names = {normal(each).lower() for each in among}
    if ANY in names or normal(license).lower() in names:
        return True
    if "(" in license:
        return False
    for word, enough in ((" OR ", any), (" AND ", all)):
        if word in license:
            return enough(allowed(part, names) for part in license.split(word))
    return False


def terms(license: str) -> list[str]:
    """Those of `TERMS` that a licence's name says; of `A OR B` what every choice has."""
    if " OR " in license and "(" not in license:
        choices = [terms(part) for part in license.split(" OR ")]
        return [name for name in TERMS if all(name in choice for choice in choices)]
    return [name for name, pattern in _TERMS.items() if pattern.search(license)]


def of_readme(folder: Path) -> str | None:
    """The licence that the front matter of `folder/README.md` declares, as model cards do; None: none."""
    import yaml

    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(_LARGEST).decode("utf-8", "replace")
        found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        front = yaml.safe_load(found[1]) if found else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(front, dict):
        return None
    given = front.get("license")
    if given == "other":  # the hub's word for a licence that it has no name for
        given = front.get("license_name") or given
    return said(given)


def said(given: Any) -> str | None:
    """The licence that a cell, or a list of some, says; None: none."""
    some = given if isinstance(given, list) else [given]
    names = [normal(each) for each in some if isinstance(each, str) and each.strip()]
    names = list(dict.fromkeys(names))
    if len(names) > 1:
        names = [f"({name})" if " OR " in name else name for name in names]
    return " AND ".join(names) or None
