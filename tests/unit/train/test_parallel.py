from __future__ import annotations

import random

import pytest
import torch
from torch import distributed, nn

from addenda.errors import ConfigError
from addenda.train.parallel import Parallel, processes


@pytest.fixture
def sizes():
    return [random.randint(1, 1000) for _ in range(random.randint(1, 40))]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_every_micro_batch_is_run_once(sizes, size):
    shares = [Parallel(rank, size).turns(sizes) for rank in range(size)]
    assert sorted(index for share in shares for index, _ in share) == list(range(len(sizes)))
    assert all(weight == 1.0 for share in shares for _, weight in share)
    assert all(share == sorted(share) for share in shares)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_no_process_has_more_to_do_than_the_others_and_one_micro_batch(sizes, size):
    loads = [sum(sizes[i] for i, _ in Parallel(rank, size).turns(sizes)) for rank in range(size)]
    assert max(loads) <= min(loads) + max(sizes)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_in_lockstep_all_run_equally_many_and_what_is_filled_in_weighs_nothing(sizes, size):
    shares = [Parallel(rank, size, lockstep=True).turns(sizes) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    for rank, share in enumerate(shares):
        assert [turn for turn in share if turn[1]] == Parallel(rank, size).turns(sizes)


def test_alone_every_message_is_what_was_said():
    parallel, parameter = Parallel(), nn.Parameter(torch.randn(3))
    parameter.grad = torch.randn(3)
    before, numbers = parameter.grad.clone(), [random.random() for _ in range(5)]
    parallel.add_gradients([parameter])
    parallel.add([parameter.grad])
    parallel.require_same({"data": "1"})
    assert torch.equal(parameter.grad, before)
    assert parallel.total(*numbers) == numbers
    assert parallel.most(3, -1) == [3, -1]
    assert parallel.agree(None) is None
    assert parallel.alone and parallel.first  # noqa: PT018


@pytest.mark.parametrize("size", [None, "1"])
def test_a_lone_process_joins_nobody(monkeypatch, size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    with processes() as parallel:
        assert parallel == Parallel()
        assert not distributed.is_initialized()


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": None},
        {"RANK": "2"},
        {"RANK": "-1"},
        {"MASTER_ADDR": ""},
        {"MASTER_PORT": "x"},
        {"WORLD_SIZE": "two"},
    ],
)
def test_half_an_environment_is_refused_with_all_four_variables(monkeypatch, changes):
    whole = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**whole, **changes}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="not this one's place among them") as caught, processes():
        pass
    assert list(caught.value.where) == ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    assert "torchrun" in caught.value.hint
