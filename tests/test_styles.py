"""A style LoRA in the teacher: each part is the UNet with its LoRAs fused, and only ours is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_kit import bases
from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.folder import save_adapter
from lcm_kit.adapter.styles import add_teacher_adapters
from lcm_kit.bases import inspect_base, load_unet
from lcm_kit.config import schema
from lcm_kit.errors import UserError
from lcm_kit.lora import loading, structure
from lcm_kit.lora.layers import Layer, Lora
from lcm_kit.lora.provenance import Base, Provenance
from tests import broken
from tests.loras import fuse, lcm_modules, random_lora, text_modules
from tests.runs import load_adapter


def output(unet: Any) -> torch.Tensor:
    return loading.probe({"unet": unet})["unet"]


def off(unet: Any, wanted: Any) -> float:
    return loading.relative_error(output(unet), output(wanted))


@pytest.fixture
def base(sd_base: Callable[..., Path]) -> Path:
    return sd_base("epsilon")


def styled(base: Path, tmp_path: Path, in_student: bool) -> tuple[AdaptedUNet, Any, Lora, list[Any]]:
    """A UNet with two style files (kohya and peft style) for the teacher, and a LoRA of its own."""
    place = structure.of_base(str(base))
    half = lcm_modules(place)[::2]
    one = random_lora(place, half, ranks=(4, 2), alphas=(8.0,), size=0.05)
    two = random_lora(place, lcm_modules(place)[:20], alphas=(4.0,), seed=1, size=0.05)
    broken.save(tmp_path / "one.safetensors", broken.kohya_diffusers_spelling(one, place))
    broken.save(tmp_path / "two.safetensors", broken.peft_wrapper(two, place))  # alpha = rank
    adapters = (
        schema.Weighted(str(tmp_path / "one.safetensors"), 0.7),
        schema.Weighted(str(tmp_path / "two.safetensors"), -0.5),
    )
    info = inspect_base(str(base))
    adapted = AdaptedUNet(load_unet(info))
    facts = add_teacher_adapters(adapted, schema.Teacher(adapters, in_student), info)
    parameters = adapted.add_lora(schema.Adapter(rank=4, alpha=8.0))
    torch.manual_seed(2)
    for p in parameters:
        p.data = torch.randn_like(p) * 0.05
    style = fused_style(place, one, two)
    state = adapted.state()
    names = {key.rpartition(".lora_")[0] for key in state}
    own = Lora(
        {f"unet.{n}": Layer(state[f"{n}.lora_A.weight"], state[f"{n}.lora_B.weight"], 8.0) for n in names}
    )
    assert [entry.weight for entry in facts] == [0.7, -0.5] and len(facts[0].sha256) == 64
    assert {id(p) for p in adapted.unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    return adapted, style, own, parameters


def fused_style(place: structure.Structure, one: Lora, two: Lora) -> Callable[[Any], Any]:
    return lambda unet: fuse(fuse(unet, one, 0.7), two, -0.5)


@pytest.mark.parametrize("in_student", [False, True])
def test_teacher_and_student_are_the_fused_unets(base: Path, tmp_path: Path, in_student: bool) -> None:
    adapted, style, own, _ = styled(base, tmp_path, in_student)
    unet = adapted.unet
    info = inspect_base(str(base))
    with adapted.teacher():
        teaching = output(unet)
    with adapted.teacher(styled=False):
        assert torch.equal(output(unet), output(load_unet(info)))  # the plain base, for what is not styled
    assert loading.relative_error(teaching, output(style(load_unet(info)))) <= 1e-5
    student = fuse(load_unet(info), own)
    if in_student:
        student = style(student)
    assert off(unet, student) <= 1e-5
    assert loading.relative_error(teaching, output(unet)) > 0.05  # and they differ
    with pytest.raises(RuntimeError), adapted.teacher():
        raise RuntimeError
    assert off(unet, student) <= 1e-5  # restored after an exception too


@pytest.mark.parametrize("in_student", [False, True])
def test_only_our_own_lora_learns_and_is_saved(base: Path, tmp_path: Path, in_student: bool) -> None:
    adapted, _, own, parameters = styled(base, tmp_path, in_student)
    unet = adapted.unet
    frozen = {n: p.detach().clone() for n, p in unet.named_parameters() if ".style." in n}
    with adapted.teacher(), torch.no_grad():
        output(unet)
    x = torch.randn(2, 4, 16, 16)
    unet(x, 500, encoder_hidden_states=torch.randn(2, 8, 32)).sample.square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in parameters)
    assert frozen and all(p.grad is None for n, p in unet.named_parameters() if ".style." in n)
    save_adapter(tmp_path / "adapter", adapted, Provenance(base=Base("a base", "abc"), steps=1))
    bare = bases.load(str(base), parts=["unet"]).unet
    assert load_adapter(tmp_path / "adapter", bare).state().keys() == {
        n.removeprefix("unet.") + e for n in own.layers for e in (".lora_A.weight", ".lora_B.weight")
    }


def test_files_that_do_not_fit_and_text_encoder_layers(
    base: Path, sdxl_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = inspect_base(str(base))
    place, other = structure.of_base(str(base)), structure.of_base(str(sdxl_base))

    def add(lora: Lora, made_for: structure.Structure) -> None:
        tensors = {
            f"{made_for.kohya[n]}.lora_{w}.weight": getattr(x, w)
            for n, x in lora.layers.items()
            for w in ("down", "up")
        }
        broken.save(tmp_path / "a.safetensors", (tensors, {}))
        teacher = schema.Teacher((schema.Weighted(str(tmp_path / "a.safetensors")),))
        add_teacher_adapters(AdaptedUNet(load_unet(info)), teacher, info)

    add(random_lora(place, lcm_modules(place)[:3] + text_modules(place)), place)
    said = capsys.readouterr().out
    assert "changes 12 text encoder layers too, which are left out" in said
    assert f"`lcm-kit merge {tmp_path}/a.safetensors --fuse-into {base} --output FOLDER`" in said
    with pytest.raises(UserError, match="changes nothing in the UNet"):
        add(random_lora(place, text_modules(place)), place)
    with pytest.raises(UserError, match="teacher.adapters: .* is not whole"):
        add(random_lora(other, lcm_modules(other)[:50]), other)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_was_taken_out_of_the_base_is_not_added_to_it(
    base: Path, tmp_path: Path, start: str
) -> None:
    """peft's PiSSA and OLoRA before a step: since W_res + B A = W, the teacher is the base itself."""
    import json

    import peft
    from safetensors.torch import save_file

    info = inspect_base(str(base))
    unet = load_unet(info)
    wanted = loading.probe({"unet": unet})["unet"]
    targets = [name.removeprefix("unet.") for name in lcm_modules(structure.of_base(str(base)))]
    targets = [name for name in targets if name.endswith((".to_q", ".to_k", ".to_v"))]
    trained = load_unet(info)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=start)
    peft.inject_adapter_in_model(config, trained)
    state = peft.get_peft_model_state_dict(trained, adapter_name="default")
    told = {"unet.r": 2, "unet.lora_alpha": 3, "unet.init_lora_weights": start}
    tensors = {f"unet.{key}": value.contiguous() for key, value in state.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    teacher = schema.Teacher((schema.Weighted(str(tmp_path / "a.safetensors")),))
    add_teacher_adapters(AdaptedUNet(unet), teacher, info)
    found = loading.probe({"unet": unet})["unet"]
    assert loading.relative_error(found, wanted) <= 1e-5


def test_norms_of_a_teachers_lora_are_refused_with_the_way_to_fuse_them(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    info = inspect_base(str(base))
    place = structure.of_base(str(base))
    name = next(n for n in place.norms if n.endswith("resnets.0.norm1"))
    key = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
    save_file({f"{key}.w_norm": torch.ones(place.norms[name])}, tmp_path / "a.safetensors")
    teacher = schema.Teacher((schema.Weighted(str(tmp_path / "a.safetensors")),))
    with pytest.raises(
        UserError, match="1 norms and biases, such as .*norm1, which no LoRA holds.* --fuse-into"
    ):
        add_teacher_adapters(AdaptedUNet(load_unet(info)), teacher, info)
