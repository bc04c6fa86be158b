from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from addenda.train.config import TrainConfig
from addenda.train.optimizer import (
    clip,
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
    warmup_steps,
)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "fraction"), [(1, 0.03), (2, 0.5), (10, 0.03), (200, 0.1), (7, 0.0)])
def test_learning_rate_rises_to_the_peak_and_is_never_zero(schedule, total, fraction):
    warmup = warmup_steps(total, fraction)
    factors = [
        learning_rate_factor(step, total=total, warmup=warmup, schedule=schedule)
        for step in range(1, total + 1)
    ]
    assert max(factors) == 1.0
    assert min(factors) > 0
    peak = factors.index(1.0)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_cosine_is_half_way_down_half_way_through_and_ends_at_the_floor():
    factor = [
        learning_rate_factor(s, total=99, warmup=1, schedule="cosine", floor=0.2) for s in range(1, 101)
    ]
    assert math.isclose(factor[0], 1.0)
    middle = learning_rate_factor(50, total=99, warmup=0, schedule="cosine", floor=0.2)
    assert math.isclose(middle, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 49 / 99)))
    assert math.isclose(factor[99], 0.2)


def test_warmup_takes_three_steps_at_least_and_half_the_run_at_most():
    assert [warmup_steps(total, 0.03) for total in (1, 4, 10, 1000)] == [0, 2, 3, 30]
    assert warmup_steps(1000, 0.0) == 0


def test_vectors_are_not_decayed():
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([matrix, vector], TrainConfig(weight_decay=0.1), 0.01)
    for p in (matrix, vector):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 3), 1 - 0.01 * 0.1))
    assert torch.equal(vector.detach(), torch.ones(3))


def test_the_set_learning_rate_scales_the_step():
    p = nn.Parameter(torch.zeros(4))
    optimizer = make_optimizer([p], TrainConfig(), 123.0)
    set_learning_rate(optimizer, 0.25)
    p.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.25, 0.25, -0.25, 0.25]))


def test_clipping_scales_all_gradients_together():
    parameters = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(2))]
    gradients = [torch.randn(5, 3) * 10, torch.randn(7) * 10]
    for p, g in zip(parameters, gradients, strict=False):
        p.grad = g.clone()
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    torch.testing.assert_close(clip(parameters, 1.0), norm)
    for p, g in zip(parameters, gradients, strict=False):
        torch.testing.assert_close(p.grad, g / norm, rtol=1e-4, atol=1e-6)
    assert parameters[2].grad is None


def test_small_gradients_and_no_limit_change_nothing():
    p = nn.Parameter(torch.randn(6))
    p.grad = torch.full((6,), 1e-3)
    clip([p], 1.0)
    assert torch.equal(p.grad, torch.full((6,), 1e-3))
    p.grad = torch.full((6,), 1e3)
    clip([p], None)
    assert torch.equal(p.grad, torch.full((6,), 1e3))


def test_a_norm_that_is_not_finite_leaves_the_gradients_for_the_report():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    p.grad, q.grad = torch.tensor([1.0, math.nan]), torch.ones(2)
    assert math.isnan(clip([p, q], 1.0))
    assert torch.equal(q.grad, torch.ones(2))
