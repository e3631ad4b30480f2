"""The table of wrong-on-purpose edits fits the sources, and the command tells what the tests let pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import mutants
from tools.mutation import TableError, curated, edits_of, generic

ROOT = Path(__file__).parents[1]
TABLE = yaml.safe_load((ROOT / "tools/mutants.yaml").read_text(encoding="utf-8"))


def test_every_edit_of_the_table_applies_exactly_once() -> None:
    edits = curated(TABLE, ROOT)  # raises where an old text or a test is gone
    assert len(edits) >= 200 and len({edit.name for edit in edits}) == len(edits)
    for edit in edits:
        source = (ROOT / edit.file).read_bytes()
        assert edit.tests and edit.applied(source) != source


def test_every_equivalent_edit_is_one_of_those_that_syntax_suggests() -> None:
    edits = generic(TABLE, ROOT)  # raises where one is gone
    assert len(edits) > 1000 and len({edit.name for edit in edits}) == len(edits)
    assert all(len(reason.split()) > 3 for reason in TABLE["equivalent"].values())
    missing = [test for tests in TABLE["generic"].values() for test in tests if not (ROOT / test).is_file()]
    assert not missing


# -- Edits from the syntax -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("y = a + b * 2", {"y = (a - b * 2)", "y = a + (b / 2)", "y = a + b * (3)"}),
        ("y = a < b", {"y = (a <= b)"}),
        ("y = 0 <= a < n", {"y = (0 < a < n)", "y = (0 <= a <= n)", "y = (1) <= a < n"}),
        ("y = a and not b", {"y = (a or not b)", "y = a and (b)"}),
        ("y = 0.5 if a else 0.0",
         {"y = (0.0 if a else 0.5)", "y = (1.0) if a else 0.0", "y = 0.5 if a else (1.0)"}),
        ("y = -x.max()", {"y = (x.max())", "y = -(x.min())"}),
        ("if a:\n    f(x)", {"if (not (a)):\n    f(x)", "if a:\n    pass"}),
        ("y = [a for a in x if a]", {"y = [a for a in x if (not (a))]"}),
        ("for a in x:\n    s += a", {"for a in x:\n    pass"}),
        ("def f(x: 'int' = True) -> 'a | b':\n    '''1 + 1'''\n    raise E(f'{x + 1}')",
         {"def f(x: 'int' = (False)) -> 'a | b':\n    '''1 + 1'''\n    raise E(f'{x + 1}')",
          "def f(x: 'int' = True) -> 'a | b':\n    '''1 + 1'''\n    pass"}),
        ("é = 'é' + x\ny = é * x", {"é = 'é' + x\ny = (é / x)"}),  # bytes, not characters
    ],
)  # fmt: skip
def test_the_edits_that_syntax_suggests(source: str, wanted: set[str]) -> None:
    found = [edit.applied(source.encode()).decode() for edit in edits_of("x.py", source.encode())]
    assert sorted(found) == sorted(wanted)


def test_equal_edits_of_one_function_have_names_of_their_own() -> None:
    names = [edit.name for edit in edits_of("x.py", b"def f(x):\n    return x * 2 + y * 2")]
    assert "x.py: f: 2 -> 3" in names and "x.py: f: 2 -> 3 (2)" in names


# -- The table is held to the sources ------------------------------------------------------------------------


def project(folder: Path, source: str, test: str, wrong: dict[str, Any], **table: Any) -> Path:
    """A checkout of one module and one file of tests, and the table beside them."""
    (folder / "halves.py").write_text(source)
    (folder / "test_halves.py").write_text(test)
    (folder / ".gitignore").write_text("ignored\n")
    edits = {"halves.py": {"tests": ["test_halves.py"], "wrong": wrong}}
    whole = {"preload": ["pytest"], "edits": edits, "generic": {}, "equivalent": {}, **table}
    (folder / "table.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


HALF = "def half(x):\n    return x / 2\n"
TEST = "from halves import half\n\n\ndef test_half():\n    assert half(4) == 2\n"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gone": ["x / 3", "x"]}, "halves.py: gone: its old text is gone, and must be there once: 'x / 3'"),
        ({"twice": ["x", "y"]}, "halves.py: twice: its old text is there 2 times"),
        ({"same": ["x / 2", "x / 2"]}, "halves.py: same: the edit changes nothing"),
        ({"broken": ["x / 2", "x /"]}, "halves.py: broken: the edit gives no Python"),
        ({"untested": ["x / 2", "x", ["test_none.py"]]}, "halves.py: untested: there is no test_none.py"),
    ],
)
def test_an_edit_that_does_not_fit_is_named(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    folder = project(tmp_path, HALF, TEST, wrong)
    with pytest.raises(TableError) as raised:
        curated(yaml.safe_load((folder / "table.yaml").read_text()), folder)
    assert str(raised.value).startswith(said)


def test_a_file_or_an_equivalent_edit_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"none\.py: the table edits this file, and it is gone"):
        curated({"edits": {"none.py": {"tests": [], "wrong": {}}}}, tmp_path)
    folder = project(tmp_path, HALF, TEST, {})
    table = {"generic": {"halves.py": ["test_halves.py"]}, "equivalent": {"halves.py: half: 7 -> 8": "never"}}
    with pytest.raises(TableError, match="an equivalent edit is gone: halves.py: half: 7 -> 8"):
        generic(table, folder)
    table["equivalent"] = {"halves.py: half: 2 -> 3": "never"}
    assert [edit.name for edit in generic(table, folder)] == ["halves.py: half: x / 2 -> x * 2"]


# -- The command ---------------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    script = [sys.executable, str(ROOT / "tools/mutants.py"), "--root", str(folder)]
    done = subprocess.run(
        [*script, "--table", str(folder / "table.yaml"), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout + done.stderr


def listed(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    options = ["--list", "--root", str(folder), "--table", str(folder / "table.yaml")]
    assert mutants.main([*options, *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_what_survives_is_told_and_the_checkout_is_left_alone(tmp_path: Path) -> None:
    wrong = {
        "a third": ["x / 2", "x / 3"], "rounded down": ["x / 2", "x // 2"],
        "no import": ["def half(x):", "import nowhere\ndef half(x):"],
    }  # fmt: skip
    folder = project(tmp_path, HALF, TEST, wrong)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, said = command(folder)
    lines = said.splitlines()
    assert code == 1 and lines[0].startswith("clean ")
    assert lines[1].startswith("noticed ") and lines[1].endswith("a third  [test_halves.py::test_half]")
    assert lines[2].startswith("SURVIVED ") and "halves.py: rounded down" in lines[2]
    assert lines[3].startswith("noticed ") and lines[3].endswith("no import  [test_halves.py]")
    assert lines[4:] == ["2 of 3 noticed", "SURVIVED  halves.py: rounded down"]
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_tests_that_fail_without_an_edit_are_no_score(tmp_path: Path) -> None:
    folder = project(tmp_path, HALF, TEST.replace("== 2", "== 3"), {"a third": ["x / 2", "x / 3"]})
    code, said = command(folder)
    assert code == 2 and "without an edit test_halves.py fails" in said


def test_edits_are_chosen_by_name_and_sampled_by_the_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = HALF + HALF.replace("half", "halve").replace("2", "4")
    wrong = {"a third": ["x / 2", "x / 3"], "a fifth": ["x / 4", "x / 5"]}
    folder = project(tmp_path, source, TEST, wrong, generic={"halves.py": ["test_halves.py"]})
    assert listed(folder, capsys) == ["halves.py: a third", "halves.py: a fifth"]
    assert listed(folder, capsys, "--only", "fifth") == ["halves.py: a fifth"]
    every = listed(folder, capsys, "--generic", "99")
    assert len(every) == 4
    drawn = [listed(folder, capsys, "--generic", "2", "--seed", seed) for seed in "012301"]
    assert all(len(set(some)) == 2 and set(some) <= set(every) for some in drawn)
    assert drawn[:2] == drawn[4:] and len(set(map(tuple, drawn))) > 1
    assert (
        mutants.main(["--only", "nothing", "--table", str(folder / "table.yaml"), "--root", str(folder)]) == 2
    )
    assert "no edit of that name" in capsys.readouterr().err


def test_an_endless_loop_is_noticed(tmp_path: Path) -> None:
    source = "def half(x):\n    n = 0\n    while n < x:\n        n += 1\n    return n / 2\n"
    folder = project(tmp_path, source, TEST, {"no progress": ["n += 1", "n += 0"]})
    code, said = command(folder, "--least", "1")
    assert code == 0 and "halves.py: no progress  [it took too long]" in said
