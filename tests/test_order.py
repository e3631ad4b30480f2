"""Orders against their definitions: epochs, windows of large sets, and whose turn it is among shapes."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch

from lcm_kit.data import order as module
from lcm_kit.data.batches import Batches, Mix
from lcm_kit.data.order import Order, Run, Turns

from .test_batches import Rows


def test_a_small_set_is_shuffled_whole() -> None:
    order = Order(((10, 3), (50, 4)), seed=5)
    rows = [order.at(place) for place in range(21)]
    whole = [10, 11, 12, 50, 51, 52, 53]
    for epoch in range(3):
        wanted = module.permutation(7, 5, epoch).tolist()
        assert rows[7 * epoch : 7 * epoch + 7] == [whole[i] for i in wanted]


@pytest.mark.parametrize("window", [10, 16, 35, 60])
def test_a_large_set_is_shuffled_by_windows_of_whole_runs(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW", window)
    runs = tuple((100 * k, 5 + k % 3) for k in range(10))  # 59 rows
    order = Order(runs, seed=2)
    every = sorted(row for first, rows in runs for row in range(first, first + rows))
    seen = [order.at(place) for place in range(3 * 59)]
    epochs = [seen[k : k + 59] for k in (0, 59, 118)]
    assert [sorted(epoch) for epoch in epochs] == [every] * 3 and len(set(map(tuple, epochs))) == 3
    for epoch in epochs:  # a window's runs are over before the next one's begin
        spans = {k: [i for i, row in enumerate(epoch) if row // 100 == k] for k in range(10)}
        for k, places in spans.items():
            assert max(places) - min(places) < window, k
    assert order.at(70) == Order(runs, seed=2).at(70)


def test_memory_of_an_order_does_not_grow_with_the_rows() -> None:
    """10^8 rows in runs of 10^4: no tensor of more than a window is made."""
    made: list[int] = []
    real = torch.randperm

    def counted(n: int, **how: torch.Generator) -> torch.Tensor:
        made.append(n)
        return real(n, **how)

    order = Order(tuple((k * 10_000, 10_000) for k in range(10_000)), seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", counted)
        rows = [order.at(place) for place in (0, 1, 123_456_789, 10**8 - 1)]
    assert max(made) <= module.WINDOW and len(set(rows)) == 4 and max(rows) < 10**8


@pytest.mark.parametrize(("rows", "size"), [((17, 5, 1), 4), ((3, 2, 1), 8), ((40,), 3), ((1, 1, 1, 97), 10)])
def test_each_group_has_its_share_of_batches_to_within_one(rows: tuple[int, ...], size: int) -> None:
    turns = Turns(tuple(map(Fraction, rows)), size, seed=1)
    seen = [turns.at(number) for number in range(400)]
    for group, own in enumerate(rows):
        numbers = [number for who, number in seen if who == group]
        assert numbers == list(range(len(numbers)))  # none is left out, none comes twice
        share = own / sum(rows)
        slack = 1 + own / size  # within an epoch they are shuffled
        assert all(
            abs(sum(who == group for who, _ in seen[:n]) - n * share) <= slack + 1 for n in (50, 133, 400)
        )
    assert [turns.at(number) for number in reversed(range(400))] == seen[::-1]


class Shaped(Rows):
    """Ten records in three shapes, of which one is seen twice an epoch."""

    @property
    def runs(self) -> list[Run]:
        return [Run(4), Run(1, (96, 32)), Run(2, (32, 96)), Run(3, (96, 32), 2)]


SHAPE = [()] * 4 + [(96, 32)] + [(32, 96)] * 2 + [(96, 32)] * 3


def test_batches_are_of_one_shape_and_every_record_is_seen_as_often_as_it_should() -> None:
    batches = Batches(Shaped(), batch_size=3, seed=4)
    drawn = [batches.index(step) for step in range(26 * 20)]  # 13 places an epoch: 120 epochs
    assert all(len({SHAPE[row] for row in batch}) == 1 for batch in drawn)
    counts = Counter(row for batch in drawn for row in batch)
    for row in range(10):
        wanted = 120 * (2 if row >= 7 else 1)
        assert abs(counts[row] - wanted) <= 3, (row, counts)
    assert len({tuple(SHAPE[batch[0]] for batch in drawn[k : k + 26]) for k in range(0, 520, 26)}) > 10


def test_shapes_are_the_same_for_two_processes_and_any_order_of_steps() -> None:
    for mix in (None, Mix(5, Fraction("0.3"))):
        one = [Batches(Shaped(), 6, seed=3, mix=mix).index(step) for step in range(30)]
        two = [
            [i for rank in (0, 1) for i in Batches(Shaped(), 3, 3, rank, 2, mix).index(step)]
            for step in range(30)
        ]
        again = [Batches(Shaped(), 6, seed=3, mix=mix).index(step) for step in reversed(range(30))]
        assert one == two == again[::-1]


def test_a_mix_of_several_shapes_keeps_its_share_in_whole_batches() -> None:
    mix = Mix(5, Fraction("0.3"))
    batches = Batches(Shaped(), 4, seed=0, mix=mix)
    drawn = [batches.index(step) for step in range(600)]
    sources = [{row >= 5 for row in batch} for batch in drawn]
    assert all(len(each) == 1 for each in sources)
    assert abs(sum(each == {True} for each in sources) - 180) <= 3
    assert all(len({SHAPE[row] for row in batch}) == 1 for batch in drawn)
