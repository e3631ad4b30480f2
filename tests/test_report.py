"""The report: one file, nothing fetched, all text escaped, and an honest verdict."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcm_kit.errors import UserError
from lcm_kit.evaluation import verdicts
from lcm_kit.report import plots, shared
from lcm_kit.report.build import snippet, write_report
from tests.measured import cell, results
from tests.runs import build_run

EVIL = '<script>alert(1)</script> & "quotes"'


def row(kind: str, sampler: str, steps: int, guidance: float, **figures: Any) -> dict[str, Any]:
    adapter = "student" if kind == "student" else None
    usual = {
        "seconds": 0.01 * steps * (2 if guidance > 1 else 1), "prompt_adherence": 0.5, "object_accuracy": 0.6,
        "colour_accuracy": 0.7, "pattern_accuracy": 0.8, "frechet_biased": 1.0, "pixel_distance": 0.2,
        "saturation": 1.1, "clipped": 0.01,
    }  # fmt: skip
    return cell(kind, sampler, steps, guidance, adapter, **{**usual, **figures})


def rows(**student: Any) -> list[dict[str, Any]]:
    return [
        row("teacher", "ddim", 50, 5, prompt_adherence=0.95, frechet_biased=0.1),
        row("plain", "ddim", 2, 5, prompt_adherence=0.3, frechet_biased=0.8),
        row("plain", "dpmpp_2m", 2, 5, prompt_adherence=0.4, frechet_biased=0.7),
        row("plain", "ddim", 8, 1, prompt_adherence=0.9, frechet_biased=0.1),
        row("student", "lcm", 1, 1, prompt_adherence=0.6),
        row(
            "student",
            "lcm",
            4,
            1,
            **{"prompt_adherence": (0.9, 0.85, 0.94), "frechet_biased": 0.3, **student},
        ),
    ]


def quality(found: list[dict[str, Any]], prompts: list[str], **more: Any) -> dict[str, Any]:
    made = results("evaluation/quality", found, prompts, **{"frechet_floor": 0.05, **more})
    return {**made, "verdict": verdicts.quality_verdict(made)}


def write_results(run: Path, found: list[dict[str, Any]], prompts: list[str], n: int = 128) -> None:
    (run / "pictures").mkdir(parents=True, exist_ok=True)
    for k, each in enumerate(found):
        each["pictures"] = [f"pictures/{k}-{i}.png" for i in range(len(prompts))]
        for name in each["pictures"]:
            Image.new("RGB", (64, 64), (40 * k, 90, 120)).save(run / name)
    texts = [*prompts, *(f"prompt {k}" for k in range(n - len(prompts)))]
    (run / "results.json").write_text(json.dumps(quality(found, texts)))


class Page(HTMLParser):
    """Collects images and whatever could load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(found)
        self.links += [found[key] for key in ("src", "href") if key in found]


@pytest.fixture
def run(sd_base: Callable[..., Path], tmp_path: Path) -> Path:
    run = build_run(tmp_path / "run", sd_base("epsilon"))
    write_results(run, rows(), [EVIL, "a cat"])
    (run / "validation").mkdir()
    Image.new("RGB", (90, 60)).save(run / "validation" / "step-000020.png")
    return run


def test_one_file_without_network_and_with_alternatives(run: Path) -> None:
    text = write_report(run).read_text()
    page = Page(text)
    assert all(link and link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text and "@import" not in text
    assert all(image.get("alt") for image in page.images)
    # headline 3 rows and gallery 6 rows of 2 pictures, 4 plots, 1 validation grid
    assert len(page.images) == (3 + 6) * 2 + 4 + 1
    first = page.images[0]["src"] or ""
    assert base64.b64decode(first.partition(",")[2]) == (run / "pictures" / "0-0.png").read_bytes()


def test_prompts_are_escaped(run: Path) -> None:
    text = write_report(run).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quotes&#34;" in text


def test_the_story_has_its_order_and_its_numbers(run: Path) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", write_report(run).read_text().replace("\u00a0", " ")))
    questions = [
        "Does it work? Yes.",
        "How much faster?",
        "What does it look like?",
        "How was it made?",
        "How do I use",
    ]
    places = [text.index(question) for question in questions]
    assert places == sorted(places)
    assert "With 4 UNet calls an image the student draws 90 % of 128 pictures right" in text
    assert "needs 100 calls for 95 %" in text
    assert "best plain sampler at 4 calls (DPM-Solver++ 2M, 2 steps with guidance) draws 40 % right" in text
    assert "25 ×" in text
    assert "90 % (85 % to 94 %)" in text  # the interval in the table
    assert (
        "20 steps of 8 images a process" in text
    )  # from the adapter's facts: what was done, not what was planned


def test_the_best_plain_solver_is_chosen_at_equal_calls() -> None:
    found = quality(rows(), ["a cat"])
    head = verdicts.quality_headline(found)
    assert head.student["steps"] == 4
    assert head.plain is not None and head.plain["sampler"] == "dpmpp_2m"
    assert head.fewer == 25 and head.faster == pytest.approx(25)
    assert head.plain_frechet == 0.7  # not the 0.1 of eight calls
    assert verdicts.best_plain(found, 6) is None
    unread = [row(each["kind"], each["sampler"], each["steps"], each["guidance_scale"],
                  prompt_adherence=None, frechet_biased=None) for each in rows()]  # fmt: skip
    unread[1]["metrics"]["pixel_distance"]["value"] = 0.1
    assert verdicts.best_plain(quality(unread, ["a cat"]), 4) is unread[1]


@pytest.mark.parametrize(
    ("student", "wanted"),
    [
        ({}, "Yes"),
        ({"prompt_adherence": 0.84}, "In part"),  # 11 points below the teacher
        ({"frechet_biased": 0.36}, "In part"),  # more than half of 0.7
        ({"prompt_adherence": 0.4}, "No"),  # no better than the plain sampler
        ({"prompt_adherence": None, "frechet_biased": None}, "Judge by eye"),
    ],
)
def test_verdict(student: dict[str, Any], wanted: str) -> None:
    assert verdicts.quality_verdict(quality(rows(**student), ["a cat"])) == wanted


def test_a_base_that_nothing_can_read(run: Path) -> None:
    """Another base: no accuracy, no Frechet distance, no training files; the page stands all the same."""
    unread = ("prompt_adherence", "object_accuracy", "colour_accuracy", "pattern_accuracy", "frechet_biased")
    found = rows()
    for each in found:
        each["metrics"] |= dict.fromkeys(unread)
    (run / "results.json").write_text(json.dumps(quality(found, ["a cat"], frechet_floor=None)))
    (run / "metrics.jsonl").unlink()
    text = write_report(run).read_text()
    assert "Judge by eye" in text
    assert "look for yourself" in text


def test_the_snippet_is_a_program(run: Path) -> None:
    found = json.loads((run / "results.json").read_text())
    use: Any = {"sampler": "tcd:0.5", "steps": 4, "guidance_scale": 1.5}
    text = snippet(run, found["base"]["path"], found["prompts"]["main"]["texts"][0], use)
    compile(text, "snippet", "exec")
    assert "TCDScheduler.from_config(pipe.scheduler.config, clip_sample=False)" in text
    assert f"pipe({json.dumps(EVIL)}, eta=0.5, num_inference_steps=4, guidance_scale=1.5)" in text
    assert str((run / "export").resolve()) in text


def test_large_pictures_are_embedded_smaller(tmp_path: Path) -> None:
    Image.effect_noise((512, 512), 60).convert("RGB").save(tmp_path / "a.png")
    uri = shared.picture_uri(tmp_path / "a.png")
    assert uri.startswith("data:image/jpeg")
    assert len(uri) < (tmp_path / "a.png").stat().st_size / 4


def test_running_mean_has_no_bias_at_its_start() -> None:
    assert plots._running_mean([3.0] * 50) == pytest.approx([3.0] * 50)
    steps = [0.0] * 50 + [1.0] * 50
    assert plots._running_mean(steps)[49] == 0
    assert 0.99 < plots._running_mean(steps)[99] < 1


def test_numbers_as_text() -> None:
    assert [shared.number(v) for v in (None, 0.0312, 1.0, 25.0)] == ["–", "0.0312", "1.00", "25.0"]
    assert shared.number(25.0, 2) == "25"
    assert [shared.seconds(v) for v in (0.0123, 1.5)] == ["12\u00a0ms", "1.50\u00a0s"]
    assert shared.percent(0.905) == "90\u00a0%"


def test_an_unevaluated_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lcm-kit evaluate"):
        write_report(tmp_path)


def test_a_base_alone_has_no_report(run: Path) -> None:
    file = run / "results.json"
    found = json.loads(file.read_text())
    found["cells"] = [each for each in found["cells"] if each["kind"] != "student"]
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match="without a student"):
        write_report(run)


def test_figures_of_other_weights_are_said_to_be_such(run: Path) -> None:
    words = "results.json was measured before the last training of this run"
    assert words not in write_report(run).read_text()
    weights = run / "adapter" / "lora.safetensors"
    later = (run / "results.json").stat().st_mtime + 60
    os.utime(weights, (later, later))  # as after more training
    assert words in write_report(run).read_text()


def test_figures_of_a_tiny_decoder_are_said_to_be_such(run: Path) -> None:
    words = "Pictures and figures: previews, decoded by AutoencoderTiny my-tiny (0a1b2c3d)"
    assert words not in write_report(run).read_text()
    found = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**found, "decoder": "AutoencoderTiny my-tiny (0a1b2c3d)"}))
    assert words in write_report(run).read_text()
