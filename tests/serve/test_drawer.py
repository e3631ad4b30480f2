"""What is drawn: the same picture for the same seed whatever it is drawn with, LoRAs on and off, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from lcm_kit import sample
from lcm_kit.drawing.how import How
from lcm_kit.errors import UserError
from lcm_kit.lora import diffusers_format, structure
from lcm_kit.serve.adapters import Served, parted
from lcm_kit.serve.drawer import Drawer, Piece
from tests.decoders import build_consistency
from tests.loras import random_lora
from tests.serve.small import order, served

LEVEL = 1  # of 255: sums of other batch sizes differ in the last bits, and rounding to 8 bits may show one


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, sd_base: Callable[..., Path]) -> Served:
    """A small random base with two LoRAs of different ranks."""
    folder, base = tmp_path_factory.mktemp("loras"), sd_base()
    found = structure.of_folder(base, str(base))
    for name, rank in (("one", 4), ("other", 2)):
        lora = random_lora(found, ranks=(rank,), alphas=(float(rank),), size=0.3, seed=rank)
        header = {"format": "pt", **diffusers_format.header(lora)}
        save_file(diffusers_format.tensors(lora, found), folder / f"{name}.safetensors", header)
    return served(str(base), [str(folder / "one.safetensors"), f"{folder / 'other.safetensors'}=0.5"])


def opened(what: Served, batch: int = 8) -> Drawer:
    drawer = Drawer(what, batch)
    drawer.open()
    return drawer


def pixels(pictures: list[Any]) -> numpy.ndarray[Any, Any]:
    return numpy.stack([numpy.asarray(each) for each in pictures]).astype(int)


def drawn(drawer: Drawer, what: Served, pieces: list[Piece] | None = None, **asked: Any) -> Any:
    found = order(what, steps=2, **asked)
    return pixels(drawer.draw(found.key, pieces or [Piece(found.prompt, found.seed, 0)], lambda *_: None))


def plain(what: Served, weights: dict[str, float], **asked: Any) -> Any:
    """The same by a fresh pipeline whose LoRAs peft adds beside the weights."""
    found = order(what, steps=2, **asked)
    pipe = sample.pipeline(what.base.path)
    for each in what.adapters:
        if each.name in weights:
            sample.load_adapter(pipe, each.file, name=f"plain_{each.name}")
    if weights:
        pipe.set_adapters([f"plain_{name}" for name in weights], list(weights.values()))
    key = found.key
    images = sample.sample(
        pipe, [found.prompt], sampler=key.sampler, steps=key.steps, guidance_scale=key.guidance_scale,
        seed=found.seed,
    )  # fmt: skip
    return pixels(sample.to_pil(images))


def test_loras_go_on_and_off_without_a_trace(two: Served) -> None:
    """Any of them, both, none, each as a fresh pipeline draws it, and later the same bit for bit."""
    drawer = opened(two)
    cases: list[dict[str, float]] = [{"one": 1.0}, {"other": 0.5}, {}, {"one": 0.7, "other": -0.4}]
    first = [drawn(drawer, two, adapters=case) for case in cases]
    for case, found in zip(cases, first, strict=True):
        wanted = plain(two, case)
        assert abs(found - wanted).max() <= LEVEL, case
    for number in (3, 0, 2, 1, 0, 3, 2):
        assert (drawn(drawer, two, adapters=cases[number]) == first[number]).all()
    differences = [abs(a - b).max() for k, a in enumerate(first) for b in first[:k]]
    assert min(differences) > 10  # so that all of the above could have failed


def test_no_lora_is_loaded_again(two: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    drawer = opened(two)
    monkeypatch.setattr(sample, "load_adapter", lambda *_, **__: pytest.fail("loaded again"))
    monkeypatch.setattr(sample, "pipeline", lambda *_, **__: pytest.fail("loaded again"))
    for case in ({"one": 1.0}, {"other": 1.0}, {}):
        drawn(drawer, two, adapters=case)


def test_the_default_is_the_first_lora_at_its_weight(two: Served) -> None:
    assert order(two).settings["adapters"] == {"one": 1.0}
    assert order(two, adapters={"other": None}).settings["adapters"] == {"other": 0.5}
    assert order(two, adapters={"one": 0.0}).key == order(two, adapters={}).key
    both = order(two, adapters={"one": 1.0, "other": 2.0})
    assert both.key == order(two, adapters={"other": 2.0, "one": 1.0}).key


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_same_seed_is_the_same_picture_whatever_it_is_drawn_with(two: Served, guidance: float) -> None:
    drawer = opened(two)
    found = order(two, guidance_scale=guidance)
    mine = Piece(found.prompt, 11, 1)
    alone = drawn(drawer, two, [mine], guidance_scale=guidance)[0]
    others = [Piece("something else entirely", seed, 0) for seed in range(3)]
    for place in range(4):
        together = drawn(drawer, two, [*others[:place], mine, *others[place:]], guidance_scale=guidance)
        assert abs(together[place] - alone).max() <= LEVEL
    again = drawn(drawer, two, [mine, *others, mine], guidance_scale=guidance)
    assert abs(again[0] - again[-1]).max() <= LEVEL
    assert (drawn(drawer, two, [mine], guidance_scale=guidance)[0] == alone).all()
    assert abs(drawn(drawer, two, [mine._replace(number=0)], guidance_scale=guidance)[0] - alone).max() > 10


def test_a_decoder_that_draws_does_so_by_seed_and_number(two: Served, tmp_path: Path) -> None:
    """Whatever is decoded with it; and it is what `sample_images` makes of them."""
    folder = build_consistency(tmp_path / "drawing")
    drawer = Drawer(two, 8, how=How.of(two.base, str(folder), False, False))
    drawer.open()
    found = order(two)
    mine, others = Piece(found.prompt, 11, 1), [Piece("else", seed, 0) for seed in range(3)]
    alone = drawn(drawer, two, [mine])[0]
    for place in range(4):
        together = drawn(drawer, two, [*others[:place], mine, *others[place:]])
        assert abs(together[place] - alone).max() <= LEVEL
    assert abs(drawn(opened(two), two, [mine])[0] - alone).max() > 30  # which the VAE does not draw
    key = found.key
    wanted = sample.draw_images(
        two.base.path, [found.prompt], adapter=two.adapters[0].file, sampler=key.sampler, steps=2, count=2,
        guidance_scale=key.guidance_scale, seed=11, decoder=str(folder),
    )  # fmt: skip
    assert abs(pixels(list(wanted))[1] - alone).max() <= LEVEL


def test_it_is_the_picture_that_sample_images_draws(two: Served) -> None:
    """Of a request's picture i: the noise of (seed, i), as the command line has it."""
    found = order(two, seed=5, count=2)
    drawer = opened(two, batch=1)
    pictures = drawer.draw(
        found.key, [Piece(found.prompt, 5, number) for number in range(2)], lambda *_: None
    )
    wanted = sample.draw_images(
        two.base.path, ["a red circle"], adapter=two.adapters[0].file, seed=5, count=2, batch_size=1
    )
    assert [each.tobytes() for each in pictures] == [each.tobytes() for each in wanted]


def test_memory_that_runs_out_halves_the_batch_and_then_is_a_sentence(
    two: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawer, real, room = opened(two), sample.sample, 2
    found = order(two, steps=2)
    pieces = [Piece(found.prompt, seed, 0) for seed in range(5)]
    wanted = pixels(drawer.draw(found.key, pieces, lambda *_: None))

    def little(pipe: Any, prompts: Any, **settings: Any) -> Any:
        if len(prompts) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(pipe, prompts, **settings)

    monkeypatch.setattr(sample, "sample", little)
    assert abs(pixels(drawer.draw(found.key, pieces, lambda *_: None)) - wanted).max() <= LEVEL
    assert drawer.most(found.key) == 2
    room = 0
    with pytest.raises(UserError, match="memory ran out while drawing a picture of 64 x 64 pixels, one at a"):
        drawer.draw(found.key, pieces, lambda *_: None)


def test_a_gpu_without_room_is_left_for_the_cpu_unless_it_was_asked_for(
    two: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement, pipeline = sample.placement, sample.pipeline
    gpu = {"device": "cuda", "dtype": torch.float16}
    monkeypatch.setattr(
        sample, "placement", lambda device, dtype: placement(device, dtype) if device == "cpu" else gpu
    )

    def full(*given: Any, **settings: Any) -> Any:
        if settings["device"] == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return pipeline(*given, **settings)

    monkeypatch.setattr(sample, "pipeline", full)
    drawer = opened(two)
    assert (drawer.fell_back, drawer.place) == ("CUDA out of memory", "cpu in float32")
    with pytest.raises(torch.OutOfMemoryError):
        Drawer(two, 1, device="cuda").open()


def test_what_after_step_raises_ends_the_drawing_and_leaves_a_whole_drawer(two: Served) -> None:
    drawer, calls = opened(two), 0
    before = drawn(drawer, two)
    found = order(two, steps=5)

    def second(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        drawer.draw(found.key, [Piece(found.prompt, 0, 0)], second)
    assert calls == 2 and (drawn(drawer, two) == before).all()


def test_every_step_says_whose_it_is(two: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of another length are drawn by themselves, and memory has room for three at once."""
    drawer, real = opened(two), sample.sample

    def little(pipe: Any, prompts: Any, **settings: Any) -> Any:
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(pipe, prompts, **settings)

    monkeypatch.setattr(sample, "sample", little)
    key, long = order(two, steps=2).key, "word " * 100
    pieces = [Piece(prompt, 0, 0) for prompt in ("a", long, "b", "c", long, "d")]
    told: list[tuple[list[int], int, int]] = []
    drawer.draw(key, pieces, lambda places, step, steps: told.append((list(places), step, steps)))
    assert sorted(told) == [
        (places, step, 2) for places in ([0, 2], [1], [3, 5], [4]) for step in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a.safetensors", ("a.safetensors", None)), ("a.safetensors=0.5", ("a.safetensors", 0.5)),
     ("hub:o/n/f.safetensors=-1", ("hub:o/n/f.safetensors", -1.0)), ("asset:x", ("asset:x", None))],
)  # fmt: skip
def test_a_weight_stands_behind_the_last_equals_sign(text: str, wanted: tuple[str, float | None]) -> None:
    assert parted(text) == wanted


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "rank=4"
    path.mkdir()
    assert parted(str(path)) == (str(path), None) and parted(f"{path}=2") == (str(path), 2.0)
    for odd in ("nan", "heavy", "", "1e9"):
        with pytest.raises(UserError, match="weight"):
            parted(f"{path}={odd}")
