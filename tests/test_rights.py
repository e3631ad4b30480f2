"""Licences, sources and consents of pictures: read from metadata, counted, asked for."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from lcm_kit import bases
from lcm_kit.cli.main import app
from lcm_kit.config.load import dump
from lcm_kit.config.schema import Base, Data, Distill
from lcm_kit.data import images, stream_images
from lcm_kit.data.folder import check_folder
from lcm_kit.data.parted import PartedCache
from lcm_kit.data.records import Record, open_records
from lcm_kit.data.rights import Rights, summary
from lcm_kit.data.streams import source_shards
from lcm_kit.errors import UserError
from lcm_kit.export.sources import write_sources
from lcm_kit.io import licenses, own_files, own_shapes
from lcm_kit.lora import provenance
from lcm_kit.lora.provenance_rules import of_training
from tests.sources import rows, tar_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures: two told of by a table, one beside it in JSON, one by both, one by nothing."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        Image.effect_mandelbrot((64, 64), (-2 - i / 9, -1.5, 1, 1.5), 90).convert("RGB").save(
            folder / f"{i}.png"
        )
        (folder / f"{i}.txt").write_text(f"a fractal, number {i}")
    lines = [
        {"file_name": "0.png", "license": "cc by 4.0", "source": "https://a.example/0", "consent": True},
        {"file_name": "1.png", "Licence": "MIT License", "author": "Ada", "consent": "no"},
        {"file_name": "3.png", "license": "CC0"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "2.json").write_text(json.dumps({"licence": "cc-by-nc-4.0", "source": "agency", "width": 64}))
    (folder / "3.png.json").write_text(json.dumps({"license": "CC-BY-4.0", "consent": "signed 2026-03-01"}))
    return folder


SAID = {
    "0.png": Rights("CC-BY-4.0", "https://a.example/0", "yes"),
    "1.png": Rights("MIT", None, "no", "Ada"),
    "2.png": Rights("CC-BY-NC-4.0", "agency"),
    "3.png": Rights("CC-BY-4.0 AND CC0-1.0", None, "signed 2026-03-01"),
    "4.png": Rights(),
}
SUMMARY: own_shapes.Rights = {
    "pictures": 5,
    "licenses": {"CC-BY-4.0": 1, "CC-BY-4.0 AND CC0-1.0": 1, "CC-BY-NC-4.0": 1, "MIT": 1},
    "source": 2,
    "consent": 2,
    "refused": 1,
    "author": 1,
}


def training(data: Data) -> Distill:
    return Distill(recipe="train/distill", output="unused", base=Base("asset:tiny-sd"), data=data)


def test_rights_are_read_from_tables_and_from_json_beside_pictures(folder: Path) -> None:
    good, bad = open_records(Data(path=str(folder)))
    assert {record.id: record.rights for record in good} == SAID and not bad
    assert summary(record.rights for record in good) == SUMMARY
    assert summary([Rights(), Rights()]) is None


def test_rights_are_read_from_a_csv_table_and_from_columns_of_a_data_set(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "csv"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    (folder / "metadata.csv").write_text(
        "file_name,text,licence,author\na.png,a red square all over,CC-BY-SA-4.0,Bo\n"
    )
    good, _ = open_records(Data(path=str(folder)))
    assert [record.rights for record in good] == [Rights("CC-BY-SA-4.0", author="Bo")]

    cells = {
        "image": [str(folder / "a.png")] * 2, "text": ["a red square", "once more, a red square"],
        "license": ["apache-2.0", None], "consent": [None, True],
    }  # fmt: skip
    made = datasets.Dataset.from_dict(cells).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "set"))
    good, _ = open_records(Data(path=str(tmp_path / "set")))
    assert [record.rights for record in good] == [Rights("Apache-2.0"), Rights(consent="yes")]


def test_json_that_says_nothing_of_rights_is_named_as_left_out(folder: Path) -> None:
    (folder / "4.json").write_text('{"width": 64}')
    (left,) = [text for text in check_folder(str(folder), resolution=64).notes if "neither picture" in text]
    assert "4.json" in left and "2.json" not in left and "3.png.json" not in left


def test_the_check_says_what_is_there_and_what_goes_on_to_what_is_trained(folder: Path) -> None:
    found = check_folder(str(folder), resolution=64)
    (counts,) = [text for text in found.notes if text.startswith("Rights of 5 images")]
    assert "1 CC-BY-NC-4.0" in counts and "1 without one" in counts
    assert "2 name their source, 1 their author, 2 a consent" in counts
    assert any("1 image has a licence whose name says non-commercial: 2.png" in w for w in found.warnings)
    assert any("1 image says that there is no consent: 1.png" in w for w in found.warnings)
    assert not found.errors


@pytest.mark.parametrize(
    ("allowed", "missing"),
    [
        (["any"], ["4.png (says none)"]),
        (["cc-by-4.0", "mit", "CC0 1.0"], ["2.png (CC-BY-NC-4.0)", "4.png (says none)"]),
        (["MIT"], ["0.png (CC-BY-4.0)", "2.png", "3.png (CC-BY-4.0 AND CC0-1.0)", "4.png"]),
    ],
)
def test_the_gate_names_every_picture_without_an_allowed_licence(
    folder: Path, allowed: list[str], missing: list[str]
) -> None:
    (error,) = check_folder(str(folder), resolution=64, require_license=allowed).errors
    assert error.startswith(f"{len(missing)} image") and all(name in error for name in missing)
    data = Data(path=str(folder), cache=str(folder.parent / "cache"), require_license=tuple(allowed))
    with pytest.raises(UserError, match="data.require_license") as caught:
        images.encode(training(data), progress=False)
    assert error.rstrip(".") in str(caught.value) and not (folder.parent / "cache").exists()


def test_a_cache_has_the_summary_and_no_list_and_follows_the_metadata(folder: Path) -> None:
    data = Data(path=str(folder), cache=str(folder.parent / "cache"))
    config = training(data)
    images.encode(config, progress=False)
    manifest = folder.parent / "cache" / "manifest.json"
    assert json.loads(manifest.read_text())["rights"] == SUMMARY
    assert "agency" not in manifest.read_text() and "Ada" not in manifest.read_text()
    (folder / "2.json").unlink()
    again = images.encode(config, progress=False)
    assert again.encoded == 0
    assert again.changes == ["what metadata says of licences, sources and consents changed"]
    assert json.loads(manifest.read_text())["rights"]["licenses"].get("CC-BY-NC-4.0") is None
    assert images.encode(config, progress=False).changes == []


def test_a_cache_of_before_has_no_summary_and_opens(folder: Path) -> None:
    from lcm_kit.data.cache import Cache

    data = Data(path=str(folder), cache=str(folder.parent / "cache"))
    images.encode(training(data), progress=False)
    manifest = folder.parent / "cache" / "manifest.json"
    old = {k: v for k, v in json.loads(manifest.read_text()).items() if k not in ("rights", "hash")}
    own_files.write_json(manifest, old)
    base = bases.inspect_base("asset:tiny-sd")
    assert Cache.open(data.cache, base=base, data=data).rights is None
    images.encode(training(data), progress=False)
    assert Cache.open(data.cache, base=base, data=data).rights == SUMMARY


@pytest.mark.parametrize(
    ("text", "name", "terms"),
    [
        ("mit", "MIT", []),
        ("Apache License 2.0", "Apache-2.0", []),
        ("https://creativecommons.org/licenses/by-nc-sa/4.0/deed.en", "CC-BY-NC-SA-4.0",
         ["non-commercial", "share-alike"]),
        ("http://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0", []),
        ("CC BY-ND 2.0", "CC-BY-ND-2.0", ["no derivatives"]),
        ("creativeml-openrail-m", "creativeml-openrail-m", ["use restrictions"]),
        ("openrail++", "openrail++", ["use restrictions"]),
        ("some-non-commercial-license", "some-non-commercial-license", ["non-commercial"]),
        ("For research only", "For research only", ["non-commercial"]),
        ("NCSA", "NCSA", []),
        ("mit or cc-by-nc-4.0", "MIT OR CC-BY-NC-4.0", []),
        ("cc-by-nc-4.0 or cc-by-nc-sa-4.0", "CC-BY-NC-4.0 OR CC-BY-NC-SA-4.0", ["non-commercial"]),
        ("mit and cc-by-nc-4.0", "MIT AND CC-BY-NC-4.0", ["non-commercial"]),
        ("  All  rights reserved ", "All rights reserved", []),
        ("((", "((", []),
    ],
)  # fmt: skip
def test_licences_have_one_spelling_and_their_names_say_what_goes_on(
    text: str, name: str, terms: list[str]
) -> None:
    assert licenses.normal(text) == name and licenses.normal(name) == name
    assert licenses.terms(name) == terms


@pytest.mark.parametrize(
    ("license", "among", "answer"),
    [
        ("MIT", ["mit"], True), ("MIT", ["Apache-2.0"], False), (None, ["any"], False),
        ("whatever", ["any"], True), ("MIT OR GPL-3.0-only", ["MIT"], True),
        ("MIT AND CC-BY-NC-4.0", ["MIT"], False), ("MIT AND CC-BY-NC-4.0", ["MIT", "cc by nc 4.0"], True),
        ("(MIT OR X) AND Y", ["MIT", "Y"], False),
    ],
)  # fmt: skip
def test_which_licences_are_allowed(license: str | None, among: list[str], answer: bool) -> None:
    assert licenses.allowed(license, among) is answer


def test_the_licence_of_a_folder_is_what_its_readme_declares(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    assert licenses.of_readme(tmp_path) is None
    for text, license in (
        ("---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# A base\n", "creativeml-openrail-m"),
        ("---\nlicense: other\nlicense_name: acme-non-commercial\n---\n", "acme-non-commercial"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "MIT AND Apache-2.0"),
        ("# license: mit\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\n[[\n---\n", None),
    ):
        readme.write_text(text)
        assert licenses.of_readme(tmp_path) == license


def cli(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, " ".join((done.output + str(done.exception or "")).split())


@pytest.mark.parametrize("option", ["--require-license", "--require-licence"])
def test_the_command_line_asks_for_licences_of_folders_and_of_configs(folder: Path, option: str) -> None:
    code, said = cli("check", folder, option, "any")
    assert code and "1 image lacks a licence" in said and "4.png (says none)" in said
    config = folder.parent / "config.yaml"
    config.write_text(
        f"recipe: train/distill\noutput: {folder.parent}/run\nbase: {{path: 'asset:tiny-sd'}}\n"
        f"data: {{path: {folder}, cache: {folder.parent}/cache, regularization: 'asset:general'}}\n"
    )
    for verb in ("check", "encode"):
        code, said = cli(verb, config, option, "cc-by-4.0, mit")
        assert code and "3 images lack a licence that data.require_license allows (CC-BY-4.0 or MIT)" in said
    code, said = cli("check", folder, option, " ,")
    assert code and "--require-license names no licence" in said


def test_the_list_of_sources_is_written_where_asked_and_a_change_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder.parent / "run"
    (run / "adapter").mkdir(parents=True)
    config = training(Data(path=str(folder)))
    (run / "config.yaml").write_text(dump(config))
    made = of_training(config, bases.inspect_base("asset:tiny-sd"), "ab", 1, rights=SUMMARY)
    content = provenance.trained(made, {"r": 4, "lora_alpha": 4.0, "target_modules": ["to_q"]})
    own_files.write_json(run / "adapter" / "adapter.json", content)
    (run / "adapter" / "lora.safetensors").write_bytes(b"")
    file = write_sources(run, run)
    with file.open(newline="", encoding="utf-8") as opened:
        first, *listed = csv.reader(opened)
    assert first == ["picture", "license", "source", "author", "consent"]
    assert listed[0] == ["0.png", "CC-BY-4.0", "https://a.example/0", "", "yes"]
    assert listed[1] == ["1.png", "MIT", "", "Ada", "no"] and listed[4] == ["4.png", "", "", "", ""]
    assert "warning" not in capsys.readouterr().err
    (folder / "2.json").unlink()
    write_sources(run, run)
    assert "says other things of licences and sources now" in capsys.readouterr().err


def test_rights_are_read_from_streams_of_every_kind(tmp_path: Path) -> None:
    said = [
        {"license": "cc by 4.0", "source": "agency"}, {"license": None, "source": None},
        {"license": "MIT", "source": None},
    ]  # fmt: skip
    wanted = [Rights("CC-BY-4.0", "agency"), Rights(), Rights("MIT")]
    some = rows(range(3))
    files = [
        file
        for (key, png, text), row in zip(some, said, strict=True)
        for file in ((f"{key}.png", png), (f"{key}.json", json.dumps({"text": text, **row}).encode()))
    ]
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "data-000000.tar").write_bytes(tar_bytes(files))
    images = [{"bytes": png, "path": None} for _, png, _ in some]
    columns = {name: [row[name] for row in said] for name in ("license", "source")}
    table = pa.table({"image": images, "text": [text for *_, text in some], **columns})
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "train-00000-of-00001.parquet")
    for data in (
        Data(path=str(tmp_path / "tars"), kind="webdataset"),
        Data(path=str(tmp_path / "set" / "*.parquet"), kind="parquet"),
        Data(path=str(tmp_path / "set"), streaming=True),
    ):
        found = [item for shard in source_shards(data) for item in shard.records()]
        assert [item.rights for item in found if isinstance(item, Record)] == wanted, data.kind


def test_a_cache_of_a_stream_has_the_summary_of_all_parts_and_older_parts_are_asked_too(
    tmp_path: Path,
) -> None:
    for number, row in enumerate(({"license": "MIT"}, {"consent": "no"})):
        some = rows(range(number * 2, number * 2 + 2), side=64)
        texts = [{"text": some[0][2], **row}, {"text": some[1][2], "license": "CC0-1.0"}]
        files = [(f"{key}.png", png) for key, png, _ in some]
        files += [
            (f"{key}.json", json.dumps(text).encode()) for (key, *_), text in zip(some, texts, strict=True)
        ]
        (tmp_path / "tars").mkdir(exist_ok=True)
        (tmp_path / "tars" / f"data-{number:06d}.tar").write_bytes(tar_bytes(sorted(files)))
    data = Data(path=str(tmp_path / "tars"), kind="webdataset", cache=str(tmp_path / "cache"))
    stream_images.encode(training(data), progress=False)
    base = bases.inspect_base("asset:tiny-sd")
    found = PartedCache.open(stream_images.folder_of(data), base=base, data=data)
    assert found.rights == {
        "pictures": 4, "licenses": {"CC0-1.0": 2, "MIT": 1}, "source": 0, "consent": 0, "refused": 1,
        "author": 0,
    }  # fmt: skip
    asked = replace(data, require_license=("any",))
    with pytest.raises(UserError, match=r"data-000001.* has pictures without a licence"):
        stream_images.encode(training(asked), progress=False)
    with pytest.raises(UserError, match=r"1 image lacks a licence .*000002 \(says none\)"):
        stream_images.encode(training(replace(asked, cache=str(tmp_path / "new"))), progress=False)
