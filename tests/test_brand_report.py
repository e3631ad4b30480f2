"""The report of a brand run: brand, base and adapter side by side, an honest verdict, and what is missing."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lcm_kit.config.finetune import Finetune
from lcm_kit.config.load import dump
from lcm_kit.config.schema import Base
from lcm_kit.data import reconstruction
from lcm_kit.data.reconstruction import Measured
from lcm_kit.evaluation import verdicts
from lcm_kit.report import brand
from lcm_kit.report.build import write_report
from tests.brands import content, row, rows, with_contract, write_brand
from tests.measured import cell, results
from tests.runs import build_run
from tests.test_report import EVIL, Page, write_results
from tests.test_report import rows as quality_rows

PROMPTS = [EVIL, "a cat", "a dog", "a tree", "a fish", "a house", "a seventh"]


@pytest.fixture
def run(sd_base: Callable[..., Path], tmp_path: Path) -> Path:
    run = build_run(tmp_path / "run", sd_base("epsilon"))
    write_brand(run, PROMPTS)
    return run


def colour(source: str | None) -> tuple[int, ...]:
    """The first pixel of a data URI's picture."""
    data = base64.b64decode((source or "").partition(",")[2])
    with Image.open(io.BytesIO(data)) as picture:
        found = picture.convert("RGB").getpixel((0, 0))
    assert isinstance(found, tuple)
    return found


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page).replace("\u00a0", " "))


def test_the_first_picture_is_brand_base_adapter_a_row_a_prompt(run: Path) -> None:
    page = Page(write_report(run).read_text())
    # tests/brands.py: base at 50 steps is row 0 (shade 0), the adapter at 4 steps row 4 (shade 80)
    wanted = [(shade, 30 * i, 7) for i in range(6) for shade in (200, 0, 80)]
    assert [colour(image["src"]) for image in page.images[:18]] == wanted
    names = ("Your pictures", "The base, 50 steps", "Your adapter, 4 steps")
    assert [image["alt"] for image in page.images[3:6]] == [f"{name}: a cat" for name in names]
    # then the control prompts, base beside adapter
    wanted = [(shade, 30 * i, 7) for i in range(6) for shade in (9, 89)]
    assert [colour(image["src"]) for image in page.images[18:30]] == wanted
    text = write_report(run).read_text()
    assert text.index(names[0]) < text.index(names[1]) < text.index(names[2])
    assert "a seventh</figcaption>" not in text


def test_it_needs_no_other_evaluation_and_fetches_nothing(run: Path) -> None:
    text = write_report(run).read_text()
    page = Page(text)
    assert all(link and link.startswith("data:image/") for link in page.links)
    assert all(image.get("alt") for image in page.images)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert 'base = "some/base"' in unescape(text) and f"pipe({json.dumps(EVIL)}, num_inf" in unescape(text)
    assert "Does it work?" not in text and "How do I use the file?" in text


def test_numbers_in_plain_words(run: Path) -> None:
    text = text_of(write_report(run).read_text())
    assert "Your style, in 4 steps? Yes." in text
    assert (
        "Nearness to your pictures (brand similarity, higher is nearer): the base 0.200 (0.150 to 0.250), "
        "your adapter 0.700 (0.640 to 0.760), the look at 50 steps 0.800 (0.750 to 0.850); "
        "adapter less base, prompt by prompt, 0.500 (0.440 to 0.560)." in text
    )
    assert (
        "Prompts of other things, pictures right: the base 98 % (95 % to 100 %), your adapter 95 % "
        "(91 % to 99 %), the look at 50 steps 97 % (94 % to 100 %)." in text
    )


def test_the_other_evaluation_follows_below(run: Path) -> None:
    write_results(run, quality_rows(), ["one", "two"])
    page = write_report(run).read_text()
    text = text_of(page)
    parts = ("Your style, in 4 steps?", "Does it still draw", "Beside the base, on", "How much faster?")
    places = [text.index(part) for part in parts]
    assert places == sorted(places) and "Does it work?" not in text
    assert "your adapter draws 90 % of 128 pictures right" in text and "at 100 calls, 95 %" in text
    assert page.count("<h1>") == 1
    # six rows of three, six of two, then the headline's three rows of two
    assert [colour(image["src"]) for image in Page(page).images[30:36]] == [
        (shade, 90, 120) for shade in (0, 0, 80, 80, 200, 200)
    ]


@pytest.mark.parametrize(
    ("adapter", "less", "answer"),
    [
        ({}, (0.5, 0.44, 0.56), "Yes"),
        ({"brand_similarity": (0.3, 0.2, 0.4)}, (0.1, 0.001, 0.2), "Yes"),  # prompts differ more than the two
        ({"brand_similarity": (0.3, 0.2, 0.4)}, (0.1, 0.0, 0.2), "No"),
        ({"brand_similarity": (0.1, 0.05, 0.15)}, (-0.1, -0.2, -0.01), "No"),
        ({"control_adherence": (0.93, 0.9, 0.95)}, (0.5, 0.44, 0.56), "Yes"),  # exactly 5 points
        ({"control_adherence": (0.929, 0.9, 0.95)}, (0.5, 0.44, 0.56), "In part"),
        ({"control_adherence": None}, (0.5, 0.44, 0.56), "Yes"),
        ({"brand_similarity": None}, None, "Judge by eye"),
        ({"in_style": (0.9, 0.8, 1.0)}, (0.5, 0.44, 0.56), "Yes"),  # nine in ten
        ({"in_style": (0.89, 0.8, 1.0)}, (0.5, 0.44, 0.56), "In part"),
        ({"in_style": (0.0, 0.0, 0.0)}, (0.5, 0.44, 0.56), "No"),
        ({"in_style": None}, (0.5, 0.44, 0.56), "Yes"),  # of a kit that did not measure it
    ],
)
def test_the_verdicts_rule(
    adapter: dict[str, Any], less: tuple[float, float, float] | None, answer: str
) -> None:
    head = verdicts.brand_headline(content(rows(**adapter), less))
    assert verdicts.brand_verdict(head, "attributes") == answer
    told = " ".join(brand.sentences(head, "attributes"))
    shown = adapter.get("in_style", (1.0,))
    assert ("forgotten" in told) == (answer == "In part" and shown == (1.0,))
    if shown:
        begin = "Prompts in your style that show it, nearer to yours than to the base's, of 1"
        assert f"{begin}: your adapter {shown[0]:.0f}, the base 0, the look at 50 steps 1." in told
    if "forgotten" in told:
        assert "the adapter is 5\u00a0% below the base" in told


def test_the_page_shows_what_the_vae_draws_worst(run: Path) -> None:
    assert "Can the base draw" not in write_report(run).read_text()  # it was not measured
    figures = [Measured(f"{k}.png", 30 - k, 3.5, "#6cb29e", "#70b0a0", 0.1 * k) for k in range(6)]
    pairs = tuple((torch.full((3, 8, 8), k / 4), torch.full((3, 8, 8), -k / 4)) for k in range(4))
    reconstruction.write(reconstruction.Reconstructions(tuple(figures), pairs, 96, 64), run)
    page = write_report(run).read_text()
    text = text_of(page)
    assert "gives 6 of the 96 pictures back at 27.5 dB on average" in text
    assert "1.png: 29.0 dB; #6cb29e comes back as #70b0a0 (CIELAB 3.5); 10% of fine detail lost" in text
    assert "4.png" not in text and "<details><summary>The 4 that come back worst, at 64 × 64 pixels" in page
    images = [each for each in Page(page).images if "VAE" in (each["alt"] or "")]
    assert len(images) == 4 and colour(images[2]["src"]) == (64, 64, 64)  # (-2 / 4 + 1) / 2 of 255, rounded
    bad = [Measured("a.png", 18, 30, "#6cb29e", "#8090a0", 0.1)]
    reconstruction.write(reconstruction.Reconstructions(tuple(bad), pairs[:1], 1, 64), run)
    page = write_report(run).read_text()
    assert "cannot draw a colour of 1 picture: a.png" in text_of(page) and "<details open>" in page


def test_a_clip_score_loses_by_its_share_and_is_no_percentage() -> None:
    def head(value: float) -> verdicts.Brand:
        found = rows(control_adherence=(value, value - 1, value + 1))
        found[0]["control_adherence"] = (30.0, 29.0, 31.0)
        return verdicts.brand_headline(content(found))

    answers = [verdicts.brand_verdict(head(score), "clip") for score in (28.5, 28.4)]
    assert answers == ["Yes", "In part"]
    told = " ".join(brand.sentences(head(28.4), "clip"))
    assert "(CLIP score): the base 30.0 (29.0 to 31.0), your adapter 28.4 (27.4 to 29.4)" in told
    assert "the adapter is 1.60 below the base" in told


def test_the_adapter_nearest_four_steps_and_runs_without_a_style() -> None:
    found = [row("base", 50), row("adapter", 2), row("adapter", 8)]
    head = verdicts.brand_headline(content(found))
    assert head.adapter["steps"] == 2 and head.styled is None
    assert all("the look at" not in sentence for sentence in brand.sentences(head, "attributes"))


def test_pictures_of_the_folder_stand_in_where_no_prompt_is_of_one(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (250, i, 99)).save(folder / f"{i}.png")
    write_brand(run, PROMPTS[:2], brand_pictures=[None, None], brand=str(folder))
    images = Page(write_report(run).read_text()).images
    assert [colour(images[i]["src"]) for i in (0, 3)] == [(250, 0, 99), (250, 2, 99)]
    write_brand(run, PROMPTS[:2], brand_pictures=[None, None], brand=str(tmp_path / "gone"))
    page = write_report(run).read_text()
    assert page.count('<div class="none">') == 2 and colour(Page(page).images[0]["src"]) == (0, 0, 7)


def test_a_run_of_other_adapters_alone_keeps_its_report(run: Path) -> None:
    found = json.loads((run / "brand.json").read_text())
    found["cells"] = [each for each in found["cells"] if each["kind"] != "student"]
    (run / "brand.json").write_text(json.dumps(found))
    write_results(run, quality_rows(), ["one", "two"])
    text = text_of(write_report(run).read_text())
    assert "Does it work? Yes." in text and "Your style" not in text


@pytest.mark.parametrize(("count", "answer"), [(120, "In part"), (7, "Yes")])
def test_what_is_forgotten_is_told_by_the_evaluation_with_more_prompts(
    run: Path, count: int, answer: str
) -> None:
    """brand.json has 7 control prompts and 3 points between base and adapter; results.json has 12 points."""
    found = quality_rows()
    for each in found:
        each["metrics"]["prompt_adherence"]["value"] = {"teacher": 1.0, "student": 0.875}.get(
            each["kind"], 0.8
        )
    write_results(run, found, ["one", "two"], count)
    text = text_of(write_report(run).read_text())
    assert f"Your style, in 4 steps? {answer}." in text
    assert ("On 120 prompts of other things the adapter is 12 % below the base" in text) == (count == 120)


def test_a_share_of_more_prompts_is_a_share_beside_clip_scores_too() -> None:
    shares = (("teacher", 50, 1.0), ("student", 4, 0.875), ("student", 2, 0.5))
    cells = [cell(kind, "lcm", steps, prompt_adherence=share) for kind, steps, share in shares]
    more = results("evaluation/quality", cells, [f"prompt {k}" for k in range(120)])
    head = verdicts.brand_headline(content(rows()), more)
    assert brand.sentences(head, "clip")[-1].startswith(
        "On 120 prompts of other things the adapter is 12\u00a0% below the base"
    )


def test_the_trigger_contract_is_a_section_with_pictures(run: Path) -> None:
    assert "What does the trigger do?" not in write_report(run).read_text()  # a file of before
    found = with_contract(json.loads((run / "brand.json").read_text()), EVIL)
    for each in found["cells"]:
        if each["prompts"] == "bare":
            each["pictures"] = [name.replace("-0.png", "-1.png") for name in each["pictures"]]
    (run / "brand.json").write_text(json.dumps(found))
    page = write_report(run).read_text()
    text = text_of(page)
    assert (
        "What does the trigger do? Kept: the trigger brings the style, without it the style stays away and "
        "what the base can draw is kept." in text
    )
    assert "<script" not in page
    names = ("The base, without the trigger", "Your adapter, without it", "Your adapter, with it")
    shown = [each for each in Page(page).images if (each["alt"] or "").partition(":")[0] in names]
    # tests/brands.py: the base is row 0 (shade 0), the adapter at 4 steps row 4 (80)
    assert [colour(each["src"]) for each in shown[:3]] == [(0, 30, 7), (80, 30, 7), (80, 0, 7)]
    for cells in (
        "90 % (80 % to 100 %)9 % (5 % to 15 %)10 % (5 % to 20 %)0.500 (0.400 to 0.600)",
        "2 % (-2 % to 6 %)3 % (-1 % to 7 %)",
    ):
        assert text.count(cells) == 5, cells  # of the style and of the adapter at 1, 2, 4 and 8 steps


def test_without_a_trigger_the_page_says_so_once(run: Path) -> None:
    found = with_contract(json.loads((run / "brand.json").read_text()), None)
    (run / "brand.json").write_text(json.dumps(found))
    text = text_of(write_report(run).read_text())
    assert text.count("No trigger is set") == 1 and "style with the trigger" not in text
    assert "0.500 (0.400 to 0.600) 3 % (-1 % to 7 %)" in text


def test_the_report_of_a_style_says_what_its_trigger_does(run: Path) -> None:
    base = Base(path="some/base")
    (run / "config.yaml").write_text(dump(Finetune(recipe="train/finetune", output=str(run), base=base)))
    told = "What the trigger does: Kept: the trigger brings the style, without it the style stays away and"
    assert "Was the style learned?" in (text := text_of(write_report(run).read_text())) and told not in text
    found = with_contract(json.loads((run / "brand.json").read_text()))
    (run / "brand.json").write_text(json.dumps(found))
    assert told in text_of(write_report(run).read_text())
    os.utime(run / "brand.json", (1, 1))  # of weights before these
    assert told not in text_of(write_report(run).read_text())


def test_pictures_of_another_shape_are_shown_in_it(run: Path) -> None:
    squares = write_report(run).read_text()
    assert "--shape:" not in squares and "same noise, 64 × 64 pixels." in text_of(squares)
    write_brand(run, PROMPTS, resolution=[96, 64], seen="of pictures of 96 × 64 pixels c sees the middle")
    page = write_report(run).read_text()
    assert "same noise, 96 × 64 pixels." in text_of(page) and "c sees the middle. In brackets" in text_of(
        page
    )
    boxes = re.findall(r'<div class="brand[^"]*"([^>]*)>', page)
    assert boxes == [' style="--shape: 96 / 64"'] * 2
    for rule in (r"\.brand \.row img", r"\.brand \.none"):
        assert re.search(rule + r" \{[^}]*aspect-ratio: var\(--shape, 1\)", page)
