"""Held-out figures equal those of the model's own forward, row by row, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.bases.loaded import LoadedBase
from addenda.bases.packed import PackedModel
from addenda.core.progress import Progress
from addenda.data.rows import Example, RowRef
from addenda.errors import BaseModelError, DataError
from addenda.evals.heldout import heldout


def random_examples(base: LoadedBase, count: int = 9) -> list[Example]:
    examples = []
    for index in range(count):
        length = int(torch.randint(4, 40, ()))
        ids = torch.randint(4, len(base.tokenizer), (length,)).tolist()
        trained = [False, *(torch.rand(length - 1) < 0.5).tolist()]
        trained[-1] = True
        examples.append(Example(tuple(ids), tuple(trained), RowRef("made-up", index + 1, index)))
    return examples


def reference(base: LoadedBase, example: Example) -> tuple[float, int]:
    """Sum of nll and correct tokens of one row, from the model's logits in float64."""
    model = base.model.double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
    model.float()
    nll, correct = 0.0, 0
    for position, (token, on) in enumerate(zip(example.input_ids, example.trained, strict=True)):
        if on:
            row = logits[position - 1]
            nll -= float(row[token] - torch.logsumexp(row, 0))
            correct += int(row.argmax()) == token
    return nll, correct


def test_figures_equal_a_float64_reference_row_by_row(tiny_base: LoadedBase) -> None:
    examples = random_examples(tiny_base)
    found = heldout(tiny_base, examples, tokens_per_batch=64, chunk=5)
    for score, example in zip(found.per_row, examples, strict=True):
        nll, correct = reference(tiny_base, example)
        assert score.nll_sum == pytest.approx(nll, rel=1e-5)
        assert score.correct == correct
        assert score.tokens == example.trained_tokens
    tokens = sum(example.trained_tokens for example in examples)
    assert found.tokens == tokens
    assert found.rows == len(examples)
    assert found.nll_per_token == pytest.approx(sum(s.nll_sum for s in found.per_row) / tokens)
    assert found.token_accuracy == pytest.approx(sum(s.correct for s in found.per_row) / tokens)


def test_batching_and_chunking_do_not_change_the_figures(tiny_base: LoadedBase) -> None:
    examples = random_examples(tiny_base)
    one = heldout(tiny_base, examples, tokens_per_batch=1)
    many = heldout(tiny_base, examples, tokens_per_batch=10_000, chunk=3)
    assert [s.correct for s in one.per_row] == [s.correct for s in many.per_row]
    torch.testing.assert_close(
        torch.tensor([s.nll_sum for s in one.per_row]), torch.tensor([s.nll_sum for s in many.per_row])
    )


def test_adapter_counts_when_enabled_and_not_when_disabled(tiny_base: LoadedBase) -> None:
    examples, packed = random_examples(tiny_base), PackedModel(tiny_base.model)
    before = heldout(tiny_base, examples, packed=packed)
    handle = addenda.attach(tiny_base.model, addenda.LoRA(rank=4))
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert heldout(tiny_base, examples, packed=packed).nll_per_token != before.nll_per_token
    with handle.disabled():
        assert heldout(tiny_base, examples, packed=packed) == before


def test_dropout_is_off_while_measuring_and_modes_come_back(tiny_base: LoadedBase) -> None:
    examples = random_examples(tiny_base)
    handle = addenda.attach(tiny_base.model, addenda.LoRA(rank=4, dropout=0.5))
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.1)
    tiny_base.model.eval()
    expected = heldout(tiny_base, examples)
    for adapter in handle.adapters.values():
        adapter.train()
    modes = [module.training for module in tiny_base.model.modules()]
    assert heldout(tiny_base, examples) == expected
    assert [module.training for module in tiny_base.model.modules()] == modes
    assert any(modes)


def test_measuring_leaves_training_possible_and_gradients_alone(tiny_base: LoadedBase) -> None:
    handle = addenda.attach(tiny_base.model, addenda.LoRA(rank=2))
    heldout(tiny_base, random_examples(tiny_base))
    assert all(parameter.grad is None for parameter in handle.parameters())
    tiny_base.model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert any(parameter.grad is not None for parameter in handle.parameters())


def test_progress_ends_at_the_number_of_rows(tiny_base: LoadedBase) -> None:
    seen: list[Progress] = []
    heldout(tiny_base, random_examples(tiny_base), tokens_per_batch=40, on_progress=seen.append)
    assert len(seen) > 1
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (9, 9, "rows")


def test_rows_that_cannot_be_measured_are_refused(tiny_base: LoadedBase) -> None:
    with pytest.raises(DataError, match="no rows to measure on"):
        heldout(tiny_base, [])
    blank = Example((4, 5, 6), (False, False, False), RowRef("data.jsonl", 7, 6))
    with pytest.raises(DataError, match="1 rows have no trained token") as caught:
        heldout(tiny_base, [*random_examples(tiny_base), blank])
    assert caught.value.where["rows"] == "data.jsonl:7"
    assert "loss mask" in caught.value.hint


def test_a_model_that_gives_no_number_is_refused_and_the_row_named(tiny_base: LoadedBase) -> None:
    examples = random_examples(tiny_base)
    with torch.no_grad():
        next(tiny_base.model.parameters())[examples[0].input_ids[0]] = float("nan")
    with pytest.raises(BaseModelError, match="no finite nll") as caught:
        heldout(tiny_base, examples)
    assert "made-up" in str(caught.value.where["first"])
