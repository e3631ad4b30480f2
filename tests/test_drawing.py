"""How pictures are drawn: adapters in the weights, half precision that proves itself, decoders, batches."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn

from lcm_kit import bases, sample
from lcm_kit.bases.base import inspect_base
from lcm_kit.drawing import how as how_module
from lcm_kit.drawing import vae as drawing_vae
from lcm_kit.drawing.batches import Batches, at_once
from lcm_kit.drawing.fused import TOLERANCE, fuse
from lcm_kit.drawing.how import How
from lcm_kit.drawing.placed import place
from lcm_kit.drawing.vae import ProvenVae
from lcm_kit.errors import UserError
from lcm_kit.evaluation import draw as drawing
from lcm_kit.evaluation.cells import Cell
from lcm_kit.evaluation.extract import FeatureExtractor
from lcm_kit.share import Share

LORA = "asset:tiny-lcm-lora"


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


# -- Batches -------------------------------------------------------------------------------------------------


def room_for(most: int, seen: list[tuple[int, int]]) -> Callable[[int, Sequence[int]], list[int]]:
    """Work whose memory holds `most` items; notes the place and the number of what it is given."""

    def work(first: int, items: Sequence[int]) -> list[int]:
        seen.append((first, len(items)))
        if len(items) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [item * 10 for item in items]

    return work


def test_batches_are_halved_for_good_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    batches = Batches(8, "drawing a picture", "draw smaller ones")
    made = [*batches.run(range(10), room_for(3, seen), first=100)]
    assert sum(made, []) == [10 * k for k in range(10)]
    assert seen == [(100, 8), (100, 4), (100, 2), (102, 2), (104, 2), (106, 2), (108, 2)]
    assert [*batches.run(range(4), room_for(3, seen))] == [[0, 10], [20, 30]]  # it stays so
    said = capsys.readouterr().err
    assert "memory ran out with 8 at once while drawing a picture; going on with 4" in said
    assert "with 4 at once while drawing a picture; going on with 2" in said and said.count("ran out") == 2


def test_one_that_does_not_fit_is_a_sentence_and_other_errors_are_their_own() -> None:
    batches = Batches(2, "drawing a picture of 64 x 32 pixels", "draw smaller ones")
    with pytest.raises(
        UserError, match=r"drawing a picture of 64 x 32 pixels, one at a time .*; draw smaller"
    ):
        list(batches.run([1, 2], room_for(0, [])))

    def broken(first: int, items: Sequence[int]) -> None:
        raise RuntimeError("expected all tensors to be on the same device")

    with pytest.raises(RuntimeError, match="same device"):
        list(Batches(2, "", "").run([1, 2], broken))


@pytest.mark.parametrize(
    ("asked", "side", "device", "number"),
    [
        (7, 1024, "cpu", 7), ("auto", 512, "cuda", 32), ("auto", 1024, "cuda:1", 8), ("auto", 64, "cuda", 32),
        ("auto", 512, "cpu", 4), ("auto", 1024, "cpu", 1), ("auto", 2048, "cpu", 1), ("auto", 64, "cpu", 32),
    ],
)  # fmt: skip
def test_how_many_at_once(asked: Any, side: int, device: str, number: int) -> None:
    assert at_once(asked, side, side, device) == number


def test_pictures_are_the_same_where_memory_runs_out(
    sd_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, prompts = str(sd_base()), ["a cat", "a dog", "an owl", "a fox", "a fish"]
    whole = list(sample.draw_images(base, prompts, steps=1, batch_size=4))
    real, sizes = sample.decode, []

    def decode(pipe: Any, latents: Tensor, **of: Any) -> Tensor:
        sizes.append(len(latents))
        if len(latents) > 2:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return real(pipe, latents, **of)

    monkeypatch.setattr(sample, "decode", decode)
    parts = list(sample.draw_images(base, prompts, steps=1, batch_size=4))
    assert sizes == [4, 2, 2, 1]
    for a, b in zip(whole, parts, strict=True):
        assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1


# -- Adapters in the weights ---------------------------------------------------------------------------------


@pytest.fixture
def adapted() -> Any:
    """tiny-sd with two LoRAs, at the weights 0.7 and 0.4; `second` is the first one scaled by -0.5."""
    pipe = sample.pipeline("asset:tiny-sd")
    sample.load_adapter(pipe, LORA, name="first")
    sample.load_adapter(pipe, LORA, name="second")
    with torch.no_grad():
        for module in pipe.unet.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["second"].weight.mul_(-0.5).add_(0.001)
    pipe.set_adapters(["first", "second"], [0.7, 0.4])
    return pipe


def unet_of(pipe: Any) -> Tensor:
    unet, g = pipe.unet, torch.Generator().manual_seed(0)
    x = torch.randn(3, unet.config.in_channels, 16, 16, generator=g)
    text = torch.randn(3, 12, unet.config.cross_attention_dim, generator=g)
    with torch.no_grad():
        like = {"device": unet.device, "dtype": unet.dtype}
        return unet(x.to(**like), torch.tensor([999, 499, 19]), text.to(**like)).sample


def test_two_adapters_in_the_weights_draw_what_peft_draws_and_come_out_bit_for_bit(adapted: Any) -> None:
    before = {name: tensor.clone() for name, tensor in adapted.unet.state_dict().items()}
    beside, bare = unet_of(adapted), sample.pipeline("asset:tiny-sd").unet
    done = fuse(adapted)
    assert (len(done.layers), done.left) == (129, 0)
    assert relative(unet_of(adapted), beside) < 1e-5
    # the sum itself, from the factors: W + 0.7 B1 A1 + 0.4 B2 A2 (the LoRA's own strength is 1)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer, own = adapted.unet.get_submodule(name), bare.get_submodule(name).weight
    wanted = own.double()
    for which, weight in (("first", 0.7), ("second", 0.4)):
        wanted = wanted + weight * layer.lora_B[which].weight.double() @ layer.lora_A[which].weight.double()
    torch.testing.assert_close(layer.base_layer.weight.double(), wanted, rtol=0, atol=1e-7)
    assert (
        relative(unet_of(adapted), unet_of(sample.pipeline("asset:tiny-sd"))) > 0.01
    )  # and it does something
    done.undo()
    after = adapted.unet.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert torch.equal(unet_of(adapted), beside)
    done.undo()  # a second time does nothing
    adapted.unload_lora_weights()
    for key, tensor in bare.state_dict().items():
        assert torch.equal(adapted.unet.state_dict()[key], tensor), key


def test_float16_weights_with_an_adapter_are_as_near_as_they_are_promised_to_be() -> None:
    """Against float32 arithmetic on the same float16 base, the LoRA beside it: what rounding alone moves."""
    pipe = sample.pipeline("asset:tiny-sd", dtype=torch.float16)
    sample.load_adapter(pipe, LORA)
    exact = copy.deepcopy(pipe.unet).float()
    assert fuse(pipe, keep=False).left == 0
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float16}
    rounded = copy.deepcopy(pipe.unet).float()

    class Around(nn.Module):
        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.unet = unet

    wanted = unet_of(Around(exact))
    assert 1e-5 < relative(unet_of(Around(rounded)), wanted) < TOLERANCE[torch.float16]
    # and in float16 arithmetic it is as near as peft's way is
    assert relative(unet_of(pipe), wanted) < 2e-3


def test_what_has_too_few_digits_or_no_plain_sum_stays_with_peft() -> None:
    pipe = sample.pipeline("asset:tiny-sd", dtype=torch.bfloat16)
    sample.load_adapter(pipe, LORA)
    before = unet_of(pipe)
    done = fuse(pipe)
    assert (len(done.layers), done.left) == (0, 129) and torch.equal(unet_of(pipe), before)

    own = sample.pipeline("asset:tiny-sd")
    own.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False))
    drawn, done = unet_of(own), fuse(own)
    assert not done.layers and done.left > 0 and torch.equal(unet_of(own), drawn)


def test_text_encoders_are_fused_as_well(sd_base: Callable[..., Path]) -> None:
    pipe = sample.pipeline(str(sd_base()))
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False), pipe.text_encoder
    )
    beside = pipe.encode_prompt("a cat", "cpu", 1, False)[0].detach()
    done = fuse(pipe)
    assert done.layers and not done.left
    fused = pipe.encode_prompt("a cat", "cpu", 1, False)[0].detach()
    assert 0 < relative(fused, beside) < 1e-5
    done.undo()
    assert torch.equal(pipe.encode_prompt("a cat", "cpu", 1, False)[0], beside)


def test_sampling_with_an_adapter_runs_the_bare_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: no product of a LoRA is left in any pass."""
    passes: list[str] = []
    real = sample.fuse

    def counted(pipe: Any, **settings: Any) -> Any:
        for name, module in pipe.unet.named_modules():
            if ".lora_A." in name:
                module.register_forward_hook(lambda *_, name=name: passes.append(name))
        return real(pipe, **settings)

    monkeypatch.setattr(sample, "fuse", counted)
    fused = list(sample.draw_images("asset:tiny-sd", ["a red cat"], adapter=LORA, steps=2))
    assert not passes
    monkeypatch.setattr(sample, "fuse", lambda pipe, **settings: None)
    plain = list(sample.draw_images("asset:tiny-sd", ["a red cat"], adapter=LORA, steps=2))
    assert max(abs(a - b) for a, b in zip(fused[0].tobytes(), plain[0].tobytes(), strict=True)) <= 1


def test_fused_layers_are_called_without_peft_and_go_back_to_it(
    adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: peft's forward of none of the 129 layers while they are fused, of all of them afterwards."""
    passes: list[Any] = []
    for kind in (Linear, Conv2d):
        real = kind.forward
        monkeypatch.setattr(
            kind, "forward", lambda layer, x, real=real: passes.append(layer) or real(layer, x)
        )
    done = fuse(adapted)
    fused = unet_of(adapted)
    assert not passes
    done.undo()
    unet_of(adapted)
    assert len(set(passes)) == 129
    again = fuse(adapted)
    assert torch.equal(unet_of(adapted), fused)
    again.undo()


def test_a_pipeline_is_where_diffusers_would_find_it_but_is_not_looked_through(
    sd_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same place by diffusers' own search, and the same picture; counted: no search of the UNet."""
    looked: list[Any] = []
    real = group_offloading._get_top_level_group_offload_hook
    monkeypatch.setattr(
        group_offloading, "_get_top_level_group_offload_hook", lambda part: looked.append(part) or real(part)
    )
    for path, dtype in (("asset:tiny-sd", torch.float32), (str(sd_base()), torch.bfloat16)):
        pipe = sample.pipeline(path, dtype=dtype)
        plain = type(pipe).__mro__[1]
        assert type(pipe).__name__ == plain.__name__ == "StableDiffusionPipeline"
        assert pipe.device == plain.device.fget(pipe) and pipe._execution_device == torch.device("cpu")
        assert pipe._execution_device == plain._execution_device.fget(pipe)
        assert place(pipe) == (pipe.unet.device, pipe.unet.dtype) == (torch.device("cpu"), dtype)
        looked.clear()
        how: dict[str, Any] = {"sampler": "lcm", "steps": 2, "seed": 3}
        drawn = sample.latents(pipe, ["a red cat"], **how)
        assert pipe.unet not in looked
        pipe.__class__ = plain
        assert torch.equal(sample.latents(pipe, ["a red cat"], **how), drawn) and pipe.unet in looked


def test_the_pipes_of_an_evaluation_give_the_base_back(monkeypatch: pytest.MonkeyPatch) -> None:
    base = inspect_base("asset:tiny-sd")
    monkeypatch.setattr(drawing, "warm_up", lambda pipe, samples: None)
    file = sample.load_adapter.__globals__["adapter_file"](LORA)
    subject = type("Subject", (), {"file": file})()
    pipes = drawing.Pipes(base, {"lcm": subject}, drawing.Samples(("a",), 1, 0, 64, 1, 1))
    plain = Cell("teacher", None, "ddim", 2, 1.0)
    students = [Cell("student", "lcm", "lcm", 2, 1.0, weight) for weight in (1.0, 0.5)]
    before = unet_of(pipes.get(plain))
    found = []
    for cell in students:
        found.append(unet_of(pipes.get(cell)))
        wanted = sample.pipeline("asset:tiny-sd")
        sample.load_adapter(wanted, LORA, cell.lora_weight)
        assert 0 < relative(found[-1], unet_of(wanted)) < 1e-5
    assert relative(*found) > 1e-3
    assert torch.equal(unet_of(pipes.get(plain)), before)


# -- The VAE's precision -------------------------------------------------------------------------------------


@pytest.fixture
def vae() -> Any:
    return bases.load_vae(inspect_base("asset:tiny-sd"))


def latents_of(vae: Any, count: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, vae.config.latent_channels, 16, 16, generator=g)


def test_a_vae_that_is_near_in_float16_goes_on_in_it(vae: Any) -> None:
    latents, pixels = latents_of(vae), torch.rand(3, 3, 64, 64) * 2 - 1
    wanted, raw = bases.decode_latents(vae, latents), bases.encode_images(vae, pixels)
    for proven, given, exact in (
        (ProvenVae(copy.deepcopy(vae), (torch.float16,)).decoded, latents, wanted),
        (ProvenVae(copy.deepcopy(vae), (torch.float16,)).encoded, pixels, raw),
    ):
        found = proven(given)
        assert found.dtype == torch.float32 and proven.__self__.dtype == torch.float16
        assert 0 < relative(found, exact) < 2e-3


@pytest.mark.parametrize(("side", "proof"), [(16, (1, 16, 16)), (10, (1, 8, 8)), (4, (1, 4, 4))])
def test_what_is_computed_both_ways_is_the_middle_of_one_picture(
    vae: Any, side: int, proof: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole one of 1024 pixels would take 3 GiB in float32. The middle of 16 and of 10 is 8 wide here."""
    monkeypatch.setattr(drawing_vae, "PROOF", 64 if side != 16 else 1024)
    seen: list[Tensor] = []
    decode = bases.decode_latents

    def looking(model: Any, latents: Tensor) -> Tensor:
        seen.append(latents)
        return decode(model, latents)

    monkeypatch.setattr(bases, "decode_latents", looking)
    latents = latents_of(vae)[..., :side, :side]
    ProvenVae(vae, (torch.float16,)).decoded(latents)
    (exact, half, rest), first = seen, (side - proof[1]) // 2
    assert torch.equal(exact, latents[:1, :, first : first + proof[1], first : first + proof[1]])
    assert torch.equal(half, exact) and torch.equal(rest, latents)


def overflowing(vae: Any) -> Any:
    """Activations beyond float16's range, which float32 and bfloat16 hold: what comes out is the same."""
    norm = vae.decoder.conv_norm_out
    conv = vae.decoder.conv_out
    with (
        torch.no_grad()
    ):  # SiLU of 1e6 x is 1e6 x where x is positive, else nothing: so only the size changes
        norm.weight.mul_(1e6)
        norm.bias.mul_(1e6)
        conv.weight.div_(1e6)
    return vae


def test_one_that_overflows_falls_back_and_says_so_once(vae: Any, capsys: pytest.CaptureFixture[str]) -> None:
    latents = latents_of(vae)
    exact = bases.decode_latents(overflowing(vae), latents)
    assert exact.isfinite().all()
    proven = ProvenVae(copy.deepcopy(vae), (torch.float16,))
    assert torch.equal(proven.decoded(latents), exact) and proven.dtype == torch.float32
    proven.decoded(latents)
    said = capsys.readouterr().err
    assert said.count("not near float32 in float16, so pictures are decoded in float32") == 1
    both = ProvenVae(copy.deepcopy(vae), (torch.float16, torch.bfloat16))
    assert relative(both.decoded(latents), exact) < 0.05 and both.dtype == torch.bfloat16
    assert capsys.readouterr().err == ""


def test_pictures_that_overflow_later_are_done_again_alone(
    vae: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    proven = ProvenVae(copy.deepcopy(vae), (torch.float16,))
    latents = latents_of(vae)
    proven.decoded(latents)
    latents[1] *= 1e6  # beyond float16's range as it is
    found, exact = proven.decoded(latents), bases.decode_latents(vae, latents)
    assert relative(found[1], exact[1]) < 1e-5 and not torch.equal(found[0], exact[0])
    assert relative(found[0], exact[0]) < 2e-3 and proven.dtype == torch.float16
    assert "some pictures are not finite in float16 and are decoded in float32" in capsys.readouterr().err


def test_a_picture_that_is_broken_anyway_settles_nothing(vae: Any) -> None:
    proven, broken = ProvenVae(vae, (torch.float16,)), latents_of(vae) * float("nan")
    assert not proven.decoded(broken).isfinite().any() and proven.dtype == torch.float32
    proven.decoded(latents_of(vae))
    assert proven.dtype == torch.float16


def test_a_pipeline_decodes_by_a_vae_that_proves_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(how_module, "half_dtypes", lambda device, overflows: (torch.float16,))
    pipe = sample.pipeline("asset:tiny-sd", dtype=torch.float16)
    latents = latents_of(pipe.vae)
    exact = sample.decode(sample.pipeline("asset:tiny-sd"), latents)
    found = sample.decode(pipe, latents)
    assert pipe.vae.dtype == torch.float16 and 0 < relative(found, exact) < 2e-3
    assert isinstance(sample.pipeline("asset:tiny-sd").vae, type(pipe.vae.full))  # float32 asks for none


# -- Tiles --------------------------------------------------------------------------------------------------


def test_tiles_are_diffusers_own_and_named_where_they_are_used(
    tmp_path: Path, sd_base: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = inspect_base(str(sd_base()))
    pipe = sample.pipeline(str(sd_base()), how=How(tiling=True))
    tile = pipe.vae.tile_sample_min_size
    latents = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    plain = bases.load_vae(base)
    whole = bases.decode_latents(plain, latents)
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 16
    plain.tile_sample_min_size, plain.tile_latent_min_size = 64, 16
    plain.enable_tiling()
    found = sample.decode(pipe, latents)
    torch.testing.assert_close(found, bases.decode_latents(plain, latents).clamp(-1, 1))
    assert relative(found, whole.clamp(-1, 1)) > 1e-3  # and it is not exact, as is said
    How(tiling=True).say(pipe.vae, 96, 64)
    assert "decoded in tiles of 64 pixels, which is not exact" in capsys.readouterr().err
    How(tiling=True).say(pipe.vae, 64, 64)
    assert "tiling changes nothing: pictures of 64 x 64 pixels" in capsys.readouterr().err
    assert tile == plain.config.sample_size


def test_compiling_needs_a_compiler(sd_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"^compile needs a C\+\+ compiler, and there is none"):
        sample.pipeline(str(sd_base()), how=How(compile=True))
    assert sample.pipeline(str(sd_base())).unet._compiled_call_impl is None


# -- Evaluations ---------------------------------------------------------------------------------------------


def look() -> FeatureExtractor:
    return FeatureExtractor(None, None, None, {"mean": lambda pixels: pixels.mean((1, 2, 3))})


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_keep_their_places_where_memory_runs_out(
    sd_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Of two processes one halves its batches: each still gives one table for each batch of the plan."""
    pipe, cell = sample.pipeline(str(sd_base())), Cell("plain", None, "ddim", 1, 1.0)
    samples = drawing.Samples(tuple("abcdefg"), 1, 0, 64, 4, 7, keep_all=True)
    share = Share(rank, 2)

    def rows() -> list[dict[str, Tensor]]:
        batches = Batches.of_pictures(samples.batch_size, 64, 64, "cpu")
        return drawing.draw(pipe, cell, samples, look(), share, batches, lambda calls: None)

    whole, real = rows(), sample.latents

    def latents(pipe: Any, prompts: Sequence[str], **settings: Any) -> Tensor:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. ")
        return real(pipe, prompts, **settings)

    monkeypatch.setattr(sample, "latents", latents)
    parts = rows()
    assert (
        [len(table["latents"]) for table in parts] == [len(table["latents"]) for table in whole] == [4 - rank]
    )
    for name in ("latents", "mean"):
        torch.testing.assert_close(parts[0][name], whole[0][name], rtol=0, atol=2e-5)
    assert (parts[0]["pictures"].int() - whole[0]["pictures"].int()).abs().max() <= 1
    assert (parts[0]["seconds"] > 0).all()
