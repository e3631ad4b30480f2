"""Keys that have another name now: the old one works, is warned of, and is never taken silently."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lcm_kit.config import renamed
from lcm_kit.config.load import RECIPES, dump, load
from lcm_kit.config.mistakes import _hint
from lcm_kit.errors import UserError
from lcm_kit.io import own_files
from lcm_kit.lora.provenance import from_json
from lcm_kit.training import run_files

OLD = {
    "recipe": "train/distill", "output": "x",
    "data": {"regularisation": "general", "regularisation_share": 0.25, "samples": {"solver": "dpmpp_2m"}},
    "teacher": {"regularisation": "adapters"},
}  # fmt: skip


def write(folder: Path, keys: object) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    return file


def test_old_keys_are_the_new_ones_with_a_warning_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(write(tmp_path, OLD))
    data = config.data  # type: ignore[union-attr]
    assert (data.regularization, data.regularization_share, data.samples.sampler) == (
        "general", 0.25, "dpmpp_2m",
    )  # fmt: skip
    assert config.teacher.regularization == "adapters"  # type: ignore[union-attr]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith(f"warning: config {tmp_path}") for line in lines)
    assert "data.regularisation is called data.regularization now" in lines[0]
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config and not capsys.readouterr().err


def test_an_override_may_have_the_old_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = load(write(tmp_path, {"recipe": "evaluation/quality", "run": "r"}), ["solvers=[ddim]"])
    assert config.samplers == ("ddim",)  # type: ignore[union-attr]
    assert "solvers is called samplers now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("in_file", "override"), [("samplers", "solvers=[dpmpp_2m]"), ("solvers", "samplers=[dpmpp_2m]")]
)
def test_an_override_is_of_the_same_key_by_either_name(tmp_path: Path, in_file: str, override: str) -> None:
    file = write(tmp_path, {"recipe": "evaluation/quality", "run": "r", in_file: ["ddim"]})
    assert load(file, [override]).samplers == ("dpmpp_2m",)  # type: ignore[union-attr]


def test_both_names_are_a_mistake(tmp_path: Path) -> None:
    both = {**OLD, "data": {"regularisation": "a", "regularization": "b"}}
    with pytest.raises(
        UserError, match=r"data\.regularisation: it is called data\.regularization now, which"
    ):
        load(write(tmp_path, both))


def test_the_old_name_is_unknown_where_there_is_no_new_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="solvers: unknown key"):
        load(write(tmp_path, {**OLD, "solvers": ["ddim"]}))


@pytest.mark.parametrize(
    ("recipe", "old", "new"),
    [(recipe, *names) for recipe, table in renamed.RENAMED.items() for names in table.items()],
)
def test_the_table_names_keys(recipe: str, old: str, new: str) -> None:
    schema = RECIPES[recipe]
    assert _hint(schema, tuple(new.split("."))) is not None and _hint(schema, tuple(old.split("."))) is None


def test_states_and_records_of_before_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "state/step-000003"
    kept = {"config": {"teacher.regularisation": "base", "seed": 1}, "step": 3, "lines": 0, "files": {}}
    origin = {"unet": "u", "data": "d", "teacher": [], "base": "b", "batch": 2, "world": 1}
    own_files.write_json(folder / "manifest.json", {**kept, **origin})
    found = run_files.manifest(folder)
    assert found is not None and found["config"] == {"teacher.regularization": "base", "seed": 1}
    record = from_json({"teacher": {"regularisation": "adapters"}})
    assert record.teacher is not None and record.teacher.regularization == "adapters"
    assert record.to_json()["teacher"]["regularization"] == "adapters"
