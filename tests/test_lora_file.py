"""Where a LoRA is found: a file, a run, an export's folder, an asset, the hub's cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lcm_kit import assets
from lcm_kit.cli.main import app
from lcm_kit.errors import UserError
from lcm_kit.lora.locate import ADAPTER_FILE, NAME, adapter_file


def test_the_embedded_lcm_lora_is_whole() -> None:
    from lcm_kit.lora import reading, structure

    file = adapter_file("asset:tiny-lcm-lora")
    assert file == assets.path("tiny-lcm-lora") / NAME
    found = reading.read(file, structure.of_base("asset:tiny-sd"))
    assert not found.problems and not found.lacks_alpha and len(found.lora.layers) == 129
    assert {layer.rank for layer in found.lora.layers.values()} == {16}


def test_an_exports_folder_is_its_file(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"")
    assert adapter_file(tmp_path) == adapter_file(str(tmp_path / NAME)) == tmp_path / NAME


def test_an_export_older_than_the_adapter_is_refused(tmp_path: Path) -> None:
    import os

    for name in ("adapter/lora.safetensors", ADAPTER_FILE):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / ADAPTER_FILE, (1, 1))
    with pytest.raises(UserError, match="trained on since its export; run `lcm-kit export"):
        adapter_file(tmp_path)


def test_the_hub_is_read_from_its_cache_without_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--some--lora"
    for name in (NAME, "other.safetensors"):
        file = repository / "snapshots" / "abc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert adapter_file("hub:some/lora").read_bytes() == NAME.encode()
    assert adapter_file("hub:some/lora/other.safetensors").read_bytes() == b"other.safetensors"
    with pytest.raises(UserError, match=r"hub:some/thing.* cannot be had from the hub .*give its path"):
        adapter_file("hub:some/thing")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("hub:lora", "is not hub:OWNER/NAME"),
        ("hub:some/lora/weights.ckpt", "is not hub:OWNER/NAME"),
        ("some/lora", "is hub:OWNER/NAME"),
        ("asset:lora", "is not shipped"),
    ],
)
def test_what_names_no_lora(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        adapter_file(text)


def test_names_with_a_colon_and_their_weights(tmp_path: Path) -> None:
    def merged(*words: str) -> Result:
        return CliRunner().invoke(app, ["merge", *words, "--format", "diffusers", "--base", "asset:tiny-sd"])

    name = "asset:tiny-lcm-lora"
    done = merged(name, f"{name}:0.5", "--output", str(tmp_path / "m"))
    assert done.exit_code == 0 and "all 129 modules load" in done.output
    refused = merged(name, f"{name}:much")
    assert refused.exit_code == 2 and "give a number behind the colon" in refused.stderr
