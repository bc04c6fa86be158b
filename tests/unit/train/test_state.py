from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.errors import CheckpointError
from addenda.train.config import TrainConfig
from addenda.train.optimizer import make_optimizer
from addenda.train.state import (
    RunState,
    adapter_tensors,
    digest_of_tensors,
    load_adapter,
    load_optimizer,
    optimizer_tensors,
    require_same_run,
    seed_generators,
)


def attached(rank=2):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    handle = addenda.attach(model, addenda.LoRA(rank=rank), targets=["0", "2"])
    return handle, make_optimizer(handle.parameters(), TrainConfig(), 0.1)


def step(handle, optimizer):
    for parameter in handle.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_a_run_state_survives_being_plain_data():
    state = RunState(step=3, recent_losses=[1.5, 2.5], best_step=2, best_nll=0.1)
    assert RunState.from_document(state.document()) == state


@pytest.mark.parametrize("change", [lambda d: d.pop("best_nll"), lambda d: d.update(more=1)])
def test_a_state_with_other_parts_is_refused(change):
    document = RunState().document()
    change(document)
    with pytest.raises(CheckpointError, match="does not have the parts"):
        RunState.from_document(document)


def test_steps_are_counted_and_only_recent_losses_kept():
    state = RunState()
    for loss in range(9):
        state.enter_step(float(loss), tokens=10, trained_tokens=4, seconds=0.5)
    assert (state.step, state.tokens, state.trained_tokens, state.step_seconds) == (9, 90, 36, 4.5)
    assert state.first_loss == 0.0
    assert state.recent_losses == [4.0, 5.0, 6.0, 7.0, 8.0]


def test_evaluated_means_as_it_is_now():
    state = RunState()
    assert not state.evaluated
    state.evaluations.append({"step": 0})
    assert state.evaluated
    state.step = 1
    assert not state.evaluated


def test_an_optimizer_put_back_takes_the_same_next_step():
    first, optimizer = attached()
    for _ in range(3):
        step(first, optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(first, optimizer).items()}
    assert len(saved) == 4 * 3
    second, other = attached()
    load_adapter(second, adapter_tensors(first))
    load_optimizer(second, other, saved)
    for handle, own in ((first, optimizer), (second, other)):
        torch.manual_seed(1)
        step(handle, own)
    assert digest_of_tensors(adapter_tensors(first)) == digest_of_tensors(adapter_tensors(second))
    assert all(torch.equal(value, optimizer_tensors(second, other)[key]) for key, value in
               optimizer_tensors(first, optimizer).items())  # fmt: skip


def test_what_is_not_the_adapters_is_refused():
    handle, optimizer = attached()
    step(handle, optimizer)
    tensors = adapter_tensors(handle)
    name = next(iter(tensors))
    with pytest.raises(CheckpointError, match="are not those of this adapter"):
        load_adapter(handle, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match="has shape"):
        load_adapter(handle, {**tensors, name: torch.zeros(1, 1)})
    saved = optimizer_tensors(handle, optimizer)
    with pytest.raises(CheckpointError, match="optimizer tensors are not those"):
        load_optimizer(handle, optimizer, {**saved, "9.A.step": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match="has shape"):
        load_optimizer(handle, optimizer, {**saved, f"{name}.exp_avg": torch.zeros(1, 1)})


def test_copies_do_not_change_with_the_adapter():
    handle, optimizer = attached()
    before = adapter_tensors(handle)
    digest = digest_of_tensors(before)
    step(handle, optimizer)
    assert digest_of_tensors(before) == digest != digest_of_tensors(adapter_tensors(handle))


def test_draws_depend_on_seed_and_place_alone():
    def drawn(*place):
        seed_generators(*place)
        return torch.randn(9)

    first = drawn(5, 3, 0)
    others = [drawn(5, 3, 1), drawn(5, 4, 0), drawn(6, 3, 0), drawn(5, 3, "evaluation")]
    assert torch.equal(drawn(5, 3, 0), first)
    assert len({tuple(numbers.tolist()) for numbers in (first, *others)}) == 5


def test_every_difference_between_two_runs_is_listed():
    require_same_run({"a": "1"}, {"a": "1"})
    with pytest.raises(CheckpointError, match="3 differences") as caught:
        require_same_run({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"})
    assert caught.value.where == {
        "b": "2 in the checkpoint, 9 now",
        "c": "3 in the checkpoint, absent now",
        "d": "absent in the checkpoint, 4 now",
    }


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_the_hash_of_tensors_sees_every_change(change):
    tensor = torch.zeros(2, 3)
    other = {
        "value": {"a": torch.zeros(2, 3).index_fill(0, torch.tensor([1]), -0.0)},
        "name": {"b": tensor},
        "shape": {"a": tensor.reshape(3, 2)},
        "dtype": {"a": tensor.view(torch.int32)},
    }[change]
    assert digest_of_tensors({"a": tensor}) != digest_of_tensors(other)
    assert digest_of_tensors({"a": tensor}) == digest_of_tensors({"a": tensor.clone()})
