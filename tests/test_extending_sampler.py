"""docs/extending/sampler.md, followed: its one entry is known wherever samplers are named."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lcm_kit import sample, samplers
from lcm_kit.cli.main import app
from lcm_kit.config import shipped
from lcm_kit.config.load import load
from lcm_kit.config.sweep import GuidanceSweep
from lcm_kit.core.methods import DEFAULT
from lcm_kit.errors import UserError
from lcm_kit.evaluation import cells
from lcm_kit.lora.metadata_reading import sampler_name
from lcm_kit.lora.provenance import Recommended
from lcm_kit.report import plots

PAGE = (Path(__file__).parents[1] / "docs" / "extending" / "sampler.md").read_text(encoding="utf-8")
ENTRY, COMMANDS = (
    re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) for kind in ("python", "bash")
)


@pytest.fixture
def euler(monkeypatch: pytest.MonkeyPatch) -> samplers.Sampler:
    """The page's entry in the table, for one test."""
    monkeypatch.setattr(samplers, "SAMPLERS", dict(samplers.SAMPLERS))
    exec(ENTRY[0], {})
    return samplers.SAMPLERS["euler"]


def test_the_page_names_every_field_and_what_it_is_without() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*?) ?\|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == [field.name for field in fields(samplers.Sampler)]
    for field, (_, default) in zip(fields(samplers.Sampler), rows, strict=True):
        needed = field.default is MISSING and field.default_factory is MISSING
        assert needed == (default == ""), field.name
        if isinstance(field.default, int):
            assert default == str(field.default).lower()


def test_configs_of_the_page_take_it_and_messages_list_it(euler: samplers.Sampler) -> None:
    lines = [shlex.split(line)[1:] for line in COMMANDS[0].splitlines()]
    configs = [load(shipped.config_path(words[1]), words[2:]) for words in lines if words[0] == "evaluate"]
    assert len(configs) == 2
    swept = configs[1]
    assert isinstance(swept, GuidanceSweep)
    drawn = [cell for cell in cells.plan(swept, {"mine": DEFAULT}) if cell.sampler == "euler"]
    assert drawn and all(cell.kind == "plain" and cell.deterministic for cell in drawn)
    with pytest.raises(UserError, match="one of ddim, dpmpp_2m, euler; did you mean `euler`"):
        load(shipped.config_path("evaluation/quality"), ["run=r", "samplers=[eular]"])
    with pytest.raises(UserError, match="'euler' is not allowed; it must be one of lcm, tcd, ddim, or null$"):
        load(shipped.config_path("evaluation/brand"), ["run=r", "sampler=euler"])  # not for an adapter


def test_without_the_entry_the_page_is_refused() -> None:
    with pytest.raises(UserError, match="'euler' is not allowed; it must be one of ddim, dpmpp_2m"):
        load(shipped.config_path("evaluation/quality"), ["run=r", "samplers=[ddim, euler]"])


def test_the_command_line_lists_it(euler: samplers.Sampler) -> None:
    refused = CliRunner().invoke(app, ["sample", "--prompt", "a", "--sampler", "heun"])
    assert refused.exit_code == 2
    assert "sampler 'heun' is unknown; choose one of lcm, tcd, ddim, dpmpp_2m, euler" in refused.stderr
    show = f"{ENTRY[0]}\nfrom lcm_kit.cli.main import app\napp(['sample', '--help'])"
    command, wide = [sys.executable, "-c", show], {**os.environ, "COLUMNS": "200"}
    helped = subprocess.run(command, capture_output=True, text=True, env=wide, check=True)
    assert "lcm|tcd|ddim|dpmpp_2m|euler" in re.sub(r"[\s│]+", "", helped.stdout)


def test_titles_plots_and_metadata_know_it(euler: samplers.Sampler) -> None:
    assert samplers.title_of("euler") == "Euler" and samplers.title_of("no such") == "no such"
    assert plots.styles()["plain", "euler", True][0] == "Euler, guidance"
    assert sampler_name(Recommended("", "euler", 4, 1.0, 1.0)) == "Euler"
    for name in ("student", "plain"):  # no two lines look alike
        looks = [style[1:] for (who, _, _), style in plots.styles().items() if who == name]
        assert len(set(looks)) == len(looks)


def test_it_draws_what_diffusers_draws_with_that_scheduler(
    euler: samplers.Sampler, sd_base: Callable[..., Path]
) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    own = StableDiffusionPipeline.from_pretrained(sd_base(), safety_checker=None)
    own.scheduler = EulerDiscreteScheduler.from_config(own.scheduler.config, timestep_spacing="trailing")
    noise = torch.randn((1, 4, 16, 16), generator=sample.generators(3, 0, 1)[0])
    keys: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0}
    wanted = own("a fox", latents=noise, output_type="latent", **keys).images
    found = sample.latents(
        sample.pipeline(str(sd_base())), ["a fox"], sampler="euler", steps=3, guidance_scale=4.0, seed=3
    )
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1e-5)
