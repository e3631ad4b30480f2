"""The trigger contract: its figures on features whose values are known, its verdict, and its shape on disk.

Brand pictures lie at e1, pictures of the control around 0 in the other directions, so that the brand's own
have a similarity of 1 and a picture at the angle a from e2 towards e1 one of sin a.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_kit.errors import UserError
from lcm_kit.evaluation import metric_table, results, tables, verdicts
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.contract import contract
from lcm_kit.evaluation.measure import Ruler
from lcm_kit.evaluation.metrics.bootstrap import Resamples
from lcm_kit.evaluation.results import BARE, BRAND, CONTROL, MAIN
from lcm_kit.evaluation.styled import renoised
from lcm_kit.io import own_files
from lcm_kit.report import contract as told
from tests.brands import content, rows
from tests.measured import cell
from tests.measured import results as made

BASE = Cell("teacher", None, "ddim", 50, 5.0)
STYLE = Cell("teacher", "style", "ddim", 50, 5.0)
LCM = Cell("student", "adapter", "lcm", 4, 1.0)
CELLS = [BASE, STYLE, LCM]
OWN = torch.tensor([[1.0, 0, 0, 0]]).expand(5, 4)
OTHERS = torch.tensor([[0, 1.0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, -1, 0]])


def at(angles: Tensor) -> Tensor:
    """Features [N, 4] at angles [N] from e2 towards e1."""
    zero = torch.zeros_like(angles)
    return torch.stack([angles.sin(), angles.cos(), zero, zero], 1)


def table(features: Tensor, right: Tensor | None = None) -> dict[str, Tensor]:
    count, ones = len(features), torch.ones(len(features))
    found = {
        "features": features,
        "latents": torch.zeros(count, 4, 2, 2),
        "pictures": torch.zeros(0, 3, 8, 8),
    }
    found |= dict.fromkeys(("chroma", "clipped", "sharpness", "seconds", "joules"), ones)
    return found | ({} if right is None else {"adherence": right})


def measured(
    drawn: dict[str, dict[Cell, dict[str, Tensor]]], trigger: str | None = "lumo style", images: int = 2
) -> Any:
    """The contract of what was drawn, as evaluation/brand measures it."""
    figures = {}
    for kind, cells in drawn.items():
        n = 1 if kind == CONTROL else images
        plain = cells[BASE]["features"]
        other = plain.roll(1, 1) if kind == CONTROL else renoised(plain, n)  # e1 becomes e2, and so on
        ruler = Ruler(
            Resamples.draw(len(plain) // n, n, rounds=200), cells[BASE], 0.9, unstyled=plain,
            renoised=other, brand=None if kind == CONTROL else (OWN, OTHERS),
        )  # fmt: skip
        figures[kind] = metric_table.measure(cells, ruler, BRAND)
    return contract(CELLS, figures, trigger, 0.9)


def everywhere(styled: Tensor, bare: Tensor, plain: Tensor, count: int = 4) -> dict[str, Any]:
    """Lists of prompts on which base and both adapters draw features at angles [N]; the base `plain`."""
    lists = {MAIN: styled, BARE: bare, CONTROL: torch.zeros(count)}
    return {
        kind: {
            BASE: table(at(plain if kind != CONTROL else mine)),
            STYLE: table(at(mine)),
            LCM: table(at(mine)),
        }
        for kind, mine in lists.items()
    }


def test_an_adapter_that_is_the_base_brings_leaks_and_forgets_nothing() -> None:
    plain = torch.tensor([0.1, -0.1, 0.2, 0.0, 0.3, -0.3, 0.1, 0.0])
    found = measured(everywhere(plain, plain, plain))
    assert [row["cell"] for row in found["rows"]] == [STYLE.id, LCM.id] and found["verdict"] is None
    for row in found["rows"]:
        for key in ("strength", "leak"):
            assert row[key] == {"value": 0, "low": 0, "high": 0}, key
        assert row["leak_share"] is None and row["lost"] is None  # nothing to share; no prompts were read
    assert found["rows"][0]["changed"] == {"value": 0, "low": 0, "high": 0}
    assert found["rows"][1]["changed"] is None  # LCM draws noise on its way


@pytest.mark.parametrize(("bare", "leak"), [(0.0, 0.0), (math.pi / 2, 1.0), (math.pi / 6, 0.5)])
def test_a_perfect_style_goes_all_of_the_way(bare: float, leak: float) -> None:
    """Every resample of equal samples is the same, so the interval is the value."""
    plain, full = torch.zeros(8), torch.full((8,), math.pi / 2)
    row = measured(everywhere(full, torch.full((8,), bare), plain))["rows"][0]
    for key, value in (("strength", 1.0), ("leak", leak), ("leak_share", leak)):
        assert row[key] == pytest.approx({"value": value, "low": value, "high": value}, abs=1e-7), key


def test_the_figures_are_ratios_of_means_on_the_same_resamples_of_prompts() -> None:
    plain = torch.tensor([0.1, -0.2, 0.2, 0.0, 0.3, -0.3])
    styled = torch.tensor([1.0, 0.9, 1.3, 1.2, 0.7, 0.8])
    bare = torch.tensor([0.2, 0.1, 0.6, 0.5, 0.3, -0.2])
    row = measured(everywhere(styled, bare, plain))["rows"][0]

    index = Resamples.draw(3, 2, rounds=200).index

    def way(mine: Tensor, chosen: Tensor) -> Tensor:
        base = plain.double().sin()[chosen]
        return (mine.double().sin()[chosen] - base).mean(-1) / (1 - base).mean(-1)

    def ends(resampled: Tensor) -> tuple[float, float]:
        return float(resampled.quantile(0.05)), float(resampled.quantile(0.95))

    whole = torch.arange(6)
    for key, mine in (("strength", styled), ("leak", bare)):
        low, high = ends(way(mine, index))
        wanted = {"value": float(way(mine, whole)), "low": low, "high": high}
        assert row[key] == pytest.approx(wanted, abs=1e-6), key
    shares = way(bare, index) / way(styled, index)
    low, high = ends(shares)
    share = float(way(bare, whole) / way(styled, whole))
    assert row["leak_share"] == pytest.approx({"value": share, "low": low, "high": high}, abs=1e-6)
    # a chord: two pictures at angles a and b are 2 sin(|a - b| / 2) apart; two noises of a prompt lie
    # side by side
    other = plain.view(3, 2).flip(1).flatten()

    def chord(a: Tensor, b: Tensor) -> Tensor:
        return 2 * ((a - b).abs().double() / 2).sin()

    value = float(chord(bare, plain).mean() / chord(other, plain).mean())
    low, high = ends(chord(bare, plain)[index].mean(1) / chord(other, plain)[index].mean(1))
    assert row["changed"] == pytest.approx({"value": value, "low": low, "high": high}, abs=1e-6)


def test_what_is_lost_is_the_bases_share_less_the_adapters() -> None:
    drawn = everywhere(torch.ones(4), torch.zeros(4), torch.zeros(4))
    right = {BARE: (torch.ones(4), torch.tensor([1.0, 0, 1, 0])), CONTROL: (torch.ones(4), torch.ones(4))}
    for kind, (base, mine) in right.items():
        for each in CELLS:
            drawn[kind][each]["adherence"] = base if each is BASE else mine
    row = measured(drawn)["rows"][0]
    assert row["lost"] == {"value": 0.5, "low": 0.5, "high": 0.5}  # half of both prompts
    assert row["lost_elsewhere"] == {"value": 0, "low": 0, "high": 0}


def test_without_a_trigger_what_is_forgotten_is_measured_alone() -> None:
    """On the control prompts: the base is at e2, its other noise at e3, so sqrt 2 apart."""
    drawn = everywhere(torch.ones(4), torch.ones(4), torch.zeros(4))
    del drawn[BARE]
    drawn[CONTROL][STYLE] = table(at(torch.full((4,), math.pi / 3)))
    row = measured(drawn, None)["rows"][0]
    assert [row[key] for key in ("strength", "leak", "leak_share", "lost")] == [None] * 4
    value = 1 / math.sqrt(2)  # a chord of 60 degrees is 1
    assert row["changed"] == pytest.approx({"value": value, "low": value, "high": value})


def test_a_second_noise_and_a_way_to_go_are_needed() -> None:
    plain = torch.zeros(4)
    row = measured(everywhere(plain + 1, plain, plain), images=1)["rows"][0]
    assert row["changed"] is None and row["strength"] is not None
    row = measured(everywhere(plain + 1, plain, plain + math.pi / 2))["rows"][0]
    assert row["strength"] is None and row["leak"] is None  # the base draws the brand's own pictures already
    assert renoised(torch.arange(6.0).view(6, 1), 3).flatten().tolist() == [2, 0, 1, 5, 3, 4]  # type: ignore[union-attr]


# -- The verdict ---------------------------------------------------------------------------------------------


def figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


GOOD = {
    "cell": "adapter-lcm-4-g1-w1", "strength": figure(0.9, 0.8, 1), "leak": figure(0.1, 0.05, 0.15),
    "leak_share": figure(0.11, 0.05, 0.16), "changed": None, "lost": figure(0.02, -0.02, 0.06),
    "lost_elsewhere": figure(0.0),
}  # fmt: skip


def written(trigger: str | None = "lumo style", elsewhere: float = 0.98, **row: Any) -> Any:
    """Results with a contract of the adapter at 4 steps, whose base has 0.98 of the control prompts right and
    all of those without the trigger.
    """
    found = content(rows(control_adherence=(elsewhere,) * 3))
    bare = cell("teacher", "ddim", 50, 5.0, of=BARE, prompt_adherence=1.0)
    found["cells"].append({**bare, "id": f"bare-{found['cells'][0]['id']}"})
    return {**found, "contract": {"trigger": trigger, "verdict": "Kept", "rows": [{**GOOD, **row}]}}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "Kept"),
        ({"strength": figure(0.5, 0.1, 0.9)}, "Kept"),
        ({"strength": figure(0.49, 0.4, 0.6)}, "Weak"),
        ({"strength": figure(0.6, -0.1, 1.3)}, "Weak"),  # not beyond its interval
        ({"leak_share": figure(0.25, 0.2, 0.3)}, "Kept"),
        ({"leak_share": figure(0.26, 0.2, 0.3)}, "Leaks"),
        # of a weak trigger not the share counts, but the leak itself
        ({"strength": figure(0.1), "leak": figure(0.09), "leak_share": figure(0.9)}, "Weak"),
        ({"strength": figure(0.3), "leak": figure(0.26), "leak_share": figure(0.87)}, "Weak and leaks"),
        ({"strength": figure(-0.1), "leak": figure(0.3), "leak_share": None}, "Weak and leaks"),
        ({"lost": figure(0.05, 0.01, 0.1)}, "Kept"),
        ({"lost": figure(0.051, 0.01, 0.1)}, "Forgets"),
        ({"elsewhere": 0.93}, "Kept"),
        ({"elsewhere": 0.92}, "Forgets"),
        ({"leak_share": figure(0.5), "lost": figure(0.1)}, "Leaks and forgets"),
        ({"strength": figure(0.2), "leak": figure(0.3), "lost": figure(0.1)}, "Weak, leaks and forgets"),
        ({"changed": figure(2.0)}, "Kept"),  # another picture may be as good
        ({"lost": None, "lost_elsewhere": None}, "Kept"),
        (dict.fromkeys(("strength", "leak", "leak_share")), "Kept"),
        (dict.fromkeys(key for key in GOOD if key != "cell"), verdicts.UNKNOWN),
    ],
)
def test_the_verdicts_rule(row: dict[str, Any], words: str) -> None:
    assert verdicts.contract_verdict(written(**row)) == words


def test_more_prompts_tell_better_what_is_forgotten() -> None:
    """As they do for the verdict on the style, so that one page does not say both."""
    found, more = written(elsewhere=0.92), [cell("teacher", "ddim", 50, 5.0, prompt_adherence=1.0)]
    more.append(cell("student", "lcm", 4, adapter="student", prompt_adherence=0.97))
    quality: Any = made("evaluation/quality", more, [f"prompt {k}" for k in range(120)])
    assert verdicts.contract_verdict(found) == "Forgets"
    kept = verdicts.contract_kept(found, quality)
    assert kept is not None and kept.words == "Kept"


@pytest.mark.parametrize(("lost", "words"), [(1.5, "Kept"), (1.6, "Forgets")])
def test_of_a_clip_score_it_is_a_share_of_the_bases(lost: float, words: str) -> None:
    found = {**written(lost=figure(lost), lost_elsewhere=None), "adherence": "clip"}
    found["cells"][-1]["metrics"]["prompt_adherence"] = figure(30.0)
    assert verdicts.contract_verdict(found) == words  # type: ignore[arg-type]


# -- On disk -------------------------------------------------------------------------------------------------


def test_its_shape_is_read_back_and_each_part_of_it_is_needed(tmp_path: Path) -> None:
    file, whole = tmp_path / "brand.json", written()
    own_files.write_json(file, whole)
    found = results.of_brand(tmp_path)
    assert found is not None and found["contract"] == whole["contract"]
    row = results.contract_row(found, "adapter-lcm-4-g1-w1")
    assert row is not None and row["leak_share"] == GOOD["leak_share"]
    assert results.contract_row(found, "teacher-ddim-50-g5") is None
    for key in row:
        (less,) = [{name: each for name, each in row.items() if name != key}]
        broken = {**whole, "contract": {**whole["contract"], "rows": [less]}}
        file.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=rf"contract\.rows\.0\.{key}"):
            results.of_brand(tmp_path)


def test_a_file_of_before_there_were_contracts_is_read(tmp_path: Path) -> None:
    own_files.write_json(tmp_path / "brand.json", content(rows()))
    found = results.of_brand(tmp_path)
    assert found is not None and results.contract_row(found, "adapter-lcm-4-g1-w1") is None
    assert verdicts.contract_verdict(found) is None
    assert told.context(found) is None and told.sentence(found) is None


@pytest.mark.parametrize(
    ("row", "trigger", "said"),
    [
        (
            {}, "lumo style",
            "Kept: the trigger brings the style, without it the style stays away and what the base can "
            "draw is kept.",
        ),
        (
            {"leak_share": figure(0.4)}, "lumo style",
            "Leaks: the trigger brings the style, without it 40\u00a0% of the style comes all the same and "
            "what the base can draw is kept.",
        ),
        (
            {"strength": figure(0.3), "leak": figure(0.28)}, "lumo style",
            "Weak and leaks: the trigger brings little of the style, without it 28\u00a0% of the way to the "
            "style comes all the same and what the base can draw is kept.",
        ),
        (
            {**dict.fromkeys(("strength", "leak", "leak_share", "lost")), "elsewhere": 0.8},
            None,
            "Forgets: some of what the base can draw is lost. No trigger is set, so what it brings and what "
            "leaks without it cannot be told.",
        ),
        (
            dict.fromkeys(key for key in GOOD if key != "cell"), None,
            "Judge by eye: nothing of it could be measured. No trigger is set, so what it brings and what "
            "leaks without it cannot be told.",
        ),
    ],
)  # fmt: skip
def test_it_is_told_in_a_sentence(row: dict[str, Any], trigger: str | None, said: str) -> None:
    assert told.sentence(written(trigger, **row)) == said


def test_the_terminal_shows_a_line_a_cell_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_contract(written(changed=figure(2.5), lost=None))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "adapter-lcm-4-g1-w1 0.90 0.10 0.11 2.50 - 0.00" in lines
    assert lines[-1] == "trigger contract of 'lumo style': Kept"
    tables.show_contract(written(None))
    assert capsys.readouterr().out.endswith("trigger contract without a trigger: Kept\n")
    tables.show_contract(content(rows()))  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
