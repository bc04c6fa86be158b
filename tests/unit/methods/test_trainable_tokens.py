"""Trainable tokens: rows of an embedding and of its head, tied or not; no other row changes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import addenda
from addenda.methods.trainable_tokens import TrainableTokens

TOKENS = (9, 2, 31)


def gpt2(*, tied: bool) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, tie_word_embeddings=tied
    )
    return transformers.GPT2LMHeadModel(config).eval()


def stir(handle: addenda.Handle) -> None:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_what_changed_rows_of_the_tables_give(tied: bool) -> None:
    model, ids = gpt2(tied=tied), torch.arange(40).reshape(2, 20)
    handle = addenda.attach(model, TrainableTokens(tokens=TOKENS))
    assert handle.paths == ["transformer.wte", "lm_head"]
    assert handle.trainable_parameters == len(TOKENS) * 16 * (1 if tied else 2)
    stir(handle)
    adapted = model(ids).logits
    reads, scores = (handle.adapters[path].rows.detach().clone() for path in handle.paths)
    handle.detach()
    with torch.no_grad():
        model.transformer.wte.weight[list(TOKENS)] += reads
        if not tied:
            model.lm_head.weight[list(TOKENS)] += scores
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)


def test_rows_of_a_tied_pair_get_the_gradients_of_both(tmp_path: object) -> None:
    model, ids = gpt2(tied=True), torch.tensor([[1, 9, 3]])
    handle = addenda.attach(model, TrainableTokens(tokens=TOKENS))
    (name, rows), *others = handle.named_parameters()
    assert (name, others) == ("*.tables.0", [])
    model(ids).logits.square().sum().backward()
    assert all(rows.grad.abs().sum(-1) > 0)  # a token that is not read is scored all the same
    stir(handle)
    expected = model(ids).logits
    addenda.save(model, f"{tmp_path}/adapter")
    handle.detach()
    again = addenda.load(model, f"{tmp_path}/adapter")
    assert torch.equal(model(ids).logits, expected)
    assert again.adapters["lm_head"].rows is again.adapters["transformer.wte"].rows


def test_the_embedding_alone_changes_what_is_read_alone() -> None:
    model, ids = gpt2(tied=True), torch.tensor([[1, 4, 3]])
    before = model(ids).logits
    handle = addenda.attach(
        model, TrainableTokens(tokens=TOKENS), "wte"
    )  # no token of the model's batch is among them
    stir(handle)
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(model(torch.tensor([[1, 9, 3]])).logits[:, 1:], before[:, 1:])


def test_an_embedding_that_scales_is_followed() -> None:
    config = transformers.Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model, ids = transformers.Gemma2ForCausalLM(config).eval(), torch.tensor([[1, 9, 31, 3]])
    handle = addenda.attach(model, TrainableTokens(tokens=TOKENS))
    stir(handle)
    adapted = model(ids).logits
    rows = handle.adapters["lm_head"].rows.detach().clone()
    handle.detach()
    with torch.no_grad():
        model.model.embed_tokens.weight[list(TOKENS)] += rows
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (TrainableTokens(tokens=(3, 40)), "token 40 is beyond its 40 rows"),
        (TrainableTokens(), "names no token"),
    ],
)
def test_what_cannot_be_trained_is_refused(method: TrainableTokens, text: str) -> None:
    with pytest.raises(addenda.MethodError, match=text):
        addenda.plan(gpt2(tied=True), method)


@pytest.mark.parametrize("tokens", [(3, 3), (-1,), (True,), "9", (1.5,)])
def test_what_is_no_list_of_tokens_is_refused(tokens: object) -> None:
    with pytest.raises(addenda.ConfigError, match="token"):
        TrainableTokens(tokens=tokens)
