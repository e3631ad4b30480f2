"""Which modules a base has, and the shapes of their weights: what a LoRA file is held against.

Built from configuration alone, on torch's meta device: no weights are loaded and none are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from lcm_kit.bases.configs import require_sizes
from lcm_kit.bases.locate import locate
from lcm_kit.bases.source import read_json
from lcm_kit.bases.weights import building
from lcm_kit.errors import UserError
from lcm_kit.families import Family, Generation, by_unet, generation_of, listed, names
from lcm_kit.lora.names import kohya_names, sgm_names

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """The modules of a base that a LoRA can change, in the model's own order, by name with their part."""

    label: str  # what to call it in a sentence
    generation: Generation
    modules: Mapping[str, Shape]  # shape of the weight: [out, in] or [out, in, kh, kw]
    unet_config: Mapping[str, Any]
    prediction_type: str | None = None  # None: not known, as for a generation instead of a base
    factor: int = 8  # pixels along one side of a latent
    zero_terminal_snr: bool = False  # its last timestep is pure noise (arXiv:2305.08891)
    pooled: int | None = None  # numbers in SDXL's pooled text embedding; None: as many as its encoder is wide

    @property
    def family(self) -> Family:
        """Of its generation."""
        return self.generation.family

    @property
    def width(self) -> int:
        """Of the text embeddings: 768 for SD1.x, 1024 for SD2.x, 2048 for SDXL."""
        return int(self.unet_config["cross_attention_dim"])

    @property
    def published(self) -> bool:
        """Whether it has the size of a published base, which apps know; a base in small does not."""
        return self.width == self.generation.width

    @cached_property
    def blocks(self) -> Generation | None:
        """The published model whose blocks its UNet has, at any width; None: nobody published them.

        It is its generation or one pruned from that. Apps take the blocks for granted.
        """
        own = self.generation.name
        related = (g for g in map(generation_of, names()) if own in (g.name, g.pruned_from))
        return next((g for g in related if known(g.name).unet.keys() == self.unet.keys()), None)

    @property
    def resolution(self) -> int:
        """Pixels along one side that the base was made for."""
        return int(self.unet_config["sample_size"]) * self.factor

    @cached_property
    def unet(self) -> dict[str, Shape]:
        """The UNet's modules, without `unet.` in front."""
        return {k.removeprefix("unet."): v for k, v in self.modules.items() if k.startswith("unet.")}

    @cached_property
    def norms(self) -> dict[str, Shape]:
        """The group and layer norms, as `modules`, whose weights and biases a LyCORIS file can change too."""
        from torch.nn import GroupNorm, LayerNorm

        found = {
            f"unet.{name}": tuple(module.weight.shape)
            for name, module in empty_unet(self.unet_config).named_modules()
            if isinstance(module, GroupNorm | LayerNorm)
        }
        for name, (_, width) in _text_layers(self.modules):
            layer = name.removesuffix(".mlp.fc1")
            found |= {f"{layer}.layer_norm{k}": (width,) for k in (1, 2)}
            found[f"{name.partition('.')[0]}.text_model.final_layer_norm"] = (width,)
        return found

    @cached_property
    def projections(self) -> dict[str, Shape]:
        """The projection behind SDXL's second text encoder, which OneTrainer adapts and the kit does not."""
        widths = {name.partition(".")[0]: shape[1] for name, shape in _text_layers(self.modules)}
        if (width := widths.get("text_encoder_2")) is None:
            return {}
        return {"text_encoder_2.text_projection": (self.pooled or width, width)}

    @cached_property
    def sizes(self) -> dict[str, Shape]:
        """The shapes of all weights that a file can change: of modules, projections and norms."""
        return {**self.modules, **self.projections, **self.norms}

    @cached_property
    def sgm(self) -> dict[str, str]:
        """The UNet's modules in the original spelling (`lcm_kit.lora.names`), no part in front."""
        return sgm_names(self.unet)

    @cached_property
    def kohya(self) -> dict[str, str]:
        """What a kohya file calls each module that it has a name for."""
        return kohya_names([*self.modules, *self.projections], self.family)


@cache
def known(name: str) -> Structure:
    """The structure of a published model (`lcm_kit.families`). Raises `UserError` for another name."""
    model = generation_of(name)
    generation = model if model.pruned_from is None else generation_of(model.pruned_from)
    text = {part: (clip.layers, clip.width, clip.hidden) for part, clip in model.text.items()}
    return _structure(model.title, generation, model.unet, text)


def of_base(path: str, *, revision: str | None = None, variant: str | None = None) -> Structure:
    """The structure of a base: a diffusers folder, a hub id or `asset:NAME`; no weights are loaded.

    Raises `UserError` if it is not found or is not the folder of a Stable Diffusion pipeline.
    """
    return of_folder(locate(path, revision, variant), path)


def of_folder(folder: Path, path: str) -> Structure:
    """The structure of the base in `folder`, which a user calls `path`."""
    require_sizes(folder, path)
    read_json(folder / "model_index.json", path)
    config = read_json(folder / "unet" / "config.json", path)
    if config.get("_class_name") != "UNet2DConditionModel":
        raise UserError(
            f"base {path!r} has a {config.get('_class_name')}, not a Stable Diffusion UNet; give an "
            f"{listed()} base"
        )
    text, pooled = {}, None
    for part in ("text_encoder", "text_encoder_2"):
        if (folder / part).is_dir():
            clip = read_json(folder / part / "config.json", path)
            pooled = clip.get("projection_dim")
            text[part] = (clip["num_hidden_layers"], clip["hidden_size"], clip["intermediate_size"])
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", path)
    vae = read_json(folder / "vae" / "config.json", path)
    return _structure(
        path, by_unet(config), config, text,
        prediction_type=scheduler.get("prediction_type", "epsilon"),
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        factor=2 ** (len(vae["block_out_channels"]) - 1), pooled=pooled,
    )  # fmt: skip


def of_pipeline(pipe: Any) -> Structure:
    """The structure of the models that a diffusers pipeline holds. Raises `UserError` if it has no UNet."""
    unet, encoders = getattr(pipe, "unet", None), {}
    if unet is None:
        raise UserError(f"a {type(pipe).__name__} has no UNet; give a Stable Diffusion pipeline")
    for part in ("text_encoder", "text_encoder_2"):
        if (model := getattr(pipe, part, None)) is not None:
            encoders[part] = model.config
    text = {
        part: (clip.num_hidden_layers, clip.hidden_size, clip.intermediate_size)
        for part, clip in encoders.items()
    }
    pooled = getattr(encoders.get("text_encoder_2"), "projection_dim", None)
    config = dict(unet.config)
    return _structure("the pipeline", by_unet(config), config, text, pooled=pooled)


def _text_layers(modules: Mapping[str, Shape]) -> list[tuple[str, Shape]]:
    """The first matrix of each text encoder layer's MLP, [hidden, width], by its name."""
    return [(name, shape) for name, shape in modules.items() if name.endswith(".mlp.fc1")]


def _structure(
    label: str,
    generation: Generation,
    config: Mapping[str, Any],
    text: Mapping[str, tuple[int, int, int]],
    **more: Any,
) -> Structure:
    with building(label, "unet"):
        modules = {f"unet.{name}": shape for name, shape in _weight_shapes(empty_unet(config)).items()}
    for part, (layers, width, hidden) in text.items():
        for k in range(layers):
            layer = f"{part}.text_model.encoder.layers.{k}"
            modules |= {f"{layer}.self_attn.{end}_proj": (width, width) for end in ("k", "v", "q", "out")}
            modules |= {f"{layer}.mlp.fc1": (hidden, width), f"{layer}.mlp.fc2": (width, hidden)}
    return Structure(label, generation, modules, config, **more)


def empty_unet(config: Mapping[str, Any]) -> Any:
    """diffusers' UNet of this configuration without weights: its parameters are on the meta device."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config)).eval().requires_grad_(False)


def _weight_shapes(model: Any) -> dict[str, Shape]:
    from torch.nn import Conv2d, Linear

    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, Linear | Conv2d)
    }
