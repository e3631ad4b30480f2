"""The queue: what is drawn together, in which order, who leaves, and how it ends. No model is loaded."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lcm_kit.errors import UserError
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.asked import Order
from lcm_kit.serve.engine import Batch, Closed, Engine, Full, NoRoom, Ticket
from lcm_kit.serve.limits import Limits
from tests.serve.small import PATIENCE, FakeDrawer, colour, order, running, wait_for


def engine(drawer: FakeDrawer, **limits: Any) -> tuple[Engine, list[Batch]]:
    told: list[Batch] = []
    return Engine(drawer, Limits(**{"window": 0.0, **limits}), told.append), told


def submit(where: Engine, what: Order) -> Ticket:
    return where.submit_all([what], lambda *_: None)[0]


def pixels(pictures: list[Any]) -> list[Any]:
    return [each.getpixel((0, 0)) for each in pictures]


def test_what_waits_and_belongs_together_is_drawn_together(tiny: Served) -> None:
    """The oldest says what is next, whatever lies behind it; nothing is over the bound."""
    drawer = FakeDrawer(size=3)
    found, told = engine(drawer)
    with running(found):
        first = submit(found, order(tiny, seed=1))
        drawer.began.get(timeout=PATIENCE)  # it is being drawn, and all that comes now waits
        others = [
            submit(found, order(tiny, seed=seed, steps=steps, count=count))
            for seed, steps, count in ((2, 1, 2), (3, 2, 1), (4, 1, 1), (5, 1, 1), (6, 2, 1))
        ]
        assert found.waiting == 6
        drawer.may_go.set()
        pictures = [ticket.future.result(PATIENCE) for ticket in (first, *others)]
    assert [[(each.seed, each.number) for each in pieces] for _, pieces in drawer.batches] == [
        [(1, 0)], [(2, 0), (2, 1), (4, 0)], [(3, 0), (6, 0)], [(5, 0)],
    ]  # fmt: skip
    assert [key.steps for key, _ in drawer.batches] == [4, 1, 2, 1]
    assert pixels(pictures[1]) == [colour(2, 0).getpixel((0, 0)), colour(2, 1).getpixel((0, 0))]
    assert pixels(pictures[3]) == [colour(4, 0).getpixel((0, 0))]
    assert [(each.size, each.outcome) for each in told] == [
        (1, "drawn"), (3, "drawn"), (2, "drawn"), (1, "drawn"),
    ]  # fmt: skip
    assert others[0].batches == [3, 3] and first.batches == [1]


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 3}, {"guidance_scale": 2.0}, {"width": 72}, {"height": 72}, {"sampler": "ddim"},
        {"adapters": {}}, {"adapters": {"tiny-lcm-lora": 0.5}},
        {"guidance_scale": 2.0, "negative_prompt": "blue"},
    ],
)  # fmt: skip
def test_what_differs_in_more_than_prompt_and_seed_is_not_drawn_together(
    tiny: Served, other: dict[str, Any]
) -> None:
    plain = order(tiny).key
    assert order(tiny, prompt="another", seed=9, count=3).key == plain != order(tiny, **other).key


def test_a_batch_waits_for_company_only_where_there_was_some(tiny: Served) -> None:
    """The window is an hour: who is alone does not wait for it, and who had company lately gets it again."""
    drawer = FakeDrawer()
    drawer.may_go.set()
    found, _ = engine(drawer, window=3600.0)
    with running(found):
        submit(found, order(tiny)).future.result(PATIENCE)
        submit(found, order(tiny, count=2)).future.result(PATIENCE)
        pair = [submit(found, order(tiny, seed=1))]
        wait_for(lambda: found.waiting == 1, "it waits for another")
        pair.append(submit(found, order(tiny, seed=2)))
        for ticket in pair:
            ticket.future.result(PATIENCE)
    assert [len(pieces) for _, pieces in drawer.batches] == [1, 2, 2]


def test_a_full_queue_refuses_and_says_when(tiny: Served) -> None:
    drawer = FakeDrawer()
    found, _ = engine(drawer, queue=3)
    with running(found):
        submit(found, order(tiny))
        drawer.began.get(timeout=PATIENCE)
        submit(found, order(tiny, count=2))
        with pytest.raises(Full, match="the queue is full: 2 pictures wait, of 3") as refused:
            submit(found, order(tiny, count=2))
        assert refused.value.seconds >= 1
        last = submit(found, order(tiny, seed=8))  # which fits
        drawer.may_go.set()
        assert pixels(last.future.result(PATIENCE)) == [(8, 0, 7)]


def test_who_leaves_takes_his_pictures_out_of_the_queue(tiny: Served) -> None:
    drawer = FakeDrawer()
    found, told = engine(drawer)
    with running(found):
        stays = submit(found, order(tiny, seed=1))
        drawer.began.get(timeout=PATIENCE)
        leaves, other = submit(found, order(tiny, seed=2, count=3)), submit(found, order(tiny, seed=3))
        found.leave(leaves)
        assert found.waiting == 1
        drawer.may_go.set()
        stays.future.result(PATIENCE)
        other.future.result(PATIENCE)
    assert [[each.seed for each in pieces] for _, pieces in drawer.batches] == [[1], [3]]
    assert not leaves.future.done() and [each.outcome for each in told] == ["drawn", "drawn"]


def test_a_batch_that_nobody_waits_for_ends_at_its_next_step(tiny: Served) -> None:
    """The drawer is never let go: what ends the batch is that its client left."""
    drawer = FakeDrawer()
    found, told = engine(drawer)
    with running(found):
        one = submit(found, order(tiny, seed=3, count=2))
        drawer.began.get(timeout=PATIENCE)
        other = submit(found, order(tiny, seed=4))
        found.leave(one)
        drawer.began.get(timeout=PATIENCE)
        assert [(each.size, each.outcome) for each in told] == [(2, "stopped")]
        drawer.may_go.set()
        assert pixels(other.future.result(PATIENCE)) == [(4, 0, 7)]
    assert not one.future.done()


def test_one_of_a_batch_that_leaves_ends_nothing_for_the_others(tiny: Served) -> None:
    drawer = FakeDrawer()
    found, told = engine(drawer)
    with running(found):
        submit(found, order(tiny))
        drawer.began.get(timeout=PATIENCE)
        leaves, stays = submit(found, order(tiny, seed=1)), submit(found, order(tiny, seed=2))
        drawer.let_one_go()
        assert [each.seed for each in drawer.began.get(timeout=PATIENCE)] == [1, 2]
        found.leave(leaves)
        drawer.may_go.set()
        assert pixels(stays.future.result(PATIENCE)) == [(2, 0, 7)]
    assert [(each.size, each.outcome) for each in told] == [(1, "drawn"), (2, "drawn")]
    assert not leaves.future.done()


def test_a_bug_in_a_batch_is_told_to_its_clients_and_ends_nothing_else(tiny: Served) -> None:
    drawer = FakeDrawer(error=RuntimeError("a shape is wrong"))
    drawer.may_go.set()
    found, told = engine(drawer)
    with running(found):
        with pytest.raises(RuntimeError, match="a shape is wrong"):
            submit(found, order(tiny)).future.result(PATIENCE)
        drawer.error = UserError("memory ran out")
        with pytest.raises(NoRoom, match="memory ran out"):
            submit(found, order(tiny)).future.result(PATIENCE)
        drawer.error = None
        assert pixels(submit(found, order(tiny, seed=3)).future.result(PATIENCE)) == [(3, 0, 7)]
    assert [each.outcome for each in told] == ["failed", "refused", "drawn"]


def test_draining_finishes_what_was_taken_and_takes_nothing_new(tiny: Served) -> None:
    drawer = FakeDrawer(size=1)
    found, _ = engine(drawer)
    with running(found):
        taken = [submit(found, order(tiny, seed=seed)) for seed in (1, 2)]
        drawer.began.get(timeout=PATIENCE)
        found.drain()
        with pytest.raises(Closed, match="it is being stopped"):
            submit(found, order(tiny))
        assert not found.idle
        drawer.may_go.set()
        assert [pixels(ticket.future.result(PATIENCE)) for ticket in taken] == [[(1, 0, 7)], [(2, 0, 7)]]
        wait_for(lambda: found.idle, "idle")


def test_halting_refuses_what_is_left_and_ends_the_thread(tiny: Served) -> None:
    drawer = FakeDrawer(size=1)
    found, told = engine(drawer)
    with running(found):
        drawn, waits = submit(found, order(tiny, seed=1)), submit(found, order(tiny, seed=2))
        drawer.began.get(timeout=PATIENCE)
        found.halt()
        for ticket in (drawn, waits):
            with pytest.raises(Closed, match="stopped before the picture was drawn"):
                ticket.future.result(PATIENCE)
        assert "draws" not in [thread.name for thread in threading.enumerate()]
    assert [each.outcome for each in told] == ["stopped"]


def test_nothing_is_taken_while_it_loads_and_a_failure_is_kept(tiny: Served) -> None:
    class Broken(FakeDrawer):
        def open(self) -> None:
            assert self.may_go.wait(PATIENCE)
            raise UserError("the base has no weights")

    drawer = Broken()
    found, _ = engine(drawer)
    found.start()
    with pytest.raises(Closed, match="it is still loading"):
        submit(found, order(tiny))
    drawer.may_go.set()
    wait_for(lambda: found.state == "stopped", "stopped")
    assert str(found.failure) == "the base has no weights"
    with pytest.raises(Closed):
        submit(found, order(tiny))
