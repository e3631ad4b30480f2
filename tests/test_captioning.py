"""`lcm-kit caption`: a model's captions in a table, what a person lets stand of them in files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import lcm_kit
from lcm_kit.cli.main import app
from lcm_kit.config.schema import Data
from lcm_kit.data import captioner, captioning
from lcm_kit.data.caption_review import REVIEW, Row, is_review, read_review, table_of
from lcm_kit.data.captioner import Captioner
from lcm_kit.data.folder import check_folder
from lcm_kit.data.records import list_source, open_records
from lcm_kit.errors import UserError
from tests import vision_language


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_language.blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_language.llava(tmp_path_factory.mktemp("models") / "llava")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20 + seed, 24, 3)).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures, the fifth in a subfolder; the last has a caption."""
    place = tmp_path / "pictures"
    (place / "sub").mkdir(parents=True)
    for k, name in enumerate(("a.png", "b.png", "c.png", "d.png", "sub/e.png", "f.png")):
        picture(k).save(place / name)
    (place / "f.txt").write_text("of its own")
    return place


def counting(
    said: list[int], text: Callable[[int], str] = "picture {}".format
) -> Callable[[], captioning.Say]:
    """What "loads" a model that says the width of pictures and notes how many it was shown at once."""

    def say(images: Sequence[Image.Image]) -> list[str]:
        said.append(len(images))
        return [text(image.height - 20) for image in images]

    return lambda: say


def texts(folder: Path) -> dict[str, str]:
    return {row.picture: row.caption for row in read_review(folder / REVIEW)}


# --- the models ---


def by_hand(place: Path, images: Sequence[Image.Image], question: str | None, most: int) -> list[str]:
    """Greedy decoding with nothing of `generate`: each picture alone, the likeliest token again and again."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(place)
    model = AutoModelForImageTextToText.from_pretrained(place).eval()
    asked = {} if question is None else {"text": question}
    found = []
    for image in images:
        inputs = processor(images=image, return_tensors="pt", **asked)
        is_blip = model.config.model_type == "blip"
        if is_blip:  # its text begins with [DEC] and is not ended
            start = torch.tensor([[5]])
            tokens = torch.cat([start, inputs["input_ids"][:, 1:-1]], 1) if question else start
        else:
            tokens = inputs["input_ids"]
        begin = 0 if is_blip else tokens.shape[1]
        with torch.no_grad():
            for _ in range(most):
                if is_blip:
                    seen = model.vision_model(inputs["pixel_values"]).last_hidden_state
                    logits = model.text_decoder(input_ids=tokens, encoder_hidden_states=seen).logits
                else:
                    logits = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits
                best = logits[:, -1].argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, best], 1)
                if int(best) == (3 if is_blip else 2):
                    break
        found.append(" ".join(processor.decode(tokens[0, begin:], skip_special_tokens=True).split()))
    return found


@pytest.mark.parametrize(
    ("name", "prompt", "question"),
    [
        ("blip", None, None),
        ("blip", "a picture of", "a picture of"),
        ("llava", "describe this", "USER: <image> describe this ASSISTANT:"),
    ],
)
def test_a_batch_says_what_the_likeliest_words_are_one_picture_at_a_time(
    request: pytest.FixtureRequest, name: str, prompt: str | None, question: str | None
) -> None:
    place, images = request.getfixturevalue(name), [picture(k) for k in range(6)]
    say = Captioner.load(str(place), "cpu", torch.float32, prompt, 6)
    wanted = [text.lstrip("=+-@").strip() for text in by_hand(place, images, question, 6)]
    assert say(images) == wanted
    assert len(set(wanted)) > 2 and all(wanted)  # they are of the pictures
    assert say(images[2:3]) == wanted[2:3]


def test_a_model_without_a_template_is_asked_behind_its_sign_for_a_picture(tmp_path: Path) -> None:
    place = vision_language.llava(tmp_path / "llava", chat=False)
    say = Captioner.load(str(place), "cpu", torch.float32, " describe this", 5)
    images = [picture(k) for k in range(3)]
    assert say(images) == by_hand(place, images, "<image> describe this", 5)


def test_an_answer_ends_where_the_model_has_no_more_places(blip: Path) -> None:
    """Behind them it would read embeddings that there are not."""
    images = [picture(k) for k in range(2)]
    assert Captioner.load(str(blip), "cpu", torch.float32, None, 500)(images) == by_hand(
        blip, images, None, 63
    )
    say = Captioner.load(str(blip), "cpu", torch.float32, "a cup " * 40, 5)
    with pytest.raises(
        UserError, match="--prompt and picture take 82 tokens, and the model has places for 64"
    ):
        say(images)


@pytest.mark.parametrize("kind", ["nowhere", "empty", "text", "pickle"])
def test_what_is_no_such_model(tmp_path: Path, kind: str, blip: Path) -> None:
    place = tmp_path / kind
    if kind != "nowhere":
        place.mkdir()
    if kind == "text":
        (place / "config.json").write_text('{"model_type": "bert"}')
    if kind == "pickle":
        for file in (each for each in blip.iterdir() if each.suffix != ".safetensors"):
            (place / file.name).write_bytes(file.read_bytes())
        torch.save({}, place / "pytorch_model.bin")
    with pytest.raises(
        UserError, match="is no vision-language model that transformers loads from safetensors"
    ):
        Captioner.load(str(place), "cpu", torch.float32, None, 5)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ('  "a red\n cup" ', "a red cup"),
        ("=HYPERLINK(1)", "HYPERLINK(1)"),
        ("“a cup”", "a cup"),
        ("a \x1b[31m cup", ""),
        ("  ", ""),
        ("word " * 20_000, ""),
    ],
)
def test_an_answer_becomes_one_line_that_does_nothing(answer: str, wanted: str) -> None:
    assert captioner._caption(answer) == wanted


# --- the table ---


def test_a_table_is_written_read_and_accepted(folder: Path) -> None:
    said: list[int] = []
    done = captioning.caption(folder, None, counting(said), 2, trigger="lumo", progress=False)
    assert (done.rows, done.written, done.had, done.silent, done.unread) == (5, 5, 1, [], [])
    assert said == [2, 2, 1]
    with (folder / REVIEW).open(newline="", encoding="utf-8") as handle:
        assert list(csv.reader(handle)) == [
            ["picture", "caption", "status"],
            *(
                [name, f"lumo, picture {k}", "new"]
                for k, name in enumerate(("a.png", "b.png", "c.png", "d.png"))
            ),
            ["sub/e.png", "lumo, picture 4", "new"],
        ]
    rows = [
        Row("a.png", "a person wrote this", "ok"), Row("b.png", "picture 1", "rejected"),
        Row("c.png", "", "new"), Row("d.png", "picture 3"), Row("sub/e.png", "picture 4"),
        Row("gone.png", "x"), Row("f.png", "another"),
    ]  # fmt: skip
    (folder / REVIEW).write_text(table_of(rows), encoding="utf-8")
    accepted = captioning.accept(folder)
    assert [path.relative_to(folder).as_posix() for path in accepted.files] == ["a.txt", "d.txt", "sub/e.txt"]
    assert (accepted.had, accepted.gone, accepted.rejected) == (["f.png"], ["gone.png"], 2)
    assert (folder / "a.txt").read_text() == "a person wrote this\n"
    assert (folder / "f.txt").read_text() == "of its own"
    assert {row.picture: row.status for row in read_review(folder / REVIEW)} == {
        "a.png": "written", "b.png": "rejected", "c.png": "new", "d.png": "written", "sub/e.png": "written",
        "f.png": "new", "gone.png": "new",
    }  # fmt: skip
    again = captioning.accept(folder, overwrite=True)
    assert again.files == [folder / "f.txt"] and (folder / "f.txt").read_text() == "another\n"


def test_the_table_is_no_caption_of_anything_until_it_is_accepted(folder: Path) -> None:
    captioning.caption(folder, None, counting([]), 4, progress=False)
    good, bad = open_records(Data(path=str(folder)))
    assert [record.id for record in good] == ["f.png"] and len(bad) == 5
    left = list_source(Data(path=str(folder))).left_out
    assert (left.review, left.others) == ([REVIEW], [])
    (said,) = [note for note in check_folder(str(folder), resolution=16).notes if REVIEW in note]
    assert "is not read" in said and "--accept" in said
    (folder / REVIEW).write_text("file_name,text\na.png,a cup\n")  # another's table of that name
    left = list_source(Data(path=str(folder))).left_out
    assert (left.review, left.others) == ([], [REVIEW])


def test_a_run_that_was_stopped_goes_on(folder: Path) -> None:
    said: list[int] = []

    def stops(images: Sequence[Image.Image]) -> list[str]:
        if len(said) == 2:
            raise KeyboardInterrupt
        said.append(len(images))
        return ["before"] * len(images)

    with pytest.raises(KeyboardInterrupt):
        captioning.caption(folder, None, lambda: stops, 2, progress=False)
    assert texts(folder) == {name: "before" for name in ("a.png", "b.png", "c.png", "d.png")}
    done = captioning.caption(folder, None, counting(later := []), 2, progress=False)
    assert (done.rows, done.written, later) == (5, 1, [1])
    assert texts(folder)["a.png"] == "before" and texts(folder)["sub/e.png"] == "picture 4"

    def never() -> Any:
        raise AssertionError("loaded")

    assert captioning.caption(folder, None, never, 2, progress=False).written == 0


def test_what_a_person_changes_meanwhile_is_not_written_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioning, "_EVERY", 0)

    def say(images: Sequence[Image.Image]) -> list[str]:
        if (folder / REVIEW).is_file():
            (folder / REVIEW).write_text("picture,caption,status\na.png,mine,ok\n")
        return ["a cup"] * len(images)

    with pytest.raises(UserError, match=r"captions.csv was changed by somebody else meanwhile"):
        captioning.caption(folder, None, lambda: say, 1, progress=False)
    assert texts(folder) == {"a.png": "mine"}


def test_all_pictures_are_captioned_where_it_is_asked_for(folder: Path) -> None:
    done = captioning.caption(folder, None, counting([]), 4, overwrite=True, progress=False)
    assert (done.rows, done.had) == (6, 0) and texts(folder)["f.png"] == "picture 5"


def test_batches_shrink_where_memory_runs_out(folder: Path) -> None:
    tried: list[int] = []

    def say(images: Sequence[Image.Image]) -> list[str]:
        tried.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return ["a cup"]

    assert captioning.caption(folder, None, lambda: say, 4, progress=False).written == 5
    assert tried == [4, 2, 1, 1, 1, 1, 1]


def test_unreadable_pictures_and_silence_are_told(folder: Path) -> None:
    (folder / "b.png").write_bytes(b"no picture")
    done = captioning.caption(
        folder, None, counting([], lambda k: "" if k == 2 else "a cup"), 4, progress=False
    )
    assert [id for id, _ in done.unread] == ["b.png"] and done.silent == ["c.png"]
    assert {row.picture: row.status for row in read_review(folder / REVIEW)} == {
        "a.png": "new", "c.png": "rejected", "d.png": "new", "sub/e.png": "new",
    }  # fmt: skip


def test_pictures_of_one_stem_get_files_of_their_own(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    picture(2).save(tmp_path / "a.jpg")
    (tmp_path / REVIEW).write_text(table_of([Row("a.png", "one cup"), Row("a.jpg", "two cups")]))
    captioning.accept(tmp_path)
    good, _ = open_records(Data(path=str(tmp_path)))
    assert {record.id: record.caption for record in good} == {"a.png": "one cup", "a.jpg": "two cups"}


def test_files_of_an_accept_that_was_killed_are_its_own(folder: Path) -> None:
    (folder / REVIEW).write_text(table_of([Row("a.png", "a cup"), Row("b.png", "a mug")]))
    (folder / "a.txt").write_text("a cup\n")
    accepted = captioning.accept(folder)
    assert len(accepted.files) == 2 and accepted.had == []


def test_a_table_saved_by_a_spreadsheet(folder: Path) -> None:
    (folder / REVIEW).write_bytes('\ufeff"picture";"caption";"Status"\r\na.png;"a cup, red";\r\n'.encode())
    assert read_review(folder / REVIEW) == [Row("a.png", "a cup, red", "new")]
    assert is_review((folder / REVIEW).read_bytes())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no such table; write one with `lcm-kit caption`"),
        ("file_name,text\na.png,x\n", "has not the columns picture, caption, status"),
        ("", "has not the columns"),
        ("picture,caption,status\na.png,x,maybe\n", "line 2: status 'maybe' is none of new, ok, rejected"),
        ("picture,caption,status\na.png,x,\na.png,y,\n", "line 3: a.png stands there twice"),
        ("picture,caption,status\n,x,\n", "line 2: it names no picture"),
        ("picture,caption,status\na.png,x\x1b[2J,\n", "line 2: caption holds a control character"),
    ],
)
def test_a_table_that_is_broken(folder: Path, text: str | None, words: str) -> None:
    if text is not None:
        (folder / REVIEW).write_text(text)
    with pytest.raises(UserError, match="captions.csv") as caught:
        captioning.accept(folder)
    assert words in str(caught.value)
    assert sorted(path.name for path in folder.glob("*.txt")) == ["f.txt"]


# --- the command, and the calls ---


def test_the_command_from_a_folder_to_caption_files(folder: Path, blip: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(
        app, ["caption", str(folder), "--model", str(blip), "--trigger", "lumo", "--max-tokens", "5",
              "--device", "cpu", "--batch-size", "3"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "5 rows, 5 of them new; 1 picture has a caption already" in done.stdout
    images = [picture(k) for k in range(5)]
    wanted = [f"lumo, {text.lstrip('=+-@').strip()}" for text in by_hand(blip, images, None, 5)]
    assert list(texts(folder).values()) == wanted
    done = runner.invoke(app, ["caption", str(folder), "--accept"])
    assert done.exit_code == 0 and "5 caption files written, 0 rows rejected" in done.stdout
    good, bad = open_records(Data(path=str(folder)))
    assert not bad and [record.caption for record in good] == [*wanted[:4], "of its own", wanted[4]]


def test_mistakes_are_sentences(folder: Path, blip: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    for words, told in (
        (["caption", str(folder)], "give the vision-language model as --model PATH, or --accept"),
        (["caption", str(folder), "--accept", "--prompt", "x"], "--prompt has no effect with --accept"),
        (["caption", str(folder), "--accept"], "there is no such table"),
        (["caption", str(tmp_path / "nowhere"), "--model", str(blip)], "no such folder or no image in it"),
        (["caption", str(folder / "a.png"), "--model", str(blip)], "is a file; give a folder of pictures"),
        (
            ["caption", str(folder), "--model", str(blip), "--max-tokens", "0"],
            "--max-tokens 0 is out of range",
        ),
        (["caption", str(folder), "--model", str(blip), "--trigger", " "], "the trigger is empty"),
        (
            ["caption", str(folder), "--model", str(blip), "--table", str(folder / "metadata.csv")],
            "has the name of a table that training reads",
        ),
    ):
        done = runner.invoke(app, words)
        assert done.exit_code == 2 and told in " ".join(done.output.split()), (words, done.output)
    assert not (folder / REVIEW).exists()


def test_from_python(folder: Path, llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "review" / "mine.csv"
    done = lcm_kit.caption(folder, llava, table=table, max_tokens=4, device="cpu")
    assert done.table == table and done.written == 5 and not (folder / REVIEW).exists()
    accepted = lcm_kit.accept_captions(folder, table=table)
    assert len(accepted.files) + accepted.rejected == 5
    assert capfd.readouterr() == ("", "")
