"""The model card of a look: its figures, base above adapter, and none of the brand's own pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcm_kit.export import card
from lcm_kit.lora.structure import known
from tests.brands import content, row, rows, with_contract, write_brand
from tests.cards import BOTH, HOSTILE, WORSE, evaluated, facts, headings, hollow, snippets, tables

PROMPTS = ["a fox, lumo style", HOSTILE, "an owl, lumo style"]


def write(folder: Path, found: dict[str, Any] | None, **more: Any) -> str:
    path = card.write(
        folder, title="house", files=BOTH, structure=known("sd1"), facts=facts(), lora=hollow(known("sd1")),
        checks=[], brand=found, **more,
    )  # fmt: skip
    return path.read_text(encoding="utf-8")


def brand_of(run: Path, prompts: list[str]) -> dict[str, Any]:
    write_brand(run, prompts)
    found: dict[str, Any] = json.loads((run / "brand.json").read_text())
    return found


def test_the_figures_and_the_sheet(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "export"
    page = write(folder, brand_of(run, PROMPTS), pictures_from=run)
    (table,) = (table for table in tables(page) if table[0][0] == "drawn by")
    right, other = "90\u00a0% (85\u00a0% to 95\u00a0%)", "95\u00a0% (91\u00a0% to 99\u00a0%)"
    assert table[0][2:] == [
        "steps",
        "brand similarity",
        "in the style",
        "prompts of the style",
        "other prompts",
    ]
    assert [line[0] for line in table[1:]] == ["base", "base with the style alone", *["this LoRA"] * 4]
    how, all_of_them = "LCM, guidance_scale 1", "100\u00a0% (100\u00a0% to 100\u00a0%)"
    assert table[5] == ["this LoRA", how, "4", "0.700 (0.640 to 0.760)", all_of_them, right, other]
    assert "Yes. In brackets the interval of 95%, over 3 prompts." in page
    assert 'prompt = "a fox, lumo style"' in snippets(page)[0]  # with the word that calls the style

    # tests/brands.py: the base is row 0 (shade 0), the adapter at 4 steps row 4 (80), the brand's own 200
    (link,) = re.findall(r"^!\[.*\]\((.*)\)$", page, re.MULTILINE)
    with Image.open(folder / link) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (64 + 4 + 64, 3 * 64 + 8, 3)
    cells = [[pixels[y, x].tolist() for x in (8, 76, 144)] for y in (6, 74)]
    assert cells == [[[shade, 30 * i, 7] for i in range(3)] for shade in (0, 80)]
    assert [file.name for file in folder.rglob("*.png")] == ["base-and-style.png"]


@pytest.mark.parametrize(
    ("adapter", "less", "sentence"),
    [
        (
            {"control_adherence": (0.5, 0.4, 0.6)},
            (0.5, 0.4, 0.6),
            "In part: it is nearer to the brand's pictures, but some of what the base can draw is lost.",
        ),
        (
            {"in_style": (2 / 3, 0.4, 0.9), "control_adherence": (0.5, 0.4, 0.6)},
            (0.5, 0.4, 0.6),
            "pictures, but 2 of 3 prompts show the style and some of what the base can draw is lost.",
        ),
        (
            {"in_style": (0.0, 0.0, 0.0)},
            (0.5, 0.4, 0.6),
            "No: nearer to the brand's pictures than the base, but",
        ),
        ({}, (0.1, -0.1, 0.3), "No: it is not nearer to"),
        ({"brand_similarity": None}, None, "Judge by eye: nearness to"),
    ],
)
def test_it_says_what_did_not_work(
    adapter: dict[str, Any], less: tuple[float, float, float] | None, sentence: str, tmp_path: Path
) -> None:
    found = content(rows(**adapter), less, PROMPTS)
    assert sentence in write(tmp_path / "export", found)


def test_beside_the_other_evaluation_and_by_clip(tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = {**brand_of(run, PROMPTS), "adherence": "clip"}
    page = write(tmp_path / "export", found, results=evaluated(run), pictures_from=run)
    named = headings(page)
    order = ("What it looks like", "Away from the style", "Does it draw in the style?", "How good is it?")
    assert [name for name in named if name in order] == list(order)
    assert "CLIP score" in page and "0.900 (0.850 to 0.950)" in page
    assert len(list((tmp_path / "export").rglob("*.png"))) == 2


def test_nothing_is_claimed_without_an_adapter_or_a_base(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", None)
    for names in (("base", "styled"), ("adapter",)):
        found = content([row(name, 4) for name in names], prompts=PROMPTS)
        assert write(tmp_path / names[0], found) == plain


@pytest.mark.parametrize("text", [HOSTILE, WORSE], ids=["hostile", "worse"])
def test_foreign_prompts_break_nothing(text: str, tmp_path: Path) -> None:
    pages = []
    for prompt in (text, "a fox"):
        run = tmp_path / str(len(pages))
        pages.append(write(run / "export", brand_of(run, [prompt, "an owl"]), pictures_from=run))
    assert headings(pages[0]) == headings(pages[1])
    sizes = [[[len(line) for line in table] for table in tables(page)] for page in pages]
    assert sizes[0] == sizes[1]


# -- The trigger contract ------------------------------------------------------------------------------------


def test_the_trigger_contract_is_a_section_with_its_figures(tmp_path: Path) -> None:
    found = with_contract(content(rows(), prompts=PROMPTS), leak_share=(0.4, 0.3, 0.5))
    page = write(tmp_path / "export", found)
    assert (
        "Leaks: the trigger brings the style, without it 40\u00a0% of the style comes all the same and what "
        "the base can draw is kept." in page
    )
    assert "The same 3 prompts were drawn with `lumo style` and without it, from the same noise." in page
    (table,) = (table for table in tables(page) if "style with it" in table[0])
    assert table[0][3:] == [
        "style with it", "style without it", "share that leaks", "changed", "lost", "lost elsewhere",
    ]  # fmt: skip
    assert [line[:3] for line in table[1:3]] == [
        ["base with the style alone", "DDIM, guidance_scale 5", "50"],
        ["this LoRA", "LCM, guidance_scale 1", "1"],
    ]
    assert table[1][3:] == [
        "90\u00a0% (80\u00a0% to 100\u00a0%)", "9\u00a0% (5\u00a0% to 15\u00a0%)",
        "40\u00a0% (30\u00a0% to 50\u00a0%)", "0.500 (0.400 to 0.600)", "2\u00a0% (-2\u00a0% to 6\u00a0%)",
        "3\u00a0% (-1\u00a0% to 7\u00a0%)",
    ]  # fmt: skip


def test_without_a_trigger_a_sentence_says_so(tmp_path: Path) -> None:
    page = write(tmp_path / "export", with_contract(content(rows(), prompts=PROMPTS), None))
    told = "No trigger is set, so what it brings and what leaks without it cannot be told."
    assert f"Kept: what the base can draw is kept. {told}" in page and page.count(told) == 1
    (table,) = (table for table in tables(page) if table[0][-1] == "lost elsewhere")
    assert table[0][3:] == ["changed", "lost elsewhere"] and len(table) == 6
    assert table[1][3:] == ["0.500 (0.400 to 0.600)", "3\u00a0% (-1\u00a0% to 7\u00a0%)"]


def test_a_file_of_before_says_nothing_of_it(tmp_path: Path) -> None:
    assert "What does the trigger do?" not in headings(write(tmp_path / "export", content(rows())))


@pytest.mark.parametrize("trigger", [HOSTILE, WORSE], ids=["hostile", "worse"])
def test_a_foreign_trigger_breaks_nothing(trigger: str, tmp_path: Path) -> None:
    pages = [
        write(tmp_path / str(k), with_contract(content(rows(), prompts=PROMPTS), each))
        for k, each in enumerate((trigger, "lumo style"))
    ]
    assert headings(pages[0]) == headings(pages[1])
    sizes = [[[len(line) for line in table] for table in tables(page)] for page in pages]
    assert sizes[0] == sizes[1]
