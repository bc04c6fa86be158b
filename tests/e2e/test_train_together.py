"""Adapters trained together learn what each would have learnt alone."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
import train_tiny as tiny

import addenda
from addenda.core.activating import active_composition
from addenda.errors import ConfigError, TrainingError
from addenda.train.config import TrainConfig
from addenda.train.events import CheckpointEvent, EvalEvent, StepEvent
from addenda.train.interrupt import Interrupted
from addenda.train.loop import train
from addenda.train.together import Job, train_together

METHODS = {
    "small": addenda.LoRA(rank=2),
    "large": addenda.LoRA(rank=7, alpha=5.0),
    "vera": addenda.VeRA(rank=8),
    "ia3": addenda.IA3(),
    "bottleneck": addenda.Bottleneck(size=4),
}
CONFIGS = {
    "small": {"learning_rate": 5e-3, "batch_size": 4},
    "large": {"learning_rate": 2e-3, "batch_size": 2, "seed": 5},
    "vera": {"learning_rate": 2e-2, "batch_size": 3, "schedule": "constant", "weight_decay": 0.1},
    "ia3": {"learning_rate": 1e-2, "batch_size": 5, "epochs": 1},
    "bottleneck": {"learning_rate": 3e-3, "batch_size": 4, "clip_norm": 0.1},
}
ROWS = {name: tiny.make_rows(6 + place, seed=place) for place, name in enumerate(METHODS)}
HELDOUT = {name: tiny.make_rows(3, seed=50 + place) for place, name in enumerate(METHODS)}


def config_of(name, **changes):
    usual = {
        "save_every_minutes": None,
        "threads": 1,
        "epochs": 2,
        "patience": None,
        "tokens_per_micro_batch": 40,
    }
    return TrainConfig(**{**usual, **CONFIGS[name], **changes})


def job(base, name, folder, events=None, **changes):
    handle = addenda.attach(base.model, METHODS[name], name=name, seed=3)
    tell = (lambda _: None) if events is None else events.append
    return Job(handle, ROWS[name], config_of(name, **changes), folder / name, tell, HELDOUT[name])


def tensors(handle):
    return {name: value.detach().clone() for name, value in handle.tensors().items()}


def alone(name, folder, **changes):
    base, events = tiny.make_base(), []
    one = job(base, name, folder, events, **changes)
    result = train(
        base,
        one.handle,
        one.train_examples,
        one.heldout_examples,
        one.config,
        run_dir=one.run_dir,
        on_event=one.on_event,
    )
    return tensors(one.handle), result, events


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_each_learns_what_it_would_have_learnt_alone(tmp_path):
    base = tiny.make_base()
    events = {name: [] for name in METHODS}
    jobs = [job(base, name, tmp_path, events[name]) for name in METHODS]
    before = active_composition(base.model)
    results = train_together(base, jobs)
    assert active_composition(base.model) == before
    for one, result in zip(jobs, results, strict=True):
        name = one.handle.name
        wanted, wanted_result, wanted_events = alone(name, tmp_path / "alone")
        assert (result.steps, result.best_step, result.trained_tokens) == (
            wanted_result.steps, wanted_result.best_step, wanted_result.trained_tokens,
        )  # fmt: skip
        for kind, key in ((StepEvent, "loss"), (StepEvent, "grad_norm"), (StepEvent, "lr")):
            found, expected = (
                [getattr(event, key) for event in told if isinstance(event, kind)]
                for told in (events[name], wanted_events)
            )
            assert found == pytest.approx(expected, rel=2e-3), (name, key)
        assert [e.metrics for e in events[name] if isinstance(e, EvalEvent)] == [
            pytest.approx(e.metrics, rel=1e-3) for e in wanted_events if isinstance(e, EvalEvent)
        ]
        assert_close(tensors(one.handle), wanted)


def test_gradients_of_one_step_equal_those_alone_and_no_row_touches_another_adapter(tmp_path):
    """In float64, so that nothing but a mistake could differ."""
    pair = ("small", "large")
    base = tiny.make_base(dtype=torch.float64)
    jobs = [job(base, name, tmp_path, max_steps=1, schedule="constant") for name in pair]
    train_together(base, jobs)
    for one in jobs:
        other = tiny.make_base(dtype=torch.float64)
        twin = job(other, one.handle.name, tmp_path / "alone", max_steps=1, schedule="constant")
        train(
            other,
            twin.handle,
            twin.train_examples,
            twin.heldout_examples,
            twin.config,
            run_dir=twin.run_dir,
            on_event=twin.on_event,
        )
        for (name, found), wanted in zip(
            one.handle.tensors().items(), twin.handle.tensors().values(), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_one_that_fails_leaves_the_others_to_go_on(tmp_path):
    base = tiny.make_base()
    jobs = [job(base, "small", tmp_path, learning_rate=1e30), job(base, "large", tmp_path)]
    failed, result = train_together(base, jobs)
    assert isinstance(failed, TrainingError)
    wanted, wanted_result, _ = alone("large", tmp_path / "alone")
    assert result.steps == wanted_result.steps
    assert_close(tensors(jobs[1].handle), wanted)


def test_an_interrupted_run_is_saved_whole_and_ends_with_the_same_bits(tmp_path):
    pair = ("small", "large")
    base = tiny.make_base()
    whole = [job(base, name, tmp_path / "whole") for name in pair]
    train_together(base, whole)

    def interrupt(event):
        if isinstance(event, StepEvent) and event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    base, saved = tiny.make_base(), []
    jobs = [job(base, name, tmp_path, saved) for name in pair]
    with pytest.raises(Interrupted):
        train_together(base, [replace(jobs[0], on_event=interrupt), jobs[1]])
    assert [event for event in saved if isinstance(event, CheckpointEvent)]
    base = tiny.make_base()
    again = [replace(job(base, name, tmp_path), resume=True) for name in pair]
    results = train_together(base, again)
    for found, wanted, result in zip(again, whole, results, strict=True):
        assert result.seconds_before > 0
        assert all(
            torch.equal(a, b)
            for a, b in zip(found.handle.tensors().values(), wanted.handle.tensors().values(), strict=True)
        )


def test_what_jobs_cannot_share_is_named_at_once(tmp_path):
    base = tiny.make_base()
    one = job(base, "small", tmp_path)
    other = replace(one, config=config_of("small", tokens_per_micro_batch=20))
    with pytest.raises(ConfigError) as caught:
        train_together(base, [one, other])
    for problem in (
        "adapter 'small' is in several jobs",
        "run folder",
        "train.tokens_per_micro_batch differs: 20, 40",
    ):
        assert problem in str(caught.value)
    with pytest.raises(ConfigError, match="there is no job"):
        train_together(base, [])
    assert not (tmp_path / "small").exists()
