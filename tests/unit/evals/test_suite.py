"""The whole evaluation in one call, on a tiny model that is made to learn or left alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import addenda
from addenda.bases.loaded import LoadedBase
from addenda.core.handle import Handle
from addenda.core.progress import Progress
from addenda.data.rows import Example, RowRef
from addenda.errors import MethodError
from addenda.evals import suite
from addenda.evals.heldout import heldout
from addenda.evals.suite import evaluate


def rows(count: int, *, first: int) -> list[Example]:
    """Rows that all follow one rule: after token t comes t + 1."""
    made = []
    for index in range(first, first + count):
        ids = tuple(range(20 + index, 30 + index))
        made.append(Example(ids, (False, *([True] * 9)), RowRef("rule", index, index)))
    return made


def trained(base: LoadedBase, examples: list[Example], *, steps: int) -> Handle:
    handle = addenda.attach(
        base.model, addenda.LoRA(rank=8), targets=["q_proj", "v_proj", "up_proj", "down_proj"]
    )
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    batch = torch.tensor([example.input_ids for example in examples])
    for _ in range(steps):
        logits = base.model(input_ids=batch).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle


def test_rule_that_carries_over_is_learned(tiny_base: LoadedBase) -> None:
    everything = rows(60, first=0)
    held, seen = everything[::3], [row for index, row in enumerate(everything) if index % 3]
    found = evaluate(tiny_base, trained(tiny_base, seen, steps=40), held, train_examples=seen)
    assert found.learning.verdict == "learned"
    assert found.heldout.nll_after < found.heldout.nll_before
    assert found.heldout.nll_change.below_zero
    assert found.heldout.accuracy_change.above_zero
    assert found.general.mean > 0
    assert found.learning.train_change.units == len(held)


def test_the_base_is_measured_once_for_several_adapters(
    tiny_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[str] = []

    def counted(*given: Any, task: str, **more: Any) -> Any:
        tasks.append(task)
        return heldout(*given, task=task, **more)

    monkeypatch.setattr(suite, "heldout", counted)
    everything, scores = rows(24, first=0), {}
    held, seen = everything[::3], [row for index, row in enumerate(everything) if index % 3]
    for steps in (1, 3):
        handle = trained(tiny_base, seen, steps=steps)
        found = evaluate(tiny_base, handle, held, train_examples=seen, base_scores=scores)
        assert found == evaluate(tiny_base, handle, held, train_examples=seen)
        handle.detach()
    assert sum("base" in task for task in tasks) == 2 + 2 * 2
    assert sum("adapted" in task for task in tasks) == 8


def test_rows_without_a_rule_are_memorised(tiny_base: LoadedBase) -> None:
    noise = [
        Example(tuple(torch.randint(20, 200, (12,)).tolist()), (False, *([True] * 11)), RowRef("noise", i, i))
        for i in range(40)
    ]
    held, seen = noise[:20], noise[20:]
    found = evaluate(tiny_base, trained(tiny_base, seen, steps=60), held, train_examples=seen)
    assert found.learning.verdict == "memorising"
    assert found.learning.gap.above_zero


def test_untrained_adapter_has_learned_nothing_and_moved_nothing(tiny_base: LoadedBase) -> None:
    handle = addenda.attach(tiny_base.model, addenda.LoRA(rank=2))
    found = evaluate(tiny_base, handle, rows(10, first=0), train_examples=rows(10, first=30))
    assert found.learning.verdict == "nothing learned"
    assert found.heldout.nll_change.value == 0.0
    assert found.general.mean == 0.0


def test_before_is_the_base_and_after_the_adapted_model(tiny_base: LoadedBase) -> None:
    examples = rows(10, first=0)
    plain = heldout(tiny_base, examples)
    handle = trained(tiny_base, examples, steps=3)
    found = evaluate(tiny_base, handle, examples).heldout
    assert (found.nll_before, found.accuracy_before) == (plain.nll_per_token, plain.token_accuracy)
    assert found.nll_after == heldout(tiny_base, examples).nll_per_token
    assert handle.active


def test_figures_are_json_and_hold_the_names_of_the_summary(tiny_base: LoadedBase) -> None:
    handle = trained(tiny_base, rows(10, first=0), steps=2)
    figures = evaluate(tiny_base, handle, rows(10, first=0), train_examples=rows(12, first=0)).figures()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    for name in (
        "heldout_nll_before",
        "heldout_nll_after",
        "heldout_token_accuracy_before",
        "heldout_token_accuracy_after",
        "base_kl_general",
        "verdict",
    ):
        assert name in figures
    low, high = figures["base_kl_general_interval"]
    assert low < figures["base_kl_general"] < high
    few = evaluate(tiny_base, handle, rows(3, first=0)).figures()
    assert few["heldout_nll_change_interval"] is None
    assert "verdict" not in few


def test_each_step_is_named_for_the_watcher(tiny_base: LoadedBase) -> None:
    seen: list[Progress] = []
    handle = addenda.attach(tiny_base.model, addenda.LoRA(rank=2))
    evaluate(tiny_base, handle, rows(9, first=0), train_examples=rows(9, first=9), on_progress=seen.append)
    assert list(dict.fromkeys(step.task for step in seen)) == [
        "held-out rows, base",
        "held-out rows, adapted",
        "training rows, base",
        "training rows, adapted",
        "general prompts",
    ]


def test_disabled_adapter_is_refused(tiny_base: LoadedBase) -> None:
    handle = addenda.attach(tiny_base.model, addenda.LoRA(rank=2))
    handle.disable()
    with pytest.raises(MethodError, match="disabled, so nothing changes") as caught:
        evaluate(tiny_base, handle, rows(9, first=0))
    assert "enable()" in caught.value.hint
