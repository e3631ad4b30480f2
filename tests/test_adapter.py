"""The adapter: one UNet is bitwise its base with the LoRA off, and comes back as it was whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_kit import adapter, families
from lcm_kit.config.schema import Adapter
from lcm_kit.errors import UserError
from lcm_kit.provenance import Base, Provenance

CONFIG = Adapter(rank=4, alpha=8.0)


def load(sd_base: Callable[..., Path], dtype: torch.dtype = torch.float32) -> Any:
    return families.load_unet(families.inspect_base(str(sd_base())), dtype)


def trained(unet: Any, seed: int = 0) -> list[torch.nn.Parameter]:
    """A LoRA that changes the output: B is not zero."""
    parameters = adapter.add_lora(unet, CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return parameters


def output(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, embeds = (torch.randn(s, generator=generator) for s in ((2, 4, 16, 16), (2, 24, 32)))
    return unet(x.to(unet.dtype), torch.tensor([19, 999]), embeds.to(unet.dtype)).sample


@torch.no_grad()
def test_teacher_is_bitwise_the_base_and_the_student_comes_back(sd_base: Callable[..., Path]) -> None:
    unet = load(sd_base)
    base = output(unet)
    adapter.add_lora(unet, CONFIG)
    assert torch.equal(output(unet), base)  # B is zero
    for p in (p for p in unet.parameters() if p.requires_grad):
        p.fill_(0.05)
    student = output(unet)
    assert (student - base).abs().max() > 1e-2
    with adapter.teacher(unet):
        assert torch.equal(output(unet), base)
        with adapter.teacher(unet):  # nested: the inner block must not turn the adapter on
            pass
        assert torch.equal(output(unet), base)
    assert torch.equal(output(unet), student)


@torch.no_grad()
def test_adapter_is_not_left_off_after_an_exception(sd_base: Callable[..., Path]) -> None:
    unet = load(sd_base)
    trained(unet)
    student = output(unet)
    with pytest.raises(RuntimeError, match="boom"), adapter.teacher(unet):
        raise RuntimeError("boom")
    assert torch.equal(output(unet), student)


def test_teacher_pass_changes_no_state(sd_base: Callable[..., Path]) -> None:
    unet = load(sd_base)
    trained(unet)
    unet.train()

    def snapshot() -> list[Any]:
        modes = [(name, m.training) for name, m in unet.named_modules()]
        grads = [(name, p.requires_grad, p.grad, p._version) for name, p in unet.named_parameters()]
        flags = [layer._disable_adapters for layer in unet._lora_layers]
        return [modes, grads, flags, torch.random.get_rng_state().tolist()]

    before = snapshot()
    with torch.no_grad(), adapter.teacher(unet):
        output(unet)
    assert snapshot() == before


def test_lora_is_float32_and_alone_trained_on_a_bfloat16_base(sd_base: Callable[..., Path]) -> None:
    unet = load(sd_base, torch.bfloat16)
    state = torch.random.get_rng_state()
    parameters = adapter.add_lora(unet, CONFIG, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert len(named) == len(parameters) == 2 * len(unet._lora_layers) > 40
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in named.items())
    rest = [p for name, p in unet.named_parameters() if name not in named]
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
        unet = load(sd_base)
        torch.manual_seed(99 + len(states))  # must not matter
        adapter.add_lora(unet, CONFIG, seed=seed)
        states.append(adapter.lora_state(unet))
    a_keys = [key for key in states[0] if "lora_A" in key]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not any(torch.equal(states[0][key], states[2][key]) for key in a_keys)


def test_swapped_weights_come_back_and_autograd_does_not_notice(sd_base: Callable[..., Path]) -> None:
    unet = load(sd_base)
    live = trained(unet)
    average = [torch.zeros_like(p) for p in live]
    storages, versions = [p.data_ptr() for p in live], [p._version for p in live]
    student = output(unet)
    with torch.no_grad():
        with adapter.teacher(unet):
            base = output(unet)
        with adapter.swapped(live, average):
            assert (output(unet) - base).abs().max() < 1e-6  # all-zero LoRA
        with pytest.raises(RuntimeError, match="boom"), adapter.swapped(live, average):
            raise RuntimeError("boom")
    assert [p.data_ptr() for p in live] == storages
    assert [p._version for p in live] == versions
    student.sum().backward()  # would raise if a saved tensor had changed
    assert all(p.grad is not None for p in live)
    assert all(a.grad is None and not a.requires_grad for a in average)


def test_ema_is_the_weighted_mean() -> None:
    average, weights = [torch.full((3,), 2.0)], [torch.nn.Parameter(torch.full((3,), 4.0))]
    adapter.update_ema(average, weights, 0.75)
    assert torch.equal(average[0], torch.full((3,), 2.5))
    assert not average[0].requires_grad


@torch.no_grad()
def test_saved_adapter_loads_exactly(sd_base: Callable[..., Path], tmp_path: Path) -> None:
    unet = load(sd_base)
    trained(unet)
    adapter.save_adapter(tmp_path / "adapter", unet, Provenance(base=Base("a base", "abc"), steps=7))
    other = load(sd_base)
    facts = adapter.load_adapter(tmp_path / "adapter", other)
    assert facts.steps == 7
    assert (facts.lora_config["r"], facts.lora_config["lora_alpha"]) == (4, 8.0)
    assert facts.lora_config["target_modules"] == sorted(families.lora_targets("lcm"))
    assert torch.equal(output(other), output(unet))
    state = adapter.lora_state(unet)
    assert all(
        t.dtype == torch.float32 and key.endswith((".lora_A.weight", ".lora_B.weight"))
        for key, t in state.items()
    )
    first = next(iter(state))
    with pytest.raises(UserError, match="1 keys differ"):
        adapter.load_lora_state(unet, {key: t for key, t in state.items() if key != first})
    with pytest.raises(UserError, match=f"1 keys differ, such as {first}"):
        adapter.load_lora_state(unet, {**state, first: state[first][:1]})
    with pytest.raises(UserError, match="no trained adapter"):
        adapter.read_facts(tmp_path / "nowhere")


def test_attention_targets_adapt_attention_only(sd_base: Callable[..., Path]) -> None:
    unet = load(sd_base)
    adapter.add_lora(unet, Adapter(rank=2, alpha=2.0, targets="attention"))
    assert all(".to_" in key for key in adapter.lora_state(unet))
