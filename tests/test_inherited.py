"""What of the licences of base, LoRAs and pictures goes on to what is made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lcm_kit.cli.main import app
from lcm_kit.config import schema
from lcm_kit.export import card
from lcm_kit.lora import structure
from lcm_kit.lora.inherited import Declared, declared, license_of, sentence, terms, warnings
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.provenance import Base, Data, Lora, Part, Provenance, Rights, Teacher
from lcm_kit.lora.untrusted import inspect
from lcm_kit.lora.write import write
from tests.loras import lcm_modules, random_lora

MADE = Provenance(
    title="trail",
    base=Base("org/base", license="creativeml-openrail-m"),
    teacher=Teacher((Lora("loras/look.safetensors", "5a" * 32, 0.7, "CC-BY-NC-4.0"),)),
    data=Data("ab12", 512, rights=Rights(9, {"MIT": 4, "CC-BY-NC-SA-4.0": 2}, 3, 1, 1, 2)),
)


def test_every_declared_licence_is_told_and_what_goes_on_with_where_from() -> None:
    base, look = (
        Declared("the base", "creativeml-openrail-m"),
        Declared("the LoRA look.safetensors", "CC-BY-NC-4.0"),
    )
    mit, some = Declared("4 of 9 pictures", "MIT"), Declared("2 of 9 pictures", "CC-BY-NC-SA-4.0")
    assert declared(MADE) == [base, look, mit, some]
    assert terms(MADE) == {"non-commercial": [look, some], "use restrictions": [base], "share-alike": [some]}
    assert sentence(MADE) == (
        "non-commercial, use restrictions, share-alike (made from the base: creativeml-openrail-m; the LoRA "
        "look.safetensors: CC-BY-NC-4.0; 4 of 9 pictures: MIT; 2 of 9 pictures: CC-BY-NC-SA-4.0)"
    )
    first, second, third = warnings(MADE)
    assert "non-commercial" in first and "the LoRA look.safetensors (CC-BY-NC-4.0)" in first
    assert "use restrictions" in second and "1 of the 9 pictures" in third
    assert sentence(Provenance()) is None and not warnings(Provenance())


def test_a_merged_file_inherits_from_all_of_its_parts() -> None:
    plain = Provenance(base=MADE.base, license="MIT")
    both = Provenance(base=MADE.base, parts=(Part("a.safetensors", 1, plain), Part("b.safetensors", 1, MADE)))
    assert declared(both) == [
        Declared("the base", "creativeml-openrail-m"), Declared("a.safetensors", "MIT"),
        Declared("b.safetensors: the LoRA look.safetensors", "CC-BY-NC-4.0"),
        Declared("b.safetensors: 4 of 9 pictures", "MIT"),
        Declared("b.safetensors: 2 of 9 pictures", "CC-BY-NC-SA-4.0"),
    ]  # fmt: skip


@pytest.fixture
def base(sd_base: Callable[..., Path]) -> Path:
    return sd_base("epsilon")


def file_of(base: Path, file: Path, made: Provenance) -> Path:
    place = structure.of_base(str(base))
    write(
        file, random_lora(place, lcm_modules(place)[:4], ranks=(4,), seed=0), place, "kohya", "float32", made
    )
    return file


def test_the_header_says_it_and_a_file_that_is_made_of_it_too(base: Path, tmp_path: Path) -> None:
    file = file_of(base, tmp_path / "trail.safetensors", MADE)
    header = inspect(file).metadata
    assert header["modelspec.license"] == sentence(MADE)
    assert declared(provenance_from_header(header, "trail")) == declared(MADE)
    every = "creativeml-openrail-m AND CC-BY-NC-4.0 AND MIT AND CC-BY-NC-SA-4.0"
    assert license_of(file) == every
    done = CliRunner().invoke(app, ["convert", str(file), "--format", "kohya", "--base", str(base)])
    assert done.exit_code == 0, done.output
    assert license_of(tmp_path / "trail_kohya.safetensors") == every


def test_the_licence_of_a_strangers_lora_is_that_of_its_header_or_of_its_card(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    weights = {"a.lora_down.weight": torch.zeros(1, 2)}
    save_file(weights, file)
    assert license_of(file) is None
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A look\n")
    assert license_of(file) == "CC-BY-NC-4.0"
    save_file(weights, file, metadata={"modelspec.license": "MIT License"})
    assert license_of(file) == "MIT"


def test_the_card_says_what_was_declared_and_that_it_is_no_advice(base: Path, tmp_path: Path) -> None:
    place = structure.of_base(str(base))
    lora = random_lora(place, lcm_modules(place)[:4], ranks=(4,), seed=0)
    files = {"kohya": Path("trail.safetensors")}
    told = {"title": "trail", "files": files, "structure": place, "lora": lora, "checks": []}
    text = card.write(tmp_path, facts=MADE, **told).read_text(encoding="utf-8")  # type: ignore[arg-type]
    page = text.partition("## Licences")[2]
    assert "| the base | creativeml-openrail-m |" in page and "| 2 of 9 pictures | CC-BY-NC-SA-4.0 |" in page
    assert "**Non-commercial**: so says, by its name, the licence of the LoRA look.safetensors" in page
    assert (
        "Of 9 pictures that it was trained on, 6 name a licence, 3 their source, 2 their author and 1 a"
        in page
    )
    assert "1 say that there is none" in page and "no legal advice" in page
    bare = replace(MADE, base=Base("org/base"), teacher=None, data=Data())
    text = card.write(tmp_path, facts=bare, **told).read_text(encoding="utf-8")  # type: ignore[arg-type]
    assert "Nothing was declared" in text and "Non-commercial" not in text


def test_the_licence_of_a_base_is_the_key_or_its_readme_and_a_difference_is_told(
    base: Path, tmp_path: Path
) -> None:
    from lcm_kit import bases
    from lcm_kit.lora.provenance_rules import of_training

    (base / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    try:
        info = bases.inspect_base(str(base))
        config = schema.Distill(recipe="train/distill", output="run", base=schema.Base(str(base)))
        assert of_training(config, info, "ab", 1).base.license == "creativeml-openrail-m"
        own = replace(config, base=schema.Base(str(base), license="cc by nc 4.0"))
        assert of_training(own, info, "ab", 1).base.license == "CC-BY-NC-4.0"
        file = tmp_path / "config.yaml"
        file.write_text(
            f"recipe: train/distill\noutput: {tmp_path}/run\nbase:\n  path: {base}\n  license: MIT\n"
        )
        done = CliRunner().invoke(app, ["check", str(file)])
        assert "base licence: MIT" in done.output, done.output
        assert "base.license says MIT, and the README.md of the base creativeml-openrail-m" in done.output
    finally:
        (base / "README.md").unlink()
