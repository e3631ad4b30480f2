"""Updates that are no plain LoRA: what they change, against plain steps, peft's own layers and diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from lcm_kit.cli.main import app
from lcm_kit.errors import UserError
from lcm_kit.lora import loading, peft_header, plain, reading, structure, verify
from lcm_kit.lora.base_weights import BaseWeights
from lcm_kit.lora.convert import require_diffusers, weights_of
from lcm_kit.lora.diffusers_format import HEADER
from lcm_kit.lora.structure import Structure
from tests import kinds
from tests.loras import lcm_modules

LINEAR, CONV = "attn1.to_q", "conv1"


@pytest.fixture(scope="module")
def folder(sd_base: Callable[..., Path]) -> Path:
    return sd_base("epsilon")


@pytest.fixture(scope="module")
def base(folder: Path) -> Structure:
    return structure.of_base(str(folder))


@pytest.fixture(scope="module")
def weights(folder: Path) -> BaseWeights:
    return BaseWeights(folder)


def module(base: Structure, end: str) -> str:
    return next(name for name in lcm_modules(base) if name.endswith(end))


def save(path: Path, base: Structure, pieces: dict[str, dict[str, Tensor]], **header: str) -> Path:
    """`pieces`: module -> role -> tensor, under kohya's name of the module."""
    spell = {n: base.kohya.get(n) or "lora_unet_" + n[5:].replace(".", "_") for n in pieces}
    tensors = {
        f"{spell[n]}.{role}": t.contiguous().clone()
        for n, piece in pieces.items()
        for role, t in piece.items()
    }
    save_file(tensors, path, metadata=header)
    return path


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


CASES: list[tuple[str, str, Callable[[tuple[int, ...]], kinds.Tensors], Any, int]] = [
    ("LoHa", LINEAR, lambda s: kinds.loha(s), kinds.loha_delta, 9),
    ("LoHa", CONV, lambda s: kinds.loha(s), kinds.loha_delta, 9),
    ("LoHa", CONV, lambda s: kinds.loha(s, 2, core=True), kinds.loha_delta, 4),
    ("LoKr", LINEAR, lambda s: kinds.lokr(s, 2), kinds.lokr_delta, 4),
    ("LoKr", LINEAR, lambda s: kinds.lokr(s, 1, both=True), kinds.lokr_delta, 1),
    ("LoKr", CONV, lambda s: kinds.lokr(s, 2), kinds.lokr_delta, 4),
    ("LoKr", CONV, lambda s: kinds.lokr(s, 2, core=True), kinds.lokr_delta, 4),
    ("LoKr", CONV, lambda s: kinds.lokr(s, None), kinds.lokr_delta, 0),
]


@pytest.mark.parametrize(("kind", "end", "make", "truth", "rank"), CASES)
def test_deltas_and_the_exact_layers_of_them(
    base: Structure, tmp_path: Path, kind: str, end: str, make: Any, truth: Any, rank: int
) -> None:
    torch.manual_seed(0)
    name = module(base, end)
    shape = base.modules[name]
    piece = make(shape)
    file = save(tmp_path / "a.safetensors", base, {name: {**piece, "alpha": torch.tensor(1.5)}})
    read = reading.read(file, base)
    wanted = truth(piece, shape, 1.5)
    assert read.problems == () and read.others[name].kind == kind
    close(read.others[name].delta(), wanted)
    made = plain.plain(read).lora
    assert list(made.layers) == [name] and made.plain
    close(made.layers[name].delta(), wanted)
    assert made.layers[name].rank == (rank or min(shape[0], torch.Size(shape[1:]).numel()))


def peft_layer(config: Any, shape: tuple[int, ...]) -> tuple[nn.Module, Any]:
    """A module of one layer named `to_q` with peft's adapter of random weights, and that layer."""
    import peft

    out, inner, *kernel = shape
    layer = nn.Conv2d(inner, out, kernel[0], bias=False) if kernel else nn.Linear(inner, out, bias=False)
    model = peft.get_peft_model(nn.ModuleDict({"to_q": layer}), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "magnitude" not in name:
                p.normal_()
    return model, model.base_model.model["to_q"]


@pytest.mark.parametrize("end", [LINEAR, CONV])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr whole", "LoHa core"])
def test_peft_gives_the_same_deltas(base: Structure, tmp_path: Path, kind: str, end: str) -> None:
    """peft's own layers, saved by peft, with its config beside them for the alpha."""
    import peft

    torch.manual_seed(0)
    name = module(base, end)
    shape = base.modules[name]
    settings = {"r": 2, "alpha": 5, "target_modules": ["to_q"], "use_effective_conv2d": kind == "LoHa core"}
    if kind == "LoKr whole":
        settings["r"] = 10_000
    config = (peft.LoHaConfig if "LoHa" in kind else peft.LoKrConfig)(**settings)
    model, layer = peft_layer(config, shape)
    key = "base_model.model." + name.removeprefix("unet.")
    state = peft.get_peft_model_state_dict(model)
    tensors = {f"{key}.{k.rpartition('.')[2]}": v.contiguous() for k, v in state.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    told = {key: value for key, value in config.to_dict().items() if key in ("r", "alpha")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    read = reading.read(tmp_path / "adapter_model.safetensors", base)
    delta = layer.get_delta_weight("default").detach()
    assert read.problems == () and len(read.others) == 1
    close(read.others[name].delta(), delta)


@pytest.mark.parametrize("end", [LINEAR, CONV])
def test_dora_is_pefts(base: Structure, tmp_path: Path, weights: BaseWeights, end: str) -> None:
    """The merged weight of peft's DoRA layer, with the magnitude moved as training moves it."""
    import peft

    torch.manual_seed(0)
    name = module(base, end)
    shape = base.modules[name]
    model, layer = peft_layer(
        peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["to_q"]), shape
    )
    with torch.no_grad():
        layer.base_layer.weight.copy_(weights.weight(name, shape))
        layer.lora_magnitude_vector["default"].weight.mul_(1.3)
    before = layer.base_layer.weight.detach().clone()
    state = peft.get_peft_model_state_dict(model)
    tensors = {name + k.removeprefix("base_model.model.to_q"): v.contiguous() for k, v in state.items()}
    header = json.dumps({"unet.r": 2, "unet.lora_alpha": 3, "unet.use_dora": True})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": header})
    layer.merge()
    read = reading.read(tmp_path / "a.safetensors", base)
    assert read.problems == () and read.others[name].kind == "DoRA"
    close(read.others[name].delta(before), layer.base_layer.weight.detach() - before)
    made = plain.plain(read, weights, rank=10_000).lora
    close(made.layers[name].delta(), layer.base_layer.weight.detach() - before)
    with pytest.raises(
        UserError, match="1 modules are DoRA, and what they change follows from the base's weights"
    ):
        plain.plain(read)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("end", [LINEAR, CONV])
def test_dora_of_lycoris_over_outputs_or_inputs(
    base: Structure, tmp_path: Path, weights: BaseWeights, end: str, axis: int
) -> None:
    torch.manual_seed(0)
    name = module(base, end)
    shape = base.modules[name]
    ones = (1,) * (len(shape) - 2)
    size = (shape[0], 1, *ones) if axis == 0 else (1, shape[1], *ones)
    down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *ones)
    magnitude = torch.rand(size) + 0.5
    piece = {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "alpha": torch.tensor(1.0),
        "dora_scale": magnitude,
    }
    read = reading.read(save(tmp_path / "a.safetensors", base, {name: piece}), base)
    update = (0.5 * up.flatten(1) @ down.flatten(1)).reshape(shape)
    weight = weights.weight(name, shape)
    close(read.others[name].delta(weight), kinds.dora_delta(weight, update, magnitude, axis))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_pissa_and_olora_are_the_difference_to_their_start(
    base: Structure, tmp_path: Path, weights: BaseWeights, start: str
) -> None:
    """peft takes the start out of the weight: before a step the file changes nothing, then what peft has."""
    import peft

    torch.manual_seed(0)
    name = module(base, LINEAR)
    shape = base.modules[name]
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data = weights.weight(name, shape)
    before = layer.weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=start, target_modules=["to_q"])
    model = peft.get_peft_model(nn.ModuleDict({"to_q": layer}), config)
    held = model.base_model.model["to_q"]

    def file() -> Path:
        state = peft.get_peft_model_state_dict(model)
        told = {"unet.r": 4, "unet.lora_alpha": 6, "unet.init_lora_weights": start}
        tensors = {name + k.removeprefix("base_model.model.to_q"): v.contiguous() for k, v in state.items()}
        save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
        return tmp_path / "a.safetensors"

    def change() -> Tensor:
        layer = plain.plain(reading.read(file(), base), weights).lora.layers[name]
        assert layer.rank == 8
        return layer.delta()

    assert float(change().norm()) <= 1e-5 * float(before.norm())
    assert float(held.get_delta_weight("default").detach().norm()) > 0.1 * float(before.norm())
    with torch.no_grad():
        held.lora_A["default"].weight.add_(torch.randn_like(held.lora_A["default"].weight) * 0.1)
        held.lora_B["default"].weight.add_(torch.randn_like(held.lora_B["default"].weight) * 0.1)
    trained = held.base_layer.weight.detach() + held.get_delta_weight("default").detach()
    close(change(), trained - before, 1e-4)
    with pytest.raises(UserError, match="give its folder as --base FOLDER"):
        plain.plain(reading.read(file(), base))


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_starts_that_the_file_does_not_hold_are_refused(base: Structure, tmp_path: Path, start: str) -> None:
    name = module(base, LINEAR)
    out, inner = base.modules[name]
    tensors = {f"{name}.lora_A.weight": torch.randn(2, inner), f"{name}.lora_B.weight": torch.randn(out, 2)}
    told = json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": start})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": told})
    (problem,) = reading.read(tmp_path / "a.safetensors", base).problems
    assert start in problem and "path_initial_model_for_weight_conversion" in problem
    for harmless in (True, "gaussian", "eva", "orthogonal", "mica"):  # these leave the base's weight alone
        told = json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": harmless})
        save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": told})
        read = reading.read(tmp_path / "a.safetensors", base)
        assert read.problems == () and list(read.lora.layers) == [name]


@pytest.mark.parametrize(
    "pattern",
    [
        {"to_q": 8.0, "attn1.to_q": 16.0},
        {"attn1.to_q": 16.0, "to_q": 8.0},
        {r"down_blocks\..*\.to_q": 3.0, "to_q": 5.0},
        {"to_[qk]": 7.0},
        {"o_q": 9.0},
        {"^to_q": 9.0, "conv1|attn1.to_k": 2.0},
    ],
)
def test_alpha_patterns_are_pefts(base: Structure, tmp_path: Path, pattern: dict[str, float]) -> None:
    """The first pattern that fits, in the header's order, as peft's own config gives it to a real UNet."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    names = [module(base, end) for end in (LINEAR, "attn1.to_k", "attn2.to_q", CONV)]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(base.unet_config))
    plain_names = [name.removeprefix("unet.") for name in names]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=plain_names, alpha_pattern=pattern))
    wanted = {name: unet.get_submodule(name.removeprefix("unet.")).scaling["default"] for name in names}
    tensors = {}
    for name in names:
        out, inner, *kernel = base.modules[name]
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, inner, *kernel)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, *(1 for _ in kernel))
    told = json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": pattern})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": told})
    read = reading.read(tmp_path / "a.safetensors", base)
    assert {name: layer.scale for name, layer in read.lora.layers.items()} == wanted


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("alpha_pattern", {"to_q(": 1.0}),
        ("alpha_pattern", {"(a+)+$": 1.0}),
        ("alpha_pattern", {"(\\w*)*q": 1.0}),
        ("alpha_pattern", {"a*b*c*d*": 1.0}),  # harmless here; a kind that is not, on a name that nearly fits
        ("alpha_pattern", {f"{k}a*b*c": 1.0 for k in range(7)}),
        ("rank_pattern", {"a?" * 14: 1}),
        ("target_modules", "(a|b)" * 14),
    ],
)
def test_patterns_that_cannot_be_tried_are_named(
    base: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, said: Any
) -> None:
    """And diffusers, which would try them, is not given the file."""
    name = module(base, LINEAR)
    out, inner = base.modules[name]
    tensors = {f"{name}.lora_A.weight": torch.randn(2, inner), f"{name}.lora_B.weight": torch.randn(out, 2)}
    told = json.dumps({"unet.lora_alpha": 4, f"unet.{where}": said})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": told})
    read = reading.read(tmp_path / "a.safetensors", base)
    (problem,) = (each for each in read.problems if "header" in each)
    assert problem.startswith(f"its header's {where} has '")
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("it was loaded"))
    (row,) = verify.verify(tmp_path / "a.safetensors", verify.Against(base), apps=["diffusers"]).rows
    assert row.wrong and row.verdict == f"is not asked to load it: {problem}"


def test_patterns_that_people_write_are_tried() -> None:
    names = {f"unet.blocks.{k}.attn1.to_q": 4.0 for k in range(2400)}  # diffusers' own: a module each
    for said in (
        names,
        {r".*\.attn1\.to_[qk]": 2.0, "(to_q|to_k|to_v)": 3.0, r"^down_blocks\..*\..*to_q": 1.0},
    ):
        configs, problems = peft_header.read(Path("a"), {HEADER: json.dumps({"unet.alpha_pattern": said})})
        assert problems == [] and len(configs["unet"].pattern) == len(said)


@pytest.mark.parametrize("said", ["1e999", "nan", "-inf", "9" * 400, "[" * 100_000, "", "x", "null"])
def test_an_alpha_that_is_no_number_is_none(base: Structure, tmp_path: Path, said: str) -> None:
    name = module(base, CONV)
    out, inner, *kernel = base.modules[name]
    shapes = {"lora_down.weight": (2, inner, *kernel), "lora_up.weight": (out, 2, 1, 1)}
    tensors = {f"{name}.{role}": torch.ones(shape) for role, shape in shapes.items()}
    for header in ({"ss_network_args": f'{{"conv_alpha": {said}}}'}, {"ss_network_alpha": said}):
        save_file(tensors, tmp_path / "a.safetensors", metadata=header)
        read = reading.read(tmp_path / "a.safetensors", base)
        assert read.lacks_alpha == 1 and read.lora.layers[name].alpha == 2.0


def everything(base: Structure, path: Path) -> Path:
    """A file with one module of each kind, norms and biases among them."""
    torch.manual_seed(3)
    names = lcm_modules(base)
    linear, conv = [n for n in names if n.endswith(".to_q")], [n for n in names if n.endswith("conv1")]
    size = 0.05

    def small(piece: kinds.Tensors) -> kinds.Tensors:
        return {role: tensor * size for role, tensor in piece.items()}

    out, inner = base.modules[linear[2]]
    alpha = {"alpha": torch.tensor(1.0)}
    norm = next(n for n in base.norms if n.endswith("resnets.0.norm1"))
    lora = {"lora_down.weight": torch.randn(2, inner) * size, "lora_up.weight": torch.randn(out, 2) * size}
    return save(
        path, base,
        {
            linear[0]: {k: v * 0.3 for k, v in kinds.loha(base.modules[linear[0]]).items()} | alpha,
            conv[0]: small(kinds.lokr(base.modules[conv[0]], 2)) | alpha,
            linear[2]: lora | alpha | {"dora_scale": torch.rand(out, 1) + 0.5},
            linear[1]: {"diff": torch.randn(base.modules[linear[1]]) * size},
            conv[1]: {"diff": torch.randn(base.modules[conv[1]]) * size,
                      "diff_b": torch.randn(base.modules[conv[1]][0]) * size},
            norm: {role: torch.randn(base.norms[norm]) * size for role in ("w_norm", "b_norm")},
        },
    )  # fmt: skip


def by_hand(folder: Path, base: Structure, file: Path, *, only_weights: bool = False) -> Any:
    """The base's UNet with what the file changes added in plain steps, from its tensors alone."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    names = {"lora_unet_" + n.replace(".", "_"): n for n, _ in unet.named_modules()}
    pieces: dict[str, kinds.Tensors] = {}
    for key, tensor in load_file(file).items():
        place, _, role = key.partition(".")
        pieces.setdefault(names[place], {})[role] = tensor
    with torch.no_grad():
        for name, piece in pieces.items():
            held = unet.get_submodule(name)
            shape = tuple(held.weight.shape)
            if any(role.startswith("hada") for role in piece):
                held.weight += kinds.loha_delta(piece, shape, 1.0)
            elif any(role.startswith("lokr") for role in piece):
                held.weight += kinds.lokr_delta(piece, shape, 1.0)
            elif "dora_scale" in piece:
                update = piece["lora_up.weight"] @ piece["lora_down.weight"] / 2
                held.weight += kinds.dora_delta(held.weight, update, piece["dora_scale"], 0)
            elif "diff" in piece:
                held.weight += piece["diff"]
            if not only_weights:
                if "w_norm" in piece:
                    held.weight += piece["w_norm"]
                for role in piece.keys() & {"diff_b", "b_norm"}:
                    held.bias += piece[role]
    return unet


def test_fusing_is_exact_for_every_kind(base: Structure, folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    from lcm_kit.lora.loading import probe, relative_error

    file = everything(base, tmp_path / "all.safetensors")
    done = CliRunner().invoke(
        app, ["merge", str(file), "--fuse-into", str(folder), "--output", str(tmp_path / "fused")]
    )
    assert done.exit_code == 0, done.output
    fused = UNet2DConditionModel.from_pretrained(tmp_path / "fused" / "unet")
    wanted = by_hand(folder, base, file)
    for (name, found), (_, exact) in zip(fused.named_parameters(), wanted.named_parameters(), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6, msg=name)
    plain_unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    outputs = [probe({"unet": unet})["unet"] for unet in (fused, wanted, plain_unet)]
    assert relative_error(outputs[0], outputs[1]) <= 1e-5 < 1e-2 < relative_error(outputs[2], outputs[1])


def test_convert_says_what_no_lora_holds_and_writes_the_rest_exactly(
    base: Structure, folder: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    from lcm_kit.lora.loading import probe, relative_error

    file = everything(base, tmp_path / "all.safetensors")
    common = ["convert", str(file), "--base", str(folder), "--dtype", "float32"]
    for more, words in (
        ([], "changes the weights of 1 norms"),
        (["--leave-out", "norms"], "changes the biases of 2 modules"),
        (["--leave-out", "norm"], "'norm' is nothing to leave out; choose among norms, biases"),
    ):
        done = CliRunner().invoke(app, [*common, *more])
        assert done.exit_code == 2 and words in done.stderr, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"all.safetensors"}
    done = CliRunner().invoke(app, [*common, "--leave-out", "norms", "--leave-out", "biases"])
    assert done.exit_code == 0, done.output
    for words in (
        "1 modules are LoHa",
        "1 modules of DoRA made into layers",
        "left out: the weights of 1 norms",
    ):
        assert words in done.stdout
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(str(tmp_path), weight_name="all_kohya.safetensors")
    found = probe({"unet": pipe.unet})["unet"]
    exact = probe({"unet": by_hand(folder, base, file, only_weights=True)})["unet"]
    assert relative_error(found, exact) <= 1e-5
    reduced = [*common, "--leave-out", "norms", "--leave-out", "biases", "--rank", "2"]
    done = CliRunner().invoke(app, [*reduced, "--output", str(tmp_path / "small")])
    assert done.exit_code == 0, done.output
    small = reading.read(tmp_path / "small" / "all_kohya.safetensors", base).lora
    large = reading.read(tmp_path / "all_kohya.safetensors", base).lora
    assert max(layer.rank for layer in small.layers.values()) == 2
    off = sum(float((small.layers[n].delta() - x.delta()).square().sum()) for n, x in large.layers.items())
    size = sum(float(x.delta().square().sum()) for x in large.layers.values())
    told = float(done.stdout.split("relative error of all: ")[1].split()[0])
    assert told == pytest.approx((off / size) ** 0.5, rel=1e-2) and told > 0.1


def test_a_loha_merges_with_a_lora(base: Structure, folder: Path, tmp_path: Path) -> None:
    """0.5 of the one and -1 of the other; what was made of the LoHa is told."""
    torch.manual_seed(0)
    name = module(base, LINEAR)
    piece = {role: tensor * 0.3 for role, tensor in kinds.loha(base.modules[name]).items()}
    save(tmp_path / "a.safetensors", base, {name: piece | {"alpha": torch.tensor(1.5)}})
    save(tmp_path / "b.safetensors", base, {name: lora_piece(base, name)})
    done = cli(
        "merge", f"{tmp_path}/a.safetensors:0.5", f"{tmp_path}/b.safetensors:-1", "--base", folder,
        "--output", tmp_path / "c", "--dtype", "float32",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "a.safetensors: 1 modules of LoHa made into layers of rank up to 9" in done.stdout
    other = reading.read(tmp_path / "b.safetensors", base).lora.layers[name].delta()
    found = reading.read(tmp_path / "c_kohya.safetensors", base).lora.layers[name]
    close(found.delta(), 0.5 * kinds.loha_delta(piece, base.modules[name], 1.5) - other)


def test_large_updates_ask_for_a_rank(tmp_path: Path) -> None:
    real = structure.known("sd1")
    name = next(n for n in real.modules if n.endswith("down_blocks.0.attentions.0.proj_in"))
    file = save(tmp_path / "a.safetensors", real, {name: {"diff": torch.randn(320, 320, 1, 1) * 0.01}})
    with pytest.raises(
        UserError, match=r"1 modules \(full difference\) .* rank 320; choose .* --rank: 320 is exact"
    ):
        plain.plain(reading.read(file))
    made = plain.plain(reading.read(file), rank=8)
    assert made.lora.layers[name].rank == 8 and made.errors is not None and 0.9 < made.errors["all"] < 1


def test_what_diffusers_makes_of_them_is_run(base: Structure, folder: Path, tmp_path: Path) -> None:
    """Its loader drops `dora_scale`, takes peft's magnitude exactly, and refuses a file with other keys."""
    torch.manual_seed(0)
    against = verify.base_of(str(folder))
    name = module(base, LINEAR)
    out, inner = base.modules[name]
    down, up, magnitude = torch.randn(2, inner) * 0.1, torch.randn(out, 2) * 0.1, torch.rand(out) + 0.5
    lora = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}

    def row(file: Path) -> verify.Row:
        (found,) = verify.verify(file, against, apps=("diffusers",)).rows
        return found

    kohya = save(tmp_path / "kohya.safetensors", base, {name: lora | {"dora_scale": magnitude[:, None]}})
    dropped = row(kohya)
    assert not dropped.ok and (dropped.loaded, dropped.right, dropped.of) == (1, 0, 1)
    assert "1 modules without their DoRA magnitude" in dropped.verdict
    assert dropped.error is not None and dropped.error > 1e-3
    with pytest.raises(UserError, match="holds DoRA in a form that diffusers does not load.*lcm-kit convert"):
        require_diffusers(kohya, against)
    pefts = tmp_path / "peft.safetensors"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors | {f"{name}.lora_magnitude_vector": magnitude}, pefts)
    taken = row(pefts)
    assert taken.ok and taken.error is not None and taken.error <= 1e-5
    require_diffusers(pefts, against)
    loha = save(tmp_path / "loha.safetensors", base, {name: kinds.loha((out, inner))})
    refused = row(loha)
    assert refused.verdict.startswith("refuses the file") and (refused.loaded, refused.of) == (0, 1)


def test_the_base_of_other_kinds_is_found(tmp_path: Path) -> None:
    """By names and what the shapes tell: a LoHa of SDXL, a LoKr of SD2.x, norms of SD1.x."""
    torch.manual_seed(0)
    for generation, make in (("sdxl", kinds.loha), ("sd2", lambda s: kinds.lokr(s, 2))):
        real = structure.known(generation)  # type: ignore[arg-type]
        names = [n for n in lcm_modules(real) if n.endswith("attn2.to_k")]
        file = save(tmp_path / "a.safetensors", real, {n: make(real.modules[n]) for n in names})
        read = reading.read(file)
        assert read.structure.generation.name == generation and read.others.keys() == set(names)


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


BROKEN: list[tuple[str, kinds.Tensors, str]] = [
    ("alphas", {"alpha": torch.ones(2)}, r"an alpha of shape \[2\], which is not one number"),
    ("no alpha", {"alpha": torch.ones(0)}, r"an alpha of shape \[0\], which is not one number"),
    ("alpha nan", {"alpha": torch.tensor(float("nan"))}, "an alpha that is not a finite number"),
    ("mid", {"lora_mid.weight": torch.ones(2, 2)}, "a mid of shape"),
    ("scalar", {"lora_down.weight": torch.tensor(1.0)}, "do not fit"),
    ("empty", {"lora_down.weight": torch.ones(0, 4)}, "which is empty"),
    ("int", {"lora_up.weight": torch.ones(4, 2, dtype=torch.int8)}, "int8 numbers, so it is quantised"),
    ("hada", {"hada_w1_a": torch.ones(3)}, "a LoRA and a LoHa at once"),
    ("two magnitudes", {"dora_scale": torch.ones(1), "lora_magnitude_vector": torch.ones(1)}, "at once"),
    ("magnitude", {"dora_scale": torch.ones(3, 1)}, r"dora_scale of shape \[3, 1\], which does not fit"),
    ("scale", {"scale": torch.tensor(5.0)}, "a scale of 5 and an alpha of 2 at rank 2, and apps differ"),
    ("bias", {"lora_up.bias": torch.ones(3)}, r"a change of its bias of shape \[3\]"),
]


@pytest.mark.parametrize(("label", "change", "words"), BROKEN, ids=[label for label, _, _ in BROKEN])
def test_broken_pieces_are_one_sentence(
    base: Structure, tmp_path: Path, label: str, change: kinds.Tensors, words: str
) -> None:
    import re

    name = module(base, LINEAR)
    out, inner = base.modules[name]
    whole = {
        "lora_down.weight": torch.ones(2, inner),
        "lora_up.weight": torch.ones(out, 2),
        "alpha": torch.tensor(2.0),
    }
    file = save(tmp_path / "a.safetensors", base, {name: whole | change})
    problems = reading.read(file, base).problems
    assert problems and re.search(words, " ".join(problems)), problems
    done = cli("convert", file, "--base", base.label)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
    done = cli("verify", file, "--base", base.label, "--app", "diffusers")
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.output


@pytest.mark.parametrize(
    ("end", "piece", "words"),
    [
        (LINEAR, {"hada_w1_a": torch.ones(4, 2), "hada_w1_b": torch.ones(2, 3)}, "rest of it is missing"),
        (LINEAR, {f"hada_w{n}": torch.ones(3) for n in ("1_a", "1_b", "2_a", "2_b")}, "do not fit"),
        (LINEAR, {f"hada_w{n}": torch.ones(2, 2, 2) for n in ("1_a", "1_b", "2_a", "2_b")}, "do not fit"),
        (LINEAR, {"lokr_w1": torch.ones(2), "lokr_w2": torch.ones(2, 2)}, "do not fit"),
        (LINEAR, {"lokr_w1": torch.ones(3, 3), "lokr_w2": torch.ones(5, 7)}, "do not fit"),
        (LINEAR, {"lokr_w1": torch.ones(2, 2)}, "rest of it is missing"),
        (CONV, {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 4, 2, 2)}, "do not fit"),
        (LINEAR, {"diff": torch.ones(3)}, "does not fit"),
        (LINEAR, {"w_norm": torch.ones(3)}, "is no norm"),
        (LINEAR, {"dora_scale": torch.ones(3)}, "rest of it is missing"),
        ("norm1", {"w_norm": torch.ones(3)}, "does not fit"),
        (
            "norm1",
            {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(3, 2)},
            "holds no LoRA",
        ),
    ],
)
def test_pieces_that_do_not_fit_are_one_sentence(
    base: Structure, tmp_path: Path, end: str, piece: kinds.Tensors, words: str
) -> None:
    name = module(base, end) if end != "norm1" else next(n for n in base.norms if n.endswith("norm1"))
    (problem, *_) = reading.read(save(tmp_path / "a.safetensors", base, {name: piece}), base).problems
    assert words in problem and name in problem


def lora_piece(base: Structure, name: str, **more: Tensor) -> kinds.Tensors:
    out, inner, *kernel = base.sizes[name]
    return {
        "lora_down.weight": torch.randn(2, inner, *kernel) * 0.1,
        "lora_up.weight": torch.randn(out, 2, *(1 for _ in kernel)) * 0.1,
        "alpha": torch.tensor(2.0),
        **more,
    }


def test_a_scale_is_taken_and_written_as_an_alpha(base: Structure, folder: Path, tmp_path: Path) -> None:
    """A1111's `.scale` alone: alpha = scale * rank, and what is written has no `.scale`."""
    name = module(base, LINEAR)
    piece = lora_piece(base, name)
    del piece["alpha"]
    file = save(tmp_path / "a.safetensors", base, {name: piece | {"scale": torch.tensor(0.25)}})
    read = reading.read(file, base)
    assert read.lora.layers[name].scale == 0.25 and read.lacks_alpha == 0
    assert any("`.scale`" in finding for finding in read.findings)
    assert cli("convert", file, "--base", folder).exit_code == 0
    written = load_file(tmp_path / "a_kohya.safetensors")
    assert float(written[f"{base.kohya[name]}.alpha"]) == 0.5 and not any(
        k.endswith(".scale") for k in written
    )
    both = save(tmp_path / "b.safetensors", base, {name: lora_piece(base, name, scale=torch.tensor(3.0))})
    done = cli("convert", both, "--base", folder, "--alpha", "6")
    assert done.exit_code == 0, done.output
    assert reading.read(tmp_path / "b_kohya.safetensors", base).lora.layers[name].alpha == 6.0


def test_strength_zero_is_named(base: Structure, tmp_path: Path) -> None:
    name = module(base, LINEAR)
    file = save(tmp_path / "a.safetensors", base, {name: lora_piece(base, name, alpha=torch.tensor(0.0))})
    assert "1 layers of strength 0 (alpha 0), which change nothing" in reading.read(file, base).findings


def test_bundled_embeddings_are_named_and_left_out_only_when_told(
    base: Structure, folder: Path, tmp_path: Path
) -> None:
    name = module(base, LINEAR)
    file = save(tmp_path / "a.safetensors", base, {name: lora_piece(base, name)})
    save_file(load_file(file) | {"bundle_emb.mark.string_to_param.*": torch.ones(2, 8)}, file)
    read = reading.read(file, base)
    assert read.problems == () and "1 embeddings are bundled with it: mark" in read.findings
    for arguments in (("convert", file, "--base", folder), ("merge", file, "--fuse-into", folder)):
        done = cli(*arguments, "--output", tmp_path / "out")
        assert done.exit_code == 2 and "mark" in done.stderr and "--leave-out embeddings" in done.stderr
    done = cli("convert", file, "--base", folder, "--leave-out", "embeddings")
    assert done.exit_code == 0 and "left out: what the embeddings mark stand for" in done.stdout, done.output
    assert not any("bundle" in key for key in load_file(tmp_path / "a_kohya.safetensors"))
    done = cli("sample", "--prompt", "x", "--adapter", file, "--base", folder, "--output", tmp_path / "p.png")
    assert done.exit_code == 2 and "lcm-kit convert" in done.stderr and "--leave-out" not in done.stderr


def test_keys_with_weights_are_never_offered_to_be_dropped(
    base: Structure, folder: Path, tmp_path: Path
) -> None:
    name = module(base, LINEAR)
    file = save(tmp_path / "a.safetensors", base, {name: lora_piece(base, name)})
    whole = load_file(file)
    save_file(whole | {"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)}, file)
    done = cli("convert", file, "--base", folder, "--drop-unknown")
    assert done.exit_code == 2 and "nowhere" in done.stderr and "--drop-unknown" not in done.stderr
    silent = {
        "lora_unet_nowhere.lora_up.weight": torch.zeros(2, 2),
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 2),
        "lora_unet_nowhere.alpha": torch.tensor(4.0),
    }
    save_file(whole | silent, file)
    assert "--drop-unknown" in cli("convert", file, "--base", folder).stderr
    assert cli("convert", file, "--base", folder, "--drop-unknown").exit_code == 0


@pytest.mark.parametrize("alpha", [0.1, 4097.0])
def test_alphas_are_exact_in_halves(base: Structure, folder: Path, tmp_path: Path, alpha: float) -> None:
    """float16 has neither 0.1 nor 4097: kohya's `.alpha` is written in float32."""
    name = module(base, LINEAR)
    piece = lora_piece(base, name, alpha=torch.tensor(alpha))
    file = save(
        tmp_path / "a.safetensors",
        base,
        {name: {k: t * 1e-3 if "lora" in k else t for k, t in piece.items()}},
    )
    done = cli("convert", file, "--base", folder, "--dtype", "float16")
    assert done.exit_code == 0, done.output
    written = load_file(tmp_path / "a_kohya.safetensors")[f"{base.kohya[name]}.alpha"]
    assert written.dtype == torch.float32 and float(written) == float(torch.tensor(alpha))


def test_text_attention_without_out_is_written_whole(base: Structure, folder: Path, tmp_path: Path) -> None:
    """diffusers drops q, k and v of a text encoder in which no layer has out_proj; zeros bring them back."""
    first = "text_encoder.text_model.encoder.layers.0."
    names = [*(f"{first}self_attn.{end}_proj" for end in "qkv"), f"{first}mlp.fc1"]
    file = save(tmp_path / "a.safetensors", base, {name: lora_piece(base, name) for name in names})
    report = verify.verify(file, verify.base_of(str(folder)), apps=("diffusers",))
    assert report.rows[0].loaded == 1 and "drops 3 modules" in report.rows[0].verdict
    done = cli("convert", file, "--base", folder, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    fixed = reading.read(tmp_path / "a_kohya.safetensors", base).lora
    assert fixed.layers.keys() == {*names, f"{first}self_attn.out_proj"}
    assert float(fixed.layers[f"{first}self_attn.out_proj"].delta().abs().max()) == 0
    given = reading.read(file, base).lora
    assert all(torch.equal(fixed.layers[name].delta(), given.layers[name].delta()) for name in names)


@pytest.mark.slow
def test_the_projection_of_sdxls_second_text_encoder_is_known(sdxl_base: Path, tmp_path: Path) -> None:
    """OneTrainer's `lora_te2_text_projection`; and a file of text encoders alone converts."""
    place = structure.of_base(str(sdxl_base))
    (projection,) = place.projections
    first = "text_encoder_2.text_model.encoder.layers.0.self_attn."
    names = [projection, *(f"{first}{end}_proj" for end in ("q", "k", "v", "out"))]
    file = save(tmp_path / "a.safetensors", place, {name: lora_piece(place, name) for name in names})
    assert "lora_te2_text_projection.alpha" in load_file(file)
    read = reading.read(file, place)
    assert read.problems == () and read.lora.layers.keys() == set(names)
    report = verify.verify(file, verify.base_of(str(sdxl_base)), apps=("diffusers",))
    assert report.rows[0].ok and report.rows[0].loaded == 5, report.rows
    done = cli("convert", file, "--base", sdxl_base, "--leave-out", "projections", "--format", "diffusers")
    assert done.exit_code == 0 and f"left out: {projection}" in done.stdout, done.output


def test_weights_of_a_base_are_asked_for_once_its_folder_is_known(folder: Path) -> None:
    assert weights_of(None) is None
    assert weights_of(verify.Against(structure.known("sd1"))) is None
    assert isinstance(weights_of(verify.base_of(str(folder))), BaseWeights)
