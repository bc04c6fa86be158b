from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import train_tiny as tiny

from addenda.train.config import TrainConfig
from addenda.train.events import StepEvent
from addenda.train.loop import train
from addenda.train.profile import OTHER, PARTS, StepProfile, necessary_flop, product_rate


def profiled(folder, rows, **settings):
    base, events = tiny.make_base(), []
    handle = tiny.attach(base)
    profile = StepProfile(handle, events.append)
    config = TrainConfig(epochs=1, batch_size=2, threads=1, save_every_minutes=None, **settings)
    with profile:
        train(base, handle, tiny.make_rows(rows), [], config, run_dir=folder, on_event=profile)
    return profile.times, handle, [event for event in events if isinstance(event, StepEvent)]


def test_the_parts_add_up_to_the_time_and_each_was_seen(tmp_path):
    times, handle, steps = profiled(tmp_path, 14)
    assert len(steps) == 7  # nothing is kept from whoever listens
    measured = steps[2:4]
    assert times.steps == 2
    assert (times.tokens, times.trained_tokens) == (
        sum(step.tokens for step in measured),
        sum(step.trained_tokens for step in measured),
    )
    assert set(times.parts) == {name for name, _ in PARTS} | {OTHER}
    assert 0.2 * times.seconds <= sum(times.parts.values()) <= 1.05 * times.seconds
    for name in ("attention", "norms", "matrix products", "optimizer"):
        assert times.parts[name] > 0, name
    assert times.flop == necessary_flop(handle, tokens=times.tokens, trained_tokens=times.trained_tokens)
    assert "matrix products" in str(times)
    assert times.document()["share"] == times.share > 0


def test_a_run_of_too_few_steps_has_no_profile(tmp_path):
    assert profiled(tmp_path, 6)[0] is None


def test_necessary_work_is_that_of_the_weights():
    base = tiny.make_base()
    handle = tiny.attach(base)
    hidden, inner, vocabulary, kv = 64, 96, tiny.VOCAB, 32
    linear = 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    trained = handle.trainable_parameters
    expected = 4 * linear * 10 + 4 * hidden * vocabulary * 3 + 6 * trained * 10
    assert necessary_flop(handle, tokens=10, trained_tokens=3) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_the_rate_is_that_of_a_product(dtype):
    assert 1e8 < product_rate(torch.zeros(1, dtype=dtype), size=256, repeats=2) < 1e15


def test_a_run_that_ends_while_it_is_measured_leaves_a_process_that_ends_well(tmp_path):
    code = (
        "import sys, runpy\n"
        f"module = runpy.run_path({__file__!r})\n"
        "from pathlib import Path\n"
        "assert module['profiled'](Path(sys.argv[1]), 6)[0] is None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
