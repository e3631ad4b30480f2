"""The adapter: one UNet is bitwise its base with the LoRA off, and comes back as it was whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_kit import bases
from lcm_kit.adapter import folder as adapter
from lcm_kit.adapter.adapted_unet import TRAINED, AdaptedUNet
from lcm_kit.adapter.folder import save_adapter
from lcm_kit.adapter.trained_weights import swapped, update_ema
from lcm_kit.config.schema import Adapter
from lcm_kit.errors import UserError
from lcm_kit.lora.provenance import Base, Provenance
from tests.runs import load_adapter

CONFIG = Adapter(rank=4, alpha=8.0)


def load(sd_base: Callable[..., Path], dtype: torch.dtype = torch.float32) -> AdaptedUNet:
    return AdaptedUNet(bases.load_unet(bases.inspect_base(str(sd_base())), dtype))


def trained(adapted: AdaptedUNet, seed: int = 0, name: str = TRAINED) -> list[torch.nn.Parameter]:
    """A LoRA that changes the output: B is not zero."""
    parameters = adapted.add_lora(CONFIG, name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return parameters


def output(adapted: AdaptedUNet) -> Tensor:
    unet, generator = adapted.unet, torch.Generator().manual_seed(3)
    x, embeds = (torch.randn(s, generator=generator) for s in ((2, 4, 16, 16), (2, 24, 32)))
    return unet(x.to(unet.dtype), torch.tensor([19, 999]), embeds.to(unet.dtype)).sample


def tuner_layers(adapted: AdaptedUNet) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in adapted.unet.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def test_teacher_is_bitwise_the_base_and_the_student_comes_back(sd_base: Callable[..., Path]) -> None:
    adapted = load(sd_base)
    base = output(adapted)
    adapted.add_lora(CONFIG)
    assert torch.equal(output(adapted), base)  # B is zero
    for p in (p for p in adapted.unet.parameters() if p.requires_grad):
        p.fill_(0.05)
    student = output(adapted)
    assert (student - base).abs().max() > 1e-2
    with adapted.teacher():
        assert torch.equal(output(adapted), base)
        with adapted.teacher():  # nested: the inner block must not turn the adapter on
            pass
        assert torch.equal(output(adapted), base)
    assert torch.equal(output(adapted), student)


@torch.no_grad()
def test_adapter_is_not_left_off_after_an_exception(sd_base: Callable[..., Path]) -> None:
    adapted = load(sd_base)
    trained(adapted)
    student = output(adapted)
    with pytest.raises(RuntimeError, match="boom"), adapted.teacher():
        raise RuntimeError("boom")
    assert torch.equal(output(adapted), student)


def test_teacher_pass_changes_no_state(sd_base: Callable[..., Path]) -> None:
    adapted = load(sd_base)
    trained(adapted)
    adapted.unet.train()

    def snapshot() -> list[Any]:
        modes = [(name, m.training) for name, m in adapted.unet.named_modules()]
        grads = [(name, p.requires_grad, p.grad, p._version) for name, p in adapted.unet.named_parameters()]
        flags = [layer._disable_adapters for layer in tuner_layers(adapted)]
        return [modes, grads, flags, torch.random.get_rng_state().tolist()]

    before = snapshot()
    with torch.no_grad(), adapted.teacher():
        output(adapted)
    assert snapshot() == before


def test_lora_is_float32_and_alone_trained_on_a_bfloat16_base(sd_base: Callable[..., Path]) -> None:
    adapted = load(sd_base, torch.bfloat16)
    state = torch.random.get_rng_state()
    parameters = adapted.add_lora(CONFIG, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    named = {name: p for name, p in adapted.unet.named_parameters() if p.requires_grad}
    assert len(named) == len(parameters) == 2 * len(tuner_layers(adapted)) > 40
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in named.items())
    rest = [p for name, p in adapted.unet.named_parameters() if name not in named]
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in rest)
    # An update far below bfloat16's resolution of these weights (2^-9 relative) must not be lost.
    p = next(p for p in parameters if p.abs().max() > 0.1)
    old = p.detach().clone()
    with torch.no_grad():
        p.add_(1e-5)
    assert (p - old - 1e-5).abs().max() < 1e-7


def test_initial_weights_are_a_function_of_the_seed(sd_base: Callable[..., Path]) -> None:
    states = []
    for seed in (0, 0, 1):
        adapted = load(sd_base)
        torch.manual_seed(99 + len(states))  # must not matter
        adapted.add_lora(CONFIG, seed=seed)
        states.append(adapted.state())
    a_keys = [key for key in states[0] if "lora_A" in key]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not any(torch.equal(states[0][key], states[2][key]) for key in a_keys)


def test_swapped_weights_come_back_and_autograd_does_not_notice(sd_base: Callable[..., Path]) -> None:
    adapted = load(sd_base)
    live = trained(adapted)
    average = [torch.zeros_like(p) for p in live]
    storages, versions = [p.data_ptr() for p in live], [p._version for p in live]
    student = output(adapted)
    with torch.no_grad():
        with adapted.teacher():
            base = output(adapted)
        with swapped(live, average):
            assert (output(adapted) - base).abs().max() < 1e-6  # all-zero LoRA
        with pytest.raises(RuntimeError, match="boom"), swapped(live, average):
            raise RuntimeError("boom")
    assert [p.data_ptr() for p in live] == storages
    assert [p._version for p in live] == versions
    student.sum().backward()  # would raise if a saved tensor had changed
    assert all(p.grad is not None for p in live)
    assert all(a.grad is None and not a.requires_grad for a in average)


def test_ema_is_the_weighted_mean() -> None:
    average, weights = [torch.full((3,), 2.0)], [torch.nn.Parameter(torch.full((3,), 4.0))]
    update_ema(average, weights, 0.75)
    assert torch.equal(average[0], torch.full((3,), 2.5))
    assert not average[0].requires_grad


@torch.no_grad()
def test_saved_adapter_loads_exactly(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    adapted = load(sd_base)
    trained(adapted)
    save_adapter(tmp_path / "adapter", adapted, Provenance(base=Base("a base", "abc"), steps=7))
    facts = adapter.read_provenance(tmp_path / "adapter")
    assert facts.steps == 7
    assert (facts.lora_config["r"], facts.lora_config["lora_alpha"]) == (4, 8.0)
    assert facts.lora_config["target_modules"] == sorted(bases.lora_targets("lcm"))
    assert torch.equal(output(load_adapter(tmp_path / "adapter", load(sd_base).unet)), output(adapted))
    state = adapted.state()
    assert all(
        t.dtype == torch.float32 and key.endswith((".lora_A.weight", ".lora_B.weight"))
        for key, t in state.items()
    )
    first = next(iter(state))
    with pytest.raises(UserError, match="1 keys differ"):
        adapted.load_state({key: t for key, t in state.items() if key != first})
    with pytest.raises(UserError, match=f"1 keys differ, such as {first}"):
        adapted.load_state({**state, first: state[first][:1]})
    with pytest.raises(UserError, match="no trained adapter"):
        adapter.read_provenance(tmp_path / "nowhere")


def test_attention_targets_adapt_attention_only(sd_base: Callable[..., Path]) -> None:
    adapted = load(sd_base)
    adapted.add_lora(Adapter(rank=2, alpha=2.0, targets="attention"))
    assert all(".to_" in key for key in adapted.state())
