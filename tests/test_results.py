"""The one door to results: other versions are refused in a sentence, and the accessors say what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lcm_kit.errors import UserError
from lcm_kit.evaluation import results, verdicts
from lcm_kit.io import own_files
from lcm_kit.io.own_files import Damaged
from tests.brands import content, row
from tests.measured import cell
from tests.measured import results as made

CELLS = [
    cell("teacher", "ddim", 50, 5.0, prompt_adherence=0.9, frechet_biased=0.1),
    cell("plain", "ddim", 4, prompt_adherence=(0.5, 0.4, 0.6), frechet_biased=0.5, pixel_distance=0.2),
    cell("plain", "dpmpp_2m", 4, prompt_adherence=0.5, frechet_biased=0.4, pixel_distance=0.3),
    cell("plain", "ddim", 2, 5.0, prompt_adherence=None, frechet_biased=0.0, pixel_distance=0.0),
    cell("student", "lcm", 4, adapter="student", prompt_adherence=0.8, frechet_biased=0.1),
]


def quality(**more: Any) -> Any:
    return made("evaluation/quality", CELLS, ["a cat", "a dog"], images_per_prompt=2, **more)


@pytest.mark.parametrize(
    ("version", "said"), [(None, "names no version"), (1, "has version 1"), (3, "has version 3")]
)
@pytest.mark.parametrize("name", ["results.json", "brand.json"])
def test_another_version_is_refused_by_name(
    name: str, version: int | None, said: str, tmp_path: Path
) -> None:
    """Also one with a hash that is right: it is whole, but of another shape."""
    found = {**quality(), "version": version}
    own_files.write_json(tmp_path / name, {key: each for key, each in found.items() if each is not None})
    read = results.of_run if name == results.FILE else results.of_brand
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / name} {said} of results, and this lcm-kit reads 2; evaluate again, which keeps what it "
        "drew"
    )


def test_what_an_earlier_kit_wrote_is_refused_not_misread(tmp_path: Path) -> None:
    rows = [{"name": "teacher", "solver": "ddim", "steps": 50, "attribute_accuracy": 0.9}]
    own_files.write_json(tmp_path / "results.json", {"rows": rows, "n": 4, "prompts": ["a cat"]})
    with pytest.raises(UserError, match="names no version of results"):
        results.is_sweep(tmp_path)


def test_every_part_of_the_shape_is_needed(tmp_path: Path) -> None:
    file, whole = tmp_path / "results.json", quality()
    for key in whole:
        file.write_text(json.dumps({name: each for name, each in whole.items() if name != key}))
        with pytest.raises(UserError, match="names no version" if key == "version" else f"{key} is missing"):
            results.read(file)
    for place, wrong in (("steps", "4"), ("metrics", {"seconds": {"value": 1.0}}), ("pictures", None)):
        file.write_text(json.dumps({**whole, "cells": [{**whole["cells"][0], place: wrong}]}))
        with pytest.raises(Damaged, match=rf"cells\.0\.{place}"):
            results.read(file)


def test_each_reader_takes_its_own_recipe(tmp_path: Path) -> None:
    own_files.write_json(tmp_path / "results.json", quality())
    found = results.of_run(tmp_path)
    assert found is not None and found["recipe"] == results.QUALITY and not results.is_sweep(tmp_path)
    with pytest.raises(UserError, match="is of evaluation/quality, not a guidance sweep's"):
        results.of_sweep(tmp_path)
    own_files.write_json(tmp_path / "results.json", made("evaluation/compose", CELLS, ["a cat"]))
    assert results.of_run(tmp_path) is None and results.of_brand(tmp_path) is None
    assert results.of_sweep(tmp_path / "none") is None


def test_accessors() -> None:
    found = quality()
    assert results.reference(found)["id"] == "teacher-ddim-50-g5" and results.count(found) == 4
    assert [results.prompt_of(found, sample) for sample in range(4)] == ["a cat"] * 2 + ["a dog"] * 2
    assert results.prompts(found, "control")["texts"] == [] and results.count(found, "control") == 0
    first = results.by_id(found, "plain-ddim-4-g1")
    assert first is not None and results.figure(first, "prompt_adherence") == {
        "value": 0.5, "low": 0.4, "high": 0.6
    }  # fmt: skip
    assert results.value(first, "prompt_adherence") == 0.5 and results.value(first, "no_such") is None
    assert [each["steps"] for each in results.cells_of(found["cells"], "student", adapter=False)] == []
    found["reference"] = "gone"
    with pytest.raises(UserError, match="lack the cell gone"):
        results.reference(found)


def test_the_best_plain_cell_by_the_first_metric_that_tells() -> None:
    """Equal shares of right pictures: the Frechet distance decides; what was not measured is the worst."""
    best = verdicts.best_plain(quality(), 4)
    assert best is not None and best["sampler"] == "dpmpp_2m"
    by_distance = results.best_plain(CELLS, 4, ["pixel_distance"], quality()["metrics"])
    assert by_distance is CELLS[3]
    assert results.best_plain(CELLS, 16, ["pixel_distance"], {}) is None


def test_rows_of_brand_join_both_lists() -> None:
    found = content([row("base", 50), row("adapter", 4, control_adherence=(0.6, 0.5, 0.7))])
    base, mine = results.brand_rows(found)
    assert (base["name"], mine["name"], mine["steps"]) == ("base", "adapter", 4)
    assert mine["brand_adherence"] == {"value": 0.9, "low": 0.85, "high": 0.95}
    assert mine["control_adherence"] == {"value": 0.6, "low": 0.5, "high": 0.7}
    assert results.compares_brand(found) and not results.compares_brand(content([row("base", 50)]))
    less = results.difference(found, mine["id"], base["id"], "brand_similarity")
    assert less is not None and less["difference"] == 0.5
    assert results.difference(found, base["id"], mine["id"], "brand_similarity") is None


def test_what_the_vae_did_not_decode_whole_is_told_and_goes_on_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lcm_kit.export import run as export

    plain, tiny = quality(), quality(decoder="AutoencoderTiny my-tiny (0a1b2c3d)")
    tiled = {**plain, "settings": {**plain["settings"], "tiling": True}}
    assert results.decoded(plain) is None
    assert results.decoded(tiled) == "decoded in tiles, which is not exact"
    told = results.decoded(tiny)
    assert told == "previews, decoded by AutoencoderTiny my-tiny (0a1b2c3d) and not by the base's VAE"
    monkeypatch.setattr(export.adapter, "is_of_these_weights", lambda run, name: True)
    for found, wanted in ((plain, plain), (tiny, None)):
        assert export._measured(tmp_path, "results.json", lambda run, found=found: found) is wanted
    said = capsys.readouterr().err
    assert said.count("the card has no figures of") == 1 and "AutoencoderTiny my-tiny (0a1b2c3d)" in said
