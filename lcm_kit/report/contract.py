"""The trigger contract in words and in cells of a table, for the report, the card and the terminal."""

from __future__ import annotations

from typing import Any

from lcm_kit.evaluation import verdicts
from lcm_kit.evaluation.result_shapes import Results
from lcm_kit.evaluation.results import BARE, brand_rows, by_id, contract_row, prompts
from lcm_kit.evaluation.verdicts import Kept
from lcm_kit.io.own_shapes import Interval
from lcm_kit.report.shared import number, percent


def interval(figure: Interval | None, show: Any = number) -> str:
    """A figure with its interval: `0.62 (0.58 to 0.66)`; a dash where it was not measured."""
    if figure is None:
        return "–"
    return f"{show(figure['value'])} ({show(figure['low'])} to {show(figure['high'])})"


def context(found: Results, quality: Results | None = None) -> dict[str, Any] | None:
    """What a page shows of brand.json's contract; None where there is none, as in files of earlier kits.

    `quality`: as in `verdicts.brand_headline`. `rows` have texts: `row` is the row of `results.brand_rows`,
    the rest are figures with intervals.
    """
    contract, adherence = found.get("contract"), found["adherence"]
    if contract is None:
        return None
    show = number if adherence == "clip" else percent
    rows = [
        {
            "row": row,
            "strength": interval(each["strength"], percent),
            "leak": interval(each["leak"], percent),
            "share": interval(each["leak_share"], percent),
            "changed": interval(each["changed"]),
            "lost": interval(each["lost"], show),
            "lost_elsewhere": interval(each["lost_elsewhere"], show),
        }
        for row in brand_rows(found)
        if (each := contract_row(found, row["id"])) is not None
    ]
    head = verdicts.brand_headline(found)
    return {
        "trigger": contract["trigger"],
        "sentence": sentence(found, quality),
        "rows": rows,
        "clip": adherence == "clip",
        "measured": {key: any(each[key] != "–" for each in rows) for key in ("changed", "lost_elsewhere")},
        "n": len(prompts(found, BARE)["texts"]),
        "pictures": _bare(found, head) if contract["trigger"] else [],
    }


def sentence(found: Results, quality: Results | None = None) -> str | None:
    """The verdict with its reasons; None without a contract. `quality`: as in `verdicts.brand_headline`."""
    contract = found.get("contract")
    row = contract_row(found, verdicts.brand_headline(found).adapter["id"])
    kept = verdicts.contract_kept(found, quality)
    if contract is None or row is None or kept is None:
        return None
    share = row["leak_share"] if kept.called else row["leak"]
    told = f"{kept.words}: {_reasons(kept, share)}."
    if contract["trigger"] is None:
        told += " No trigger is set, so what it brings and what leaks without it cannot be told."
    return told


def _reasons(kept: Kept, share: Interval | None) -> str:
    of = "of the style" if kept.called else "of the way to the style"
    leaks = f"without it {percent(share['value'])} {of} comes all the same" if share else ""
    said = {
        "called": {True: "the trigger brings the style", False: "the trigger brings little of the style"},
        "quiet": {True: "without it the style stays away", False: leaks},
        "remembered": {
            True: "what the base can draw is kept", False: "some of what the base can draw is lost",
        },
    }  # fmt: skip
    answers = kept._asdict()
    clauses = [said[key][answer] for key, answer in answers.items() if answer is not None]
    if not clauses:
        return "nothing of it could be measured"
    return " and ".join(filter(None, [", ".join(clauses[:-1]), clauses[-1]]))


def _bare(found: Results, head: verdicts.Brand) -> list[tuple[str, str, str, str]]:
    """Of each prompt that is shown: the prompt without the trigger, and the pictures of it by the base and by
    the adapter, and the adapter's with the trigger.
    """
    base, mine = (by_id(found, f"{BARE}-{row['id']}") for row in (head.base, head.adapter))
    if base is None or mine is None:
        return []
    drawn = (base["pictures"], mine["pictures"], head.adapter["pictures"])
    return list(zip(prompts(found, BARE)["texts"], *drawn, strict=False))
