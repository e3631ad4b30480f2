"""Several things are trained on one UNet, each by its own optimizer, as if each had a UNet of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_kit import bases
from lcm_kit.adapter.adapted_unet import AdaptedUNet, add_text_lora
from lcm_kit.adapter.trained_weights import update_ema
from lcm_kit.config.schema import Adapter, Checkpoint, Distill
from lcm_kit.errors import UserError
from lcm_kit.training import checkpoints, runtime
from lcm_kit.training.checkpoints import Origin
from tests.test_roles import unet

CONFIG, OTHER = Adapter(rank=2, alpha=4.0), Adapter(rank=3, alpha=3.0, targets="attention")
NAMES = ("adapter", "critic")


def loss(adapted: AdaptedUNet, step: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 3, 8, generator=g)
    return (adapted.unet(x, torch.tensor([20, 700]), text).sample - x).square().mean()


def optimizer(parameters: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def step(adapted: AdaptedUNet, name: str, by: torch.optim.Optimizer, number: int) -> None:
    with adapted.using(name):
        loss(adapted, number).backward()
    by.step()


def alone(add: Callable[[AdaptedUNet], list[Any]], steps: list[int]) -> dict[str, Tensor]:
    """The weights after `steps` on a UNet with nothing else on it."""
    adapted = AdaptedUNet(unet())
    by = optimizer(add(adapted))
    for number in steps:
        step(adapted, "adapter", by, number)
        by.zero_grad()
    return adapted.state()


def recomputed(adapted: AdaptedUNet) -> list[Any]:
    adapted.unet.enable_gradient_checkpointing()
    adapted.unet.train()
    return adapted.add_lora(CONFIG, seed=1)


ADD: dict[str, Callable[[AdaptedUNet], list[Any]]] = {
    "a LoRA": lambda adapted: adapted.add_lora(CONFIG, seed=1),
    "a LoRA with gradient checkpointing": recomputed,
    "the UNet's own weights": lambda adapted: adapted.train_own_weights(),
}


@pytest.mark.parametrize("first", list(ADD))
def test_two_are_trained_as_on_two_unets(first: str) -> None:
    adapted = AdaptedUNet(unet())
    base = loss(adapted, 0).detach()
    parameters = {"adapter": ADD[first](adapted)}
    parameters["critic"] = adapted.add_lora(OTHER, name="critic", seed=2)
    assert adapted.trained == NAMES and adapted.in_use == "adapter"
    optimizers = {name: optimizer(of) for name, of in parameters.items()}
    order = ["adapter", "critic", "critic", "adapter", "critic", "adapter"]
    for number, name in enumerate(order):
        step(adapted, name, optimizers[name], number)
        other = next(each for each in NAMES if each != name)
        assert all(p.grad is None for p in parameters[other])
        assert sum(p.grad is not None for p in parameters[name]) > len(parameters[name]) / 2
        optimizers[name].zero_grad()
    wanted = {
        "adapter": alone(ADD[first], [0, 3, 5]),
        "critic": alone(lambda adapted: adapted.add_lora(OTHER, seed=2), [1, 2, 4]),
    }
    for name in NAMES:
        state = adapted.state(name)
        assert state.keys() == wanted[name].keys() and len(state) == len(parameters[name])
        assert all(torch.equal(state[key], wanted[name][key]) for key in state), name
    with torch.no_grad(), adapted.teacher():
        assert torch.equal(loss(adapted, 0), base)  # neither is left on, or in the base
        with adapted.using("critic"):
            assert not torch.equal(loss(adapted, 0), base)
        assert torch.equal(loss(adapted, 0), base)
    assert adapted.in_use == "adapter"


def test_names_that_are_taken_or_not_there() -> None:
    for add in (lambda adapted: adapted.train_own_weights(), lambda adapted: adapted.add_lora(CONFIG)):
        adapted = AdaptedUNet(unet())
        add(adapted)
        with pytest.raises(ValueError, match="something is trained as 'adapter' already"):
            adapted.add_lora(OTHER)
    with pytest.raises(ValueError, match="the model has an adapter 'adapter' already"):
        AdaptedUNet(adapted.unet).add_lora(OTHER)
    with pytest.raises(ValueError, match="own weights are trained before all else"):
        adapted.train_own_weights(name="own")
    with pytest.raises(ValueError, match="nothing is trained as 'critic', only adapter"):
        adapted.using("critic")


@torch.no_grad()
def test_a_half_precision_base_teaches_as_it_is_while_it_is_trained_in_float32() -> None:
    half = unet().to(torch.bfloat16)
    x, text = torch.ones(1, 4, 8, 8, dtype=torch.bfloat16), torch.ones(1, 3, 8, dtype=torch.bfloat16)
    base = half(x, 500, text).sample
    adapted = AdaptedUNet(half)
    for p in adapted.train_own_weights():
        p.add_(1e-5)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    with adapted.teacher():
        assert torch.equal(half(x, 500, text).sample, base)


def test_nothing_of_ours_lies_on_the_unet_or_a_text_encoder(sd_base: Any) -> None:
    """But peft's layers and `peft_config`, and a flag that diffusers and transformers declare themselves."""
    base = bases.inspect_base(str(sd_base()))
    model, text = bases.load_unet(base), bases.load_text(base)
    ((part, (encoder, modules)),) = bases.family_of(base).text_lora_targets(text).items()
    before = {id(module): set(vars(module)) for of in (model, encoder) for module in of.modules()}
    adapted = AdaptedUNet(model)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = model.get_submodule(layer).in_features
    adapted.add_teacher_lora({layer: (torch.ones(1, width), torch.ones(width, 1), 1.0)}, in_student=True)
    adapted.add_lora(Adapter(rank=2, alpha=2.0))
    adapted.add_lora(Adapter(rank=2, alpha=2.0), name="critic")
    add_text_lora(encoder, modules, 2, 2.0, seed=0)
    adapted.join({part: encoder})
    with adapted.teacher(), adapted.using("critic"):
        pass
    new = {
        key
        for of in (model, encoder)
        for m in of.modules()
        for key in set(vars(m)) - before.get(id(m), set(vars(m)))
    }
    assert new == {"peft_config", "_hf_peft_config_loaded"}
    assert all(hasattr(type(each), "_hf_peft_config_loaded") for each in (model, encoder))


# -- States --------------------------------------------------------------------------------------------------


class Loop:
    """Two LoRAs in turns, an EMA of one of them, and their states in `run`."""

    def __init__(self, run: Path, names: tuple[str, ...] = NAMES) -> None:
        config = Distill("train/distill", str(run), checkpoint=Checkpoint(every=1, keep=9))
        accelerator = runtime.start(config)
        self.adapted = AdaptedUNet(unet())
        made = [optimizer(self.adapted.add_lora(CONFIG, name=name, seed=k)) for k, name in enumerate(names)]
        _, *prepared = runtime.prepare(accelerator, self.adapted, *made)
        self.optimizers = dict(zip(names, prepared, strict=True))
        self.ema = {names[-1]: [p.detach().clone() for p in self.adapted.parameters(names[-1])]}
        origin = Origin("unet", "data", (), 1, 1)
        self.saver = runtime.Saver(accelerator, config, origin, self.adapted, self.ema, self.optimizers)

    def run(self, first: int, last: int) -> None:
        """Steps `first` to `last`, then a state."""
        for number in range(first, last):
            for name, by in self.optimizers.items():
                step(self.adapted, name, by, number)
                by.zero_grad()
            for name, average in self.ema.items():
                update_ema(average, self.adapted.parameters(name), 0.5)
        self.saver.save(last, [])


@pytest.fixture
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def newest(run: Path) -> checkpoints.State:
    folder = checkpoints.newest(run)
    assert folder
    return checkpoints.read(folder)


@pytest.mark.usefixtures("_cpu")
def test_two_optimizers_are_saved_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    straight, stopped = Loop(tmp_path / "straight"), Loop(tmp_path / "stopped")
    straight.run(0, 4)
    stopped.run(0, 2)
    again = Loop(tmp_path / "stopped")
    again.saver.restore(newest(tmp_path / "stopped"))
    again.run(2, 4)
    for file in ("lora.safetensors", "ema.safetensors", "training.pt"):
        one, two = (tmp_path / run / "state/step-000004" / file for run in ("straight", "stopped"))
        assert one.read_bytes() == two.read_bytes()
    state = newest(tmp_path / "stopped")
    assert list(state.optimizers) == list(NAMES) and len(state.lora) == 2 * len(state.ema)
    assert {key.partition("/")[0] for key in state.ema} == {"critic"}
    for name in NAMES:
        assert all(
            torch.equal(t, straight.adapted.state(name)[key]) for key, t in again.adapted.state(name).items()
        )


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize(("was", "now"), [(NAMES, NAMES[:1]), (NAMES[:1], NAMES)])
def test_a_state_of_other_names_is_refused_and_stays(
    was: tuple[str, ...], now: tuple[str, ...], tmp_path: Path
) -> None:
    Loop(tmp_path, was).run(0, 1)
    other = Loop(tmp_path, now)
    before = {name: other.adapted.state(name) for name in now}
    with pytest.raises(UserError) as caught:
        other.saver.restore(newest(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: this run trains {' and '.join(was)}, and its recipe now trains {' and '.join(now)}; "
        "give back the recipe that it was started with, or another output"
    )
    assert all(
        torch.equal(t, other.adapted.state(name)[key]) for name in now for key, t in before[name].items()
    )
    assert newest(tmp_path).step == 1


@pytest.mark.usefixtures("_cpu")
def test_a_state_has_an_optimizer_of_all_that_is_trained(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    del loop.optimizers["critic"]
    with pytest.raises(
        ValueError, match=r"optimizers \['adapter'\] for what is trained, \['adapter', 'critic'\]"
    ):
        loop.saver.save(1, [])


@pytest.mark.usefixtures("_cpu")
def test_a_state_of_one_optimizer_without_a_name_is_the_adapters(tmp_path: Path) -> None:
    """As states were before they held several."""
    loop = Loop(tmp_path, NAMES[:1])
    loop.run(0, 1)
    state = newest(tmp_path)
    folder = tmp_path / "state/step-000001"
    rest = torch.load(folder / "training.pt")
    rest["optimizer"] = rest.pop("optimizers")["adapter"]
    torch.save(rest, folder / "training.pt")
    with replaced_hash(folder):
        old = checkpoints.read(folder)
    assert old.optimizers.keys() == {"adapter"}
    moments = old.optimizers["adapter"]["state"]
    assert moments and all(
        torch.equal(value, state.optimizers["adapter"]["state"][index][name])
        for index, slots in moments.items()
        for name, value in slots.items()
    )


@contextmanager
def replaced_hash(folder: Path) -> Iterator[None]:
    """The manifest is believed of the file as it now is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "manifest", lambda folder: {"files": {}})
        yield


def test_nobody_is_warned_of_a_second_lora() -> None:
    """peft warns of each that it puts beside another; and what it else warns of is still heard."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        adapted = AdaptedUNet(unet())
        for name in NAMES:
            adapted.add_lora(CONFIG, name=name)
        warnings.warn("another", UserWarning, stacklevel=1)
    said = [str(each.message) for each in heard]
    assert "another" in said and not any("peft_config" in each for each in said)
