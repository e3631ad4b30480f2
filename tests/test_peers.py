"""A machine that vanishes is missed: by beats that stop, not by a connection that breaks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

from lcm_kit.training import peers
from lcm_kit.training.peers import BEAT, SILENCE, Listener

TURNS = int(SILENCE / BEAT)


class Store:
    """As torch's, in memory."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()

    def add(self, key: str, more: int) -> int:
        self.sums[key] += more
        return self.sums[key]


def ring(world: int) -> list[Listener]:
    store = Store()
    return [Listener(store, rank, world) for rank in range(world)]


def turn(*listeners: Listener) -> list[bool]:
    for each in listeners:
        each.exchange()
    return [each.is_lost() for each in listeners]


def test_nobody_is_missed_while_all_beat() -> None:
    three = ring(3)
    assert not any(lost for _ in range(3 * TURNS) for lost in turn(*three))


def test_the_one_before_it_misses_one_that_fell_silent() -> None:
    first, second, third = ring(3)
    turn(first, second, third)
    seen = [turn(first, third) for _ in range(TURNS + 1)]  # it hears the last beat in the first one
    assert not any(lost for turns in seen[:-1] for lost in turns) and seen[-1] == [True, False]


def test_one_that_ends_as_it_should_is_not_missed() -> None:
    first, second = ring(2)
    turn(first, second)
    second.leave()
    assert not any(turn(first)[0] for _ in range(3 * TURNS))


def test_one_that_is_started_again_is_missed_though_its_predecessor_left() -> None:
    """In the same store, which the agents of torchrun hold."""
    first, second = ring(2)
    second.leave()
    again = Listener(first.store, 0, 2, life="again")
    assert [turn(again)[0] for _ in range(TURNS + 1)].index(True) == TURNS


def test_one_that_never_came_is_missed() -> None:
    first, _ = ring(2)
    assert [turn(first)[0] for _ in range(TURNS + 2)].index(True) == TURNS


def test_who_slept_itself_misses_nobody() -> None:
    """Beats of the others that it did not hear for hours are heard in its next turn."""
    first, second = ring(2)
    turn(first, second)
    for _ in range(5 * TURNS):
        second.exchange()
    assert turn(first) == [False]


def test_a_store_that_hangs_is_a_machine_that_is_lost() -> None:
    first, second = ring(2)
    turn(first, second)
    assert [first.is_lost() for _ in range(TURNS + 1)].index(True) == TURNS - 1


def test_processes_of_one_machine_do_not_listen() -> None:
    code = "import threading; from lcm_kit.training import peers\n"
    code += "peers.listen(); print(threading.active_count())"
    several = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | several, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1", done.stderr


def test_the_sentence_names_who_is_lost(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    codes: list[int] = []
    monkeypatch.setattr(peers.os, "_exit", codes.append)
    peers._judge(Listener(Store(), 3, 4, silent=TURNS))
    assert codes == [1] and "process 0 of this run, on another machine" in capsys.readouterr().err
