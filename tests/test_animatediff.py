"""AnimateDiff: a file loaded there draws what merging it first draws; what diffusers drops of it is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcm_kit.export import card
from lcm_kit.lora import animatediff, loading, structure, verify
from lcm_kit.lora.layers import Lora
from lcm_kit.lora.provenance import Method, Provenance
from lcm_kit.lora.rows import Row
from lcm_kit.lora.write import write
from tests import broken
from tests.cards import facts, hollow, section, snippets
from tests.kinds import loha
from tests.loras import fuse, lcm_modules, random_lora, text_modules

STYLES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "house.safetensors"}


@pytest.fixture(params=["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest) -> Path:
    """Bases with all blocks of the published ones, narrow."""
    return request.getfixturevalue({"sd1": "real_sd_base", "sdxl": "sdxl_base"}[request.param])


def motion_of(base: Path) -> Any:
    """A motion adapter for `base` with random weights, the same at each call."""
    from diffusers import MotionAdapter, UNet2DConditionModel

    widths = UNet2DConditionModel.load_config(base / "unet")["block_out_channels"]
    torch.manual_seed(5)
    return MotionAdapter(widths, motion_norm_num_groups=8, use_motion_mid_block=len(widths) == 4)


def lora_of(base: structure.Structure) -> Lora:
    """Of the UNet, convolutions too, and of the text encoders; ranks and alphas differ."""
    names = lcm_modules(base) + text_modules(base)
    return random_lora(base, names, ranks=(4, 2), alphas=(8.0, 3.0), size=0.05)


def file_of(folder: Path, lora: Lora, base: structure.Structure, style: str = "kohya") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STYLES[style]
    write(file, lora, base, style, "float32", Provenance("house"))
    return file


def animated(file: Path, base: structure.Structure, **more: Any) -> Row:
    (row,) = verify.verify(file, verify.Against(base), apps=("animatediff",), **more).rows
    return row


# -- What it draws -------------------------------------------------------------------------------------------


def clip(pipe: Any, steps: int = 2) -> Tensor:
    from diffusers import LCMScheduler

    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    stream = torch.Generator().manual_seed(1)
    made = pipe("a cat", num_frames=3, num_inference_steps=steps, guidance_scale=1.0, generator=stream,
                height=64, width=64, output_type="latent")  # fmt: skip
    return made.frames


def test_a_loaded_file_draws_the_frames_of_one_merged_into_the_unet_before_it_moved(
    base: Path, tmp_path: Path
) -> None:
    """diffusers' own pipelines throughout: merged into the 2D UNet, by `W + scale B A`, then made a motion
    model; the frames are finite, differ from one another and from those without the LoRA."""
    import diffusers

    own = structure.of_base(str(base))
    kind, _ = animatediff.names(own)
    lora, plain = lora_of(own), diffusers.DiffusionPipeline.from_pretrained(base)
    encoders = {part: getattr(plain, part) for part in own.family.text_parts}
    fuse(plain.unet, lora)
    texts = Lora({name: layer for name, layer in lora.layers.items() if not name.startswith("unet.")})
    loading.fuse(encoders, texts)
    parts = {name: plain.components[name] for name in own.family.parts}
    wanted = clip(getattr(diffusers, kind)(**parts, motion_adapter=motion_of(base)))
    bare = clip(getattr(diffusers, kind).from_pretrained(base, motion_adapter=motion_of(base)))
    assert wanted.shape == (1, 4, 3, 16, 16) and bool(wanted.isfinite().all())
    assert loading.relative_error(wanted[:, :, 0], wanted[:, :, 1]) > 0.05
    for style in STYLES:
        file = file_of(tmp_path, lora, own, style)
        pipe = getattr(diffusers, kind).from_pretrained(base, motion_adapter=motion_of(base))
        with loading.complaints() as said:
            pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
        assert said == []
        drawn = clip(pipe)
        assert loading.relative_error(drawn, wanted) < 1e-4 < 0.05 < loading.relative_error(bare, wanted)


def test_verifys_model_is_that_of_diffusers(base: Path) -> None:
    """The same names and shapes as a motion adapter and a base's UNet make; its weights are random."""
    from diffusers import UNet2DConditionModel, UNetMotionModel

    mine = animatediff.unet(structure.of_base(str(base)))
    theirs = UNetMotionModel.from_unet2d(UNet2DConditionModel.from_pretrained(base / "unet"), motion_of(base))
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (mine, theirs)]
    assert shapes[0] == shapes[1]
    places = [dict(model.named_buffers()) for model in (mine, theirs)]
    assert places[0] and all(torch.equal(places[0][name], value) for name, value in places[1].items())
    told = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in (mine, theirs)]
    assert told[0] == told[1]


@pytest.mark.parametrize("generation", ["sd1", "sdxl"])
def test_a_model_of_full_size_has_the_memory_of_its_largest_weight(generation: str) -> None:
    """Of 1.3 and 2.7 thousand million weights, 5 and 11 GB."""
    model = animatediff.unet(structure.known(generation))
    held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}
    assert sum(each.numel() for each in model.parameters()) > 1.2e9
    assert sum(held.values()) < 160e6


# -- Rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "style"), [("sd1", "diffusers"), ("sdxl", "kohya")], indirect=["base"])
def test_the_kits_files_are_loaded_whole(base: Path, tmp_path: Path, style: str) -> None:
    own = structure.of_base(str(base))
    lora = lora_of(own)
    row = animated(file_of(tmp_path, lora, own, style), own)
    assert row.ok and (row.loaded, row.right, row.of) == (len(lora.layers),) * 3
    assert row.error is not None and row.error < 1e-5 and row.title == "AnimateDiff in diffusers"


def test_what_the_frames_should_show_is_the_reference(real_sd_base: Path, tmp_path: Path) -> None:
    """A LoRA that differs in one convolution of 278 modules is another one."""
    own = structure.of_base(str(real_sd_base))
    lora = random_lora(own)
    name = "unet.mid_block.resnets.0.conv1"
    other = Lora({**lora.layers, name: random_lora(own, [name], seed=1).layers[name]})
    row = animated(file_of(tmp_path, lora, own), own, reference=other)
    assert row.wrong and re.match(r"its output is off by [\d.e+-]+ relative, above 1e-04", row.verdict)


def test_a_file_that_diffusers_loads_in_part_is_loaded_in_part(real_sd_base: Path, tmp_path: Path) -> None:
    own = structure.of_base(str(real_sd_base))
    file = broken.save(tmp_path / "a.safetensors", broken.kohya_without_alphas(random_lora(own), own))
    report = verify.verify(file, verify.Against(own), apps=("diffusers", "animatediff"), alpha=8.0)
    plain, clips = report.rows
    assert clips.verdict.startswith("278 modules at strength 1 instead of 2")
    assert (plain.loaded, plain.right, plain.verdict) == (clips.loaded, clips.right, clips.verdict)
    file = broken.save(tmp_path / "b.safetensors", broken.peft_wrapper(random_lora(own), own))
    report = verify.verify(file, verify.Against(own), apps=("diffusers", "animatediff"), alpha=8.0)
    assert {row.verdict.partition(":")[0] for row in report.rows} == {"refuses the file"}


def test_a_header_whose_endings_fit_motion_modules_too_does_no_harm(
    real_sd_base: Path, tmp_path: Path
) -> None:
    """As diffusers' scripts write it: `to_q` fits AnimateDiff's own attention; peft warns and leaves it."""
    own = structure.of_base(str(real_sd_base))
    file = file_of(tmp_path, random_lora(own), own, "diffusers")
    told = {"unet.r": 4, "unet.lora_alpha": 8.0, "unet.target_modules": sorted(
        {name.rpartition(".")[2] if "to_out" not in name else "to_out.0" for name in lcm_modules(own)}
    )}  # fmt: skip
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(told)})
    parts = animatediff.models(random_lora(own), own)
    said = loading.load(animatediff.pipeline(own, parts), file)
    assert any("additional target modules" in words and ".motion_modules." in words for words in said)
    row = animated(file, own)
    assert row.ok and row.loaded == 278 and row.error is not None and row.error < 1e-5


@pytest.mark.parametrize("kind", ["dora", "dora_scale", "loha", "pissa"])
def test_other_kinds(real_sd_base: Path, tmp_path: Path, kind: str) -> None:
    """peft's DoRA is exact, for convolutions too; the rest is refused, dropped or not judged, in words."""
    own = structure.of_base(str(real_sd_base))
    names = [f"unet.mid_block.{end}" for end in ("resnets.0.conv1", "attentions.0.proj_in")]
    names += ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    tensors: dict[str, Tensor] = {}
    names = names[-1:] if kind == "pissa" else names
    header: dict[str, Any] = {"unet.r": 4, "unet.lora_alpha": 8.0, "unet.use_dora": kind == "dora"}
    header |= {"unet.target_modules": [name.removeprefix("unet.") for name in names]}
    header |= {"unet.init_lora_weights": "pissa"} if kind == "pissa" else {}
    torch.manual_seed(0)
    for name, layer in random_lora(own, names).layers.items():
        if kind in ("dora", "pissa"):
            tensors |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
        if kind == "dora":
            size = layer.shape[:1] if layer.up.ndim == 2 else (1, layer.shape[0], 1, 1)
            tensors[f"{name}.lora_magnitude_vector"] = torch.rand(size) + 0.5
        if kind in ("dora_scale", "loha"):
            key, shape = own.kohya[name], own.modules[name]
            pieces = {"lora_down.weight": layer.down, "lora_up.weight": layer.up}
            pieces |= {"dora_scale": torch.rand(shape[0], *(1,) * (len(shape) - 1)) + 0.5}
            tensors |= {f"{key}.{k}": v for k, v in (loha(shape) if kind == "loha" else pieces).items()}
            tensors[f"{key}.alpha"] = torch.tensor(8.0)
    told = {"lora_adapter_metadata": json.dumps(header)} if kind in ("dora", "pissa") else None
    save_file(tensors, tmp_path / "a.safetensors", metadata=told)
    row = animated(tmp_path / "a.safetensors", own)
    if kind == "dora":
        assert row.ok and row.error is not None and row.error < 1e-5
    elif kind == "dora_scale":
        assert row.wrong and "without their DoRA magnitude" in row.verdict
    elif kind == "loha":
        assert row.wrong and row.verdict.startswith("refuses the file")
    else:
        assert row.verdict.startswith("not judged: PiSSA follows from the base's own weights")


def test_bases_that_no_motion_adapter_fits_have_no_row(
    sd2_v_base: Path, ssd1b_base: Path, sd_base: Callable[..., Path], tmp_path: Path
) -> None:
    """SD2.x, SSD-1B, and a base of two blocks; SSD-1B is refused by diffusers itself."""
    for folder in (sd2_v_base, ssd1b_base, sd_base("epsilon")):
        own = structure.of_base(str(folder))
        assert not animatediff.fits(own)
        file = file_of(tmp_path, random_lora(own, lcm_modules(own)[:3]), own, "diffusers")
        assert verify.verify(file, verify.Against(own), apps=("animatediff",)).rows == ()
    from diffusers import UNet2DConditionModel, UNetMotionModel

    pruned = UNet2DConditionModel.from_pretrained(ssd1b_base / "unet")
    with pytest.raises(RuntimeError, match="Missing key"):  # of the middle's second block
        UNetMotionModel.from_unet2d(pruned, motion_of(ssd1b_base))


# -- The card ------------------------------------------------------------------------------------------------


def page(folder: Path, base: structure.Structure, lora: Lora, **changed: Any) -> str:
    about = {"title": "t", "structure": base, "lora": lora, "checks": []}
    return card.write(folder, files={"kohya": folder / STYLES["kohya"]}, **about, **changed).read_text()


@pytest.mark.parametrize(
    ("base", "method"),
    [("sd1", "tcd"), pytest.param("sdxl", None, marks=pytest.mark.slow)],
    indirect=["base"],
)
def test_the_cards_code_animates_with_the_lora(
    method: str | None, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands, but for the hub's motion adapter; against the same pipeline with the LoRA merged."""
    import diffusers

    own, folder = structure.of_base(str(base)), tmp_path / "export"
    lora = random_lora(own, size=0.05)
    file = file_of(folder, lora, own)
    about = facts(base=str(base), method=method)
    source = snippets(page(folder, own, lora, facts=about))[1]
    kind, hub = animatediff.names(own)
    motion_of(base).save_pretrained(tmp_path / "motion")
    assert source.count(f'"{hub}"') == 1 and source.count("\nclip = pipe(") == 1
    source = source.replace(f'"{hub}"', repr(str(tmp_path / "motion")))
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    few = source.replace("num_inference_steps=25", "num_inference_steps=2")
    small = "\ntorch.manual_seed(7)\nclip = pipe(height=64, width=64, prompt="
    exec(few.replace("\nclip = pipe(", small), names)
    with Image.open(folder / "clip.gif") as made:
        assert (made.n_frames, made.size) == (16, (64, 64))  # type: ignore[attr-defined]
        assert made.info["duration"] == 120  # a hundredth of a second is all that GIF knows of 1000 / 8
    assert type(names["pipe"]).__name__ == kind
    assert type(names["pipe"].scheduler).__name__ == ("TCDScheduler" if method else "DDIMScheduler")

    pipe = getattr(diffusers, kind).from_pretrained(base, motion_adapter=motion_of(base))
    pipe.scheduler = names["pipe"].scheduler
    fuse(pipe.unet, lora)
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "eta": 0.3}
    if method is None:
        call = {"num_inference_steps": 2, "guidance_scale": own.family.usual_guidance}
    torch.manual_seed(7)
    wanted = pipe(names["prompt"], num_frames=16, height=64, width=64, **call).frames[0]
    assert file.is_file() and len(wanted) == len(names["clip"]) == 16
    both = zip(names["clip"], wanted, strict=True)
    assert max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in both) <= 1


def test_the_card_says_where_it_does_not_go(tmp_path: Path) -> None:
    sd1, sd2 = structure.known("sd1"), structure.known("sd2")
    text = hollow(sd1, lcm_modules(sd1) + text_modules(sd1))
    told = section(page(tmp_path, sd1, text, facts=facts()), "AnimateDiff")
    assert "It loads the same file, its text encoder layers too." in told
    assert "no trained motion adapter was tried" in told
    assert section(page(tmp_path, sd2, hollow(sd2), facts=facts()), "AnimateDiff") == ""
    from lcm_kit.core.methods import DMD
    from tests.test_card_samplers import told as told_of

    one = told_of(Method.of(DMD(steps=(1,), conditioning_timestep=399)))
    written = page(tmp_path, sd1, hollow(sd1), facts=one)
    assert section(written, "AnimateDiff").startswith("**Not supported.** This LoRA draws in one step")
    assert len(snippets(written)) == 1


def test_animatediffs_call_ignores_timesteps(real_sd_base: Path) -> None:
    """Why the card does not offer it: what is told `timesteps=[399]` is drawn at 999, and nothing is said."""
    own = structure.of_base(str(real_sd_base))
    pipe = animatediff.pipeline(own, animatediff.models(Lora({}), own))
    told = {"prompt_embeds": torch.zeros(1, 4, own.width), "height": 8, "width": 8, "num_frames": 2}
    with loading.complaints() as said:
        pipe(**told, num_inference_steps=1, timesteps=[399], guidance_scale=1.0, output_type="latent")
    assert pipe.scheduler.timesteps.tolist() == [999] and said == []
