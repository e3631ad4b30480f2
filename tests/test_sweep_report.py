"""A sweep's report: one file that asks for nothing, with every cell, picture and interval in it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcm_kit.errors import UserError
from lcm_kit.report import build, shared, sweep, sweep_plots
from lcm_kit.report.sweep import write_sweep_report
from lcm_kit.report.sweep_sheets import sheets
from tests.sweeps import PROMPTS, build_sweep

EVIL = '<script>alert(1)</script></script><img src="http://evil.example/a.png"> & "quotes" </svg>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FEW: Any = {
    "samplers": ("lcm",), "steps": (1, 4), "guidance": (1.0, 2.0), "teachers": (5.0,), "prompts": PROMPTS[:2],
    "metrics": ("prompt_adherence", "saturation", "energy"),
}  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, in order, and the text of the table's rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[str]] = {}
        self._row: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "tr":
            self._row = self.rows.setdefault(found.get("id") or "", [])
        if tag in ("td", "th") and self._row is not None:
            self._row.append("")

    def handle_data(self, data: str) -> None:
        if self._row:
            self._row[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self._row = None

    def of(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """The attributes of every such tag."""
        return [
            found
            for name, found in self.tags
            if name == tag and all(found.get(key) == text for key, text in wanted.items())
        ]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One sweep, reported once, that the tests only read: its folder and results. One prompt is hostile."""
    folder = tmp_path_factory.mktemp("sweep")
    some = ("prompt_adherence", "latent_distance", "energy", "cost_1000")
    prompts = (EVIL, *PROMPTS[:2])
    results = build_sweep(folder, weights=(0.8, 1.0), samplers=("lcm",), prompts=prompts, metrics=some)
    write_sweep_report(folder)
    return folder, results


@pytest.fixture(scope="module")
def found(swept: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """What the page of `swept` is made of."""
    return sweep.context(swept[0])


@pytest.fixture(scope="module")
def text(swept: tuple[Path, dict[str, Any]]) -> str:
    return (swept[0] / "report.html").read_text()


def test_nothing_is_asked_for_outside_of_the_page(text: str) -> None:
    page = Page(text)
    for _, found in page.tags:
        for key in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            assert (found.get(key) or "#").startswith(("data:image/", "#"))
        assert not any(key.startswith("on") for key in found)
    assert not {"link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    (policy,) = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")


def test_prompts_stay_text(text: str) -> None:
    page = Page(text)
    assert len(page.of("script")) == 1  # our own
    assert EVIL not in text and html.escape(EVIL, quote=False).split("quotes")[0][:40] in text
    assert page.of("button", **{"data-prompt": EVIL})


def test_each_picture_is_there_once_and_whole(swept: tuple[Path, dict[str, Any]], text: str) -> None:
    folder, results = swept
    page = Page(text)
    files = [name for cell in results["cells"] for name in cell["pictures"]]
    pictures = [found["href"] or "" for found in page.of("image")]
    assert len(pictures) == len(files)
    for name, picture in zip(files, pictures, strict=True):
        assert base64.b64decode(picture.partition(",")[2]) == (folder / name).read_bytes()
    used = {found["href"] for found in page.of("use")}
    assert used == {f"#p{n}" for n in range(len(files))}  # each is shown somewhere


def test_every_cell_is_in_the_table_with_its_figures(swept: tuple[Path, dict[str, Any]], text: str) -> None:
    _, results = swept
    rows = Page(text).rows
    shown = [key for key in results["metrics"] if key != "energy"]  # which no cell has
    for n, cell in enumerate(results["cells"]):
        head, calls, *figures = (" ".join(each.split()) for each in rows[f"cell-{n}"])
        assert f"guidance_scale {cell['guidance_scale']:g}" in head and int(calls) == cell["unet_calls"]
        assert len(figures) == len(shown)
        for key, figure in zip(shown, figures, strict=True):
            found = cell["metrics"][key]
            wanted = "–" if found is None else shared.number(found["value"])
            if found and found["low"] < found["high"]:
                wanted += f" ({shared.number(found['low'])} to {shared.number(found['high'])})"
            assert figure == wanted


def test_sheets_hold_every_cell(found: dict[str, Any], text: str) -> None:
    teacher, light, full, weights, plain = found["sheets"]
    assert teacher.columns == ("1", "3", "5", "7")
    assert full.columns == ("1 step", "2 steps", "4 steps", "8 steps")
    assert [label for label, _ in full.rows] == ["1", "1.5", "2", "3"]
    at = dict(full.rows)["1.5"][2]
    assert at is not None and at["id"] == "quickstart-lcm-4-g1.5-w1"
    assert "LoRA weight 0.8" in light.title and [label for label, _ in weights.rows] == ["0.8", "1"]
    assert plain.rows[0][0] == "1"
    shown = {button["data-cell"] for button in Page(text).of("button") if "of" in (button.get("class") or "")}
    assert shown == {str(n) for n in range(len(found["cells"]))}


def test_a_sheet_of_one_number_of_steps_lies_on_its_side() -> None:
    scales = (1.0, 1.5, 2.0)
    cells = [
        {"id": f"a-{g}", "kind": "student", "adapter": "a", "sampler": "lcm", "steps": 4, "guidance_scale": g,
         "lora_weight": 1.0, "unet_calls": 4} for g in scales
    ]  # fmt: skip
    (sheet,) = sheets(cells)
    assert (sheet.columns, sheet.rows) == (("1", "1.5", "2"), (("4 steps", tuple(cells)),))
    assert sheet.holds("a-2.0") and not sheet.holds("a-3.0")


def test_the_headline(found: dict[str, Any], text: str) -> None:
    head = [(each["title"], each["cell"]["id"]) for each in found["head"]]
    assert head == [
        ("Teacher", "teacher-ddim-50-g1"),
        ("Recommended", "quickstart-lcm-4-g1-w0.8"),
        ("Best plain sampler at 4 UNet calls", "plain-ddim-4-g1"),  # 4 steps alone beat 2 with guidance
    ]
    command = html.unescape(re.findall(r"<pre[^>]*>(.*?)</pre>", text, re.S)[0])
    words = shlex.split(command)
    assert words[:2] == ["lcm-kit", "sample"] and words[words.index("--prompt") + 1] == EVIL
    assert words[words.index("--adapter") + 1] == "runs/quickstart/my lora.safetensors"
    assert [words[words.index(key) + 1] for key in ("--steps", "--guidance", "--weight", "--sampler")] == [
        "4", "1", "0.8", "lcm",
    ]  # fmt: skip


def test_300_pictures_stay_below_20_mb(tmp_path: Path) -> None:
    """Even of noise, which nothing compresses: 25 cells of twelve prompts."""
    grid: Any = {"guidance": (1.0, 1.5, 2.0, 3.0), "steps": (1, 2, 4, 8), "metrics": ()}
    prompts = [f"prompt {k}" for k in range(12)]
    results = build_sweep(tmp_path, **{**FEW, **grid, "prompts": prompts}, size=32)
    noisy = tmp_path / "noise.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(noisy)
    files = [name for cell in results["cells"] for name in cell["pictures"]]
    assert len(files) == 300
    for name in files:
        (tmp_path / name).unlink()
        (tmp_path / name).hardlink_to(noisy)
    page = write_sweep_report(tmp_path)
    assert page.stat().st_size < 20_000_000
    picture = Page(page.read_text()).of("image")[0]["href"] or ""
    with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as small:
        assert max(small.size) >= 128


def test_pictures_are_made_as_small_as_their_budget(tmp_path: Path) -> None:
    Image.effect_noise((256, 256), 90).convert("RGB").save(tmp_path / "a.png")
    whole = shared.picture_uri(tmp_path / "a.png", budget=10**6)
    assert whole.startswith("data:image/png")
    for budget in (40_000, 10_000, 3_000):
        data = base64.b64decode(shared.picture_uri(tmp_path / "a.png", budget=budget).partition(",")[2])
        assert data[:2] == b"\xff\xd8" and len(data) <= budget


# -- Plots ---------------------------------------------------------------------------------------------------


def points(values: Sequence[tuple[int, float, float]]) -> list[dict[str, Any]]:
    """Cells of (steps, guidance, value), each with the interval value - 0.1 to value + 0.3."""
    return [
        {"steps": steps, "guidance_scale": scale, "unet_calls": steps, "kind": "student", "metrics":
            {"m": {"value": value, "low": value - 0.1, "high": value + 0.3}}}
        for steps, scale, value in values
    ]  # fmt: skip


def test_lines_have_their_intervals_and_the_break_its_mark() -> None:
    cells = points([(4, 2, 0.5), (1, 1, 0.9), (1, 2, 0.7), (4, 1, 1.0)])
    level = {"value": 0.8, "low": 0.75, "high": 0.85}
    drawn = sweep_plots.lines(
        cells, "m", {"label": "the metric", "better": "higher"}, level=level, breaks={4: 2}
    )
    (axes,) = drawn.axes
    one, four, cross, teacher = axes.get_lines()
    assert [one.get_label(), four.get_label(), teacher.get_label()] == ["steps 1", "steps 4", "teacher"]
    np.testing.assert_allclose(one.get_xydata(), [(1, 0.9), (2, 0.7)])
    np.testing.assert_allclose(four.get_xydata(), [(1, 1.0), (2, 0.5)])
    np.testing.assert_allclose(cross.get_xydata(), [(2, 0.5)])
    assert set(teacher.get_ydata()) == {0.8}
    for shade, values in zip(axes.collections, ([0.9, 0.7], [1.0, 0.5]), strict=True):
        ends = {tuple(np.round(xy, 6)) for xy in shade.get_paths()[0].vertices}
        assert ends == {
            (x, round(y + d, 6)) for x, y in zip((1, 2), values, strict=True) for d in (-0.1, 0.3)
        }
    (band,) = axes.patches
    assert [band.get_y(), band.get_y() + band.get_height()] == pytest.approx([0.75, 0.85])
    assert one.get_marker() != four.get_marker() and one.get_linestyle() != four.get_linestyle()


def test_a_single_point_has_its_interval_too() -> None:
    drawn = sweep_plots.lines(points([(4, 1, 0.5)]), "m", {"label": "m"})
    (bar,) = drawn.axes[0].collections
    np.testing.assert_allclose(bar.get_segments()[0], [(1, 0.4), (1, 0.8)])
    assert sweep_plots.lines(points([(4, 1, 0.5)]), "other", {"label": "m"}) is None


def test_more_lines_than_styles_are_all_drawn() -> None:
    drawn = sweep_plots.lines(points([(n, 1, n) for n in range(1, 20)]), "m", {"label": "m"})
    assert len(drawn.axes[0].get_lines()) == 19


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_front_is_that_of_a_slow_search(better: str) -> None:
    rng = np.random.default_rng(3)
    sign = 1 if better == "higher" else -1
    calls = rng.integers(1, 9, 40)
    values = sign * (0.3 * calls + rng.normal(size=40))
    cells = points([(int(n), k, float(v)) for k, (n, v) in enumerate(zip(calls, values, strict=True))])

    def good(cell: dict[str, Any]) -> float:
        return sign * cell["metrics"]["m"]["value"]

    slow = [
        a for a in cells
        if not any(b is not a and b["unet_calls"] <= a["unet_calls"] and good(b) >= good(a) for b in cells)
    ]  # fmt: skip
    found = sweep_plots.front(cells, "m", better)
    assert len(slow) > 2
    assert found == sorted(slow, key=lambda cell: cell["unet_calls"])
    drawn = sweep_plots.pareto({"all": cells}, found, "m", {"label": "m", "better": better})
    assert [note.get_text() for note in drawn.axes[0].texts] == [str(n + 1) for n in range(len(found))]
    assert drawn.axes[0].yaxis_inverted() == (better == "lower")


# -- What may be missing -------------------------------------------------------------------------------------


def plain_text(folder: Path) -> str:
    page = re.sub(r"<(style|script)>.*?</\1>", "", write_sweep_report(folder).read_text(), flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", page)))


def test_several_adapters_are_compared(tmp_path: Path) -> None:
    build_sweep(tmp_path, adapters=("first", "second"), **FEW)
    text = plain_text(tmp_path)
    assert (
        "Adapters at the same settings (4)" in text
        and "Against plain samplers at as many UNet calls (4)" in text
    )
    assert "first: LCM, 4 steps, guidance_scale 1, LoRA weight 1 less base: DDIM, 4 steps" in text
    assert "▲" in text


def test_marks_of_a_difference() -> None:
    over, under, none = (0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2)
    assert [sweep._mark(*over, side) for side in ("higher", "lower", "one", None)] == [
        "better", "worse", "different", "different",
    ]  # fmt: skip
    assert [sweep._mark(*under, "higher"), sweep._mark(*under, "lower")] == ["worse", "better"]
    assert sweep._mark(*none, "higher") == ""


def test_one_guidance_no_plain_cells_and_no_metric(tmp_path: Path) -> None:
    few = {**FEW, "guidance": (1.0,), "metrics": ("energy",)}
    build_sweep(tmp_path, **few, plain=False)
    found = sweep.context(tmp_path)
    assert [each["title"] for each in found["head"]] == ["Teacher", "Recommended"]
    assert found["quality"] is None and found["pareto"] is None and found["metrics"] == {}
    assert "Not swept: the adapter was drawn at guidance_scale 1 only" in plain_text(tmp_path)
    assert "Nothing in this sweep says how good a picture is" in plain_text(tmp_path)


def test_without_prompts_that_are_read_the_look_decides(tmp_path: Path) -> None:
    build_sweep(tmp_path, **{**FEW, "metrics": ("frechet_real", "saturation")})
    found = sweep.context(tmp_path)
    assert found["quality"] == "frechet_real" and found["pareto"]
    assert [cell["unet_calls"] for cell in found["front"]][0] == 1


def test_one_guidance_is_plotted_over_steps(tmp_path: Path) -> None:
    build_sweep(tmp_path, **{**FEW, "guidance": (1.0,)})
    (only,) = sweep.context(tmp_path)["plots"]
    assert [each["alt"] for each in only["figures"]][0].startswith("Plot of prompt adherence over steps")


def test_a_warning_where_nothing_is_recommended(tmp_path: Path) -> None:
    results = build_sweep(tmp_path, **FEW)
    none = dict.fromkeys(("adapter", "cell", "steps", "guidance_scale", "lora_weight", "sampler"))
    warning = {
        "adapter": "quickstart",
        "kind": "failed_to_load",
        "sentence": "It does not load whole: 3 < 4.",
    }
    results["recommended"] = {
        **none,
        "sentence": "None can be recommended.",
        "reasons": [],
        "warnings": [warning],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = plain_text(tmp_path)
    assert "⚠ Failed to load. It does not load whole: 3 < 4." in text
    assert "Not recommended" in text and "lcm-kit sample" not in text


def test_missing_pictures_and_metrics_that_results_do_not_describe(tmp_path: Path) -> None:
    results = build_sweep(tmp_path, **FEW)
    for file in (tmp_path / "pictures").glob("teacher-*"):
        file.unlink()
    results["cells"][3]["metrics"]["new_metric"] = {"value": 1234.5, "low": 1234.5, "high": 1234.5}
    del results["cells"][4]["metrics"]["saturation"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = plain_text(tmp_path)
    assert "no picture" in text and "new_metric" in text and "1,234" in text


def test_report_knows_a_sweep_from_a_run(tmp_path: Path) -> None:
    build_sweep(tmp_path, **FEW)
    assert build.write_report(tmp_path).read_text().count("Content-Security-Policy") == 1


@pytest.mark.parametrize(
    ("recipe", "version", "why"),
    [
        ("evaluation/brand", 2, "is of evaluation/brand, not a guidance sweep's"),
        (
            "evaluation/guidance_sweep",
            1,
            "has version 1 of results, and this lcm-kit reads 2; evaluate again",
        ),
        (
            "evaluation/guidance_sweep",
            3,
            "has version 3 of results, and this lcm-kit reads 2; evaluate again",
        ),
        ("evaluation/guidance_sweep", None, "names no version of results, and this lcm-kit reads 2; eval"),
    ],
)
def test_another_kind_of_results(tmp_path: Path, recipe: str, version: int | None, why: str) -> None:
    found = build_sweep(tmp_path, **FEW) | {"recipe": recipe, "version": version}
    kept = {key: value for key, value in found.items() if value is not None}
    (tmp_path / "results.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/results.json {why}"):
        write_sweep_report(tmp_path)


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lcm-kit evaluate"):
        write_sweep_report(tmp_path)


# -- In a browser --------------------------------------------------------------------------------------------

# Runs inside the page, in a frame as wide as a phone, and tells the page around it what it found
PROBE = """
<script>
const found = { errors: [], blocked: [], how: [] };
addEventListener("error", (event) => found.errors.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => found.blocked.push(event.blockedURI));
const look = () => {
  const shots = [...document.querySelectorAll("details .shot")].filter((each) => each.checkVisibility());
  const view = document.getElementById("view"), said = (name) => view.querySelector(name).textContent;
  const press = (key) => view.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const page = document.documentElement, over = () => page.scrollWidth - page.clientWidth;
  found.wide = [page.clientWidth, over()];
  found.prompts = new Set(shots.map((each) => each.dataset.prompt)).size;
  const start = "LCM, 2 steps, guidance_scale 1.5, LoRA weight 0.8";
  shots.find((each) => each.dataset.how.includes(start)).click();
  found.open = view.open;
  found.wide.push(over());
  found.how.push(said(".how"));
  for (const key of ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"]) {
    press(key);
    found.how.push(said(".how"));
  }
  found.first = said(".prompt");
  press("PageDown");
  found.second = said(".prompt");
  found.figures = said(".figures-of");
  found.enlarged = view.querySelector("img").naturalWidth;
  view.close();
  found.checked = document.querySelector("[name=k]:checked").value;
  const heads = [...document.querySelectorAll("#table ~ .figures th button")];
  const head = heads.find((each) => each.textContent.includes("latents")).closest("th");
  const rows = head.closest("table").tBodies[0].rows;
  const column = () => [...rows].map((row) => row.cells[head.cellIndex].dataset.v);
  head.querySelector("button").click();
  found.up = column();
  head.querySelector("button").click();
  found.down = column();
  new Image().src = "http://127.0.0.1:9/blocked.png";
};
addEventListener("load", () => {
  try { look(); } catch (error) { found.errors.push(String(error)); }
  setTimeout(() => parent.postMessage(JSON.stringify(found), "*"), 100);
});
</script>
"""
AROUND = """<!doctype html><body style="margin:0"><pre></pre>
<iframe src="copy.html" style="width:360px;height:700px;border:0"></iframe>
<script>
addEventListener("message", (event) => { document.querySelector("pre").textContent = event.data; });
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_chromium(text: str, tmp_path: Path) -> None:
    """No wider than a phone; pictures enlarge and step by keyboard; the table sorts; the network is shut."""
    (tmp_path / "copy.html").write_text(text.replace("<style>", PROBE + "<style>", 1))
    (tmp_path / "around.html").write_text(AROUND)
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "around.html").as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(html.unescape(re.findall(r"<pre>(.*?)</pre>", dom, re.S)[0]))
    assert found["errors"] == []
    assert found["blocked"] == ["http://127.0.0.1:9/blocked.png"]  # only what the probe asked for
    width, beyond, beyond_with_dialog = found["wide"]
    assert 340 <= width <= 360 and (beyond, beyond_with_dialog) == (0, 0)
    assert found["prompts"] == 1  # the picker shows one at a time
    assert found["open"] is True
    settings = [re.findall(r"(\d+) steps?, guidance_scale ([\d.]+)", each)[0] for each in found["how"]]
    assert settings == [("2", "1.5"), ("4", "1.5"), ("4", "2"), ("2", "2"), ("2", "1.5")]
    assert (found["first"], found["second"], found["checked"]) == (EVIL, PROMPTS[0], "1")
    assert "prompt adherence" in found["figures"] and " to " in found["figures"]
    assert found["enlarged"] == 64
    for order, reverse in (("up", False), ("down", True)):
        measured = [float(each) for each in found[order] if each]
        assert measured == sorted(measured, reverse=reverse) and len(measured) > 5
        assert not any(found[order][len(measured) :])  # what was not measured is last


def test_a_sweep_names_what_decoded_its_pictures(swept: tuple[Path, dict[str, Any]]) -> None:
    plain, told = swept[1], "previews, decoded by AutoencoderTiny my-tiny (0a1b2c3d)"
    assert "pictures" not in dict(sweep._facts(plain))
    assert told in dict(sweep._facts({**plain, "decoder": "AutoencoderTiny my-tiny (0a1b2c3d)"}))["pictures"]


@pytest.mark.parametrize("size", [(96, 64), (32, 128), (64, 64)])
def test_pictures_keep_their_shape(tmp_path: Path, size: tuple[int, int]) -> None:
    """Every place for a picture has its proportions, and the pictures in it have all of theirs."""
    results = build_sweep(tmp_path, **FEW)
    for file in (tmp_path / "pictures").iterdir():
        with Image.open(file) as picture:
            picture.resize(size).save(file)
    results["resolution"] = results["settings"]["resolution"] = list(size) if size[0] != size[1] else size[0]
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = write_sweep_report(tmp_path).read_text()
    page = Page(text)
    boxes = [(each["viewbox"] or "").split() for each in page.of("svg") if "viewbox" in each]
    assert len(boxes) > 10 and all(box[:2] == ["0", "0"] for box in boxes)
    places = [(float(box[2]), float(box[3])) for box in boxes]
    pictures = [(float(each["width"] or 0), float(each["height"] or 0)) for each in page.of("image")]
    for width, height in (*places, *pictures):
        assert width / height == pytest.approx(size[0] / size[1], rel=1e-4) and max(width, height) == 100
    for each in page.of("image"):
        data = base64.b64decode((each["href"] or "").partition(",")[2])
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == size
    assert f", {size[0]} × {size[1]} pixels" in dict(sweep._facts(results))["samples"]
    command = shlex.split(html.unescape(re.findall(r"<pre[^>]*>(.*?)</pre>", text, re.S)[0]))
    assert [command[command.index(key) + 1] for key in ("--width", "--height")] == [*map(str, size)]


def test_what_models_see_of_pictures_stands_with_their_names(swept: tuple[Path, dict[str, Any]]) -> None:
    facts = dict(
        sweep._facts({**swept[1], "seen": "of pictures of 96 × 64 pixels c sees the middle 64 × 64"})
    )
    plain = dict(sweep._facts(swept[1]))["features"]
    assert facts["features"] == f"{plain}; of pictures of 96 × 64 pixels c sees the middle 64 × 64"
