"""Runs of methods that change the sequence: over packed rows, planned, trained, judged, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import train_tiny as tiny

import addenda
from addenda.cli.app import run
from addenda.core import registry
from addenda.train.config import TrainConfig
from addenda.train.events import StepEvent
from addenda.train.loop import train

METHODS = [
    pytest.param(registry.get(name).from_settings(variant), id=f"{name}-{i}")
    for name in registry.names()
    if set(registry.get(name).kinds) & {"transformer", "attention"}
    for i, variant in enumerate(registry.get(name).variants)
]


def plain_loss(model: torch.nn.Module, rows: list) -> float:
    """Mean over all trained tokens, one row at a time, by the model's own forward and loss."""
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        labels = torch.where(torch.tensor([row.trained]), ids, -100)
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * row.trained_tokens
    return total / sum(row.trained_tokens for row in rows)


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_starts_at_the_models_own_loss_and_lowers_it(method: addenda.Method, tmp_path: Path) -> None:
    base, rows, events = tiny.make_base(), tiny.make_rows(8), []
    handle = addenda.attach(base.model, method, seed=3)
    expected = plain_loss(base.model, rows)
    config = TrainConfig(
        epochs=15,
        batch_size=8,
        tokens_per_micro_batch=60,
        learning_rate=2e-2,
        threads=1,
        save_every_minutes=None,
    )
    train(base, handle, rows, [], config, run_dir=tmp_path, on_event=events.append)
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert plain_loss(base.model, rows) < 0.995 * expected


def test_an_embedding_of_cpt_never_leaves_its_ball(tmp_path: Path) -> None:
    base, rows = tiny.make_base(), tiny.make_rows(8)
    method = registry.get("cpt")(ids=(9, 2, 6, 7), roles=(1, 2, 3, 4), epsilon=0.2, format_epsilon=0.1)
    handle = addenda.attach(base.model, method)
    config = TrainConfig(epochs=5, batch_size=4, learning_rate=0.1, threads=1, save_every_minutes=None)
    train(base, handle, rows, [], config, run_dir=tmp_path, on_event=lambda _: None)
    moved = next(iter(handle.adapters.values())).D.norm(dim=1)
    radii = torch.tensor([0.1, 0.2, 0.1, 0.0]) * (64 / 2048) ** 0.5
    torch.testing.assert_close(moved, radii)


def test_a_text_in_the_recipe_becomes_the_tokens_to_start_from(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = "the answer names the thing", tmp_path / "run"
    sets = ["method.name=cartridge", "method.tokens=5", f"method.text={text}", "train.epochs=2"]
    sets += ["evals.samples=2", "evals.max_new_tokens=4", "base.dtype=float32"]
    settings = [part for each in sets for part in ("--set", each)]
    assert run(["plan", str(chat_rows), "--base", str(tiny_model), *settings, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["forecast"]["ledger"]["total"] > planned["bytes"]
    arguments = ["train", str(chat_rows), "--base", str(tiny_model), "--out", str(folder), "-q"]
    assert run([*arguments, *settings]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trainable_parameters"] == planned["parameters"]
    base = addenda.load_base(str(tiny_model))
    handle = addenda.load(base.model, folder / "adapter")
    assert handle.method.settings()["ids"] == base.tokenizer(text, add_special_tokens=False).input_ids
