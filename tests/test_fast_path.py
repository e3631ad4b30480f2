"""Our forward of LoRA layers is peft's, its gradient and what is saved; it asks the device for less."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcm_kit.adapter import fast_blocks, fast_math
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.fast_math import Pair
from lcm_kit.adapter.trained_weights import swapped, update_ema
from lcm_kit.bench.counted import Kernels, kept_for_backward
from lcm_kit.bench.models import Base, cached
from lcm_kit.config.evaluation import Speed
from lcm_kit.config.schema import Adapter
from lcm_kit.core.flat import alike, clip_grad_norm_, flattened, whole

CPU = torch.device("cpu")
RANK = 4


def speed(structure: str, **keys: Any) -> Speed:
    small = {"width": 1.0 if structure == "tiny" else 0.125, "resolution": 64, "batch_size": 2}
    return Speed(recipe="evaluation/speed", structure=structure, precision="float32", **{**small, **keys})


def moved(parameters: list[nn.Parameter], size: float = 0.05) -> None:
    """B is zero at first, and most of a gradient with it."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(size * torch.randn(p.shape, generator=g))


class Trained:
    """A UNet with a LoRA, by peft's way or ours, and one batch for it."""

    def __init__(
        self, fast: bool, structure: str = "tiny", *, alpha: float = RANK, targets: Any = "lcm",
        style: bool = False, channels_last: bool = False, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        config = speed(structure)
        unet = nn.Module.to(Base(config, CPU).unet(), dtype)
        torch.manual_seed(3)
        self.latents, self.condition = cached(config)
        if channels_last:
            unet.to(memory_format=torch.channels_last)
        self.dtype, self.adapted = dtype, AdaptedUNet(unet)
        if style:
            g = torch.Generator().manual_seed(2)
            names = [n for n, m in unet.named_modules() if n.endswith(("to_q", "to_out.0"))][::2]
            widths = [unet.get_submodule(n).weight.shape for n in names]
            self.adapted.add_teacher_lora(
                {
                    n: (0.1 * torch.randn(3, i, generator=g), 0.1 * torch.randn(o, 3, generator=g), 6.0)
                    for n, (o, i) in zip(names, widths, strict=True)
                },
                in_student=True,
            )
        self.lora = self.adapted.add_lora(Adapter(RANK, alpha, targets=targets), seed=5)
        moved(self.lora)
        if fast:
            assert self.adapted.make_fast()

    def __call__(self, t: int = 500) -> Tensor:
        kwargs = self.condition.to(CPU, self.dtype).kwargs()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32 and not self.fast):
            return self.adapted.unet(
                self.latents.to(self.dtype), torch.tensor([t, 7]), **kwargs
            ).sample.float()

    @property
    def fast(self) -> bool:
        return self.adapted._fast is not None

    def gradient(self) -> Tensor:
        self().square().mean().backward()
        found = torch.cat([p.grad.flatten() for p in self.lora if p.grad is not None])
        for p in self.lora:
            p.grad = None
        return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- The same as peft ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"structure": "sd1"}, {"structure": "sdxl"}, {"alpha": 1.0}, {"targets": "attention"},
        {"style": True}, {"channels_last": True},
    ],
    ids=str,
)  # fmt: skip
def test_output_and_gradient_are_those_of_peft(keys: dict[str, Any]) -> None:
    ours, pefts = Trained(True, **keys), Trained(False, **keys)
    assert torch.equal(*(torch.cat([p.detach().flatten() for p in each.lora]) for each in (ours, pefts)))
    expected = pefts().detach()
    assert apart(ours().detach(), expected) < 2e-6
    assert apart(ours.gradient(), pefts.gradient()) < 2e-6
    with ours.adapted.teacher(), pefts.adapted.teacher(), torch.no_grad():
        assert apart(ours(), pefts()) < 2e-6
        assert apart(ours(), expected) > 1e-3  # what is compared is not the base
    with ours.adapted.teacher(styled=False), torch.no_grad():
        bare = ours()
        assert apart(bare, Base(speed(keys.get("structure", "tiny")), CPU).unet()(
            ours.latents, torch.tensor([500, 7]), **ours.condition.kwargs()
        ).sample) < 2e-6  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_near_to_float32_as_peft_under_autocast(dtype: torch.dtype) -> None:
    truth = Trained(False)
    expected = truth.gradient()
    ours, pefts = (Trained(fast, dtype=dtype) for fast in (True, False))
    found = ours.gradient()
    assert found.dtype == torch.float32
    assert apart(found, expected) < 1.5 * apart(pefts.gradient(), expected) < 0.2


def test_checkpointed_and_split_passes_give_the_same_gradient() -> None:
    plain, again = Trained(True, "sd1"), Trained(True, "sd1")
    again.adapted.unet.enable_gradient_checkpointing()
    expected = plain.gradient()
    assert apart(again.gradient(), expected) < 1e-6
    for _ in range(2):  # of two micro-batches the second is added
        (0.5 * again().square().mean()).backward()
    assert apart(torch.cat([p.grad.flatten() for p in again.lora]), expected) < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_may_lie_between_a_forward_and_its_backward(checkpointing: bool) -> None:
    """Two forwards before one backward, as prior preservation has it, about one text, and others without.

    Checkpointing computes the first pass's blocks again after all of them.
    """
    ours, pefts = Trained(True), Trained(False)
    found = []
    for each in (ours, pefts):
        if checkpointing:
            each.adapted.unet.enable_gradient_checkpointing()
        losses = [each(500).square().mean(), each(300).square().mean()]
        with torch.no_grad(), each.adapted.teacher():
            bare = each()
        with torch.no_grad(), swapped(each.lora, [p.detach() * 2 for p in each.lora]):
            twice = each()
        (losses[0] + 2 * losses[1]).backward()
        found.append((torch.cat([p.grad.flatten() for p in each.lora]), bare, twice))
    assert all(apart(a, b) < 3e-6 for a, b in zip(*found, strict=True))
    shared = ours.adapted._fast._shared
    assert len(shared) == 2 and not any(each.passes for each in shared)  # nothing is kept


def test_a_pass_that_fails_or_has_no_backward_keeps_nothing_for_long() -> None:
    ours = Trained(True)
    with pytest.raises(RuntimeError):
        ours.adapted.unet(ours.latents, torch.tensor([1, 2]), ours.condition.embeds[..., :-1])
    assert not any(each.passes for each in ours.adapted._fast._shared)
    for _ in range(20):
        ours()
    assert {len(each.passes) for each in ours.adapted._fast._shared} == {fast_blocks._MOST_PASSES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_seen_as_they_are_at_each_pass(dtype: torch.dtype) -> None:
    """Those that an optimizer moved, that were loaded, given other storage, or swapped for an average."""

    def of(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The output and the gradient of a UNet that never had other weights."""
        fresh = Trained(True, dtype=dtype)
        fresh.adapted.load_state(state)
        return fresh().detach(), fresh.gradient()

    ours = Trained(True, dtype=dtype)
    first, start = ours().detach(), ours.adapted.state()
    moved(ours.lora)
    state = ours.adapted.state()
    output, gradient = of(state)
    assert torch.equal(ours().detach(), output) and torch.equal(ours.gradient(), gradient)
    assert apart(output, first) > 1e-3
    with torch.no_grad(), swapped(ours.lora, [p.detach() * 2 for p in ours.lora]):
        twice = ours()
    # without gradient float32 weights are merged, which rounds otherwise
    assert apart(twice, of({key: 2 * value for key, value in state.items()})[0]) < 1e-5
    assert torch.equal(ours().detach(), output)
    for p in ours.lora:
        p.data = p.data * 2  # no view of the buffer any more
    assert apart(ours().detach(), twice) < 1e-5
    ours.adapted.load_state(start)
    assert torch.equal(ours().detach(), first)
    assert torch.equal(ours.gradient(), of(start)[1])


def test_peft_merges_and_unmerges_a_fast_layer_and_saves_the_same_state() -> None:
    ours, pefts = Trained(True), Trained(False)
    expected = ours().detach()
    for layer in ours.adapted._layers:
        layer.merge()
    with torch.no_grad():
        assert apart(ours(), expected) < 1e-5
    for layer in ours.adapted._layers:
        layer.unmerge()
    with torch.no_grad():
        assert apart(ours(), expected) < 1e-5
    a, b = ours.adapted.state(), pefts.adapted.state()
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_a_unet_under_autocast_or_asked_for_more_goes_the_way_of_peft() -> None:
    ours, pefts = Trained(True), Trained(False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert apart(ours(), pefts()) < 1e-6
    mask = torch.ones(2, ours.condition.embeds.shape[1])
    mask[:, 5:] = 0
    with torch.no_grad():
        found, expected = (
            each.adapted.unet(
                each.latents, torch.tensor([500, 7]), encoder_attention_mask=mask, **each.condition.kwargs()
            ).sample
            for each in (ours, pefts)
        )
        assert apart(found, expected) < 2e-6 and apart(found, ours()) > 1e-6


def test_times_and_sizes_are_not_rounded_and_text_may_be_float32() -> None:
    """999.25 is 1000 in bfloat16, and a picture 1023 wide 1024."""
    ours = Trained(True, "sdxl", dtype=torch.bfloat16)
    seen: dict[str, Tensor] = {}
    for name in ("time_proj", "add_time_proj"):
        getattr(ours.adapted.unet, name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    kwargs = ours.condition.kwargs()
    sizes = torch.tensor([[1023.0, 999, 0, 0, 1023, 999]]).repeat(2, 1)
    kwargs["added_cond_kwargs"]["time_ids"] = sizes
    t = torch.tensor([999.25, 7.5])
    with torch.no_grad():
        by_name = ours.adapted.unet(sample=ours.latents, timestep=t, **kwargs).sample
        assert torch.equal(seen["time_proj"], t) and torch.equal(seen["add_time_proj"], sizes.flatten())
        assert by_name.dtype == torch.bfloat16
        assert torch.equal(ours.adapted.unet(ours.latents.to(ours.dtype), t, **kwargs).sample, by_name)


def test_own_weights_keep_their_way_and_loras_come_before() -> None:
    adapted = AdaptedUNet(Base(speed("tiny"), CPU).unet())
    assert not adapted.make_fast()  # there is none
    adapted.train_own_weights()
    adapted.add_lora(Adapter(RANK, RANK), name="critic")
    assert not adapted.make_fast()
    ours = Trained(True)
    assert ours.adapted.make_fast()  # twice is once
    with pytest.raises(ValueError, match="before `make_fast`"):
        ours.adapted.add_lora(Adapter(RANK, RANK), name="critic")


# -- The pieces, by definition -------------------------------------------------------------------------------


def pairs(n_units: int, n: int, out: int, width: int, scale: float) -> Pair:
    g = torch.Generator().manual_seed(n_units)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    return Pair(random(n_units * n * 3, width), [random(n, out + k, 3) for k in range(n_units)], scale)


@pytest.mark.parametrize(("units", "n", "scale"), [(1, 1, 1.0), (1, 3, 0.5), (3, 1, 2.0), (2, 2, 0.25)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_and_their_gradients_by_finite_differences(
    units: int, n: int, scale: float, bias: bool
) -> None:
    """float64; the plain expression that torch.compile is shown has the same value."""
    pair = pairs(units, n, 4, 5, scale)
    total = sum(up.shape[0] * up.shape[1] for up in pair.ups)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=g, dtype=torch.float64).requires_grad_()
    w = torch.randn(total, 5, generator=g, dtype=torch.float64)
    b = torch.randn(total, generator=g, dtype=torch.float64) if bias else None

    def linear(x: Tensor, down: Tensor, *ups: Tensor) -> Tensor:
        return fast_math.linear(x, w, b, Pair(down, ups, scale))

    def added(x: Tensor, down: Tensor, *ups: Tensor) -> Tensor:
        return fast_math.added(nn.functional.linear(x, w, b), x, Pair(down, ups, scale))

    expected = nn.functional.linear(x, w, b)
    ups = [up for unit in pair.ups for up in unit]
    expected = expected + scale * torch.cat(
        [x @ pair.down[3 * k : 3 * k + 3].t() @ up.t() for k, up in enumerate(ups)], -1
    )
    for form in (linear, added):
        torch.testing.assert_close(form(x, pair.down, *pair.ups), expected)
        assert torch.autograd.gradcheck(form, (x, pair.down, *pair.ups))
    plain = nn.functional.linear(x, w, b) + fast_math._plain(x, pair)
    torch.testing.assert_close(plain, expected)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_and_their_gradients_by_finite_differences(kernel: int, channels_last: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, down = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((2, 4, 5, 6), (3, 4, kernel, kernel), (2, 4, kernel, kernel))
    )
    up = torch.randn(1, 3, 2, generator=g, dtype=torch.float64)
    geometry = [2, 1], [kernel // 2] * 2, [1, 1]
    if channels_last:
        x, w, down = (t.to(memory_format=torch.channels_last) for t in (x, w, down))

    def form(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return fast_math.convolution(x, w, None, geometry, Pair(down, [up], 0.5))

    expected = nn.functional.conv2d(x, w + 0.5 * torch.einsum("or,rihw->oihw", up[0], down), None, *geometry)
    torch.testing.assert_close(form(x, down, up), expected)
    assert torch.autograd.gradcheck(form, [t.requires_grad_() for t in (x, down, up)])


@pytest.mark.parametrize("n", [1, 3])
def test_merged_weights_are_those_of_the_layers_and_used_where_they_pay(n: int) -> None:
    pair, g = pairs(1, n, 4, 5, 0.5), torch.Generator().manual_seed(0)
    w = torch.randn(n * 4, 5, generator=g, dtype=torch.float64)
    x = torch.randn(7, 5, generator=g, dtype=torch.float64)
    torch.testing.assert_close(
        nn.functional.linear(x, fast_math.merged(w, pair)), fast_math.linear(x, w, None, pair)
    )
    full = w.float()
    with torch.no_grad():  # 5 x 4 weights a layer: 20 < 9 rows from the third on
        assert [fast_math.merging_pays(rows, full, pair) for rows in (2, 3)] == [False, True]
        assert not fast_math.merging_pays(3, full.half(), pair)
        assert not fast_math.merging_pays(3, full, pair._replace(ups=[*pair.ups, *pair.ups]))
    assert not fast_math.merging_pays(3, full, pair)  # there is a backward to come


@pytest.mark.parametrize("channels_last", [False, True])
def test_merged_convolutions_are_those_of_the_layers(channels_last: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, down = (torch.randn(s, generator=g) for s in ((2, 4, 9, 9), (6, 4, 3, 3), (2, 4, 3, 3)))
    if channels_last:
        w, down = (t.to(memory_format=torch.channels_last) for t in (w, down))
    pair, geometry = Pair(down, [torch.randn(1, 6, 2, generator=g)], 0.5), ([2, 2], [1, 1], [1, 1])
    torch.testing.assert_close(
        nn.functional.conv2d(x, fast_math.merged(w, pair), None, *geometry),
        fast_math.convolution(x, w, None, geometry, pair), rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_gated_units_and_times_are_those_of_diffusers() -> None:
    from diffusers.models.embeddings import Timesteps

    y = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fast_blocks._Gated.apply, (y,))
    hidden, gate = y.chunk(2, -1)
    torch.testing.assert_close(fast_blocks._Gated.apply(y), hidden * nn.functional.gelu(gate))
    for flipped, shift in ((True, 0), (False, 1)):
        before = Timesteps(32, flipped, shift)
        for t in (torch.arange(1000), torch.tensor([0.5, 999.25])):
            assert torch.equal(fast_blocks._Times(before, CPU)(t), before(t))


# -- One buffer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_gradients_lie_in_one(dtype: torch.dtype, channels_last: bool) -> None:
    ours = Trained(True, dtype=dtype, channels_last=channels_last)
    total = sum(p.numel() for p in ours.lora)
    ours().square().mean().backward()
    for parts in (ours.lora, [p.grad for p in ours.lora]):
        one = whole([part.detach() for part in parts])
        assert one is not None and len(one) == total and one.dtype == torch.float32
    assert all(p.grad.stride() == p.stride() for p in ours.lora)

    # an average, the norm and clipping, beside what is done one by one
    average, loose = flattened(ours.lora), [p.detach().clone() for p in ours.lora]
    assert whole(average) is not None and len(alike(average, ours.lora)[0]) == 1
    moved(ours.lora)
    for each in (average, loose):
        update_ema(each, ours.lora, 0.9)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(average, loose, strict=True))
    norm = torch.cat([p.grad.flatten() for p in ours.lora]).double().norm()
    before = [p.grad.clone() for p in ours.lora]
    assert float(clip_grad_norm_(ours.lora, float(norm) / 2)) == pytest.approx(float(norm), rel=1e-5)
    for p, was in zip(ours.lora, before, strict=True):
        torch.testing.assert_close(p.grad, was / 2, rtol=1e-4, atol=0)


def test_what_does_not_lie_in_one_is_told_from_what_does() -> None:
    one = torch.arange(12.0)
    a, b, c = one[:4].view(2, 2), one[4:6], one[6:]
    assert torch.equal(whole([a, b, c]), one) and torch.equal(whole([c, a, b]), one)
    assert whole([c, a, b], in_order=True) is None and whole([a, b], in_order=True).tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]
    assert whole([a, c]) is None  # a gap
    assert whole([a, torch.zeros(2), c]) is None  # another storage
    assert whole([a.t(), b, c]) is None  # not in the order of memory
    assert whole([]) is None
    shifted = flattened([c, a, b])
    assert all(torch.equal(x, y) for x, y in zip(shifted, (c, a, b), strict=True))
    assert len(alike(shifted, [c, a, b])[0]) == 1 and len(alike(shifted, [a, b, c][::-1])[0]) == 3


# -- Less for the device -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def both(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[bool, dict[str, int]]]]:
    found: dict[bool, dict[str, int]] = {}
    for fast in (True, False):
        trained = Trained(fast, request.param, dtype=torch.bfloat16)
        frozen = [p for p in trained.adapted.unet.parameters()]
        with kept_for_backward(frozen) as kept:
            trained()
        with Kernels() as kernels:
            trained().square().mean().backward()
        found[fast] = {"kernels": kernels.found.total(), "kept": sum(kept.values())}
    yield request.param, found


def test_a_pass_has_less_than_half_the_kernels_and_keeps_less(
    both: tuple[str, dict[bool, dict[str, int]]],
) -> None:
    structure, found = both
    assert found[True]["kernels"] < (2400 if structure == "sd1" else 6300)
    assert found[True]["kernels"] < 0.45 * found[False]["kernels"]
    assert found[True]["kept"] < 0.75 * found[False]["kept"]


def test_layers_of_other_kinds_keep_pefts_forward() -> None:
    unet = Base(speed("tiny"), CPU).unet()
    adapted = AdaptedUNet(unet)
    adapted.add_lora(Adapter(RANK, RANK))
    layer = next(m for n, m in unet.named_modules() if n.endswith("to_q"))
    layer.lora_dropout["adapter"] = nn.Dropout(0.5)
    before = copy.copy(type(layer))
    assert adapted.make_fast()
    assert type(layer) is before and adapted._fast.slow == [layer]
    x = torch.randn(2, 3, layer.in_features)
    assert torch.equal(layer.eval()(x), layer.base_layer(x))  # B is zero
