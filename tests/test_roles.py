"""Each row of a batch is taught by its own teacher, nobody is asked in vain, whatever is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from lcm_kit.adapter.adapted_unet import AdaptedUNet
from lcm_kit.adapter.roles import Given, Objective, Roles, route_by_teacher
from lcm_kit.bases.condition import Condition
from lcm_kit.config.load import RECIPES
from lcm_kit.config.schema import Adapter
from lcm_kit.core.methods import Times
from lcm_kit.core.schedule import Schedule
from lcm_kit.data.split import taught_by_plain_base
from tests.small_roles import distill, line, linear_roles, two_samples

X = torch.arange(12.0).view(4, 3)


def asked(
    bases: list[bool], *, always: bool = False, padded: bool = False
) -> tuple[torch.Tensor, list[tuple[list[int], bool]]]:
    """Rows of x, negative where the base alone teaches; and what was asked of whom."""
    x = torch.arange(3.0 * len(bases)).view(len(bases), 3)
    calls: list[tuple[list[int], bool]] = []

    def ask(rows: Any, styled: bool) -> torch.Tensor:
        calls.append((torch.arange(len(x))[rows].tolist(), styled))
        return x[rows] if styled else -x[rows]

    return route_by_teacher(ask, bases, always=always, padded=padded), calls


@pytest.mark.parametrize(
    "bases",
    [[True, False, False, True], [False, True, False, False], [False, False, True, True]],
)
def test_rows_come_back_in_order(bases: list[bool]) -> None:
    found, calls = asked(bases)
    assert torch.equal(found, torch.stack([-x if base else x for x, base in zip(X, bases, strict=True)]))
    assert calls == [
        ([i for i in range(4) if not bases[i]], True),
        ([i for i in range(4) if bases[i]], False),
    ]


@pytest.mark.parametrize("base", [True, False])
def test_a_teacher_without_rows_is_asked_only_where_it_must_be(base: bool) -> None:
    wanted = -X if base else X
    found, calls = asked([base] * 4)
    assert torch.equal(found, wanted) and calls == [([0, 1, 2, 3], not base)]
    found, calls = asked([base] * 4, always=True)
    assert torch.equal(found, wanted) and len(calls) == 2 and ([0], base) in calls


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 12])
def test_teachers_are_asked_for_few_numbers_of_rows(n: int) -> None:
    """In all ways to share n rows that a random draw finds; and what comes back is as without padding."""
    sizes: dict[bool, set[int]] = {True: set(), False: set()}
    for draw in range(200):
        chance = torch.rand((), generator=torch.Generator().manual_seed(draw))
        bases = (torch.rand(n, generator=torch.Generator().manual_seed(draw + 999)) < chance).tolist()
        (found, calls), (plain, as_is) = asked(bases, padded=True), asked(bases)
        assert torch.equal(found, plain)
        for (rows, styled), (own, _) in zip(calls, as_is, strict=True):
            sizes[styled].add(len(rows))
            assert rows[: len(own)] == own and set(rows) == set(own)
        assert sum(len(rows) for rows, _ in calls) <= n + -(-n // 4) + 1
    assert sizes[True] == sizes[False] == {-(-n * quarter // 4) for quarter in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("teacher", "general"),
    [
        ({}, False),  # one teacher only
        ({"adapters": ["a"]}, True),
        ({"adapters": ["a"], "regularization": "adapters"}, False),
        ({"adapters": ["a"], "in_student": True}, False),
    ],
)
def test_whose_the_general_pictures_are(teacher: dict[str, Any], general: bool) -> None:
    keys = {"recipe": "train/distill", "output": "x", "teacher": teacher}
    config = TypeAdapter(RECIPES["train/distill"]).validate_python(keys)
    assert taught_by_plain_base(config, ["a.png", "regularisation/a.png", "teacher/00001"]) == [
        False,
        general,
        False,
    ]


def test_the_interval_weighs_each_sample_by_its_closed_form() -> None:
    """1 / (rho_t - rho_s), rho = sigma / alpha, from the betas in float64; nothing else differs."""
    found, given = {}, two_samples()
    for weighting in ("interval", "none"):
        found[weighting] = linear_roles(distill(loss={"weighting": weighting})).losses(given)

    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    rho = np.sqrt(1 / np.cumprod(1 - beta) - 1)
    wanted = 1 / (rho[[999, 499]] - rho[[979, 479]])
    assert (found["interval"] / found["none"]).numpy() == pytest.approx(wanted, rel=1e-4)


def test_a_distance_that_adapts_is_of_the_grid_that_is_given() -> None:
    """c log(1 + r^2 / (2 c^2)), c = 0.02 (16 / 4)^1.15 on a grid of 4 of 16; r from the squared distance."""
    given = two_samples(s=(749, 249))

    def losses(intervals: int | None, **loss: Any) -> np.ndarray:
        roles = linear_roles(distill(loss=loss, grid={"steps": 16, "steps_start": 4}))
        return roles.losses(replace(given, intervals=intervals)).detach().numpy()

    square = losses(4, name="l2").astype(np.float64)
    for intervals, c in ((4, 0.02 * 4**1.15), (16, 0.02), (None, 0.02)):
        found = losses(intervals, name="cauchy", c=0.02, adaptive=True)
        assert found == pytest.approx(c * np.log(1 + square / (2 * c**2)), rel=1e-4)


def test_an_answer_of_the_teacher_serves_the_steps_of_its_group_and_no_other() -> None:
    """Losses are those of a teacher that is asked each time; it is asked once for each part of a group."""
    rows: list[int] = []

    def call(x: torch.Tensor, *args: Any, **text: Any) -> Any:
        rows.append(len(x))
        return line(x, *args, **text)

    def roles() -> Roles:
        return linear_roles(distill(teacher={"reuse": 2}), call)

    def of(group: int, first: int, scale: float, *, again: bool) -> Given:
        asked = (group, first) if again else None
        return two_samples(scales=(scale, scale + 1), seed=10 * group + first, again=asked)

    mine, order = roles(), [(0, 0), (0, 2), (0, 0), (0, 2), (1, 0), (1, 0), (0, 0)]
    for step, (group, first) in enumerate(order):
        plain = roles().losses(of(group, first, step + 2.0, again=False))
        rows.clear()
        assert torch.equal(mine.losses(of(group, first, step + 2.0, again=True)), plain)
        assert rows == ([4, 2, 2] if step in (0, 1, 4, 6) else [2, 2])  # teacher, target, student


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"solver": "heun"}, "teacher.reuse 2 keeps .* set solver to ddim or reuse to 1"),
        (
            {"teacher": {"reuse": 2, "weight": 0.0}},
            "teacher.weight 0 leaves the teacher out, so teacher.reuse",
        ),
        ({"teacher": {"reuse": 0}}, "teacher.reuse"),
    ],
)
def test_a_reuse_that_can_not_be_is_a_sentence(keys: dict[str, Any], words: str) -> None:
    wanted = {"recipe": "train/distill", "output": "x", "teacher": {"reuse": 2}, **keys}
    with pytest.raises(ValueError, match=words):
        TypeAdapter(RECIPES["train/distill"]).validate_python(wanted)


# -- What is trained: a LoRA beside another one, or the UNet's own weights -----------------------------------


def unet() -> Any:
    """A small UNet of random weights, each time the same."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2, layers_per_block=1,
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
    ).requires_grad_(False)  # fmt: skip


def given() -> Given:
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=g)
    times = Times(torch.tensor([999, 499]), torch.tensor([979, 479]), torch.zeros(2, dtype=torch.long))
    return Given(x0, noise, times, torch.tensor([2.0, 5.0]), Condition(torch.randn(2, 3, 8, generator=g)))


def roles_of(adapted: AdaptedUNet, **more: Any) -> Roles:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    keys = {"recipe": "train/distill", "output": "x", "loss": {"name": "l2"}}
    objective = Objective.of(TypeAdapter(RECIPES["train/distill"]).validate_python(keys))
    told: dict[str, Any] = {"ema": [], "empty": Condition(torch.zeros(1, 3, 8)), **more}
    return Roles(
        adapted, adapted.unet, schedule=Schedule.from_config(betas), kind="epsilon", objective=objective,
        dtype=torch.float32, **told,
    )  # fmt: skip


def straight_line(teacher: Any, target: Any, student: Any) -> torch.Tensor:
    """The losses of `given` by three UNets, each called by its name, and formulas (arXiv:2310.04378)."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).float()
    batch = given()
    t, s, text = batch.times.t, batch.times.s, batch.condition.embeds

    def at(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 1, 1, 1)

    def landed(net: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x0 = (x - at(1 - abar[t]).sqrt() * net(x, t, text).sample) / at(abar[t]).sqrt()
        u = at(10.0 * t)
        return 0.25 / (u**2 + 0.25) * x + u / (u**2 + 0.25).sqrt() * x0

    x_t = at(abar[t]).sqrt() * batch.x0 + at(1 - abar[t]).sqrt() * batch.noise
    with torch.no_grad():
        cond, uncond = teacher(x_t, t, text).sample, teacher(x_t, t, torch.zeros_like(text)).sample
        eps = uncond + at(batch.guidance) * (cond - uncond)
        x0 = (x_t - at(1 - abar[t]).sqrt() * eps) / at(abar[t]).sqrt()
        aim = landed(target, at(abar[s]).sqrt() * x0 + at(1 - abar[s]).sqrt() * eps, s)
    return (landed(student, x_t, t) - aim).square().mean((1, 2, 3))


def moved(parameters: list[Any], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=g))


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    a, b = (torch.cat([each.flatten() for each in of]) for of in (ours, theirs))
    assert float((a - b).norm() / b.norm()) < 1e-4 and float(b.norm()) > 1e-4


def test_a_full_model_is_taught_by_the_frozen_copy_of_its_base() -> None:
    """Against two copies of the UNet, and a third for the average of the trained one."""
    base, target, student, adapted = unet(), unet(), unet(), AdaptedUNet(unet())
    mine, theirs = adapted.train_own_weights(), list(student.requires_grad_(True).parameters())
    assert list(adapted.named()) == [name for name, _ in base.named_parameters()]
    moved(mine, 1)
    moved(theirs, 1)
    moved(list(target.parameters()), 2)
    ema = [p.detach().clone() for p in target.parameters()]
    found, wanted = roles_of(adapted, ema=ema).losses(given()), straight_line(base, target, student)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    assert abs(straight_line(student, target, student)[0] / wanted[0] - 1) > 0.01  # the teacher matters
    assert abs(straight_line(base, student, student)[0] / wanted[0] - 1) > 0.01  # and the target
    grads = torch.autograd.grad(found.mean(), mine, allow_unused=True)
    straight = torch.autograd.grad(wanted.mean(), theirs, allow_unused=True)
    assert [g is None for g in grads] == [g is None for g in straight]
    close([g for g in grads if g is not None], [g for g in straight if g is not None])


def test_the_loss_of_another_adapter_than_the_one_in_use_is_refused() -> None:
    adapted = AdaptedUNet(unet())
    for name in ("adapter", "critic"):
        moved(adapted.add_lora(Adapter(rank=2, alpha=2.0), name=name), 1)
    critic = roles_of(adapted, name="critic")
    with pytest.raises(ValueError, match="'adapter' is in use on the UNet, not 'critic'"):
        critic.losses(given())
    alone = AdaptedUNet(unet())
    moved(alone.add_lora(Adapter(rank=2, alpha=2.0)), 1)
    with adapted.using("critic"):
        assert torch.equal(critic.losses(given()), roles_of(alone).losses(given()))
