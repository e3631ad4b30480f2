from __future__ import annotations

import torch

from lcm_kit.bases.condition import Condition


def _condition(n: int, sdxl: bool = False) -> Condition:
    embeds = torch.arange(n * 6, dtype=torch.float32).reshape(n, 2, 3)
    return Condition(embeds, embeds[:, 0] * 10, embeds[:, 1] + 100) if sdxl else Condition(embeds)


def test_kwargs_are_the_unets():
    assert list(_condition(2).kwargs()) == ["encoder_hidden_states"]
    kwargs = _condition(2, sdxl=True).kwargs()
    assert kwargs["added_cond_kwargs"]["text_embeds"].tolist() == [[0, 10, 20], [60, 70, 80]]
    assert kwargs["added_cond_kwargs"]["time_ids"].tolist() == [[103, 104, 105], [109, 110, 111]]


def test_index_expand_and_cat_keep_samples_together():
    whole = _condition(4, sdxl=True)
    joined = Condition.cat([whole[2], whole[[0, 3]], whole[1:2], whole[torch.tensor([2])].expand(2)])
    order = [2, 0, 3, 1, 2, 2]
    assert len(joined) == 6
    for name in ("embeds", "pooled", "time_ids"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)[order]), name
    assert Condition.cat([_condition(1), _condition(2)]).pooled is None


def test_to_changes_every_tensor():
    half = _condition(2, sdxl=True).to(dtype=torch.float16)
    assert {t.dtype for t in (half.embeds, half.pooled, half.time_ids)} == {torch.float16}


def test_left_out_captions_become_the_other_text_and_keep_their_sizes() -> None:
    own = Condition(torch.full((3, 2, 4), 1.0), torch.full((3, 5), 2.0), torch.arange(18.0).view(3, 6))
    other = Condition(torch.full((1, 2, 4), 7.0), torch.full((1, 5), 8.0))
    found = own.replaced(torch.tensor([False, True, False]), other)
    assert found.pooled is not None and found.time_ids is not None
    assert found.embeds[:, 0, 0].tolist() == [1.0, 7.0, 1.0] and found.embeds.shape == (3, 2, 4)
    assert found.pooled[:, 0].tolist() == [2.0, 8.0, 2.0]
    assert torch.equal(found.time_ids, torch.arange(18.0).view(3, 6))
    plain = Condition(own.embeds).replaced(torch.tensor([True, False, False]), Condition(other.embeds))
    assert plain.embeds[:, 1, 3].tolist() == [7.0, 1.0, 1.0] and plain.pooled is None
