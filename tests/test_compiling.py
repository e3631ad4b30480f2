"""Blocks are compiled once for all of their kind, give what they gave, and stop at a limit of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.trained_weights import swapped
from lcm_kit.bases import compiling
from lcm_kit.bases.compiling import compile_blocks
from lcm_kit.bases.memory import make_optimizer, place
from lcm_kit.config.schema import Adapter, Optimizer
from lcm_kit.errors import UserError
from tests.test_memory import CPU, SMALL, config, held, inputs, network, relative

CUDA = torch.device("cuda")


@pytest.fixture
def _dynamo() -> Iterator[None]:
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def three_passes(adapted: AdaptedUNet, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher (LoRA off, both conditions at once), target, student: what train/distill does in a step."""
    x, t, text = inputs(seed=seed)
    with torch.no_grad(), adapted.teacher():
        aim = adapted.unet(x.repeat(2, 1, 1, 1), t.repeat(2), text.repeat(2, 1, 1)).sample
    lora = adapted.parameters()
    with torch.no_grad(), swapped(lora, lora):
        target = adapted.unet(x, t, text).sample
    return aim, target, adapted.unet(x, t, text).sample


def made(fast: bool, said: list[str], *, wanted: Any = True, backend: Any = "eager") -> list[int]:
    """Graphs made until the end of each of four steps, whose outputs are compared with uncompiled ones."""
    from torch._dynamo.utils import counters

    counters.clear()
    mine, plain = (AdaptedUNet(place(network(SMALL), config(), CPU)) for _ in range(2))
    lora, theirs = (each.add_lora(Adapter(rank=2, alpha=2.0)) for each in (mine, plain))
    if fast:
        assert mine.make_fast()
    compile_blocks(mine.unet, config(compile=wanted), said.append, backend=backend)
    optimizers = [make_optimizer(of, Optimizer(lr=1e-2), CPU) for of in (lora, theirs)]
    found = []
    for step in range(4):
        for_us, for_them = three_passes(mine, step), three_passes(plain, step)
        for ours, expected in zip(for_us, for_them, strict=True):
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
        for (aim, target, student), optimizer in zip((for_us, for_them), optimizers, strict=True):
            (student - aim[:2] - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step:  # the LoRA has left zero: teacher and student differ
            assert relative(for_us[2], for_us[0][:2]) > 1e-3
        found.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    return found


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("fast", [True, False])
def test_blocks_of_one_width_share_three_pieces_of_code(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three transformer blocks of one width, seen by teacher, target and student: three graphs, not nine."""
    monkeypatch.setattr(compiling, "SECONDS", 1e9)
    said: list[str] = []
    assert made(fast, said) == [3, 3, 3, 3]
    assert not said


@pytest.mark.usefixtures("_dynamo")
def test_after_the_limit_nothing_more_is_compiled_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "SECONDS", 0.0)
    said: list[str] = []
    assert made(True, said) == [1, 1, 1, 1]  # the teacher's, which had begun
    assert len(said) == 1 and "for 1 kinds of passes; going on with what is not compiled" in said[0]


@pytest.mark.usefixtures("_dynamo")
def test_a_compiler_that_fails_is_said_and_the_run_goes_on() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such device code")

    said: list[str] = []
    made(True, said, backend=broken)
    assert len(said) == 1 and said[0].startswith("memory.compile does not work here (")
    assert "no such device code" in said[0]


@pytest.mark.slow  # inductor and a C++ compiler
@pytest.mark.usefixtures("_dynamo")
def test_compiled_code_of_this_machine_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "SECONDS", 1e9)
    said: list[str] = []
    assert made(True, said, backend="inductor") == [3, 3, 3, 3]


def test_auto_compiles_on_a_gpu_that_can_and_for_long_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = network(SMALL)
    before = [module.forward for module in unet.modules()]

    def untouched(**keys: Any) -> bool:
        compile_blocks(unet, config(**keys), backend="eager")
        return all(m.forward == f for m, f in zip(unet.modules(), before, strict=True))

    assert untouched(compile="auto") and untouched(compile=False) and untouched()
    monkeypatch.setattr(compiling, "_missing", lambda device: None)
    long, short = (replace(config(compile="auto"), steps=steps) for steps in (1000, 999))
    assert compiling.wants(long, CUDA) and not compiling.wants(short, CUDA) and not compiling.wants(long, CPU)
    assert compiling.wants(replace(config(compile=True), steps=1), CPU)
    monkeypatch.setattr(compiling, "_missing", lambda device: "Triton")
    assert not compiling.wants(long, CUDA)


def test_no_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"memory.compile needs a C\+\+ compiler, .* install g\+\+"):
        compile_blocks(held(), config(compile=True))
