"""How the UNet is held and run. What bitsandbytes does is measured against the full weights."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.folder import save_adapter
from lcm_kit.bases import inspect_base, load_unet, memory
from lcm_kit.bases.memory import make_optimizer, place, quantizable
from lcm_kit.config.schema import Adapter, Distill, Memory, Optimizer
from lcm_kit.errors import UserError
from lcm_kit.lora.provenance import Base, Provenance
from tests.runs import load_adapter

CPU = torch.device("cpu")
# The bases of tests/bases.py are 8 to 32 wide; nf4's blocks of 64 values want wider rows
WIDE = {
    "sample_size": 8, "norm_num_groups": 8, "cross_attention_dim": 64, "attention_head_dim": 4,
    "block_out_channels": (64, 128), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SMALL = {**WIDE, "block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",),
         "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None}  # fmt: skip
SMALLEST = {**SMALL, "up_block_types": ("UpBlock2D",)}  # one transformer block, not three: dynamo takes long


def config(checkpointing: bool = False, **more: Any) -> Distill:
    return Distill("train/distill", "run", gradient_checkpointing=checkpointing, memory=Memory(**more))


def network(shape: dict[str, Any] = WIDE) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**shape).eval().requires_grad_(False)


def held(**more: Any) -> Any:
    return place(network(), config(**more), CPU)


def inputs(batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(batch, 4, 8, 8, generator=g), torch.randn(batch, 5, 64, generator=g)
    return x, torch.randint(1000, (batch,), generator=g), text


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def linear_layers(unet: Any) -> dict[str, Any]:
    return {name: m for name, m in unet.named_modules() if isinstance(m, nn.Linear)}


def nbytes(layer: Any) -> int:
    """Of a layer's weight, with whatever is needed to read it."""
    held = [layer.weight.data]
    if state := getattr(layer.weight, "quant_state", None):  # nf4: the blocks' scales, their scales, a table
        held += [state.absmax, state.state2.absmax, state.state2.code, state.code, state.offset]
    if state := getattr(layer, "state", None):
        assert state.CB.data_ptr() == layer.weight.data_ptr()
        held += [state.SCB]
    return sum(t.numel() * t.element_size() for t in held)


def live_bytes() -> int:
    """Of every tensor that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # torch.compile's stand-ins, which other tests may leave, have no data
        if isinstance(thing, Tensor) and not thing.is_meta and not isinstance(thing, FakeTensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# -- 4 and 8 bits --------------------------------------------------------------------------------------------

BITS = ["nf4", "int8"]


@pytest.fixture
def _bnb() -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantize`")


@pytest.mark.usefixtures("_bnb")
@pytest.mark.parametrize(("kind", "bound"), [("nf4", 0.12), ("int8", 0.005)])
def test_a_quantised_layer_is_near_the_full_one_and_so_is_its_gradient(kind: str, bound: float) -> None:
    """nf4's 16 levels leave 9% of normal weights, int8's 255 0.4%; both at least a tenth of that: rounded."""
    full, few = linear_layers(network()), linear_layers(held(quantize=kind))
    changed = 0
    for name, layer in full.items():
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
        for_full, for_few = (torch.autograd.grad(of[name](x).square().sum(), x)[0] for of in (full, few))
        off = relative(few[name](x), layer(x))
        if quantizable(name, layer):
            changed += 1
            assert bound / 10 < off < bound, name
            assert relative(for_few, for_full) < 2 * bound, name
        else:
            assert off == 0
    assert changed == len(full) - 2  # the time embedding's


@pytest.mark.usefixtures("_bnb")
@pytest.mark.parametrize(("kind", "bound"), [("nf4", 0.15), ("int8", 0.004)])
def test_of_a_trained_unet_the_output_hardly_moves(kind: str, bound: float) -> None:
    """asset:tiny-sd at four noise levels: 0.091 and 0.0022 were measured."""
    base = inspect_base("asset:tiny-sd")
    full, few = load_unet(base), memory.load_unet(base, config(quantize=kind), CPU, torch.float32)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, full.config.in_channels, 16, 16, generator=g)
    text = torch.randn(4, 24, 128, generator=g)
    t = torch.tensor([20, 300, 700, 980])
    with torch.no_grad():
        off = relative(few(x, t, text).sample, full(x, t, text).sample)
    assert bound / 10 < off < bound


@pytest.mark.usefixtures("_bnb")
@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.145), ("int8", 0.26)])
def test_linear_weights_take_a_share_of_their_memory(kind: str, share: float) -> None:
    """Bits a weight: nf4 4 + 8/64 and a table of 1 KiB a layer, int8 8 + 32 for each row; full 32."""
    full, few = network(), held(quantize=kind)
    names = [name for name, layer in linear_layers(full).items() if quantizable(name, layer)]
    before, after = (sum(nbytes(linear_layers(of)[name]) for name in names) for of in (full, few))
    tables = len(names) * 4 * 256 if kind == "nf4" else 0
    assert before / 10 < after - tables < share * before
    assert not [name for name, p in few.named_parameters() if p.requires_grad]


@pytest.mark.usefixtures("_bnb")
def test_quantising_leaves_no_full_weights_behind() -> None:
    unet = network()
    full = live_bytes()
    linear = sum(nbytes(m) for name, m in linear_layers(unet).items() if quantizable(name, m))
    place(unet, config(quantize="int8"), CPU)
    assert live_bytes() < full - 0.7 * linear


@pytest.mark.usefixtures("_bnb")
@pytest.mark.parametrize("kind", BITS)
def test_a_lora_on_few_bits_trains_alone_and_is_the_base_when_off(kind: str, tmp_path: Path) -> None:
    unet = held(quantize=kind)
    x, t, text = inputs()
    with torch.no_grad():
        base = unet(x, t, text).sample
    adapted = AdaptedUNet(unet)
    lora = adapted.add_lora(Adapter(rank=4, alpha=4.0))
    name = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    assert {type(layer).__name__ for layer in layers} == {"Conv2d", name}
    assert all(p.dtype == torch.float32 for p in lora)
    frozen = {name: p.detach().clone() for name, p in unet.named_parameters() if not p.requires_grad}
    aim, losses = torch.randn(base.shape, generator=torch.Generator().manual_seed(2)), []
    optimizer = make_optimizer(lora, Optimizer(lr=1e-2), CPU)
    for _ in range(3):
        loss = (unet(x, t, text).sample - aim).square().mean()
        loss.backward()
        optimizer.step()
        assert {n for n, p in unet.named_parameters() if p.grad is not None} == {
            n for n, p in unet.named_parameters() if ".lora_" in n
        }
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0] - 0.01
    assert all(torch.equal(p, frozen[n]) for n, p in unet.named_parameters() if n in frozen)
    with torch.no_grad():
        student = unet(x, t, text).sample
        with adapted.teacher():
            assert torch.equal(unet(x, t, text).sample, base)
        assert relative(student, base) > 0.01

        save_adapter(tmp_path / "adapter", adapted, Provenance(base=Base("a base", "abc"), steps=1))
        again = held(quantize=kind)
        load_adapter(tmp_path / "adapter", again)
        assert torch.equal(again(x, t, text).sample, student)
        full = network()  # what it is exported for; the keys are those of a LoRA that saw no quantisation
        assert load_adapter(tmp_path / "adapter", full).state().keys() == adapted.state().keys()
        assert relative(full(x, t, text).sample, student) < {"nf4": 0.1, "int8": 0.01}[kind]


@pytest.mark.usefixtures("_bnb")
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("of", ["sd_base", "real_sd_base", "ssd1b_base"])  # the last: SDXL, of fewer blocks
def test_the_families_bases_train_in_few_bits_with_checkpointing(
    kind: str, of: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(of)
    base = inspect_base(str(found() if callable(found) else found))
    unet = memory.load_unet(base, config(True, quantize=kind, channels_last=True), CPU, torch.float32)
    assert unet.is_gradient_checkpointing and not unet.training
    lora = AdaptedUNet(unet).add_lora(Adapter(rank=2, alpha=2.0))
    more: dict[str, Any] = {}
    if base.family.name == "sdxl":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        more["added_cond_kwargs"] = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.ones(1, 6)}
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 24, unet.config.cross_attention_dim)
    unet(x, torch.tensor([500]), text, **more).sample.square().mean().backward()
    grads = [p.grad for p in lora if p.grad is not None]
    assert len(grads) == len(lora) and all(g.isfinite().all() for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0


def test_which_modules_are_quantised() -> None:
    assert quantizable("down_blocks.0.attentions.0.proj_in", nn.Linear(64, 128))
    assert quantizable("down_blocks.0.resnets.0.time_emb_proj", nn.Linear(128, 64))
    assert not quantizable("time_embedding.linear_1", nn.Linear(64, 128))
    assert not quantizable("add_embedding.linear_2", nn.Linear(128, 128))
    assert not quantizable("down_blocks.0.attentions.0.proj_in", nn.Linear(24, 64))
    assert not quantizable("down_blocks.0.attentions.0.proj_in", nn.Linear(64, 24))
    assert not quantizable("conv_in", nn.Conv2d(16, 16, 1))


# -- Refusals ------------------------------------------------------------------------------------------------


def test_without_bitsandbytes_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    weight = nn.Parameter(torch.zeros(4))
    for kind in BITS:
        with pytest.raises(UserError) as caught:
            held(quantize=kind)
        assert str(caught.value) == (
            f"memory.quantize {kind} needs bitsandbytes; pip install 'lcm-kit[quantize]'"
        )
    with pytest.raises(UserError) as caught:
        make_optimizer([weight], Optimizer(name="adamw8bit"), CPU)
    assert str(caught.value) == (
        "optimizer.name adamw8bit needs bitsandbytes; pip install 'lcm-kit[quantize]'"
    )
    assert held().conv_in.weight.dtype == torch.float32  # who does not ask does not need it


UNASKED = """
import sys
from importlib.machinery import PathFinder

import torch
from lcm_kit.bases import memory
from lcm_kit.config.schema import Adapter, Distill, Optimizer

cpu, weight = torch.device("cpu"), torch.nn.Parameter(torch.ones(4))
memory.make_optimizer([weight], Optimizer(), cpu)
assert "bitsandbytes" not in sys.modules, "imported by lcm_kit.bases.memory"

# diffusers' UNet imports it where it is installed, whoever asks; so go on as where it is not
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "bitsandbytes" else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.bases import inspect_base

unet = memory.load_unet(inspect_base("asset:tiny-sd"), Distill("train/distill", "run"), cpu, torch.float32)
lora = AdaptedUNet(unet).add_lora(Adapter(rank=2, alpha=2.0))
optimizer = memory.make_optimizer(lora, Optimizer(), cpu)
noise = torch.randn(1, unet.config.in_channels, 16, 16)
unet(noise, torch.tensor([500]), torch.randn(1, 24, 128)).sample.mean().backward()
before = sum(p.detach().abs().sum().item() for p in lora)
optimizer.step()
assert sum(p.detach().abs().sum().item() for p in lora) != before
assert "bitsandbytes" not in sys.modules, "found although it was hidden"
print("done without")
"""


@pytest.mark.slow  # a process that imports torch anew
@pytest.mark.usefixtures("_bnb")
def test_who_does_not_ask_for_bitsandbytes_does_not_load_it_and_trains_without_it() -> None:
    """It is installed here: `lcm_kit.bases.memory` leaves it alone, and a LoRA trains where it is hidden."""
    done = subprocess.run([sys.executable, "-c", UNASKED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done without\n"), done.stderr


@pytest.mark.usefixtures("_bnb")
def test_a_device_without_kernels_is_refused_before_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import bitsandbytes as bnb

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel for this device.\nmore lines")

    monkeypatch.setattr(memory.bases, "load_unet", missing)
    monkeypatch.setattr(bnb.functional, "quantize_4bit", missing)
    with pytest.raises(UserError, match=r"^memory.quantize nf4 does not work on this cpu device \(no kernel"):
        memory.load_unet(inspect_base("asset:tiny-sd"), config(quantize="nf4"), CPU, torch.float32)
    monkeypatch.setattr(bnb.functional, "quantize_4bit", lambda w, **_: (w, None))
    with pytest.raises(UserError, match="memory.quantize nf4 does not work on this cpu device"):
        held(quantize="nf4")
    monkeypatch.setattr(bnb.optim.AdamW8bit, "step", missing)
    with pytest.raises(UserError, match=r"adamw8bit does not work on this cpu device \(no kernel"):
        make_optimizer([nn.Parameter(torch.zeros(4))], Optimizer(name="adamw8bit"), CPU)
    monkeypatch.setattr(bnb.optim.AdamW8bit, "step", lambda _: None)
    with pytest.raises(UserError, match=r"\(a trial step is wrong\); set it to adamw"):
        make_optimizer([nn.Parameter(torch.zeros(4))], Optimizer(name="adamw8bit"), CPU)


@pytest.mark.parametrize(("factor", "passes"), [(1.24, True), (1.26, False), (-1.0, False)])
@pytest.mark.usefixtures("_bnb")
def test_a_kernel_that_gives_other_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch, factor: float, passes: bool
) -> None:
    """A quarter off is more than rounding to four bits may cost."""
    monkeypatch.setattr(memory, "_quantized", lambda layer, *_: lambda x: factor * layer(x))
    if passes:
        memory._probe_layer("nf4", CPU)
        return
    with pytest.raises(UserError, match=rf"a trial layer is off by {abs(factor - 1):.0%}\); set it to none"):
        memory._probe_layer("nf4", CPU)


@pytest.mark.usefixtures("_bnb")
def test_a_unet_with_nothing_to_quantise_is_refused() -> None:
    odd = {**SMALL, "block_out_channels": (24,), "cross_attention_dim": 20}
    with pytest.raises(UserError, match="no linear layer that is a multiple of 16 wide"):
        place(network(odd), config(quantize="nf4"), CPU)


# -- Optimizer -----------------------------------------------------------------------------------------------


def _steps(optimizer: torch.optim.Optimizer, weight: Tensor, steps: range) -> None:
    for step in steps:
        weight.grad = weight.detach() - torch.linspace(-1, 1, weight.numel()).view_as(weight) * (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def test_adamw_on_a_cpu_is_torchs_own() -> None:
    settings = Optimizer(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    ours, plain = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
    _steps(make_optimizer([ours], settings, CPU), ours, range(4))
    _steps(
        torch.optim.AdamW([plain], lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1), plain, range(4)
    )
    assert torch.equal(ours, plain)


def test_each_group_has_its_own_factor_of_the_rate() -> None:
    """As text encoders have, beside the UNet."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [first]}, {"params": [second], memory.LR_FACTOR: 0.25}]
    optimizer = make_optimizer(groups, Optimizer(lr=1e-2), CPU)
    memory.set_rates(optimizer, 4e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [4e-3, 1e-3]


def test_adamw_is_fused() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert make_optimizer([weight], Optimizer(), CPU).defaults["fused"]
    assert make_optimizer([weight], Optimizer(), torch.device("cuda")).defaults["fused"]


@pytest.mark.usefixtures("_bnb")
def test_adamw8bit_walks_with_adamw_on_a_quarter_of_its_memory_and_resumes_exactly() -> None:
    settings = Optimizer(name="adamw8bit", lr=1e-2, weight_decay=0.1)
    weights = [nn.Parameter(torch.ones(128, 64)) for _ in range(3)]
    eight, full = (
        make_optimizer(weights[:1], settings, CPU),
        torch.optim.AdamW(weights[1:2], lr=1e-2, weight_decay=0.1),
    )
    for optimizer, weight in ((eight, weights[0]), (full, weights[1])):
        _steps(optimizer, weight, range(5))
    moved = [weight.detach() - 1 for weight in weights[:2]]
    assert 0 < relative(*moved) < 0.05
    state = eight.state[weights[0]]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8

    resumed = make_optimizer(weights[2:], settings, CPU)
    weights[2].data.copy_(weights[0].data)
    resumed.load_state_dict(eight.state_dict())
    for optimizer, weight in ((eight, weights[0]), (resumed, weights[2])):
        _steps(optimizer, weight, range(5, 8))
    assert torch.equal(weights[0], weights[2])


# -- Placement -----------------------------------------------------------------------------------------------


def test_attention_is_scaled_dot_product_attention() -> None:
    kinds = {type(m.processor) for m in held().modules() if isinstance(m, Attention)}
    assert kinds == {AttnProcessor2_0}


def test_channels_last_changes_the_layout_and_not_the_numbers() -> None:
    plain, last = held(), held(channels_last=True)
    convolutions = [m.weight for m in last.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert convolutions and all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    x, t, text = inputs()
    with torch.no_grad():
        assert relative(last(x, t, text).sample, plain(x, t, text).sample) < 1e-5


def _tf32() -> tuple[bool, bool, str]:
    return (
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )  # fmt: skip


@pytest.fixture
def _tf32_restored() -> Iterator[None]:
    matmul, cudnn, _ = _tf32()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.mark.usefixtures("_tf32_restored")
def test_tf32_is_switched_for_cuda_alone() -> None:
    for start in (False, True):
        memory._allow_tf32(torch.device("cuda"), start)
        assert _tf32()[:2] == (start, start)
        before = _tf32()
        held(tf32=not start)
        assert _tf32() == before
