"""Keys that decide which rows a picture has: a change of any of them is noticed, and by nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lcm_kit.bases import inspect_base
from lcm_kit.config.data import Captions, Masks, Shapes
from lcm_kit.data import parts, row_settings, shards, sources, stream_images
from lcm_kit.errors import UserError
from lcm_kit.io import own_files
from tests.recipes.small import TEMPLATE, configure
from tests.sources import rows, write_folder, write_tars

SHARDS, EACH = 2, 3
ROWS = SHARDS * EACH


@pytest.fixture
def config(tmp_path: Path, sd_base: Callable[..., Path]) -> Any:
    """Of six small pictures, whose captions have tags, in two tar files; and of the same in a folder."""
    some = [(key, png, f"a, b, {text}") for key, png, text in rows(range(ROWS), 48)]
    write_tars(tmp_path / "set", [some[:EACH], some[EACH:]])
    write_folder(tmp_path / "folder", some)
    where = {
        "path": str(tmp_path / "set"), "cache": str(tmp_path / "cache"), "resolution": 64, "trigger": "zz",
        "shapes": {"multiple": 16},
    }  # fmt: skip
    return configure({**TEMPLATE, "base": {"path": str(sd_base())}, "data": where}, tmp_path / "run")


# with the number of rows of each picture
CHANGES: dict[str, tuple[dict[str, Any], float]] = {
    "data.flip": ({"flip": True}, 2),
    "data.shapes.kind": ({"shapes": Shapes(kind="square")}, 1),
    "data.shapes.multiple": ({"shapes": Shapes(multiple=32)}, 1),
    "data.shapes.longest": ({"shapes": Shapes(multiple=16, longest=2.0)}, 1),
    "data.shapes.crops": ({"shapes": Shapes(multiple=16, crop="random", crops=3)}, 3),
    "data.shapes.small": ({"shapes": Shapes(multiple=16, small="keep")}, 1),
    "data.masks.source": ({"masks": Masks(source="alpha")}, 1),
    "data.captions.shuffle_tags": ({"captions": Captions(shuffle_tags=2)}, 1),
    "data.trigger": ({"captions": Captions(trigger_in_front=True)}, 1),
    "data.chunks": ({"chunks": 1}, 1),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_stream_is_encoded_anew_where_its_rows_would_be_others(config: Any, key: str) -> None:
    base = inspect_base(config.base.path)
    assert sources.encode(config, progress=False)[0].encoded == ROWS
    change, times = CHANGES[key]
    other = replace(config, data=replace(config.data, **change))
    with pytest.raises(UserError, match=rf"was made for another config .*{key}"):
        sources.open_images(other.data, base)
    again = sources.encode(other, progress=False)[0]
    assert (again.encoded, again.rows) == (ROWS * times, ROWS * times)
    assert any(said.startswith(key) for said in again.changes)
    assert len(sources.open_images(other.data, base)) == ROWS * times
    assert sources.encode(other, progress=False)[0].encoded == 0


def test_what_makes_no_other_rows_keeps_a_stream(config: Any) -> None:
    sources.encode(config, progress=False)
    for change in ({"trigger": "other"}, {"batch_size": 1}, {"skip_bad": True}, {"shard_size": 2}):
        other = replace(config, data=replace(config.data, **change))
        report = sources.encode(other, progress=False)[0]
        assert (report.encoded, report.changes) == (0, []), change


def test_a_part_leaves_nothing_of_the_one_before(config: Any, tmp_path: Path) -> None:
    def encode(**change: Any) -> set[str]:
        sources.encode(replace(config, data=replace(config.data, **change)), progress=False)
        return {file.relative_to(tmp_path / "cache").as_posix() for file in tmp_path.glob("cache/part-*/*")}

    before = encode(shard_size=1, shapes=Shapes(kind="square"))  # pictures of 48 are scaled up: a sheet
    assert sum(name.endswith("worst.png") for name in before) == SHARDS
    after = encode(shapes=Shapes(multiple=16, small="keep"))
    assert sorted(name.partition("/")[2] for name in after) == sorted(
        SHARDS * ["part.json", "pictures.csv", "records.json", "shard-00000.safetensors"]
    )


def test_training_on_a_folder_asks_for_the_keys_that_it_was_encoded_by(config: Any, tmp_path: Path) -> None:
    folder = replace(config, data=replace(config.data, path=str(tmp_path / "folder")))
    base = inspect_base(config.base.path)
    sources.encode(folder, progress=False)
    for key, (change, times) in CHANGES.items():
        other = replace(folder, data=replace(folder.data, **change))
        with pytest.raises(UserError, match=rf"was made for another config .*{key}"):
            sources.open_images(other.data, base)
        assert sources.encode(other, progress=False)[0].rows == ROWS * times
        assert len(sources.open_images(other.data, base)) == ROWS * times
        sources.encode(folder, progress=False)
    other = replace(folder, data=replace(folder.data, trigger="other", skip_bad=True, shard_size=2))
    assert len(sources.open_images(other.data, base)) == ROWS


def test_a_folder_encoded_before_they_were_kept_is_read(config: Any, tmp_path: Path) -> None:
    folder = replace(config, data=replace(config.data, path=str(tmp_path / "folder")))
    sources.encode(folder, progress=False)
    file = tmp_path / "cache/manifest.json"
    kept = json.loads(file.read_text())
    wanted = {**kept["settings"]}
    old = {key: value for key, value in wanted.items() if not row_settings.is_one(key)}
    assert len(wanted) - len(old) == len(row_settings.of(inspect_base(config.base.path), config.data)) > 12
    assert shards.made_by(old) == shards.made_by(wanted)  # finished shards stay what they are
    del kept[own_files.HASH]
    file.write_text(own_files.json_text({**kept, "settings": old}))
    assert len(sources.open_images(folder.data, inspect_base(config.base.path))) == ROWS
    report = sources.encode(folder, progress=False)[0]
    assert (report.encoded, report.changes) == (0, [])


def test_the_base_decides_where_the_config_leaves_it_to_it(config: Any) -> None:
    base = inspect_base(config.base.path)
    coarser, free = replace(base, multiple=base.multiple * 2), replace(config.data, shapes=Shapes())
    assert row_settings.of(base, free) != row_settings.of(coarser, free)
    assert row_settings.of(base, config.data) == row_settings.of(coarser, config.data)


def test_the_empty_condition_comes_back_after_an_encode_that_was_stopped(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written before the first part: by other settings, or it was removed, when no part is missing."""
    sources.encode(config, progress=False)
    file, base = tmp_path / "cache/empty.safetensors", inspect_base(config.base.path)
    before = file.read_bytes()

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    other = replace(config, data=replace(config.data, resolution=32))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts.PartMaker, "make", stop)
        sources.encode(other, progress=False)
    assert file.read_bytes() != before
    assert sources.encode(config, progress=False)[0].encoded == 0
    assert file.read_bytes() == before
    sources.open_images(config.data, base).empty()
    file.unlink()
    sources.encode(config, progress=False)
    assert file.read_bytes() == before


def test_a_stream_without_a_row_is_refused_like_a_folder(config: Any, tmp_path: Path) -> None:
    dropped = replace(config, data=replace(config.data, shapes=Shapes(multiple=16, small="drop")))
    with pytest.raises(UserError, match=r"no record of .*set' can be used; fix the first") as caught:
        sources.encode(dropped, progress=False)
    assert "data-000000.tar/000000: 48 x 48 pixels are fewer" in str(caught.value)
    write_tars(tmp_path / "set", [[], []])
    with pytest.raises(UserError, match="no record of .*set' can be used; 2 shards of it hold none"):
        sources.encode(config, progress=False)


def test_the_sheet_of_the_worst_is_there_before_the_list_says_so(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream_images, "_write_list", stop)
        sources.encode(config, progress=False)
    assert (tmp_path / "cache/worst.png").is_file()


def test_an_address_is_said_as_it_is(config: Any, tmp_path: Path) -> None:
    """A `Path` would make one slash of two, which nobody can copy."""
    there = replace(config.data, cache="memory://said/as/it/is", local_cache=str(tmp_path / "copies"))
    (report,) = sources.encode(replace(config, data=there), progress=False)
    assert report.folder == "memory://said/as/it/is"
    assert report.message.startswith("memory://said/as/it/is: 6 of 6 images encoded in ")
    assert sources.encode(config, progress=False)[0].folder == tmp_path / "cache"


def test_a_sheet_that_cannot_be_read_is_told_of_with_what_brings_it_back(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources.encode(config, progress=False)
    whole = (tmp_path / "cache/worst.png").read_bytes()
    first, second = (tmp_path / "cache" / parts.folder_name(f"data-00000{k}.tar") for k in range(SHARDS))
    (second / "worst.png").write_bytes(b"")
    # the parts are listed anew, as where the set has grown
    (tmp_path / "cache/parts.json").unlink()
    capsys.readouterr()
    assert sources.encode(config, progress=False)[0].encoded == 0
    said = capsys.readouterr().err
    assert f"{second}/worst.png is damaged" in said and "remove part.json beside it, and encode again" in said
    assert (tmp_path / "cache/worst.png").read_bytes() != whole  # three pictures, not six
    (second / "part.json").unlink()
    (tmp_path / "cache/parts.json").unlink()
    assert sources.encode(config, progress=False)[0].encoded == EACH
    assert (tmp_path / "cache/worst.png").read_bytes() == whole and first.is_dir()


def test_one_record_is_one_record(config: Any, tmp_path: Path) -> None:
    write_tars(tmp_path / "set", [rows(range(EACH), 48), [("odd", b"no picture", "text")]])
    with pytest.raises(UserError, match=r"^1 record of data-000001\.tar of .* cannot be used"):
        sources.encode(config, progress=False)


def test_a_trigger_counts_where_captions_are_made_by_it(config: Any) -> None:
    base = inspect_base(config.base.path)
    for captions, counts in (
        (Captions(), False), (Captions(shuffle_tags=1), True), (Captions(trigger_in_front=True), True),
    ):  # fmt: skip
        of = [row_settings.of(base, replace(config.data, captions=captions, trigger=t)) for t in ("a", "b")]
        assert (of[0] != of[1]) == counts, captions
