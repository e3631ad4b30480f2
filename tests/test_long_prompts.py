"""Pictures of long and of weighted prompts: diffusers' own pipelines, given embeddings that are made here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lcm_kit import sample
from lcm_kit.bases.emphasis import read
from lcm_kit.cli.main import app
from lcm_kit.errors import UserError
from lcm_kit.evaluation import draw

SHORT, LONG = ["a cat", "two owls, at night"], "a red fox jumps, over the lazy dog, in the snow"
# a token a letter: where the rule of A1111 cuts LONG, behind the comma of its first 22 and of its next 22
LONG_CHUNKS = ["a red fox jumps,", "over the lazy dog,", "in the snow"]
SEED = 5


def noise_and_streams(pipe: Any, rows: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    streams = sample.generators(SEED, 0, max(rows) + 1)
    side = pipe.unet.config.sample_size
    drawn = [torch.randn((4, side, side), generator=stream) for stream in streams]
    return torch.stack([drawn[row] for row in rows]), [streams[row] for row in rows]


def by_diffusers(
    pipe: Any, rows: Sequence[int], guidance_scale: float, sampler: str = "ddim", **told: Any
) -> Tensor:
    """A call of the pipeline with the kit's noise, scheduler and steps, and nothing else of it."""
    noise, streams = noise_and_streams(pipe, rows)
    own, pipe.scheduler = pipe.scheduler, sample.scheduler(sampler, pipe.scheduler.config)
    try:
        return pipe(
            **told, latents=noise, generator=streams, num_inference_steps=2, guidance_scale=guidance_scale,
            output_type="latent",
        ).images  # fmt: skip
    finally:
        pipe.scheduler = own


def sd_embeds(pipe: Any, texts: Sequence[str]) -> Tensor:
    """Each text by the pipeline's own encoding, one after the other: [1, k L, D]."""
    return torch.cat([pipe.encode_prompt([text], "cpu", 1, False)[0] for text in texts], dim=1)


@pytest.mark.parametrize("sampler", ["ddim", "lcm"])
def test_prompts_that_a_pipeline_reads_are_given_to_it_as_they_are(
    sd_base: Callable[..., Path], sampler: str
) -> None:
    pipe = sample.pipeline(str(sd_base()))
    settings = {"sampler": sampler, "steps": 2, "guidance_scale": 3.0, "seed": SEED}
    brackets = ["a (cat)", "[two] owls"]
    for prompts, negative in ((SHORT, None), (brackets, None), (SHORT, "a dog")):
        told = {"prompt": list(prompts), "negative_prompt": None if negative is None else [negative] * 2}
        wanted = by_diffusers(pipe, [0, 1], 3.0, sampler, **told)
        assert torch.equal(sample.latents(pipe, prompts, negative_prompt=negative, **settings), wanted)
    wanted = by_diffusers(pipe, [0, 1], 1.0, sampler, prompt=list(SHORT))
    assert torch.equal(sample.latents(pipe, SHORT, **{**settings, "guidance_scale": 1.0}), wanted)
    cut = by_diffusers(pipe, [0], 3.0, sampler, prompt=[LONG])
    assert torch.equal(sample.latents(pipe, [LONG], chunks=1, **settings), cut)


@pytest.mark.parametrize("negative", [None, "a dog", "blue, grey, brown and black"])
def test_long_prompts_are_drawn_from_all_chunks(sd_base: Callable[..., Path], negative: str | None) -> None:
    """The negative prompt is brought to the same length: repeated, or of chunks itself (2, so 6 for both)."""
    pipe = sample.pipeline(str(sd_base()))
    asked = sd_embeds(pipe, LONG_CHUNKS)
    several = negative is not None and "," in negative
    chunks = ["blue, grey,", "brown and black"] if several else [negative or ""]
    other = sd_embeds(pipe, chunks)
    n = 6 if len(chunks) == 2 else 3
    told = {
        "prompt_embeds": asked.repeat(1, n // 3, 1),
        "negative_prompt_embeds": other.repeat(1, n // len(chunks), 1),
    }
    wanted = by_diffusers(pipe, [0], 4.0, **told)
    settings: Any = {"sampler": "ddim", "steps": 2, "guidance_scale": 4.0, "seed": SEED}
    found = sample.latents(pipe, [LONG], negative_prompt=negative, **settings)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    first = sample.latents(pipe, [LONG_CHUNKS[0]], negative_prompt=negative, **settings)
    assert (found - first).abs().max() > 1e-3


def test_sdxl_is_given_the_first_chunks_pooled_text_and_zeros(sdxl_base: Path) -> None:
    pipe = sample.pipeline(str(sdxl_base))
    parts = [
        pipe.encode_prompt([text], device="cpu", do_classifier_free_guidance=True) for text in LONG_CHUNKS
    ]
    asked = torch.cat([part[0] for part in parts], dim=1)
    wanted = by_diffusers(
        pipe, [0], 4.0, prompt_embeds=asked, negative_prompt_embeds=torch.zeros_like(asked),
        pooled_prompt_embeds=parts[0][2], negative_pooled_prompt_embeds=torch.zeros_like(parts[0][2]),
    )  # fmt: skip
    settings: Any = {"sampler": "ddim", "steps": 2, "guidance_scale": 4.0, "seed": SEED}
    torch.testing.assert_close(sample.latents(pipe, [LONG], **settings), wanted, rtol=0, atol=1e-5)
    named = pipe.encode_prompt(["a dog"], device="cpu", do_classifier_free_guidance=False)
    wanted = by_diffusers(
        pipe, [0], 4.0, prompt_embeds=asked, negative_prompt_embeds=named[0].repeat(1, 3, 1),
        pooled_prompt_embeds=parts[0][2], negative_pooled_prompt_embeds=named[2],
    )  # fmt: skip
    found = sample.latents(pipe, [LONG], negative_prompt="a dog", **settings)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_weights_are_drawn_from_multiplied_embeddings(sd_base: Callable[..., Path]) -> None:
    """Its last norm has a bias, as a trained one has: the mean is one to return to."""
    pipe = sample.pipeline(str(sd_base()))
    norm = next(m for name, m in pipe.text_encoder.named_modules() if name.endswith("final_layer_norm"))
    norm.bias.data.fill_(0.2)
    (plain,) = sd_embeds(pipe, ["a cat"])
    heavier = plain.clone()
    heavier[2:5] *= 1.5  # a token a letter, behind the start and "a"
    heavier *= plain.double().mean() / heavier.double().mean()
    wanted = by_diffusers(pipe, [0], 1.0, prompt_embeds=heavier[None].float())
    settings: Any = {"sampler": "ddim", "steps": 2, "seed": SEED}
    found = sample.latents(pipe, [read("a (cat:1.5)")], **settings)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert (found - sample.latents(pipe, ["a cat"], **settings)).abs().max() > 1e-3
    literal = sample.latents(pipe, ["a (cat:1.5)"], **settings)
    assert torch.equal(literal, by_diffusers(pipe, [0], 1.0, prompt=["a (cat:1.5)"]))


def test_no_picture_hangs_on_the_prompts_beside_it(sd_base: Callable[..., Path]) -> None:
    pipe = sample.pipeline(str(sd_base()))
    prompts = [SHORT[0], LONG, read("a (cat:1.5)"), SHORT[1], "blue, grey, brown and black"]
    settings: Any = {"sampler": "lcm", "steps": 2, "seed": SEED}
    whole = sample.latents(pipe, prompts, **settings)
    for row, prompt in enumerate(prompts):
        alone = sample.latents(pipe, [prompt], first=row, **settings)
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=0, atol=1e-4)


# -- From a program, a terminal, an evaluation ---------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], Any]]:
    """What `latents` is asked for, where its callers call it."""
    seen: list[tuple[list[Any], Any]] = []
    own = sample.latents

    def latents(pipe: Any, prompts: Sequence[Any], **settings: Any) -> Tensor:
        seen.append((list(prompts), settings.get("negative_prompt")))
        return own(pipe, prompts, **settings)

    monkeypatch.setattr(sample, "latents", latents)
    return seen


def test_draw_images_reads_what_has_a_weights_number_and_says_so(
    sd_base: Callable[..., Path], asked: list[tuple[list[Any], Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, prompts = str(sd_base()), ["a (cat:1.5)", "a (cat)", "a cat"]
    settings: Any = {"steps": 1, "sampler": "ddim", "guidance_scale": 2.0, "negative_prompt": "(dog:0.5)"}
    list(sample.draw_images(base, prompts, **settings))
    dog = read("(dog:0.5)")
    assert asked.pop() == ([read("a (cat:1.5)"), "a (cat)", "a cat"], dog)
    said = " ".join(capsys.readouterr().err.split())
    assert "read with its brackets as weights, as apps read it: 'a (cat:1.5)' and 1 more" in said
    assert "drawn with its brackets or BREAK as they stand, where apps read weights: 'a (cat)';" in said
    list(sample.draw_images(base, prompts, emphasis=True, **settings))
    assert asked.pop() == ([read("a (cat:1.5)"), read("a (cat)", True), "a cat"], dog)
    list(sample.draw_images(base, prompts, emphasis=False, **settings))
    assert asked.pop() == (prompts, "(dog:0.5)")
    assert "brackets" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"prompt '\(a:1.2\) \[b\|c\]': \[a:b:0.5\] and \[a\|b\]"):
        list(sample.draw_images(base, ["(a:1.2) [b|c]"], **settings))


@pytest.mark.parametrize(
    ("option", "wanted"), [((), None), (("--emphasis",), True), (("--no-emphasis",), False)]
)
def test_the_command_line_hands_it_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: tuple[str, ...], wanted: bool | None
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        sample, "sample_to_folder", lambda *a, **k: seen.append(k["emphasis"]) or Path("sheet.png")
    )
    done = CliRunner().invoke(app, ["sample", "--prompt", "a (cat:1.5)", "--output", str(tmp_path), *option])
    assert done.exit_code == 0, done.output
    assert seen == [wanted]


def test_an_evaluation_draws_by_the_weights_and_judges_by_the_words(
    sd_base: Callable[..., Path], asked: list[tuple[list[Any], Any]]
) -> None:
    from lcm_kit.drawing.batches import Batches
    from lcm_kit.evaluation.cells import Cell
    from lcm_kit.share import ALONE

    pipe, judged = sample.pipeline(str(sd_base())), []

    def look(pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        judged.append(list(prompts))
        return {}

    samples = draw.Samples(("a (cat:1.5)", "a (cat)"), 1, SEED, 64, 2, 1)
    cell = Cell("plain", None, "ddim", 1, 1.0)
    (rows,) = draw.draw(
        pipe, cell, samples, look, ALONE, Batches.of_pictures(2, 64, 64, "cpu"), lambda n: None
    )
    assert asked == [([read("a (cat:1.5)"), "a (cat)"], None)] and judged == [["a cat", "a (cat)"]]
    assert rows["latents"].shape == (2, 4, 16, 16)
