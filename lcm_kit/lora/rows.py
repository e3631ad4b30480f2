"""What an app makes of a file, against what the file holds: a row of the table of `lcm_kit.lora.verify`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lcm_kit.lora.apps import NOT_JUDGED, TITLES, Loaded
from lcm_kit.lora.layers import Lora

ANIMATEDIFF = "animatediff"


def title_of(app: str) -> str:
    """The app's name."""
    return "AnimateDiff in diffusers" if app == ANIMATEDIFF else TITLES.get(app, app)


@dataclass(frozen=True)
class Row:
    """What one app makes of a file."""

    app: str
    loaded: int  # modules of the LoRA that it changes, at whatever strength
    right: int  # of those, at the right strength
    of: int  # modules of the LoRA
    verdict: str  # "ok", "not judged: ..." where neither code nor trial tells, or what goes wrong, in words
    error: float | None = None  # diffusers: relative error of the output, where it was measured

    @property
    def ok(self) -> bool:
        """Whole and at the right strength."""
        return self.verdict == "ok"

    @property
    def wrong(self) -> bool:
        """Something is dropped or changed; not to be judged is neither this nor `ok`."""
        return not self.ok and not self.verdict.startswith(NOT_JUDGED)

    @property
    def title(self) -> str:
        """The app's name."""
        return title_of(self.app)


def row_of(app: str, loaded: Loaded, lora: Lora) -> Row:
    """Compare what an app would load with what the file holds."""
    wanted = {name: update.scale for name, update in lora.updates.items()}
    wanted |= {name: 1.0 for name in lora.biases if name not in wanted}
    held = wanted.keys() & loaded.modules.keys()
    right = [
        name
        for name in held
        if math.isclose(loaded.modules[name], wanted[name], rel_tol=1e-6) and name not in loaded.remarks
    ]
    return Row(app, len(held), len(right), len(wanted), _verdict(loaded, wanted))


def _verdict(loaded: Loaded, wanted: Mapping[str, float]) -> str:
    if loaded.refused:
        return f"refuses the file: {loaded.refused}"
    missing = [name for name in wanted if name not in loaded.modules]
    wrong = [
        name
        for name, scale in wanted.items()
        if name in loaded.modules and not math.isclose(loaded.modules[name], scale, rel_tol=1e-6)
    ]
    elsewhere = sorted(loaded.modules.keys() - wanted.keys())
    found = []
    if missing:
        found.append(f"drops {len(missing)} modules, such as {missing[0]}")
    if elsewhere:
        found.append(f"changes {len(elsewhere)} other modules, such as {elsewhere[0]}")
    if wrong:
        name = wrong[0]
        found.append(
            f"{len(wrong)} modules at strength {loaded.modules[name]:g} instead of {wanted[name]:g}, "
            f"such as {name}"
        )
    if loaded.unmatched and not missing:
        found.append(f"ignores {len(loaded.unmatched)} keys, such as {loaded.unmatched[0]}")
    for words in dict.fromkeys(loaded.remarks.values()):  # each once, what is not judged last
        names = [name for name, each in loaded.remarks.items() if each == words]
        found.append(f"{words}: {len(names)} modules, such as {names[0]}")
    return "; ".join(sorted(found, key=lambda each: each.startswith(NOT_JUDGED))) or "ok"
