"""Training on the GPU: it learns, resumes to the same bits, offloads unnoticed, and holds what the ledger says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from addenda.bases.packed import PackedModel
from addenda.bases.place import move
from addenda.data.rows import Example, RowRef
from addenda.train.config import TrainConfig
from addenda.train.events import StartEvent, StepEvent
from addenda.train.loop import train
from addenda.train.memory import measure_memory
from addenda.train.offload import Offload
from addenda.train.state import adapter_tensors, digest_of_tensors

SETTINGS = {
    "epochs": 100, "max_steps": 10, "batch_size": 4, "learning_rate": 5e-3, "save_every_steps": 2,
    "save_every_minutes": None, "patience": None,
}  # fmt: skip


class Stopped(Exception):
    """The run is cut off."""


def rows(count=12):
    return [
        Example(
            tuple(torch.randint(3, 512, (40 + i,)).tolist()),
            (False,) * 10 + (True,) * (30 + i),
            RowRef("r", i + 1, i),
        )
        for i in range(count)
    ]


def run(made, device, folder, examples, *, resume=False, stop_at=None):
    torch.manual_seed(5)
    model, handle = made("llama")
    move(model, device)
    events = []

    def tell(event):
        events.append(event)
        if isinstance(event, StepEvent) and event.step == stop_at:
            raise Stopped

    base = SimpleNamespace(model=model)
    train(base, handle, examples, [], TrainConfig(**SETTINGS), run_dir=folder, on_event=tell, resume=resume)
    return digest_of_tensors(adapter_tensors(handle)), events


def test_ten_steps_lower_the_loss_and_say_where_they_ran(made, device, tmp_path):
    _, events = run(made, device, tmp_path, rows())
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.1
    [started] = [event for event in events if isinstance(event, StartEvent)]
    assert torch.cuda.get_device_name() in started.machine
    assert started.path == "packed", started.path_reason


def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(made, device, tmp_path):
    examples = rows()
    whole, _ = run(made, device, tmp_path / "whole", examples)
    with pytest.raises(Stopped):
        run(made, device, tmp_path / "cut", examples, stop_at=7)
    resumed, events = run(made, device, tmp_path / "cut", examples, resume=True)
    assert [event.step for event in events if isinstance(event, StepEvent)] == [7, 8, 9, 10]
    assert resumed == whole


def test_offloaded_activations_give_the_same_bits_in_less_of_the_gpus_memory(made, device):
    model, handle = made("llama", num_hidden_layers=8)
    move(model, device)
    packed, parameters = PackedModel(model), [p for p in handle.parameters() if p.requires_grad]
    ids, offload = torch.randint(3, 512, (16_384,), device=device), Offload(model, device)

    def gradients():
        packed.hidden(ids, [8000, 8384]).square().sum().backward()
        made = [p.grad.clone() for p in parameters]
        model.zero_grad()
        return made

    gradients()  # compiled by now
    peaks, found = [], []
    for offloaded in (False, True):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        if offloaded:
            with offload.on():
                hidden = packed.hidden(ids, [8000, 8384])
            hidden.square().sum().backward()
            found.append([p.grad.clone() for p in parameters])
        else:
            found.append(gradients())
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    assert offload.copied > 2**26
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert peaks[1] < 0.8 * peaks[0], peaks


@pytest.mark.parametrize("recompute", [0, 8])
def test_the_ledger_says_what_a_step_holds(recompute, made, device):
    model, handle = made(
        "llama",
        num_hidden_layers=8,
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=16,
        vocab_size=32_000,
    )
    move(model, device)
    packed, tokens = PackedModel(model), 8192
    memory = measure_memory(handle, packed)
    ids = torch.randint(3, 512, (tokens,), device=device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    packed.hidden(ids, [tokens], recompute=recompute).square().sum().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - memory.present
    ledger = memory.ledger(tokens, recompute)
    assert ledger.activations * 0.8 <= peak <= ledger.total - memory.present, (peak, str(ledger))
