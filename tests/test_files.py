"""The door for writing: whatever a file system says against it is one sentence, and nothing is half there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lcm_kit.errors import UserError
from lcm_kit.io import files

DOORS: dict[str, Callable[[Path], None]] = {
    "file": lambda path: files.atomic_write(path, "text"),
    "folder": lambda path: _folder(path),
    "append": lambda path: files.append(path, "line"),
}


def _folder(path: Path) -> None:
    with files.atomic_folder(path) as inside:
        (inside / "a").write_text("text")


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("taken/x", r"taken/x: cannot be written \(.*/taken is a file, not a folder\); remove it or"),
        ("taken/deep/x", r"taken is a file, not a folder"),
        ("n" * 300, r"File name too long\); choose a shorter name"),
        ("a\0b", r"its name holds a NUL character\)"),
        ("loop/x", r"loop is a link to no folder\); remove it or"),
    ],
)
def test_places_that_cannot_be(door: str, name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("here first")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=words) as refused:
        DOORS[door](tmp_path / name)
    shown = str(tmp_path / name).replace("\0", r"\x00")
    assert str(refused.value).startswith(f"{shown}: cannot be written (")
    assert "\n" not in str(refused.value)
    assert listing(tmp_path) == ["loop", "taken"] and (tmp_path / "taken").read_text() == "here first"


def test_a_folder_in_the_place_of_a_file_and_the_other_way(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(
        UserError, match=r"x: cannot be written \(a folder of that name is there\); remove it"
    ):
        files.atomic_write(tmp_path / "x", "text")
    (tmp_path / "y").write_text("precious")
    with pytest.raises(UserError, match=r"y is a file, not a folder"):
        _folder(tmp_path / "y")
    assert listing(tmp_path) == ["x", "y"] and (tmp_path / "y").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_cannot_be_removed_does_not_hide_what_went_wrong(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a read-only file system the temporary file can neither be written nor removed."""

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    for name in ("unlink", "open", "mkdir"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(UserError, match=rf"new/x: cannot be written \({os.strerror(number)}\); "):
        files.atomic_write(tmp_path / "new/x", "text")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_in_the_words_of_a_library(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"x: cannot be written \(No space left on device\); free some space"),
        files.atomic_file(tmp_path / "x") as temporary,
    ):
        temporary.write_text("half")
        raise error
    assert listing(tmp_path) == []


def test_torch_says_that_the_disk_is_full_in_its_own_way() -> None:
    """What `torch.save` makes of a handle that cannot be written is recognised, whatever its words are."""
    import io

    import torch

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises((RuntimeError, OSError)) as failed:
        torch.save({"a": torch.zeros(1000)}, Full())  # type: ignore[arg-type]
    reason = files.reason_of(failed.value)
    assert reason is not None and reason.errno == errno.ENOSPC


def test_a_file_that_could_not_be_read_is_not_said_to_be_unwritable(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere/picture.png"
    with pytest.raises(FileNotFoundError) as failed, files.atomic_file(tmp_path / "new/x") as temporary:
        temporary.write_bytes(elsewhere.read_bytes())
    assert failed.value.filename == str(elsewhere)
    assert listing(tmp_path) == []


def test_our_own_bugs_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^ours$"), files.atomic_file(tmp_path / "x"):
        raise ValueError("ours")
    with pytest.raises(UserError, match="^another sentence$"), files.atomic_folder(tmp_path / "x"):
        raise UserError("another sentence")
    assert listing(tmp_path) == []


def test_the_longest_names_have_room_for_a_temporary_one(tmp_path: Path) -> None:
    for name in ("n" * 255, "\N{HEDGEHOG}" * 63):  # 252 bytes
        files.atomic_write(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_writable_folders_are_known_by_trying(tmp_path: Path) -> None:
    files.require_writable(tmp_path / "new")
    assert listing(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file, not a folder"):
        files.require_writable(tmp_path / "file")


@pytest.mark.parametrize("refused", [1, 2])
def test_a_folder_whose_replacing_is_refused_stays(
    refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either when it is put aside, or when it is aside and the new one does not take its place."""
    _folder(tmp_path / "x")
    (tmp_path / "x/a").write_text("precious")
    real, calls = os.replace, []

    def replace(*paths: object) -> None:
        calls.append(paths)
        if len(calls) == refused:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(paths[0]))
        real(*paths)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match=r"x: cannot be written \(Permission denied\); get the right"):
        _folder(tmp_path / "x")
    assert listing(tmp_path) == ["x", "x/a"] and (tmp_path / "x/a").read_text() == "precious"


def test_what_cannot_be_removed_is_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "x")
    (tmp_path / "y").write_text("text")

    def refuse(*paths: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(paths[0]))

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(os, name, refuse)
        for name in ("x", "y"):
            with pytest.raises(UserError, match=rf"{name}: cannot be removed \(Permission denied\); get the"):
                files.discard(tmp_path / name)
    assert listing(tmp_path) == ["x", "x/a", "y"]
    for name in ("x", "y", "not there"):
        files.discard(tmp_path / name)
    assert listing(tmp_path) == []
