"""What the loop does for single methods: AdaLoRA ends within its budget, aLoRA learns behind its invocation alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_tiny as tiny

import addenda
from addenda.methods.adalora import AdaLoRA
from addenda.methods.alora import ALoRA
from addenda.train.config import TrainConfig
from addenda.train.events import StepEvent
from addenda.train.loop import train

TARGETS = ["q_proj", "v_proj", "down_proj"]


def run(folder: Path, *, break_at: int | None = None, resume: bool = False) -> addenda.Handle:
    base = tiny.make_base()
    method = AdaLoRA(rank=6, target_rank=2, t_init=2, t_final=4, delta_t=2)
    handle = addenda.attach(base.model, method, targets=TARGETS)

    def tell(event: object) -> None:
        if isinstance(event, StepEvent) and event.step == break_at:
            raise KeyboardInterrupt

    config = TrainConfig(
        epochs=8, batch_size=4, learning_rate=1e-2, save_every_steps=5, save_every_minutes=None, threads=1
    )
    train(base, handle, tiny.make_rows(8), [], config, run_dir=folder, on_event=tell, resume=resume)
    return handle


def test_the_budget_is_reached_and_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    kept = [int((adapter.values != 0).sum()) for adapter in whole.adapters.values()]
    assert sum(kept) == 2 * len(kept)
    assert len(set(kept)) > 1, "some layers are given more than others"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", break_at=7)
    resumed = run(tmp_path / "broken", resume=True)
    for name, tensor in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name


def test_an_invoked_adapter_learns_what_comes_behind_its_invocation(tmp_path: Path) -> None:
    base, rows, losses = tiny.make_base(), tiny.make_rows(8), []
    rows = [
        type(row)(
            (*row.input_ids[:2], 1, 2, *row.input_ids[2:]), (False,) * 4 + (True,) * (len(row) - 2), row.row
        )
        for row in rows
    ]
    rows = [row for row in rows if len(row) > 4]
    probe = torch.tensor([rows[0].input_ids])
    before = base.model(probe).logits.detach()
    handle = addenda.attach(base.model, ALoRA(invocation=(1, 2), rank=8), targets="all-linear")

    def tell(event: object) -> None:
        if isinstance(event, StepEvent):
            losses.append(event.loss)

    config = TrainConfig(epochs=40, batch_size=4, learning_rate=1e-2, save_every_minutes=None, threads=1)
    train(base, handle, rows, [], config, run_dir=tmp_path, on_event=tell)
    assert losses[-1] < 0.5 * losses[0]
    after = base.model(probe).logits
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.equal(after[:, 2:], before[:, 2:])
