"""When a run is over nothing holds its UNet: asked where Python's collector does not come by itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from lcm_kit import workflow
from lcm_kit.api.calls import call
from lcm_kit.bases.out_of_memory import free
from lcm_kit.config.schema import Base
from lcm_kit.errors import UserError
from lcm_kit.training import turns
from lcm_kit.training.release import released
from tests.recipes import small
from tests.recipes.test_story import FEW, studio
from train import distill, finetune


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The UNets that the recipes load, and a weight of each."""
    small.draw_little(monkeypatch)
    found: list[weakref.ref[Any]] = []
    for recipe in (distill, finetune):
        load = recipe.load_unet

        def watched(*args: Any, load: Any = load) -> Any:
            unet = load(*args)
            found.extend((weakref.ref(unet), weakref.ref(unet.conv_in.weight.untyped_storage())))
            return unet

        monkeypatch.setattr(recipe, "load_unet", watched)
    return found


def left(held: list[weakref.ref[Any]]) -> list[str]:
    assert len(held) == 2  # one UNet was loaded
    return [type(each()).__name__ for each in held if each() is not None]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.usefixtures("_no_collector")
def test_nothing_holds_the_unet_of_a_run_that_is_over(
    precision: str, held: list[weakref.ref[Any]], distill_keys: dict[str, Any], tmp_path: Path
) -> None:
    distill.main(small.configure(distill_keys, tmp_path / "run", precision=precision))
    assert not left(held)


@pytest.mark.usefixtures("_no_collector")
def test_nor_that_of_a_style_lora(
    held: list[weakref.ref[Any]], distill_keys: dict[str, Any], tmp_path: Path
) -> None:
    keys = {key: value for key, value in distill_keys.items() if key != "guidance"}
    keys |= {"recipe": "train/finetune", "adapter": {"rank": 4, "alpha": 4.0}}
    finetune.main(small.configure(keys, tmp_path / "run", precision="bfloat16"))
    assert not left(held)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.usefixtures("_no_collector")
def test_nor_that_of_a_run_that_failed(
    precision: str, held: list[weakref.ref[Any]], distill_keys: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the middle of a step, after an optimizer step: whatever begins next begins without it."""

    class Failing(turns.Passes):
        def __call__(self, step: int, *args: Any) -> Any:
            made = super().__call__(step, *args)
            if step == 2:
                raise UserError("the second step fails")
            return made

    monkeypatch.setattr(turns, "Passes", Failing)
    said = ""
    try:
        distill.main(small.configure(distill_keys, tmp_path / "run", precision=precision))
    except UserError as error:
        said = str(error)
    assert said == "the second step fails"
    free()
    assert not left(held)


@pytest.mark.usefixtures("_no_collector")
def test_runs_stages_and_calls_begin_without_what_another_left() -> None:
    class Ring:
        def __init__(self) -> None:
            self.itself = self

    def begun(start: Callable[[], object]) -> bool:
        """Whether a ring that was left is gone when the work begins."""
        ring = weakref.ref(Ring())
        assert ring() is not None
        start()
        return ring() is None

    seen: list[bool] = []

    def main() -> None:
        seen.append(True)

    assert begun(released(main)) and seen
    assert begun(lambda: call(False).__enter__())
    assert not begun(lambda: None)  # nothing else frees it here


@pytest.mark.slow
def test_no_stage_of_a_story_begins_beside_a_unet(
    sd_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    alive, heading = [], workflow._heading

    def look(number: int, title: str) -> None:
        weights = {p.untyped_storage().data_ptr() for u in unets() for p in u.parameters()} - before
        alive.append((number, len(weights)))
        heading(number, title)

    def unets() -> list[Any]:
        return [thing for thing in gc.get_objects() if isinstance(thing, UNet2DConditionModel)]

    before = {p.untyped_storage().data_ptr() for u in unets() for p in u.parameters()}
    monkeypatch.setattr(workflow, "_heading", look)
    half = ["style.precision=bfloat16", "distill.precision=bfloat16"]
    base = Base(str(sd_base("epsilon")))
    workflow.finetune(str(studio(tmp_path / "lumo")), base, tmp_path / "run", [*FEW, *half])
    assert alive == [(number, 0) for number in range(1, 8)]
