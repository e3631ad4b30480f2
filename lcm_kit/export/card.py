"""The model card: `README.md` beside the exported files, for whoever gets them without the kit.

Where a file goes was read in the apps' own code, and what to set there too (`in_apps`).
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lcm_kit import samplers
from lcm_kit.config.resolution import shown
from lcm_kit.core.guidance import paper_w
from lcm_kit.evaluation import verdicts
from lcm_kit.evaluation.result_shapes import Cell, Results
from lcm_kit.evaluation.results import (
    brand_rows,
    cells_of,
    compares_brand,
    count,
    figure,
    prompts,
    reference,
    value,
)
from lcm_kit.export import in_apps
from lcm_kit.export.markdown import code, literal, text
from lcm_kit.io import own_files
from lcm_kit.io.files import atomic_write
from lcm_kit.lora import animatediff, inherited
from lcm_kit.lora.apps import CHECKED, TITLES, VERSIONS, WHOLE
from lcm_kit.lora.layers import Lora, layer_group
from lcm_kit.lora.structure import Structure
from lcm_kit.report import brand as look
from lcm_kit.report import contract
from lcm_kit.report.build import describe
from lcm_kit.report.contract import interval
from lcm_kit.report.shared import AGAIN, number, percent
from lcm_kit.sample import contact_sheet, save_png

if TYPE_CHECKING:
    from lcm_kit.lora.provenance import Data, Guidance, Provenance

SHEET = "pictures/teacher-and-student.png"  # within the card's folder
LOOK = "pictures/base-and-style.png"
_ASKED = "a lighthouse by the sea at sunset"
_COLUMNS, _LARGEST = 8, 192  # of the sheet: pictures a row, pixels along a picture's longer side
# What ComfyUI's ModelSamplingDiscrete calls what a base predicts, for few-step sampling
_COMFY_SAMPLING = {"epsilon": "lcm", "v_prediction": "v_prediction", "sample": "x0"}
_PARTS = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
_NAMES = {"teacher": "teacher", "plain": "base, plain sampler", "student": "**this LoRA**"}
_LOOKS = {"base": "base", "styled": "base with the style alone", "adapter": "**this LoRA**"}


def write(
    folder: Path,
    *,
    title: str,
    files: Mapping[str, Path],
    structure: Structure,
    facts: Provenance,
    lora: Lora,
    checks: Sequence[tuple[str, str, str]],
    results: Results | None = None,
    brand: Results | None = None,
    pictures_from: Path | None = None,
) -> Path:
    """Write `folder/README.md`, and the contact sheets that it shows, and return the card's path.

    `files`: the LoRA's files in `folder` by format, `diffusers` or `kohya` or both. `checks`: app, format and
    a sentence on how much of the file it loads. `results` and `brand`: what `results.json` and `brand.json`
    hold, whose pictures lie in the run's folder `pictures_from`; without a student, or base and adapter, in
    it nothing is shown of it, and the brand's own pictures never are: a card is given away. Without a method
    of `facts` it is a LoRA that does not make sampling shorter. Raises `UserError` if the file system
    refuses.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(text=text, code=code, literal=literal, number=number)
    names, use = {style: Path(file).name for style, file in files.items()}, in_apps.use_of(facts)
    drawn = evaluation(results)
    compared = drawn and (drawn["head"].teacher, drawn["head"].student)
    asked = _sheet(folder / SHEET, drawn, compared, pictures_from) if drawn else []
    styled = in_the_style(brand, results)
    compared = styled and (styled["head"].base, styled["head"].adapter)
    looks = _sheet(folder / LOOK, styled, compared, pictures_from) if styled else []
    page = environment.get_template("card.md.j2").render(
        title=title,
        diffusers_file=names.get("diffusers"),
        kohya_file=names.get("kohya"),
        tag=_prompt_tag(names.get("kohya", f"{title}.safetensors")),
        facts=facts,
        fast=facts.method.name is not None,
        method=facts.distilled.title if facts.distilled else None,
        use=use,
        steps=use.steps,
        renews=not samplers.deterministic(facts.student.sampler, 2),
        student_sampler=samplers.title_of(facts.student.sampler),
        guidance=_baked(facts.guidance),
        cfg=facts.student.usual_guidance,
        guided=facts.student.guidance_scale is not None,
        base=_base(facts.base.path, structure),
        structure=structure,
        kind=structure.generation.title,
        prediction=prediction(structure),
        comfy_sampling=_COMFY_SAMPLING.get(prediction(structure)),
        zero_snr=structure.zero_terminal_snr,
        clip=any(part != "unet" for part in lora.parts()),
        motion=animatediff.names(structure) if animatediff.fits(structure) else None,
        versions=VERSIONS,
        checked=CHECKED,
        app_names=", ".join(TITLES[app] for app in WHOLE),
        resolution=_resolution(facts.data, structure.resolution),
        tags=_tags(structure, facts),
        licences=inherited.declared(facts),
        terms=inherited.terms(facts),
        layers=_layers(lora),
        checks=checks,
        commands=[_verify_command(name, facts.base.path) for name in names.values()],
        evaluation=drawn,
        sheet=SHEET if asked else None,
        prompts=asked,
        brand=styled,
        brand_sheet=LOOK if looks else None,
        brand_prompts=looks,
        asked=next((each["prompts"][0] for each in (styled, drawn) if each), _ASKED),
    )
    # A file name need not be text: what cannot be encoded is shown as `?`
    atomic_write(folder / "README.md", page.encode("utf-8", "replace"))
    return folder / "README.md"


def _verify_command(file: str, base: str | None) -> str:
    command = f"lcm-kit verify {shlex.quote(file)} --base {shlex.quote(base or 'BASE')}"
    return re.sub(r"[\r\n]+", " ", command)  # a line of its own could end the block of code


def _prompt_tag(file: str) -> str:
    """The name for A1111's `<lora:NAME:1>`, in which `:` and `>` end the name."""
    return re.sub(r'[<>:"/\\|?*\r\n]+', "-", file.removesuffix(".safetensors"))


# -- What it is ----------------------------------------------------------------------------------------------


def prediction(structure: Structure) -> str:
    """What the base predicts: `epsilon`, `v_prediction`, ..., or `unknown` where only the generation is."""
    if structure.prediction_type is None:
        return structure.generation.prediction_type or "unknown"
    return structure.prediction_type


def _base(path: str | None, structure: Structure) -> dict[str, Any]:
    """How to name the base, and how to load it: an asset, a hub id or a folder."""
    path = path or None
    hub = (
        bool(path and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path, re.ASCII))
        and not Path(path or "").exists()
    )
    asset = path.removeprefix("asset:") if path and path.startswith("asset:") else None
    return {"path": path, "hub": hub, "asset": asset, "name": path or structure.label}


def _tags(structure: Structure, facts: Provenance) -> list[str]:
    fast = facts.distilled.tags if facts.distilled else ()
    return ["text-to-image", structure.family.hub_tag, "lora", *fast, "diffusers"]


def _baked(guidance: Guidance | None) -> dict[str, str] | None:
    """What is baked in, as `guidance_scale` and as the LCM paper's w; None where that is nothing."""
    if guidance is None or guidance.max <= 1:
        return None
    ends = [guidance.min, guidance.max]
    return {"scale": in_apps.spread(ends), "w": in_apps.spread(float(paper_w(end)) for end in ends)}


def _layers(lora: Lora) -> dict[str, Any]:
    """Sizes, and the modules of each block: `UNet` -> `down_blocks.0: 44, mid_block: 46`."""
    blocks = Counter(layer_group(name) for name in lora.layers)
    parts = {}
    for part in lora.parts():
        within = {
            name.removeprefix(f"{part}."): n for name, n in blocks.items() if name.startswith(f"{part}.")
        }
        detail = ", ".join(f"{name}: {n}" for name, n in within.items())
        total = sum(within.values()) or blocks[part]
        parts[_PARTS[part]] = f"{_count(total, 'module')}" + (f" ({detail})" if detail else "")
    return {
        "rank": in_apps.spread(layer.rank for layer in lora.layers.values()),
        "alpha": in_apps.spread(layer.alpha for layer in lora.layers.values()),
        "modules": len(lora.layers),
        "parameters": _millions(lora.parameters),
        "parts": parts,
    }


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")


def _millions(n: int) -> str:
    return f"{n / 1e6:.2f} million" if n >= 1e6 else f"{n:,}"


# -- What was measured ---------------------------------------------------------------------------------------


def evaluation(results: Results | None) -> dict[str, Any] | None:
    """The rows to show, and whether there is anything in each column; None without a student.

    The teacher, then for each number of UNet calls the best plain sampler, if one ran at it, and the student.
    """
    if results is None or not verdicts.has_student(results):
        return None
    cells = results["cells"]
    students = sorted(cells_of(cells, "student"), key=lambda cell: cell["unet_calls"])
    shown = [reference(results)]
    for student in students:
        plain = verdicts.best_plain(results, student["unet_calls"])
        shown += [plain, student] if plain else [student]
    names = ("prompt_adherence", "frechet_biased")
    return {
        "rows": [_row(cell) for cell in shown],
        "head": verdicts.quality_headline(results),
        "measured": {key: any(figure(cell, key) for cell in shown) for key in names},
        "n": count(results),
        "confidence": results["settings"]["confidence"],
        "weight": results["settings"].get("lora_weight") or 1.0,
        "floor": results.get("frechet_floor"),
        "prompts": prompts(results)["texts"],
    }


def _row(cell: Cell) -> dict[str, Any]:
    """A row of the card's table."""
    return {
        "who": _NAMES[cell["kind"]],
        "how": describe(cell),
        "calls": cell["unet_calls"],
        "right": interval(figure(cell, "prompt_adherence"), percent),
        "frechet": value(cell, "frechet_biased"),
        "distance": value(cell, "pixel_distance"),
        "saturation": value(cell, "saturation"),
    }


def in_the_style(found: Results | None, results: Results | None = None) -> dict[str, Any] | None:
    """What the card says of a brand.json: every row, and the verdict; None without base and adapter."""
    if not found or not compares_brand(found):
        return None
    head, adherence = verdicts.brand_headline(found, results), found["adherence"]
    show = look.gauge(adherence)
    return {
        "rows": [
            {
                **row,
                "who": _LOOKS[row["name"]],
                "how": look.how(row),
                "similar": interval(row["brand_similarity"]),
                "shown": interval(row["in_style"], percent),
                "asked": interval(row["brand_adherence"], show),
                "other": interval(row["control_adherence"], show),
            }
            for row in brand_rows(found)
        ],
        "contract": _contract(found, results),
        "head": head,
        "verdict": _verdict(head, adherence),
        "clip": adherence == "clip",
        "confidence": found["settings"]["confidence"],
        "n": len(prompts(found)["texts"]),
        "prompts": prompts(found)["texts"],
    }


def _contract(found: Results, results: Results | None) -> dict[str, Any] | None:
    """What the card says of the trigger; None where that was not measured."""
    if (shown := contract.context(found, results)) is None:
        return None
    rows = [{**row, "who": _LOOKS[row["row"]["name"]], "how": look.how(row["row"])} for row in shown["rows"]]
    return {**shown, "rows": rows}


def _verdict(head: verdicts.Brand, adherence: str) -> str:
    """The verdict with its reason."""
    answer = verdicts.brand_verdict(head, adherence)
    if answer == verdicts.UNKNOWN:
        return f"{answer}: nearness to the brand's pictures was not measured"
    if answer == "No" and head.nearer and head.nearer["low"] > 0:
        return "No: nearer to the brand's pictures than the base, but no prompt shows the style as they do"
    if answer == "No":
        return "No: it is not nearer to the brand's pictures than the base"
    if answer == "Yes":
        return answer
    reasons = []
    if verdicts.too_few(head):
        reasons.append(f"{verdicts.showing(head, head.adapter)} of {head.n} prompts show the style")
    if verdicts.forgotten(head, adherence) is not None:
        reasons.append("some of what the base can draw is lost")
    return f"In part: it is nearer to the brand's pictures, but {' and '.join(reasons)}"


def _resolution(data: Data, own: int) -> str:
    """What it was trained at, else the base's `own`: `about 512 × 512 pixels, in 3 shapes, ...`."""
    size, sizes = shown(data.resolution or own), data.sizes
    if not sizes:
        return f"{size} pixels"
    ends = " to ".join(dict.fromkeys((shown(sizes[0]), shown(sizes[-1]))))
    return f"about {size} pixels, in {len(sizes)} shape{'s'[: len(sizes) != 1]}, {ends}"


def _sheet(file: Path, drawn: Mapping[str, Any], rows: Any, run: Path | None) -> list[str]:
    """Write the contact sheet, the pictures of one of `rows` above those of the other; returns its columns'
    prompts, maybe none.
    """
    pairs = zip(drawn["prompts"], *(row["pictures"] for row in rows), strict=False)
    found = [] if run is None else [
        (prompt, run / above, run / below)
        for prompt, above, below in pairs
        if (run / above).is_file() and (run / below).is_file()
    ][:_COLUMNS]  # fmt: skip
    if not found:
        return []
    prompts, above, below = zip(*found, strict=True)
    save_png(contact_sheet([_small(file) for file in (*above, *below)], len(found)), file)
    return list(prompts)


def _small(file: Path) -> Image.Image:
    small = own_files.read_picture(file, AGAIN).convert("RGB")
    small.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return small
