from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lcm_kit.bases.condition import Condition
from lcm_kit.data.batches import Batches, Mix, draw, generator_at
from lcm_kit.data.order import Run


@dataclass
class Rows:
    """A cache of 10 records whose latents and embeddings are their number."""

    ids: list[str] = field(default_factory=lambda: [f"r{i}" for i in range(10)])

    several = False

    @property
    def runs(self) -> list[Run]:
        return [Run(len(self.ids))]

    def latents(self, index: list[int]) -> Tensor:
        return torch.tensor(index, dtype=torch.float32)[:, None, None, None].expand(-1, 4, 2, 2)

    def weights(self, index: list[int]) -> None:
        return None

    def condition(self, index: list[int], chances: Sequence[float] | None = None) -> Condition:
        return Condition(torch.tensor(index, dtype=torch.float32)[:, None, None].expand(-1, 3, 5))


def test_every_epoch_visits_every_record_once_in_its_own_order():
    batches = Batches(Rows(), batch_size=4, seed=0)
    visited = [
        i for step in range(10) for i in batches.index(step)
    ]  # 40 places: four epochs, across batch borders
    epochs = [visited[k : k + 10] for k in range(0, 40, 10)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert Batches(Rows(), 4, seed=1).index(0) != batches.index(0)


@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_two_ranks_are_one_process_with_twice_the_batch(step: int):
    one = Batches(Rows(), batch_size=6, seed=3).at(step)
    two = [Batches(Rows(), batch_size=3, seed=3, rank=rank, world=2).at(step) for rank in (0, 1)]
    assert two[0].ids + two[1].ids == one.ids
    assert torch.equal(torch.cat([b.latents for b in two]), one.latents)
    assert torch.equal(Condition.cat([b.condition for b in two]).embeds, one.condition.embeds)
    noise = [
        draw(3, step, b.slots, "noise", lambda g: torch.randn(4, 2, 2, generator=g)) for b in (*two, one)
    ]
    assert torch.equal(torch.cat(noise[:2]), noise[2])
    assert not torch.equal(noise[0], noise[1])


def test_a_batch_is_a_function_of_its_step_alone():
    batches = Batches(Rows(), batch_size=4, seed=0)
    forward = [batches.at(step).ids for step in range(8)]
    assert [Batches(Rows(), 4, 0).at(step).ids for step in reversed(range(8))] == forward[::-1]
    batch = batches.at(5)
    assert batch.ids == [f"r{int(z[0, 0, 0])}" for z in batch.latents]
    assert batch.condition.embeds[:, 0, 0].tolist() == batch.latents[:, 0, 0, 0].tolist()


def test_a_batch_may_be_larger_than_the_cache():
    batch = Batches(Rows(), batch_size=25, seed=0).at(0)
    assert sorted(batch.ids[:10]) == sorted(batch.ids[10:20]) == sorted(Rows().ids)


def test_generators_differ_in_seed_step_slot_and_purpose_and_repeat():
    places = [
        (0, 0, 0, "noise"),
        (1, 0, 0, "noise"),
        (0, 1, 0, "noise"),
        (0, 0, 1, "noise"),
        (0, 0, 0, "times"),
    ]
    first = [torch.rand(1, generator=generator_at(*place)).item() for place in places]
    assert len(set(first)) == len(places)
    assert [torch.rand(1, generator=generator_at(*place)).item() for place in places] == first


def test_draws_of_many_slots_look_like_independent_normals():
    x = draw(0, 0, range(2000), "noise", lambda g: torch.randn(4, generator=g))
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05
    assert (torch.corrcoef(x.T) - torch.eye(4)).abs().max() < 0.1


@pytest.mark.parametrize("share", ["0.3", "0.5", "0.07", "0.93"])
def test_a_mix_keeps_its_share_in_every_run_of_places_and_its_own_epochs(share: str):
    mix = Mix(6, Fraction(share))  # records 0..5 and 6..9
    batches = Batches(Rows(), batch_size=7, seed=0, mix=mix)
    order = [i for step in range(60) for i in batches.index(step)]
    second = [i >= 6 for i in order]
    for n in (7, 20, 100):
        for start in range(len(order) - n):
            assert abs(sum(second[start : start + n]) - n * mix.share) < 1
    for of, first, size in ((False, 0, 6), (True, 6, 4)):
        visits = [i for i, is_second in zip(order, second, strict=True) if is_second == of]
        epochs = [visits[k : k + size] for k in range(0, len(visits) - size + 1, size)]
        assert len(epochs) >= 2 and all(sorted(e) == list(range(first, first + size)) for e in epochs)


def test_a_mix_is_the_same_for_two_ranks_and_for_any_order_of_steps():
    mix = Mix(6, Fraction("0.4"))
    one = [Batches(Rows(), 6, seed=3, mix=mix).index(step) for step in range(9)]
    two = [
        [i for rank in (0, 1) for i in Batches(Rows(), 3, 3, rank, 2, mix).index(step)] for step in range(9)
    ]
    again = [Batches(Rows(), 6, seed=3, mix=mix).index(step) for step in reversed(range(9))]
    assert one == two == again[::-1]


@pytest.mark.parametrize("share", [None, 0.25, 0.5])
def test_regularisation_has_its_share_of_every_batch(share: float | None) -> None:
    """Of 2 brand pictures and 18 others; without a share all records alike."""
    from lcm_kit.config.schema import Data
    from lcm_kit.data import sources

    records = Rows(["a", "b", *(f"regularisation/{k}" for k in range(18))])
    data = Data(regularization="asset:general", regularization_share=share)
    batches = Batches(records, 8, seed=1, mix=sources.mix_of(records, data))
    drawn = [batches.index(step) for step in range(45)]  # 360 places
    general = [sum(record >= 2 for record in batch) for batch in drawn]
    if share is None:
        assert sum(general) == 360 * 18 / 20
    else:
        assert set(general) == {8 * share}
        others = [record for batch in drawn for record in batch if record >= 2]
        assert all(abs(others.count(k) - len(others) / 18) <= 1 for k in range(2, 20))  # its own epochs


def test_a_share_without_regularisation_is_a_mistake() -> None:
    from pydantic import TypeAdapter, ValidationError

    from lcm_kit.config.schema import Data

    for keys in ({}, {"regularization": "asset:general", "source": "mix"}):
        with pytest.raises(ValidationError, match="regularization_share divides"):
            TypeAdapter(Data).validate_python({"regularization_share": 0.5, **keys})
