"""Configs and what runs them: encode, train, distill, finetune, evaluate, and the report of a run.

A config is a YAML file or the name of a shipped one (`lcm-kit ls`). Its keys are overridden by keywords, a
block by a mapping of what differs in it: `steps=200, optimizer={"lr": 3e-4}`. `overrides` are the same in
the words of the command line, `["optimizer.lr=3e-4"]`, for a program that passes some on; keywords go first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lcm_kit.api.calls import call
from lcm_kit.errors import UserError

if TYPE_CHECKING:
    from lcm_kit.config.load import Config
    from lcm_kit.config.schema import Training
    from lcm_kit.data.progress import EncodeReport
    from lcm_kit.data.ray_engine import RayEngine

Place = str | os.PathLike[str]  # a path, or a name such as `asset:brand` or `hub:OWNER/NAME`


def load_config(
    config: Place, /, overrides: Sequence[str] = (), *, imports: bool = True, **keys: Any
) -> Config:
    """The config with every key resolved: a frozen dataclass of the recipe that it is for.

    `imports`: the config is one of yours, so that a Python file that it names as its method is run; without
    it nothing is, and such a method cannot be trained with. Raises `UserError`, which lists every mistake,
    for a config that is not there or not valid.

        config = lcm_kit.load_config("distill/tiny_lcm", steps=200)
        print(config.output, config.optimizer.lr)
    """
    from lcm_kit.config import shipped, yaml_text
    from lcm_kit.config.load import load

    words = [*overrides, *yaml_text.overrides(keys)]
    return load(shipped.config_path(os.fspath(config)), words, imports=imports)


def encode(
    config: Place,
    /,
    overrides: Sequence[str] = (),
    *,
    verbose: bool = False,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    workers: int | None = None,
    gpus: float | None = None,
    **keys: Any,
) -> list[EncodeReport]:
    """Turn pictures and captions, or prompts, into cached latents and text embeddings.

    One report a cache that the config asks for: its `folder`, its `rows`, how many were `encoded` now, and
    what was `skipped` and why. What is cached already is left as it is. Raises `UserError` for pictures that
    cannot be used, a base that cannot be trained, and a config without data.

    `engine` ray: the shards of a stream are encoded on a Ray cluster, at `address` (that of `RAY_ADDRESS`, or
    of this machine, or one started for it), by so many `workers` (all that fit) of so many `gpus` each (1,
    where the cluster has any; 0.5: two share one). Raises `UserError` for what cannot be done there.

        (done,) = lcm_kit.encode("distill/tiny_lcm")
        print(done.folder, done.rows)
    """
    loaded = _training(config, load_config(config, overrides, **keys))
    with _engine(engine, {"address": address, "workers": workers, "gpus": gpus}) as elsewhere:
        return _encode(loaded, verbose, elsewhere)


def train(config: Place, /, overrides: Sequence[str] = (), *, verbose: bool = False, **keys: Any) -> Path:
    """Run the recipe of `train/` that the config names, on a cache that `encode` made; returns the run.

    A run that was stopped continues, one that is finished is left as it is. Raises `UserError` for a cache
    that is not there or was made for something else, and where training cannot go on.

    SIGINT and SIGTERM end it when the step is done and saved, with `KeyboardInterrupt` and `SystemExit(143)`;
    the same call continues there. In another thread than the main one, where Python takes no signals, they
    act as they did before.

        lcm_kit.encode("finetune/tiny_brand")
        run = lcm_kit.train("finetune/tiny_brand", steps=100)
    """
    return _run("train", config, load_config(config, overrides, **keys), verbose)


def distill(
    config: Place | None = None, /, overrides: Sequence[str] = (), *, verbose: bool = False, **keys: Any
) -> Path:
    """Encode, then distil a LoRA that draws in 1-8 steps; returns the run, as `train` does.

    Without a config the keywords are all of it, `output` at least; other keys are at their defaults. Raises
    `UserError` as `encode` and `train`, and for a config of another recipe.

        run = lcm_kit.distill("distill/sd15_lcm", base={"path": "my/base"}, data={"path": "my_pictures"})
        files = lcm_kit.export_run(run)
    """
    from lcm_kit.config.schema import Distill

    loaded = _distillation(keys, overrides) if config is None else load_config(config, overrides, **keys)
    name = "train/distill" if config is None else os.fspath(config)
    if not isinstance(loaded, Distill):
        raise UserError(f"config {name} is for {loaded.recipe}; give one for train/distill")
    _encode(loaded, verbose)
    return _run("train", name, loaded, verbose)


@dataclass(frozen=True)
class Finetuned:
    """Where what `finetune` made lies."""

    run: Path  # its folder
    apps: Path  # the LoRA with style and speed, as ComfyUI, A1111, Forge, InvokeAI and SD.Next read it
    diffusers: Path  # the same, as diffusers reads it
    style: Path  # the LoRA with the style alone, for apps
    card: Path  # what to set in each app, in Markdown
    report: Path  # one page about all of it, for a browser


def finetune(
    folder: Place,
    base: Place,
    *,
    revision: str | None = None,
    variant: str | None = None,
    output: Place | None = None,
    prompts: Place | None = None,
    trigger: str | None = None,
    speed: Place | None = None,
    overrides: Sequence[str] = (),
    style: Mapping[str, Any] | None = None,
    distill: Mapping[str, Any] | None = None,
    brand: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    verbose: bool = False,
) -> Finetuned:
    """From a folder of pictures to one LoRA that draws their style in 4 steps: all stages, each done once.

    `folder`: 20 to 500 pictures, a .txt caption beside each. `base`: a diffusers folder, a hub id (with
    `revision` and `variant`), a .safetensors checkpoint, or `asset:tiny-sd`. `output`: `runs/NAME` of the
    folder by default. `prompts`: a file of what to draw and judge by; by default the folder's `prompts.txt`,
    or captions of pictures that are held out. `trigger`: the word of the captions that stands for the style.
    `speed`: an LCM-LoRA of the base to start from as well. `style`, `distill` and `brand` override keys of
    the stages; `overrides` too, as `["style.steps=800"]`. `dry_run`: check the pictures and the configs, make
    nothing, and say where everything would lie.

    A stage that is done is left as it is, one that was stopped continues (`train`). Raises `UserError` for a
    folder that cannot be learned from, and as the stages do.

        made = lcm_kit.finetune("my_pictures", "my/base", style={"steps": 800})
        print(made.apps, made.report)
    """
    from lcm_kit import workflow
    from lcm_kit.config import yaml_text
    from lcm_kit.config.schema import Base

    stages = {"style": style or {}, "distill": distill or {}, "brand": brand or {}}
    with call(verbose):
        report = workflow.finetune(
            os.fspath(folder), Base(os.fspath(base), revision, variant), _path(output),
            [*overrides, *yaml_text.overrides(stages)], prompts=_text(prompts), trigger=trigger,
            speed=_text(speed), dry_run=dry_run,
        )  # fmt: skip
    return _finetuned(report)


def evaluate(config: Place, /, overrides: Sequence[str] = (), *, verbose: bool = False, **keys: Any) -> Path:
    """Run the recipe of `evaluation/` that the config names; returns the JSON file of what it measured.

    What was drawn before by the same inputs is not drawn again. Raises `UserError` for a run or an adapter
    that is not there, and a base that does not fit.

        results = lcm_kit.evaluate("evaluation/quality", run="runs/quickstart", count=64)
        report = lcm_kit.write_report("runs/quickstart")
    """
    return _run("evaluation", config, load_config(config, overrides, **keys), verbose)


def write_report(run: Place, *, verbose: bool = False) -> Path:
    """Write the run's report.html from its results and pictures; returns its path.

    Raises `UserError` if the run was not evaluated.

        page = lcm_kit.write_report("runs/quickstart")
    """
    from lcm_kit.report.build import write_report as write

    with call(verbose, models=False):
        return write(Path(run))


def _distillation(keys: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    from lcm_kit.config import yaml_text
    from lcm_kit.config.load import of_recipe

    return of_recipe("train/distill", [*overrides, *yaml_text.overrides(keys)], imports=True)


def _training(config: Place, loaded: Config) -> Training:
    from lcm_kit.config.schema import Training

    if not isinstance(loaded, Training):
        raise UserError(
            f"config {os.fspath(config)} is for {loaded.recipe}, which has no data to encode; give one for "
            "train/distill or train/finetune"
        )
    return loaded


def _engine(name: str, given: Mapping[str, Any]) -> AbstractContextManager[RayEngine | None]:
    """What encodes in this process's place; None: nothing does."""
    if name == "ray":
        from lcm_kit.data.ray_engine import RayEngine

        return RayEngine(**given)
    if name != "local":
        raise UserError(f"engine {name!r} is unknown; give local or ray")
    for key, value in given.items():
        if value is not None:
            raise UserError(f"{key} {value!r} is for engine ray; give that too, or leave it out")
    return nullcontext()


def _encode(config: Training, verbose: bool, elsewhere: RayEngine | None = None) -> list[EncodeReport]:
    """Every cache that `config` asks for; several processes share the work."""
    with call(verbose):
        from lcm_kit.data import sources
        from lcm_kit.training import processes

        return sources.encode(config, share=processes.share(), elsewhere=elsewhere)


def _run(stage: str, config: Place, loaded: Config, verbose: bool) -> Path:
    """Run the recipe that the config names, if it belongs to the stage."""
    from lcm_kit.config import shipped

    name = os.fspath(config)
    if not loaded.recipe.startswith(f"{stage}/"):
        verb = "train" if loaded.recipe.startswith("train/") else "evaluate"
        raise UserError(f"config {name} is for {loaded.recipe}; run `lcm-kit {verb} {name}`")
    with call(verbose):
        done: Path = shipped.load_recipe(loaded.recipe).main(loaded)
    return done


def _finetuned(report: Path) -> Finetuned:
    from lcm_kit.lora.write import file_name

    run = report.parent
    title, style = run.resolve().name, run / "style"
    return Finetuned(
        run, run / "export" / file_name("kohya", title), run / "export" / file_name("diffusers", title),
        style / "export" / file_name("kohya", "style"), run / "export" / "README.md", report,
    )  # fmt: skip


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)


def _text(place: Place | None) -> str | None:
    return None if place is None else os.fspath(place)
