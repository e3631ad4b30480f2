"""Captions as people write them: kohya's folders, several captions, tables of all kinds, orders of tags."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcm_kit.config.schema import Data
from lcm_kit.data import caption_tags
from lcm_kit.data.caption_texts import Caption, read
from lcm_kit.data.folder import check_data, check_folder, reading
from lcm_kit.data.records import Record, list_source, open_records
from lcm_kit.errors import UserError


def put(file: Path, caption: str | None = None, seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (seed * 37 % 256, seed * 91 % 256, 128)).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, "utf-8")
    return file


def opened(folder: Path, trigger: str | None = None, column: str = "text", **how: Any) -> dict[str, Record]:
    """The records by id. No record may be bad."""
    good, bad = open_records(Data(path=str(folder), captions=how, trigger=trigger, caption_column=column))
    assert bad == []
    return {record.id: record for record in good}


def texts(record: Record) -> list[str]:
    return [text for text, _ in record.captions]


# --- kohya's folders ---


def kohyas(root: Path) -> Path:
    put(root / "10_lumo style" / "a.png", seed=1)
    put(root / "10_lumo style" / "b.png", "its own caption", seed=2)
    put(root / "2_old_town" / "c.png", seed=3)
    return root


@pytest.mark.parametrize("layout", ["auto", "kohya"])
def test_kohyas_folders_give_repeats_and_the_caption_of_pictures_without(tmp_path: Path, layout: str) -> None:
    """The number before the first `_`, and all behind it, underscores too (its config_util.py)."""
    found = opened(kohyas(tmp_path), layout=layout)
    assert {id: (record.repeats, record.caption) for id, record in found.items()} == {
        "10_lumo style/a.png": (10, "lumo style"),
        "10_lumo style/b.png": (10, "its own caption"),
        "2_old_town/c.png": (2, "old_town"),
    }


def test_plain_takes_names_of_folders_for_nothing(tmp_path: Path) -> None:
    good, bad = open_records(Data(path=str(kohyas(tmp_path)), captions={"layout": "plain"}))
    assert [(record.id, record.repeats) for record in good] == [("10_lumo style/b.png", 1)]
    assert [id for id, reason in bad if reason.startswith("no caption")] == [
        "10_lumo style/a.png",
        "2_old_town/c.png",
    ]


@pytest.mark.parametrize(
    ("folders", "doubt"),
    [
        (["2023_spring", "2025_autumn"], "begin with a number above 200"),
        (["512_crops"], "begin with a number above 200"),
        (["01_logo", "05_packs"], "begin with 0"),
        (["1_logo", "2_packs", "3_people"], "count on by one"),
        (["10_october", "11_november"], "count on by one"),
        (["10_lumo", "others"], ""),
        (["10_lumo", "."], ""),
        (["10", "5_a"], ""),
        (["10_ "], ""),
    ],
)
def test_folders_that_are_likely_no_repeats_are_read_as_before(
    tmp_path: Path, folders: list[str], doubt: str
) -> None:
    for k, folder in enumerate(folders):
        put(tmp_path / folder / f"{k}.png", "a caption", seed=k)
    data = Data(path=str(tmp_path))
    assert all(record.repeats == 1 for record in open_records(data)[0])
    said = [line for line in reading(data) if "kohya" in line]
    assert [doubt in line for line in said] == ([True] if doubt else [])


def test_where_kohyas_layout_is_asked_for_every_folder_has_to_have_it(tmp_path: Path) -> None:
    for folder in ("2024_spring", "0_off", "others", "."):
        put(tmp_path / folder / f"{folder.strip('.')}x.png", "a caption")
    good, bad = open_records(Data(path=str(tmp_path), captions={"layout": "kohya"}))
    assert [(record.id, record.repeats) for record in good] == [("2024_spring/2024_springx.png", 2024)]
    assert sorted(id for id, reason in bad if "has no name as 10_subject, with 1 to 10,000" in reason) == [
        "0_off/0_offx.png",
        "others/othersx.png",
        "x.png",
    ]


def test_a_folder_around_kohyas_and_one_within_them(tmp_path: Path) -> None:
    put(tmp_path / "img" / "4_cup" / "sub" / "a.png")
    assert opened(tmp_path)["img/4_cup/sub/a.png"].repeats == 4
    packed = tmp_path / "set.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(tmp_path / "img" / "4_cup" / "sub" / "a.png", "set/7_mug/a.png")
    (record,) = opened(packed).values()
    assert (record.repeats, record.caption) == (7, "mug")


def test_general_pictures_have_classes_too_and_no_trigger(tmp_path: Path) -> None:
    put(tmp_path / "own" / "a.png", "a cup")
    put(tmp_path / "reg" / "3_cup" / "b.png")
    good, _ = open_records(
        Data(
            path=str(tmp_path / "own"), regularization=str(tmp_path / "reg"), trigger="lumo",
            captions={"trigger_in_front": True},
        )
    )  # fmt: skip
    assert [(record.id, record.caption, record.repeats) for record in good] == [
        ("a.png", "lumo, a cup", 1),
        ("regularisation/3_cup/b.png", "cup", 3),
    ]


def test_the_check_says_how_folders_were_read(tmp_path: Path) -> None:
    notes = check_folder(str(kohyas(tmp_path)), resolution=16).notes
    (said,) = [note for note in notes if "kohya's trainer has them" in note]
    assert "10_lumo style (2 images, 10 times each: 'lumo style')" in said
    assert "2_old_town (1 image, 2 times each: 'old_town')" in said
    assert "an epoch has 22 samples of 3 images" in said
    (named,) = [note for note in notes if "name of the folder" in note]
    assert named.startswith("2 images have no caption and get") and "2_old_town/c.png" in named
    data = Data(path=str(tmp_path), captions={"layout": "plain"})
    assert not any("kohya" in line for line in reading(data))


# --- several captions ---


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("joined", ["a red cup on a table"]),
        ("first", ["a red cup"]),
        ("each", ["a red cup", "on a table"]),
    ],
)
def test_lines_of_a_caption_file(tmp_path: Path, lines: str, wanted: list[str]) -> None:
    put(tmp_path / "a.png", "\n a red  cup \r\n\n on a table\n")
    put(tmp_path / "b.png", "one line\n")
    found = opened(tmp_path, lines=lines)
    assert texts(found["a.png"]) == wanted and {weight for _, weight in found["a.png"].captions} == {1.0}
    assert texts(found["b.png"]) == ["one line"]
    (said,) = [
        line for line in reading(Data(path=str(tmp_path), captions={"lines": lines})) if "lines" in line
    ]
    assert "1 caption is of several lines: a.txt" in said
    several = [
        line for line in reading(Data(path=str(tmp_path), captions={"lines": lines})) if "in all" in line
    ]
    assert several == (
        ["note: 1 image has several captions, 2 in all and 2 at most (a.png); every step draws one by its "
         "weight."] if lines == "each" else []
    )  # fmt: skip


def test_a_line_of_no_use_is_the_fault_of_all(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "a cup\nred\x1b[2J\n")
    _, bad = open_records(Data(path=str(tmp_path), captions={"lines": "each"}))
    assert bad == [("a.png", "caption holds a control character, '\\x1b'")]


@pytest.mark.parametrize(
    ("given", "weight", "wanted"),
    [
        ("one", None, [("one", 1.0)]),
        (["one", "two"], None, [("one", 1.0), ("two", 1.0)]),
        (["one", " one ", "two"], "3", [("one", 6.0), ("two", 3.0)]),
        (
            [{"text": "one", "weight": 0.5}, {"caption": "two"}, "three"],
            2,
            [("one", 1), ("two", 2), ("three", 2)],
        ),
        ({"text": "one", "weight": "0.25"}, "", [("one", 0.25)]),
    ],
)
def test_what_one_cell_may_hold(given: Any, weight: Any, wanted: list[tuple[str, float]]) -> None:
    assert read(given, "joined", weight) == (tuple(Caption(*each) for each in wanted), "")


@pytest.mark.parametrize(
    ("given", "weight", "reason"),
    [
        ([], None, "no caption"),
        (None, None, "no caption"),
        (["one", ""], None, "empty caption (of a list of 2)"),
        ([["one"]], None, "caption is not text but list"),
        ({"words": "one"}, None, "caption is not text but an entry with 0 of text, caption, prompt"),
        ({"text": "one", "weight": -1}, None, "caption has a weight that is no positive number, -1"),
        ("one", "heavy", "caption has a weight that is no positive number, 'heavy'"),
        ("one", True, "caption has a weight that is no positive number, True"),
        ("one", math.nan, "caption has a weight that is no positive number, nan"),
        ("one", 10**400, f"caption has a weight that is no positive number, 1{'0' * 39}"),
        (["x"] * 2000, None, "caption is too long: 2,000 of one picture, at most 1,000"),
    ],
)  # fmt: skip
def test_what_no_cell_may_hold(given: Any, weight: Any, reason: str) -> None:
    assert read(given, "joined", weight) == ((), reason)


def test_lists_and_weights_in_tables(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        put(tmp_path / name)
    rows = [
        {"file_name": "a.png", "text": ["a cup", "red cup"]},
        {"file_name": "b.png", "text": [{"text": "a mug", "weight": 3}, {"text": "blue mug"}]},
        {"file_name": "c.png", "text": "a jar"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert {id: record.captions for id, record in opened(tmp_path).items()} == {
        "a.png": (("a cup", 1), ("red cup", 1)),
        "b.png": (("a mug", 3), ("blue mug", 1)),
        "c.png": (("a jar", 1),),
    }


def test_lines_of_one_picture_are_captions_by_key_alone(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,weight\na.png,a cup,2\na.png,red cup,\n")
    ((_, reason),) = open_records(Data(path=str(tmp_path)))[1]
    assert reason.startswith("two captions: metadata.csv, line 2 and metadata.csv, line 3 say different")
    assert reason.endswith("keep one, or have both with data.captions.lines each")
    assert opened(tmp_path, lines="each")["a.png"].captions == (("a cup", 2.0), ("red cup", 1.0))
    (tmp_path / "a.txt").write_text("of its own")
    assert texts(opened(tmp_path, lines="each")["a.png"]) == ["of its own"]
    assert list_source(Data(path=str(tmp_path))).left_out.unlike == ["a.png"]


def test_rows_of_a_data_set_have_several_captions(tmp_path: Path) -> None:
    import datasets

    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    rows = datasets.Dataset.from_dict(
        {"image": images, "text": [["red", "a red square"], ["blue"]]},
        features=datasets.Features(
            {"image": datasets.Image(), "text": datasets.Sequence(datasets.Value("string"))}
        ),
    )
    rows.save_to_disk(str(tmp_path / "saved"))
    found = opened(tmp_path / "saved", trigger="lumo", trigger_in_front=True)
    assert [texts(each) for each in found.values()] == [["lumo, red", "lumo, a red square"], ["lumo, blue"]]
    with pytest.raises(UserError, match="data.captions.layout kohya has no effect"):
        opened(tmp_path / "saved", layout="kohya")


# --- other files ---


@pytest.mark.parametrize("name", ["a.json", "a.png.json", "a.JSON"])
@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"caption": "a cup", "url": "http://x", "status": "success"}, "a cup"),  # img2dataset's
        ({"text": "a cup"}, "a cup"),
        ({"tags": ["1girl", "long hair"]}, "1girl, long hair"),
        ({"tags": "a, b"}, "a, b"),
        ({"tag_string": "1girl long_hair", "rating": "g"}, "1girl, long hair"),  # danbooru's
        ({"caption": "a cup", "tags": "red, blue"}, "a cup, red, blue"),  # joined, as kohya's trainer does
        ({"caption": None, "tags": "red"}, "red"),
    ],
)
def test_json_beside_a_picture(tmp_path: Path, name: str, row: dict[str, Any], wanted: str) -> None:
    put(tmp_path / "a.png")
    (tmp_path / name).write_text(json.dumps(row))
    assert texts(opened(tmp_path)["a.png"]) == [wanted]
    assert list_source(Data(path=str(tmp_path))).left_out.others == []


@pytest.mark.parametrize("content", ['{"nodes": []}', "[1]", "{", '{"a": {}}'])
def test_json_about_something_else_is_left_out(tmp_path: Path, content: str) -> None:
    put(tmp_path / "a.png", "a cup")
    put(tmp_path / "metadata.png", "a mug")  # whatever it says, its name is a table's
    for name in ("a.json", "metadata.json", "lonely.json"):
        (tmp_path / name).write_text(content)
    listing = list_source(Data(path=str(tmp_path)))
    assert [record.caption for record in listing.good] == ["a cup", "a mug"] and not listing.bad
    assert listing.left_out.others == ["a.json", "lonely.json", "metadata.json"]


def test_the_text_file_counts_before_json_and_a_difference_is_told(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "a cup")
    put(tmp_path / "b.png", "a mug")
    (tmp_path / "a.json").write_text('{"caption": "a jar"}')
    (tmp_path / "b.json").write_text('{"caption": "a mug"}')
    listing = list_source(Data(path=str(tmp_path)))
    assert [record.caption for record in listing.good] == ["a cup", "a mug"]
    assert listing.left_out.unlike == ["a.png"]


@pytest.mark.parametrize("key", ["a.png", "a", "img/a.png", "absolute"])
@pytest.mark.parametrize("name", ["metadata.json", "meta_cap.json"])
def test_kohyas_table_of_captions_and_tags(tmp_path: Path, name: str, key: str) -> None:
    """Keys are stems, or paths (`--full_path`); tags follow the caption, or stand alone (train_util.py)."""
    picture = put(tmp_path / "img" / "a.png")
    put(tmp_path / "img" / "b.png")
    table = (tmp_path if key == "img/a.png" else picture.parent) / name
    other = "img/b" if key == "img/a.png" else "b"
    named = str(picture) if key == "absolute" else key
    table.write_text(
        json.dumps(
            {named: {"caption": "a cup", "tags": "red, small"}, other: {"tags": "blue", "image_size": [1, 2]}}
        )
    )
    found = opened(tmp_path)
    assert [texts(each) for each in found.values()] == [["a cup, red, small"], ["blue"]]
    assert list_source(Data(path=str(tmp_path))).left_out.others == []


def test_of_kohyas_tables_the_last_that_its_scripts_write_counts(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    for name in ("meta_cap.json", "meta_clean.json", "meta_cap_dd.json"):
        (tmp_path / name).write_text(json.dumps({"a": {"caption": name}}))
    listing = list_source(Data(path=str(tmp_path)))
    assert [record.caption for record in listing.good] == ["meta_clean.json"]
    assert listing.left_out.others == ["meta_cap.json", "meta_cap_dd.json"]


def test_tags_behind_every_line_where_lines_are_captions(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "metadata.json").write_text(json.dumps({"a": {"caption": "a cup\na mug", "tags": "red"}}))
    assert texts(opened(tmp_path, lines="each")["a.png"]) == ["a cup, red", "a mug, red"]
    assert texts(opened(tmp_path, lines="joined")["a.png"]) == ["a cup a mug, red"]


def test_a_list_of_lines_in_metadata_json(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "metadata.json").write_text('[{"file_name": "a.png", "caption": "a cup"}]')
    assert texts(opened(tmp_path)["a.png"]) == ["a cup"]
    (tmp_path / "metadata.json").write_text('[{"file_name": "b.png", "caption": "a cup"}]')
    assert "is named in metadata.json, but" in dict(open_records(Data(path=str(tmp_path)))[1])["b.png"]


def test_a_parquet_table_of_a_folder(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    table = pyarrow.table(
        {
            "file_name": ["a.png", "b.png"],
            "text": [
                [{"text": "a cup", "weight": 2.0}, {"text": "red"}],
                [{"text": "a mug", "weight": None}],
            ],
            "thumb": [b"\x00", b"\x01"],
        }
    )
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert {id: record.captions for id, record in opened(tmp_path).items()} == {
        "a.png": (("a cup", 2), ("red", 1)),
        "b.png": (("a mug", 1),),
    }
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="metadata.parquet: no parquet table that can be read"):
        opened(tmp_path)
    parquet.write_table(pyarrow.table({"image": ["x"], "text": ["y"]}), tmp_path / "metadata.parquet")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("beside")
    listing = list_source(Data(path=str(tmp_path)))
    assert len(listing.good) == 2 and listing.left_out.others == ["metadata.parquet"]


def test_a_column_of_the_users_own_in_json(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"blip": "a cup", "tags": "red"}')
    assert texts(opened(tmp_path, column="blip")["a.png"]) == ["a cup"]


# --- tags and the trigger ---


def in_orders(text: str, trigger: str | None = None, **how: Any) -> tuple[Caption, ...]:
    data = Data(captions=how, trigger=trigger)
    return caption_tags.prepared([Caption(text)], data.captions, data.trigger)


def test_the_first_tags_stay_and_the_others_are_the_same_in_other_orders() -> None:
    found = in_orders("cup, red, small, old, on a table", shuffle_tags=5, keep_tokens=2)
    assert [text for text, _ in found][0] == "cup, red, small, old, on a table"
    assert len(found) == 6 and len(set(found)) == 6
    assert [weight for _, weight in found] == pytest.approx([1 / 6] * 6)
    for text, _ in found:
        tags = text.split(", ")
        assert tags[:2] == ["cup", "red"] and sorted(tags[2:]) == ["old", "on a table", "small"]
    assert found == in_orders("cup, red, small, old, on a table", shuffle_tags=5, keep_tokens=2)


def test_more_orders_than_there_are_are_all_of_them() -> None:
    found = in_orders("a, b, c", shuffle_tags=50)
    assert {text for text, _ in found} == {", ".join(each) for each in permutations("abc")}
    assert sum(weight for _, weight in found) == pytest.approx(1)
    assert in_orders("a sentence", shuffle_tags=50) == (Caption("a sentence"),)
    assert in_orders("a, a", shuffle_tags=50) == (Caption("a, a"),)


def test_orders_are_drawn_evenly() -> None:
    """Over 1,200 captions of three tags each order comes as often: a chi-squared below its 99.9% point."""
    counts: Counter[tuple[int, ...]] = Counter()
    for k in range(1200):
        tags = [f"{name}{k}" for name in "xyz"]
        places = sorted(
            range(3), key=lambda place, k=k, tags=tags: caption_tags._key(", ".join(tags), k, place)
        )
        counts[tuple(places)] += 1
    assert len(counts) == 6
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 20.5  # five degrees of freedom


def test_kohyas_separator_divides_what_stays() -> None:
    """Before it, and behind a second one; keep_tokens does not count then (its process_caption)."""
    found = in_orders(
        "lumo, cup ||| red, small, old ||| best", shuffle_tags=9, keep_tokens=1, keep_separator="|||"
    )
    assert {text for text, _ in found} == {
        f"lumo, cup, {', '.join(each)}, best" for each in permutations(["red", "small", "old"])
    }
    assert found[0].text == "lumo, cup, red, small, old, best"
    assert in_orders("cup |||", shuffle_tags=9, keep_separator="|||") == (Caption("cup"),)


def test_the_trigger_goes_before_captions_that_lack_it() -> None:
    for text, wanted in (
        ("a cup", "lumo style, a cup"),
        ("a cup in Lumo Style", "a cup in Lumo Style"),
        ("lumo style, a cup", "lumo style, a cup"),
        ("a lumo-style cup", "a lumo-style cup"),
        ("stylelumo style", "lumo style, stylelumo style"),
    ):
        assert in_orders(text, "lumo style", trigger_in_front=True) == (Caption(wanted),)
        assert in_orders(text, "lumo style") == (Caption(text),)
    assert in_orders("a cup", "★", trigger_in_front=True) == (Caption("★, a cup"),)
    assert in_orders("a ★ cup", "★", trigger_in_front=True) == (Caption("a ★ cup"),)


@pytest.mark.parametrize(("keep", "stays"), [(0, 2), (1, 2), (3, 3)])
def test_the_triggers_tags_stay_in_front_and_count_among_those_kept(keep: int, stays: int) -> None:
    found = in_orders("a, b, c, d", "lumo, flat", trigger_in_front=True, shuffle_tags=30, keep_tokens=keep)
    front = {tuple(text.split(", ")[:stays]) for text, _ in found}
    assert front == {("lumo", "flat", "a")[:stays]}
    assert len({text.split(", ")[stays] for text, _ in found}) > 1


def test_weights_of_several_captions_stay_in_proportion() -> None:
    data = Data(captions={"shuffle_tags": 3})
    found = caption_tags.prepared([Caption("a, b, c, d", 3.0), Caption("a cup", 1.0)], data.captions, None)
    assert found[:2] == (("a, b, c, d", 0.75), ("a cup", 1.0))
    assert len(found) == 5 and sum(weight for text, weight in found if text != "a cup") == pytest.approx(3)


def test_the_check_counts_what_is_encoded(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "cup, red, small, old")
    put(tmp_path / "b.png", "a lumo mug", seed=1)
    data = Data(
        path=str(tmp_path), trigger="lumo", resolution=16,
        captions={"shuffle_tags": 4, "trigger_in_front": True},
    )  # fmt: skip
    notes = check_data(data).notes
    assert "The trigger 'lumo' is put before 1 caption, which lacked it." in notes
    assert any("2 captions and 4 other orders of their tags are encoded" in note for note in notes)
    assert not any("lacks the trigger" in each for each in check_data(data).warnings)
    assert any(
        "1 caption lacks the trigger" in each for each in check_data(replace(data, captions={})).warnings
    )
    (tmp_path / "a.txt").write_text("cup")
    (warning,) = [each for each in check_data(data).warnings if "shuffle" in each]
    assert warning.startswith("data.captions.shuffle_tags 4 shuffles nothing")


def test_checks_look_at_every_caption_of_a_picture(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "a lumo cup on a table\nIMG_20241130 on a table\n")
    found = check_data(Data(path=str(tmp_path), trigger="lumo", resolution=16, captions={"lines": "each"}))
    assert any("a.png (caption 2)" in each and "file name" in each for each in found.warnings)
    assert any(
        "1 caption lacks the trigger 'lumo' (of 2): a.png (caption 2)" in each for each in found.warnings
    )


# --- config ---


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"captions": {"keep_tokens": 1}}, "keep_tokens says which tags stay .* shuffle_tags is 0"),
        ({"captions": {"keep_separator": "|||"}}, "keep_separator says which tags stay"),
        ({"captions": {"shuffle_tags": 1, "keep_separator": ","}}, "cannot be told from what separates tags"),
        ({"captions": {"shuffle_tags": 1, "keep_separator": " "}}, "cannot be told from what separates tags"),
        ({"captions": {"trigger_in_front": True}}, "puts trigger before captions; give trigger"),
        (
            {"captions": {"lines": "each"}, "source": "teacher"},
            "with source teacher there are none; remove it",
        ),
        ({"captions": {"layout": "kohya"}, "kind": "datasets"}, "layout kohya is of folders"),
        ({"captions": {"lines": "all"}}, "joined"),
        ({"captions": {"shuffle_tags": 101}}, "100"),
    ],
)
def test_keys_without_effect_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Data(**keys)


def test_a_broken_picture_is_none_of_the_captions_affair(tmp_path: Path) -> None:
    """What is told of a caption does not hide what is told of its picture."""
    put(tmp_path / "3_cup" / "a.png")
    (tmp_path / "3_cup" / "b.png").write_bytes(io.BytesIO().getvalue())
    found = check_folder(str(tmp_path), resolution=16)
    assert any("1 image cannot be read: 3_cup/b.png" in each for each in found.errors)
