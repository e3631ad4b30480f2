"""Servers in processes of their own that are killed: who was answered finds it again."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lcm_kit
from lcm_kit.errors import UserError
from lcm_kit.serve.store import NAME
from tests.app_text import a1111
from tests.recipes.small import environment
from tests.serve.small import ADAPTER, PATIENCE, Process, command, wait_for


@pytest.fixture
def started() -> Iterator[list[Process]]:
    """Servers of a test, which are ended."""
    found: list[Process] = []
    yield found
    for each in found:
        each.end()


def start(started: list[Process], data: Path) -> tuple[Process, lcm_kit.Client]:
    more = ("--data", str(data), "--history", "3", "--batch", "1", "--rate", "100000")
    started.append(Process.start("--adapter", ADAPTER, *more))
    return started[-1], lcm_kit.Client(started[-1].url)


def killed(server: Process) -> None:
    server.signal(signal.SIGKILL)
    assert server.ended() == -signal.SIGKILL


def test_votes_and_history_outlive_sigkill(started: list[Process], tmp_path: Path) -> None:
    """Between votes, and while two clients vote as fast as they can."""
    data = tmp_path / "data"
    server, client = start(started, data)
    pair = client.compare("a red circle", seed=1, steps=1, blind=True, against={"steps": 2})
    assert pair.id == 1 and pair.left_is is None and pair.settings is None
    assert pair.left.size == pair.right.size == (64, 64) and pair.left.tobytes() != pair.right.tobytes()
    assert not pair.left.info and not pair.right.info
    seen = client.vote(pair, "left")
    shown = client.draw("a red circle", seed=1, **{k: seen["settings"][seen["left_is"]][k] for k in DRAWN})[0]
    assert shown.tobytes() == pair.left.tobytes()
    kept = [client.draw("a red circle", seed=k, steps=1, keep=True)[0].tobytes() for k in range(5)]
    killed(server)

    server, client = start(started, data)
    assert (client.votes()["votes"], client.votes()[seen["chosen"]]) == (1, 1)
    with pytest.raises(UserError, match="^comparison 1 has its vote, which stays"):
        client.vote(1, "right")
    history = client.history()
    assert [each["id"] for each in history] == [5, 4, 3] == [each["settings"]["seed"] + 1 for each in history]
    for each in history:
        picture = client.kept(each["id"])
        assert picture.tobytes() == kept[each["id"] - 1]
        assert a1111(picture.info["parameters"]).fields["Seed"] == str(each["settings"]["seed"])
    told = voting(server, [client.compare("a", steps=1, against={"steps": 1}).id for _ in range(30)])

    server, client = start(started, data)
    lines = list(csv.DictReader(io.StringIO(client.votes_csv(), newline="")))
    found = {int(line["id"]): line["choice"] for line in lines}
    assert found[1] == "left" and len(told) >= 10 and told.items() <= found.items()
    assert len(found) - len(told) - 1 in range(3)  # of each client one may be untold
    assert client.votes()["votes"] == len(found)
    client.forget(5)
    client.forget()
    assert client.history() == []
    server.signal(signal.SIGTERM)
    assert server.ended() == 0
    assert [each.name for each in data.iterdir()] == [NAME]  # no lock, no journal


DRAWN = ("sampler", "steps", "guidance_scale", "adapters")


def voting(server: Process, numbers: list[Any]) -> dict[int, str]:
    """Two clients vote until the server is killed amid it; what each was told."""
    told: dict[int, str] = {}

    def vote(mine: list[int]) -> None:
        for number in mine:
            choice = "tie" if number % 2 else "neither"
            try:
                status, _ = server.answer("/v1/votes", {"comparison": number, "choice": choice})
            except OSError:
                return
            if status == 200:
                told[number] = choice

    threads = [threading.Thread(target=vote, args=(numbers[k::2],)) for k in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(told) >= 10, "some voted")
    killed(server)
    for thread in threads:
        thread.join(PATIENCE)
    return told


@pytest.mark.slow  # each loads the library; tests/serve/test_store.py holds the sentences
def test_what_cannot_be_kept_in_ends_before_the_base_is_loaded(
    started: list[Process], tmp_path: Path
) -> None:
    start(started, tmp_path / "taken")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / NAME).write_text("no database, but a text of some length" * 50)
    (tmp_path / "file").touch()
    for folder, said in (
        ("taken", f"process {started[0].process.pid} is at work there (serve)"),
        ("broken", "cannot be used (file is not a database); put a copy of it that is whole in its place"),
        ("file", "cannot be written ("), ("taken/" + NAME, "is a file, not a folder"),
    ):  # fmt: skip
        given = command("--port", "0", "--adapter", "nowhere.safetensors", "--data", str(tmp_path / folder))
        done = subprocess.run(given, capture_output=True, text=True, env=environment(1), timeout=PATIENCE)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert said in " ".join(done.stderr.split()) and "nowhere" not in done.stderr, done.stderr
    assert json.loads(started[0].answer("/v1/votes")[1])["votes"] == 0  # which nobody disturbed
