"""The benchmark compares like with like, counts what it says it counts, and writes what its page says."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.bases import encode_images
from lcm_kit.bench import measure, models
from lcm_kit.bench.counted import Kernels, counted, kept_for_backward
from lcm_kit.bench.side import Side, scaler
from lcm_kit.config import shipped
from lcm_kit.config.evaluation import Speed
from lcm_kit.config.load import dump, load
from lcm_kit.config.schema import Adapter
from lcm_kit.errors import UserError

CPU, META = torch.device("cpu"), torch.device("meta")
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    return shipped.load_recipe("evaluation/speed")


def tiny(**changes: Any) -> Speed:
    keys = {"structure": "tiny", "resolution": 64, "batch_size": 2, "rank": 4, "steps": 2, "warmup": 0}
    return Speed(recipe="evaluation/speed", **{**keys, **changes})


# -- Like with like ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels", [4, 16, None]
)  # None: the configuration does not say, as the published ones
def test_the_batch_has_as_many_channels_as_the_unet_takes(
    channels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, vae, texts = models.settings(tiny())
    unet = {key: value for key, value in unet.items() if key != "in_channels"}
    told = unet if channels is None else unet | {"in_channels": channels}
    monkeypatch.setattr(models, "settings", lambda config: (told, vae, texts))
    assert models.cached(tiny())[0].shape == (2, channels or 4, 16, 16)


def test_a_batch_of_another_shape_is_timed_too() -> None:
    wide = tiny(resolution=(96, 64))
    assert wide.resolution == (96, 64)
    latents = models.cached(wide)[0]
    square = models.cached(tiny(resolution=64))[0]
    assert latents.shape == (*square.shape[:3], square.shape[3] * 3 // 2)
    assert models.sizes(wide).tolist() == [[64, 96, 0, 0, 64, 96]] * 2  # height first, as SDXL is told


def test_both_sides_have_the_same_loss_and_gradient(
    speed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the cache that the baseline's pictures and captions make, and the same noise, time and scale."""
    config = tiny()
    base = models.Base(config, CPU)
    straight = speed.baseline(config, CPU)
    pixels, ids, drawn = straight.inputs(0)
    encoded = encode_images(base.vae(), pixels), base.encode(base.texts(), ids)
    monkeypatch.setattr(speed, "cached", lambda config: encoded)
    # with 0.001 the gradient is nearly the sign of a difference, which magnifies rounding
    monkeypatch.setattr(speed, "HUBER_C", 1.0)
    mine = speed.ours(config, CPU)
    assert [p.shape for p in mine.lora] == [p.shape for p in straight.lora]
    g = torch.Generator().manual_seed(0)
    for p, q in zip(mine.lora, straight.lora, strict=True):  # B is zero at first: student would be teacher
        q.data = p.data = p.data + 0.05 * torch.randn(p.shape, generator=g)

    def part(name: str) -> Any:
        return nullcontext()

    losses = [mine.loss(*encoded, drawn, part), straight.loss(pixels, ids, drawn, part)]
    assert losses[0] > 1e-4
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    grads = [
        torch.autograd.grad(loss, side.lora) for loss, side in zip(losses, (mine, straight), strict=True)
    ]
    flat = [torch.cat([grad.flatten() for grad in of]) for of in grads]
    assert flat[0].norm() > 1e-4
    # float32 sums in another order: 0.6e-5 to 1.3e-5, by the processor
    assert (flat[0] - flat[1]).norm() / flat[0].norm() < 1e-4

    # and one optimizer step later the weights are the same
    with torch.no_grad():
        before = [p.clone() for p in mine.lora]
    for side, inputs in ((mine, (*encoded, drawn)), (straight, (pixels, ids, drawn))):
        side._replace(inputs=lambda at, inputs=inputs: inputs).step(0)
    moved = torch.cat([(p - q).flatten() for p, q in zip(mine.lora, before, strict=True)])
    apart = torch.cat([(p - q).flatten() for p, q in zip(mine.lora, straight.lora, strict=True)])
    assert moved.norm() > 0 and apart.norm() / moved.norm() < 1e-2  # Adam's first step is lr * sign


def test_the_baseline_has_a_second_unet_and_ours_has_not(
    speed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    unet = models.Base.unet
    monkeypatch.setattr(models.Base, "unet", lambda self: built.append("one") or unet(self))
    speed.ours(tiny(), META)
    assert len(built) == 1
    speed.baseline(tiny(), META)
    assert len(built) == 3


# -- The structures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "unet", "texts"),
    [
        ("sd1", 859_520_964, [123_060_480]),
        ("sd2", 865_910_724, [340_387_840]),
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
    ],
)
def test_the_models_have_the_published_sizes(structure: Any, unet: int, texts: list[int]) -> None:
    base = models.Base(Speed(recipe="evaluation/speed", structure=structure), META)

    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(base.unet()) == unet
    assert [count(text) for text in base.texts()] == texts
    assert count(base.vae()) == 83_653_863


def test_a_quarter_of_the_width_is_a_quarter_of_channels_heads_and_groups() -> None:
    config = Speed(recipe="evaluation/speed", width=0.25)
    unet, vae, (text,) = models.settings(config)
    assert unet["block_out_channels"] == (80, 160, 320, 320)
    assert (unet["attention_head_dim"], unet["norm_num_groups"], unet["cross_attention_dim"]) == (2, 8, 192)
    assert vae["block_out_channels"] == (32, 64, 128, 128)
    assert (text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"]) == (192, 3, 12)
    base = models.Base(config, META)
    unet = base.unet()
    lora = AdaptedUNet(unet).add_lora(Adapter(16, 16))
    assert len(lora) == 2 * 278 and sum(p.numel() for p in lora) < 67_250_000 / 15


@pytest.mark.parametrize(
    ("keys", "words"),
    [({"width": 0.3}, "0.125"), ({"structure": "tiny", "width": 0.5}, "tiny"), ({"resolution": 100}, "96")],
)
def test_impossible_sizes_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Speed(recipe="evaluation/speed", **keys)


# -- What is counted -----------------------------------------------------------------------------------------


def test_flops_of_a_linear_layer_by_closed_form() -> None:
    """B x I times I x O is 2 B I O, forward; its backward is as much again, for the weight alone."""
    b, i, o = 3, 5, 7

    def side(config: Speed, device: torch.device) -> Any:
        weight = nn.Parameter(torch.randn(i, o, device=device))
        x = torch.randn(b, i, device=device)
        optimizer = torch.optim.AdamW([weight])
        return Side(
            lambda at: (x, None, None), lambda x, *rest: (x @ weight).sum(), [weight], optimizer,
            scaler(device, torch.float32),
        )  # fmt: skip

    assert measure.flops(side, tiny()) == 4 * b * i * o


@pytest.mark.slow  # builds both sides twice
def test_the_baseline_has_the_flops_of_the_encoders_beside_ours(speed: ModuleType) -> None:
    config = tiny()
    base = models.Base(config, META)
    pixels, ids = torch.randn(2, 3, 64, 64, device=META), torch.zeros(2, 32, dtype=torch.int64, device=META)
    with FlopCounterMode(display=False) as counter:
        encode_images(base.vae(), pixels)
        base.encode(base.texts(), ids)
    mine, straight = measure.flops(speed.ours, config), measure.flops(speed.baseline, config)
    assert straight - mine == counter.get_total_flops() > 0


def test_parts_and_rest_are_the_whole(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks once each time it is read: two readings a part, one tick apart."""
    ticks = iter(range(1000))
    monkeypatch.setattr(measure, "clock", lambda device: float(next(ticks)))
    parts = measure.seconds_by_part(speed.ours(tiny(), CPU), 2, CPU)
    assert parts == {
        "data": 1, "teacher": 1, "target": 1, "student forward": 1, "backward": 1, "optimizer": 1, "rest": 6.5
    }  # fmt: skip  # 2 steps of 6 parts read 24 times, the whole twice: 25 ticks, 12 of them in parts


def test_resident_memory_sees_what_is_held() -> None:
    if not Path("/proc/self/status").is_file():
        assert measure.resident("VmRSS") is None
        return
    before = measure.resident("VmRSS")
    held = torch.ones(2**26)  # 256 MiB, every page of it written
    assert 0.9 * 2**28 < measure.resident("VmRSS") - before < 1.1 * 2**28
    del held
    assert measure.resident("VmHWM") >= before + 0.9 * 2**28


@pytest.mark.parametrize(
    ("structure", "most"), [("sd1", 4000), pytest.param("sdxl", 11500, marks=pytest.mark.slow)]
)
def test_a_whole_step_of_ours_has_few_kernels(speed: ModuleType, structure: Any, most: int) -> None:
    """From inputs on the device to new weights; through peft it was 9,700 and 27,300."""
    found = counted(speed.ours, Speed(recipe="evaluation/speed", structure=structure))
    assert 0.9 * most * (1 if structure == "sd1" else 0.9) < found["kernels_per_step"] <= most


def test_kernels_and_kept_bytes_by_hand() -> None:
    """y = x W, twice: a product each, a sum, and for the backward x once and W, which is there anyway."""
    x, w = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    with kept_for_backward([w]) as kept, Kernels() as kernels:
        y = (x @ w).view(-1) + (x @ w).flatten()
    assert dict(kernels.found) == {"mm": 2, "add": 1}
    assert sum(kept.values()) == 4 * 15
    with Kernels() as kernels:
        y.sum().backward()
    assert kernels.found["mm"] == 2 and kernels.found["t"] == 0


# -- The recipe ----------------------------------------------------------------------------------------------


def keys(value: Any, path: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {path}
    return {key for name, inner in value.items() for key in keys(inner, f"{path}.{name}" if path else name)}


@pytest.mark.slow
def test_a_side_is_measured_in_a_process_of_its_own(speed: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump(tiny(rank=8)))
    found = measure.peak_in_subprocess(speed.__file__, "ours", file)
    if found["library_bytes"] is not None:
        # more than its weights in float32, 5.3 M, and less than three times that and 64 MiB
        assert 4 * 5.3e6 < found["peak_bytes"] < 12 * 5.3e6 + 2**26
        assert 2**27 < found["library_bytes"] < 2**31


@pytest.mark.slow
def test_results_are_those_of_the_page(
    speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    peaks = {"ours": {"peak_bytes": 3, "library_bytes": 1}, "baseline": {"peak_bytes": 4, "library_bytes": 1}}
    monkeypatch.setattr(
        speed, "peak_in_subprocess", lambda recipe, name, file: asked.append(file.read_text()) or peaks[name]
    )
    file = speed.main(tiny(output=str(tmp_path)))
    assert asked == [dump(tiny(output=str(tmp_path)))] * 2  # each side's process reads the config as resolved
    results = json.loads(file.read_text())
    documented = set(re.findall(r"^\| `([a-z_. ]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    written = {re.sub(r"^(ours|baseline)\.", "side.", key) for key in keys(results)}
    assert {re.sub(r"^(config|parts)\..*", r"\1", key) for key in written} == documented
    assert list(results["parts"]) == [
        "data", "teacher", "target", "student forward", "backward", "optimizer", "rest"
    ]  # fmt: skip
    for name in ("ours", "baseline"):
        assert len(results[name]["seconds"]) == 2
        median = sum(results[name]["seconds"]) / 2
        assert results[name]["samples_per_second"] == pytest.approx(2 / median)
        share = results[name]["flops_per_step"] / median / results["limit_flops_per_second"]
        assert results[name]["share_of_limit"] == pytest.approx(share)
    for key, ratio in results["ratio"].items():
        assert ratio == pytest.approx(results["ours"][key] / results["baseline"][key])
    assert results["ratio"]["flops_per_step"] < 1
    assert results["config"]["structure"] == "tiny"


def test_a_measuring_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.sys, "executable", "/bin/false")
    if os.path.exists("/bin/false"):
        with pytest.raises(UserError, match="ours: the process .* ended with 1; .* lower batch_size"):
            measure.peak_in_subprocess("speed.py", "ours", tmp_path / "none.yaml")


def test_float16_on_a_cpu_is_refused(speed: ModuleType) -> None:
    with pytest.raises(UserError, match="float16 does not train on a CPU"):
        speed.ours(tiny(precision="float16"), CPU)


@pytest.mark.parametrize(("name", "width"), [("evaluation/speed", 0.25), ("evaluation/speed_sd15", 1.0)])
def test_the_shipped_configs_are_for_it(name: str, width: float) -> None:
    config = load(shipped.config_path(name))
    assert isinstance(config, Speed) and (config.structure, config.width) == ("sd1", width)
