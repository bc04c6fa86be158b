from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.errors import TrainingError
from addenda.train.evaluation import judge, run_evaluation, training_mode
from addenda.train.state import RunState


def judged(scores, *, patience):
    """Enter one score after each step, until the run would stop; returns the state and the verdicts."""
    state, verdicts = RunState(), []
    for step, nll in enumerate(scores):
        state.step = step
        verdicts.append(judge(state, {"nll_per_token": nll}, epoch=step / 2, patience=patience))
        if state.stopped_early:
            break
    return state, verdicts


def test_the_lowest_nll_after_training_began_is_the_best():
    state, verdicts = judged([1.0, 5.0, 3.0, 4.0, 2.0, 2.0], patience=None)
    assert verdicts == [False, True, True, False, True, False]
    assert (state.best_step, state.best_nll, state.stopped_early) == (4, 2.0, False)
    assert [entry["step"] for entry in state.evaluations] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_is_the_number_of_evaluations_without_gain(patience):
    state, _ = judged([9.0, 5.0, 4.0, *[4.0] * 10], patience=patience)
    assert state.stopped_early
    assert state.step == 2 + patience


def test_a_gain_renews_patience():
    state, _ = judged([9.0, 5.0, 6.0, 4.0, 6.0, 3.0, 6.0], patience=2)
    assert not state.stopped_early


@pytest.fixture
def handle():
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4)).train()
    return addenda.attach(model, addenda.LoRA(rank=2, dropout=0.5), targets=["0", "2"])


def test_only_the_adapter_is_in_training_mode_while_training(handle):
    with training_mode(handle.model, handle):
        assert not handle.model[1].training
        assert not handle.model[0].training
        assert all(adapter.training for adapter in handle.adapters.values())
    assert all(module.training for module in handle.model.modules())


def test_an_evaluation_that_fails_leaves_the_adapter_training(handle):
    def fail():
        raise ValueError("oops")

    with pytest.raises(ValueError, match="oops"):
        run_evaluation(fail, handle, step=1, device=torch.device("cpu"))
    assert all(adapter.training for adapter in handle.adapters.values())


def test_an_evaluation_draws_nothing_from_the_runs_generator(handle):
    def draw():
        return {"nll_per_token": float(torch.rand(5).sum()), "share": 1}

    state = torch.get_rng_state()
    metrics = run_evaluation(draw, handle, step=1, device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert metrics["share"] == 1.0


def test_an_infinite_evaluation_is_an_error_that_names_the_value(handle):
    with pytest.raises(TrainingError, match="not finite") as caught:
        run_evaluation(
            lambda: {"nll_per_token": 1.0, "kl": float("inf")}, handle, step=4, device=torch.device("cpu")
        )
    assert caught.value.where == {"kl": float("inf")}
