"""What a story tells: the folder's check and the plan before it starts, numbers and files at its end."""

from __future__ import annotations

import shlex
from pathlib import Path

from lcm_kit import console
from lcm_kit.config.schema import Training
from lcm_kit.data import prior
from lcm_kit.evaluation import results, verdicts
from lcm_kit.evaluation.result_shapes import Results
from lcm_kit.samplers import sampler_of
from lcm_kit.workflow.configs import Story


def plan(story: Story, pictures: int) -> None:
    """Print what will run, on how many `pictures`, and where it goes."""
    table = console.Table(box=None, pad_edge=False)
    for head in ("stage", "what", "goes to"):
        table.add_column(head, overflow="fold")
    for row in rows(story, pictures):
        table.add_row(*row)
    console.show(table)


def rows(story: Story, pictures: int) -> list[tuple[str, str, str]]:
    """The plan's lines: stage, what it does, where it goes."""
    style, distill, run = story.style, story.distill, story.run
    return [
        ("base", f"{distill.base.path}, at {distill.data.resolution} pixels", ""),
        ("encode", _pictures(story, pictures), style.data.cache),
        ("style", _training(style), style.output),
        ("distil", f"{_training(distill, _start(story))}, on {_seen(story)}", distill.output),
        ("export", "both adapters, for diffusers and the apps", f"{run}/export, {style.output}/export"),
        ("evaluate", ", ".join(config.recipe for config in story.evaluations), str(run)),
        ("report", "one page", str(run / "report.html")),
    ]


def _training(config: Training, start: str = "") -> str:
    """`200 steps of 16, LoRA of rank 16`, and how far it is if it was begun."""
    from lcm_kit.training import run_files, run_folder

    run, batch = Path(config.output), config.batch_size * config.accumulation
    done = run_folder.adapter_steps(run)
    states = run_files.folders(run)
    text = f"{config.steps:,} steps of {batch}, LoRA of rank {config.adapter.rank}{start}"
    if done >= config.steps:
        return f"{text}; done"
    return f"{text}; begun, continues" if done or states else text


def _start(story: Story) -> str:
    style, start = story.style.output, story.distill.adapter.start
    names = ["the style" if entry.path == style else entry.path for entry in start]
    return f", which starts as {' and '.join(names)}" if names else ""


def _seen(story: Story) -> str:
    data = story.distill.data
    samples = f"{data.samples.count:,} samples of the styled base"
    general = f" and {_general(story)}" if data.regularization else ""
    images = f"the pictures{general}"
    mix, prompts = f"{images} and {samples}", f"the prompts of {data.samples.prompts}, no pictures"
    return {"images": images, "teacher": samples, "mix": mix, "prompts": prompts}[data.source]


def _general(story: Story) -> str:
    """The pictures that are to keep what does not name the style."""
    drawn = story.style.prior.prompts is not None and prior.data_of(story.style).path
    general = story.distill.data.regularization
    return f"{story.style.prior.count:,} that the base drew" if general == drawn else str(general)


def _pictures(story: Story, count: int) -> str:
    share = story.style.validation.held_out
    kept = f", {max(1, round(share * count))} of them held out from the style" if share else ""
    return f"{count:,} pictures of {story.distill.data.path}{kept}"


def summary(story: Story) -> None:
    """Print the numbers of the evaluations, then which file goes where, as far as there are such files."""
    run, name = story.run, story.run.resolve().name
    found = results.of_run(run)
    if found:
        quality_table(found)
    for sentence in _brand(run, found):
        console.say(f"- {sentence}")
    lines = [
        "",
        f"Your style in few steps ({_few_steps(story)}):",
        f"  ComfyUI, A1111, Forge, InvokeAI, SD.Next   {run / 'export' / f'{name}.safetensors'}",
        f"  diffusers                                  {run / 'export' / 'pytorch_lora_weights.safetensors'}",
        "Your style alone, with the base's usual sampler, steps and CFG:",
        f"  {Path(story.style.output) / 'export' / 'style.safetensors'}",
        f"What to set in each app: {run / 'export' / 'README.md'}",
        f"The whole story, for a browser: {run / 'report.html'}",
    ]
    for line in lines:
        console.say(line)


def _few_steps(story: Story) -> str:
    """`LCM sampler, 4 steps, CFG 1, weight 1; 2 to 8 steps work`."""
    method = story.distill.student()
    more = [n for n in method.judged_steps if n > 1]
    works = f"; {min(more)} to {max(more)} steps work" if len(more) > 1 else ""
    works += "; no other number of steps" if method.only_steps else ""
    sampler = sampler_of(method.sampler)
    apps = f". {sampler.instead.rstrip('.')}" if sampler.instead else ""
    how = f"{method.usual_steps} steps, CFG {method.usual_guidance:g}, weight 1"
    return f"{sampler.name_in_apps} sampler, {how}{works}{apps}"


def other_way(story: Story, speed: str | None) -> None:
    """Print how to join the style with an acceleration LoRA (docs/brand-study.md).

    `speed`: the one that is known for the base.
    """
    base, lora = str(story.distill.base.path), speed or "LCM_LORA"
    command = ["lcm-kit", "compose", story.style.output, lora, "--base", base]
    asked = (
        "\nThere is another way, which"
        if speed
        else "\nIs there an LCM-LoRA for your base (SD1.5: hub:latent-consistency/lcm-lora-sdv1-5, SDXL: "
        "hub:latent-consistency/lcm-lora-sdxl, tiny-sd: asset:tiny-lcm-lora)? It can be started from "
        "(--speed, with another --output). And there is another way, which"
    )
    text = (
        f"{asked} trains nothing more: this finds the weights of both; where the style is near to what the "
        "base draws it may be sharper, at the price of other prompts (docs/brand-study.md):"
    )
    for line in (text, f"  {shlex.join(command)}"):
        console.say(line)


def _brand(run: Path, quality: Results | None) -> list[str]:
    from lcm_kit.report import brand, contract

    found = results.of_brand(run)
    if found is None:
        return []
    told = brand.sentences(verdicts.brand_headline(found, quality), found["adherence"])
    kept = contract.sentence(found, quality)
    return [*told, f"Trigger: {kept}"] if kept else told


def quality_table(found: Results) -> None:
    """Print the base at its full steps, and near 4 UNet calls the adapter and the best plain sampler."""
    head = verdicts.quality_headline(found) if verdicts.has_student(found) else None
    plain = head.plain if head else verdicts.best_plain(found, 4)
    chosen = [results.reference(found), *([plain] if plain else []), *([head.student] if head else [])]
    columns = ("", "UNet calls", "right attributes", "Fréchet distance", "seconds an image")
    table = console.Table(*columns, box=None, pad_edge=False)
    names = {"teacher": "base", "student": "your adapter"}
    for cell in chosen:
        keys = ("prompt_adherence", "frechet_biased", "seconds")
        right, frechet, seconds = (results.value(cell, key) for key in keys)
        table.add_row(
            names.get(cell["kind"], f"base, {cell['sampler']}"),
            str(cell["unet_calls"]),
            "-" if right is None else f"{right:.1%}",
            "-" if frechet is None else f"{frechet:.3g}",
            "-" if seconds is None else f"{seconds:.3f}",
        )
    console.show(table)


def duration(seconds: float) -> str:
    """Seconds as `12.3 s` or `4 min 9 s`."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
