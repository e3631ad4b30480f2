"""verify, convert and merge as a user meets them: the command line on files that others broke."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lcm_kit.cli.main import app
from lcm_kit.evaluation.recommended import of_adapter
from lcm_kit.lora import loading, reading, structure, verify
from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.metadata_reading import provenance_from_header
from lcm_kit.lora.provenance import Data, Method, Provenance, Recommended
from lcm_kit.lora.untrusted import inspect
from lcm_kit.lora.write import write
from tests import broken
from tests.loras import fuse, lcm_modules, random_lora, text_modules
from tests.runs import build_run


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain(text: str) -> str:
    """Output on one line: a table breaks its cells."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(scope="module")
def base(sdxl_base: Path) -> structure.Structure:
    return structure.of_base(str(sdxl_base))


def rows(report: verify.Report) -> dict[str, tuple[int, int, bool]]:
    return {row.app: (row.loaded, row.right, row.ok) for row in report.rows}


@pytest.mark.slow
def test_what_each_app_makes_of_the_public_trainers_sdxl_file(
    base: structure.Structure, sdxl_base: Path, tmp_path: Path
) -> None:
    """diffusers' SDXL script: 560 attention modules are dropped, and alpha is lost everywhere."""
    lora = random_lora(base, alphas=(8.0,))
    file = broken.save(tmp_path / "mixed.safetensors", broken.mixed_styles(lora, base))
    report = verify.verify(file, verify.base_of(str(sdxl_base)))
    assert not report.ok and report.file.lacks_alpha == 788
    told = rows(report)
    assert told["diffusers"][0] == 788 - 560
    assert told["a1111"] == (0, 0, False)
    assert told["invokeai"] == (0, 0, False)
    assert not told["forge"][2] and not told["comfyui"][2]


@pytest.mark.parametrize("generation", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_convert_mends_for_every_app_without_a_base_at_hand(tmp_path: Path, generation: Any) -> None:
    """The published structures, no weights: the base is told from the file, diffusers' own loader runs."""
    real = structure.known(generation)
    lora = random_lora(real, lcm_modules(real)[::7], ranks=(1,), alphas=(2.0,))
    broken.save(tmp_path / "their.safetensors", broken.peft_wrapper(lora, real))
    done = cli("convert", tmp_path / "their.safetensors")
    assert done.exit_code == 2
    assert "does not say the alpha of" in done.stderr and "--alpha" in done.stderr
    done = cli("convert", tmp_path / "their.safetensors", "--alpha", "2", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "base_model.model." in done.stdout and "taken as given" in done.stdout
    for style, apps in (("kohya", verify.ALL), ("diffusers", verify.ALL[:2])):
        file = tmp_path / "out" / f"their_{style}.safetensors"
        report = verify.verify(file, apps=apps)
        assert report.ok and [row.loaded for row in report.rows] == [len(lora.layers)] * len(apps)
        read = reading.read(file).lora
        assert all(torch.equal(read.layers[n].delta(), x.delta()) for n, x in lora.layers.items())
    assert {p.name for p in tmp_path.iterdir()} == {"their.safetensors", "out"}


@pytest.mark.parametrize(
    "breaker",
    [
        pytest.param(broken.kohya_two_spellings, marks=pytest.mark.slow),
        pytest.param(broken.mixed_styles, marks=pytest.mark.slow),
        pytest.param(broken.kohya_with_peft_header, marks=pytest.mark.slow),
        pytest.param(broken.sgm_with_dots, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.__name__,
)
def test_convert_gives_the_original_output_back(
    base: structure.Structure, sdxl_base: Path, tmp_path: Path, breaker: broken.Breaker
) -> None:
    lora = random_lora(base, alphas=(8.0,), size=0.05)
    file = broken.save(tmp_path / "a.safetensors", breaker(lora, base))
    done = cli(
        "convert", file, "--base", sdxl_base, "--alpha", "8", "--format", "kohya", "--dtype", "float32"
    )
    assert done.exit_code == 0, done.output
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_base, dtype=torch.float32)
    pipe.load_lora_weights(str(tmp_path), weight_name="a_kohya.safetensors")
    found = loading.probe({"unet": pipe.unet})["unet"]
    pipe.unload_lora_weights()
    wanted = loading.probe({"unet": fuse(pipe.unet, lora)})["unet"]
    assert loading.relative_error(found, wanted) <= 1e-4


def test_convert_keeps_what_a_stranger_said_of_it_and_where_it_came_from(tmp_path: Path) -> None:
    real = structure.known("sd1")
    lora = random_lora(real, text_modules(real)[:12] + lcm_modules(real)[:12], ranks=(2,))
    tensors, _ = broken.lora_down_up(lora, real)
    header = {"modelspec.author": "Ada", "modelspec.license": "CC-BY-4.0"}
    broken.save(tmp_path / "ada.safetensors", (tensors, header))
    done = cli("convert", tmp_path / "ada.safetensors", "--alpha", "8", "--dtype", "float16")
    assert done.exit_code == 0, done.output
    with safe_open(tmp_path / "ada_kohya.safetensors", "pt") as opened:
        told = opened.metadata()
        prefixes = {key.split("_text")[0].split("_down")[0] for key in opened.keys()}  # noqa: SIM118
    assert (told["modelspec.author"], told["modelspec.license"]) == ("Ada", "CC-BY-4.0")
    assert told["ss_base_model_version"] == "sd_v1" and told["ss_network_alpha"] == "8.0"
    assert prefixes == {"lora_te", "lora_unet"}


@pytest.mark.slow
def test_measured_settings_and_triggers_survive_convert_and_merge(tmp_path: Path) -> None:
    """What was measured is told of the very file, or of the part of a merged or reduced one that it is of."""
    real = structure.known("sd1")
    use = Recommended("Use 2 steps of TCD.", "tcd", 2, 1.5, 0.8)
    kinds = {
        "speed": Provenance("speed", method=Method("lcm"), recommended=use),
        "look": Provenance("look", data=Data(trigger="lumo")),
    }
    for seed, (name, facts) in enumerate(kinds.items()):
        modules = text_modules(real)[:12] + lcm_modules(real)[:12]
        lora = random_lora(real, modules, ranks=(4,), seed=seed)
        write(tmp_path / f"{name}.safetensors", lora, real, "kohya", "float32", facts)

    def told(name: str) -> tuple[Recommended | None, str | None]:
        facts = provenance_from_header(inspect(tmp_path / f"{name}.safetensors").metadata, name)
        return facts.recommended, facts.data.trigger

    speed = tmp_path / "speed.safetensors"
    done = cli("convert", speed, "--format", "kohya")
    assert done.exit_code == 0, done.output
    assert told("speed_kohya") == (use, None)
    assert cli("convert", speed, "--format", "diffusers", "--rank", "2").exit_code == 0
    assert told("speed_diffusers") == (replace(use, part="speed.safetensors"), None)
    done = cli("merge", tmp_path / "look.safetensors", f"{speed}:0.8", "--output", tmp_path / "both")
    assert done.exit_code == 0, done.output
    assert told("both_kohya") == (replace(use, part="speed.safetensors", lora_weight=1.0), "lumo")
    header = inspect(tmp_path / "both_kohya.safetensors").metadata
    told_of = header["modelspec.usage_hint"]
    assert "LoRA strength 1. Measured for speed.safetensors alone." in told_of and "Euler a" in told_of
    assert of_adapter(*[tmp_path / "both_kohya.safetensors"] * 2) == told("both_kohya")[0]


def test_verify_prints_a_table_and_tells_by_its_exit_code(
    base: structure.Structure, sdxl_base: Path, tmp_path: Path
) -> None:
    lora = random_lora(base, alphas=(8.0,))
    broken.save(tmp_path / "a.safetensors", broken.kohya_diffusers_spelling(lora, base))
    done = cli("verify", tmp_path / "a.safetensors", "--base", sdxl_base)
    assert done.exit_code == 1
    assert "788 of 788" in done.stdout and "A1111" in done.stdout
    assert "up_blocks.0.upsamplers.0.conv" in done.stdout.replace("\n", "").replace(" ", "").replace("│", "")
    told = ("--app", "comfyui", "--app", "forge")
    done = cli("verify", tmp_path / "a.safetensors", "--base", sdxl_base, *told)
    assert done.exit_code == 0 and done.stdout.count("788 of 788") == 4, done.output
    done = cli("verify", tmp_path / "a.safetensors", "--app", "photoshop")
    assert done.exit_code == 2 and "app 'photoshop' is unknown" in done.stderr
    done = cli("verify", tmp_path / "none.safetensors")
    assert done.exit_code == 2 and "none.safetensors" in done.stderr


def test_convert_refuses_what_would_be_lost_unless_told(
    base: structure.Structure, sdxl_base: Path, tmp_path: Path
) -> None:
    file = broken.save(
        tmp_path / "a.safetensors",
        broken.kohya_diffusers_spelling(random_lora(base, lcm_modules(base)[:9]), base),
    )
    tensors = load_file(file) | {"lora_unet_nowhere.lora_up.weight": torch.zeros(2, 2)}
    save_file(tensors, file)
    done = cli("convert", file, "--base", sdxl_base)
    assert done.exit_code == 2 and "belong to no module" in done.stderr and "--drop-unknown" in done.stderr
    assert not list(tmp_path.glob("a_*"))
    done = cli("convert", file, "--base", sdxl_base, "--drop-unknown")
    assert done.exit_code == 0 and "left out: 1 keys, such as lora_unet_nowhere" in done.stdout
    pickle = tmp_path / "evil.safetensors"
    torch.save({"a": torch.zeros(1)}, pickle)
    done = cli("convert", pickle)
    assert done.exit_code == 2 and "pickle" in done.stderr


def test_merge_of_two_runs_is_their_sum(sd_base: Any, tmp_path: Path) -> None:
    """Two adapters through the whole command line; diffusers with both loaded is the truth."""
    from diffusers import StableDiffusionPipeline

    folder = sd_base("epsilon")
    place = structure.of_base(str(folder))
    style, speed = (
        random_lora(place, alphas=(8.0,), size=0.05),
        random_lora(place, ranks=(3,), seed=1, size=0.05),
    )
    for name, lora in (("style", style), ("speed", speed)):
        broken.save(tmp_path / f"{name}.safetensors", broken.kohya_diffusers_spelling(lora, place))
    done = cli(
        "merge", f"{tmp_path}/style.safetensors:0.8", f"{tmp_path}/speed.safetensors", "--base", folder,
        "--output", tmp_path / "both", "--dtype", "float32",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "cosine" in done.stdout and "mid_block" in done.stdout

    def output(*loras: tuple[str, float]) -> torch.Tensor:
        pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        for name, _ in loras:
            pipe.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name)
        pipe.set_adapters([name for name, _ in loras], [weight for _, weight in loras])
        return loading.probe({"unet": pipe.unet})["unet"]

    wanted = output(("style", 0.8), ("speed", 1.0))
    for merged in ("both_kohya", "both_diffusers"):
        assert loading.relative_error(output((merged, 1.0)), wanted) <= 1e-5

    done = cli(
        "merge", f"{tmp_path}/style.safetensors:0.8", f"{tmp_path}/speed.safetensors", "--base", folder,
        "--output", tmp_path / "small", "--dtype", "float32", "--rank", "4", "--format", "kohya",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    printed = float(done.stdout.split("relative error of rank 4 in all: ")[1].split()[0])
    small = reading.read(tmp_path / "small_kohya.safetensors", place).lora
    exact = {name: 0.8 * style.layers[name].delta() + speed.layers[name].delta() for name in style.layers}
    off = sum(float((small.layers[n].delta() - d).square().sum()) for n, d in exact.items())
    whole = sum(float(d.square().sum()) for d in exact.values())
    assert printed == pytest.approx((off / whole) ** 0.5, rel=2e-2) and printed > 0.1


@pytest.mark.slow
def test_merge_into_a_base_and_its_mistakes(sd_base: Any, real_sd_base: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = sd_base("epsilon")
    run = build_run(tmp_path / "run", folder)
    done = cli("merge", f"{run}:0.5", "--fuse-into", folder, "--output", tmp_path / "fused")
    assert done.exit_code == 2 and "lcm-kit export" in done.stderr
    assert cli("export", run, "--dtype", "float32").exit_code == 0
    done = cli("merge", f"{run}:0.5", "--fuse-into", folder, "--output", tmp_path / "fused")
    assert done.exit_code == 0, done.output
    fused = StableDiffusionPipeline.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.load_lora_weights(str(run / "export"), adapter_name="a")
    pipe.set_adapters(["a"], [0.5])
    outputs = [loading.probe({"unet": p.unet})["unet"] for p in (fused, pipe)]
    assert loading.relative_error(*outputs) <= 1e-5

    file = run / "export" / "run.safetensors"
    for arguments, words in (
        ((f"{file}:strong", file), "is not FILE:WEIGHT"),
        ((file,), "there is nothing to merge"),
        ((file, file, "--rank", "0", "--base", folder), "rank"),
        ((file, file, "--rank", "2", "--fuse-into", folder), "--rank has no effect"),
        ((file, file, "--base", real_sd_base), "is not whole"),
    ):
        done = cli("merge", *arguments, "--output", tmp_path / "x")
        assert done.exit_code == 2 and words in done.stderr, done.output
    assert not list(tmp_path.glob("x*"))


@pytest.mark.slow
def test_a_layer_of_zero_strength_stays_silent(base: structure.Structure, tmp_path: Path) -> None:
    """alpha 0: the update is none, in both styles."""
    lora = random_lora(base, lcm_modules(base)[:3])
    first = next(iter(lora.layers))
    silent = Lora({**lora.layers, first: Layer(lora.layers[first].down, lora.layers[first].up, 0.0)})
    file = broken.save(tmp_path / "a.safetensors", broken.kohya_diffusers_spelling(silent, base))
    done = cli("convert", file, "--base", base.label)
    assert done.exit_code == 0, done.output
    for style in ("kohya", "diffusers"):
        read = reading.read(tmp_path / f"a_{style}.safetensors", base).lora
        assert float(read.layers[first].delta().abs().max()) == 0.0
