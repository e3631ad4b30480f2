"""The licences of what a LoRA was made from, and what of them goes on to it, by their names alone.

A summary of what was declared for the base, the LoRAs and the pictures, and no legal advice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lcm_kit.bases.headers import read_header
from lcm_kit.errors import UserError
from lcm_kit.io import licenses
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.provenance import Provenance

_LONGEST = 1000  # characters of what a header says


class Declared(NamedTuple):
    """A licence that was declared."""

    what: str  # the base, a LoRA by name, or pictures, of how many
    license: str

    @property
    def terms(self) -> list[str]:
        """What its name says that goes on (`licenses.TERMS`)."""
        return licenses.terms(self.license)


def license_of(file: Path) -> str | None:
    """The licence that a LoRA file's header declares, or else the README.md in its folder; None: none.

    Of a file of this kit's: all that were declared for what it was made from.
    """
    try:
        header = read_header(file, str(file)).metadata
    except UserError:  # whoever reads its tensors says so
        header = {}
    every = declared(provenance_from_header(header, file.stem))
    return licenses.said([each.license for each in every]) or licenses.of_readme(file.parent)


def declared(made: Provenance) -> list[Declared]:
    """What was declared of all that `made` tells of, each once: a merged file's parts too."""
    return list(dict.fromkeys(_declared(made)))


def _declared(made: Provenance) -> Iterator[Declared]:
    if made.license:
        yield Declared("the file", made.license)
    if made.base.license:
        yield Declared("the base", made.base.license)
    for lora in (*made.teachers, *made.start):
        if lora.license:
            yield Declared(f"the LoRA {Path(lora.path).name}", lora.license)
    if rights := made.data.rights:
        for license, count in sorted(rights.licenses.items(), key=lambda item: (-item[1], item[0])):
            yield Declared(f"{count} of {rights.pictures} pictures", license)
    for part in made.parts:
        for found in _declared(part.made):
            if found == ("the base", made.base.license):
                continue
            yield Declared(
                part.file if found.what == "the file" else f"{part.file}: {found.what}", found.license
            )


def terms(made: Provenance) -> dict[str, list[Declared]]:
    """What goes on to it, and from where: `non-commercial` from the base, ..."""
    every = declared(made)
    found = {term: [each for each in every if term in each.terms] for term in licenses.TERMS}
    return {term: some for term, some in found.items() if some}


def sentence(made: Provenance) -> str | None:
    """All of it in a line, as the header has it; None where nothing is declared."""
    every = declared(made)
    if not every:
        return None
    what = "; ".join(f"{each.what}: {each.license}" for each in every)
    text = f"made from {what}"
    if found := terms(made):
        text = f"{', '.join(found)} ({text})"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."


def warnings(made: Provenance) -> list[str]:
    """What whoever gives the file away should know first, in sentences."""
    found = []
    for term, some in terms(made).items():
        if term != "share-alike":
            sources = ", ".join(f"{each.what} ({each.license})" for each in some[:3])
            more = f" and {len(some) - 3} more" if len(some) > 3 else ""
            found.append(
                f"{term}: so the licence of {sources}{more} says by its name; it is taken to hold for this "
                "LoRA too, and its card and files say so"
            )
    rights = made.data.rights
    if rights and rights.refused:
        found.append(
            f"{rights.refused} of the {rights.pictures} pictures that it was trained on say that there is no "
            "consent"
        )
    return found
