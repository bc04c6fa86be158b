"""The loss of a small fixed run, step by step, against the curve that was kept: a change of the engine shows here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import train_tiny as tiny

from addenda.train.config import TrainConfig
from addenda.train.events import StepEvent
from addenda.train.loop import train

GOLDEN = Path(__file__).with_name("golden_curve.json")
"""Loss and gradient norm of each step. To keep another one: delete it, run the test, and look at what changed."""


def curve(folder, kernels):
    base, events = tiny.make_base(), []
    handle = tiny.attach(base, rank=8, dropout=0.0)
    config = TrainConfig(
        epochs=4, batch_size=4, learning_rate=5e-3, threads=1, save_every_minutes=None, kernels=kernels
    )
    train(base, handle, tiny.make_rows(12), [], config, run_dir=folder, on_event=events.append)
    return [(event.loss, event.grad_norm) for event in events if isinstance(event, StepEvent)]


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_the_curve_is_the_kept_one(tmp_path, kernels):
    now = curve(tmp_path, kernels)
    if not GOLDEN.is_file():
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        pytest.fail(f"'{GOLDEN.name}' was not there and is written anew: look at it and commit it")
    kept = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(now) == len(kept) == 12
    assert kept[-1][0] < 0.8 * kept[0][0]
    for (loss, norm), (kept_loss, kept_norm) in zip(now, kept, strict=True):
        assert loss == pytest.approx(kept_loss, rel=1e-4)
        assert norm == pytest.approx(kept_norm, rel=1e-3)
