"""aLoRA acts from the last invocation on: in plain rows, packed rows, padded rows, and over a cache."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import addenda
from addenda.bases.packed import PackedModel
from addenda.core.tokens import Tokens
from addenda.errors import MethodError
from addenda.methods.alora import ALoRA, from_the_last

CALL = (7, 3)


def by_hand(ids: list[int]) -> list[bool]:
    """Whether each token of a sample is at or behind the start of the last invocation."""
    starts = [i for i in range(len(ids) - 1) if tuple(ids[i : i + 2]) == CALL]
    return [bool(starts) and i >= starts[-1] for i in range(len(ids))]


def test_the_mask_is_that_of_a_loop_over_samples() -> None:
    for _ in range(50):
        lengths = torch.randint(1, 9, (4,)).tolist()
        rows = [[torch.randint(3, 9, (n,)).tolist() for n in lengths] for _ in range(3)]
        ids = torch.tensor([list(itertools.chain(*row)) for row in rows])
        samples = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)]).expand_as(ids)
        found = from_the_last(Tokens(ids, samples, ids.shape[1]), CALL)
        assert found.tolist() == [list(itertools.chain(*map(by_hand, row))) for row in rows]


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    model = make()
    handle = addenda.attach(model, ALoRA(invocation=CALL, rank=4, alpha=16.0))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(0.0, 0.3)
    return model


ROW = [5, 7, 3, 9, 11, 7, 3, 4, 8, 2]


def scores(model: torch.nn.Module, ids: list[int], **settings: object) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), **settings).logits[0]


def test_tokens_before_the_invocation_are_the_bases_and_the_others_are_not(model: LlamaForCausalLM) -> None:
    adapted, base = scores(model, ROW), scores(make(), ROW)
    same = [torch.equal(a, b) for a, b in zip(adapted, base, strict=True)]
    assert same == [not on for on in by_hand(ROW)]


def test_without_an_invocation_it_is_the_base(model: LlamaForCausalLM) -> None:
    assert torch.equal(scores(model, [5, 3, 7, 9]), scores(make(), [5, 3, 7, 9]))


@pytest.mark.parametrize("cut", [1, 4, 7, 9])
def test_a_cache_filled_in_parts_gives_what_one_pass_gives(model: LlamaForCausalLM, cut: int) -> None:
    ids = [5, 9, 11, 7, 3, 4, 8, 2, 6, 1] if cut != 4 else [7, 3, 5, 9, 11, 4, 8, 2, 6, 1]
    wanted = scores(model, ids)
    with torch.no_grad():
        first = model(torch.tensor([ids[:cut]]), use_cache=True)
        copied = copy.deepcopy(first.past_key_values)
        second = (
            model(torch.tensor([ids[cut:-1]]), past_key_values=first.past_key_values) if cut < 9 else first
        )
        last = model(torch.tensor([ids[-1:]]), past_key_values=second.past_key_values)
        again = model(torch.tensor([ids[cut:]]), past_key_values=copied)
    torch.testing.assert_close(last.logits[0, -1], wanted[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.logits[0], wanted[cut:], rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_is_generation_without(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[1, 1, 1, 5, 7, 3, 9], [5, 7, 3, 9, 11, 4, 8]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    found = [model.generate(ids, use_cache=cached, **settings).tolist() for cached in (True, False)]
    assert found[0] == found[1]
    assert found[0] != make().generate(ids, **settings).tolist()


def test_samples_of_a_packed_row_are_called_each_by_itself(model: LlamaForCausalLM) -> None:
    samples = [ROW, [4, 5, 6], [3, 7, 3, 2], [2, 7], [3, 4]]
    packed = PackedModel(model)
    assert packed.path == "packed"
    row = torch.tensor(list(itertools.chain(*samples)))
    hidden = packed.hidden(row, [len(s) for s in samples], recompute=packed.blocks)
    wanted = torch.cat([scores(model, sample) for sample in samples])
    with torch.no_grad():
        torch.testing.assert_close(packed.logits(hidden), wanted, rtol=1e-4, atol=1e-4)


def test_a_backward_that_runs_blocks_again_after_the_head_gives_the_same_gradients(
    model: LlamaForCausalLM,
) -> None:
    handle = addenda.core.handles(model)["default"]
    packed, row, lengths = PackedModel(model), torch.tensor([*ROW, 4, 7, 3, 2]), [len(ROW), 4]
    grads = []
    for blocks in (0, packed.blocks):
        packed.logits(packed.hidden(row, lengths, recompute=blocks)[1:4]).square().sum().backward()
        grads.append([p.grad.clone() for p in handle.parameters()])
        for parameter in handle.parameters():
            parameter.grad = None
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_embeddings_instead_of_ids_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(MethodError, match="no token ids"):
        model(inputs_embeds=torch.randn(1, 4, 32))


def test_a_copy_watches_for_itself_and_nothing_watches_after_a_detach(model: LlamaForCausalLM) -> None:
    wanted, twin = scores(model, ROW), copy.deepcopy(model)
    assert torch.equal(scores(twin, ROW), wanted)
    scores(model, [1, 2, 3])
    assert torch.equal(scores(twin, ROW), wanted)
    addenda.core.handles(model)["default"].detach()
    assert not [*model.model._forward_pre_hooks, *model.model._forward_hooks]
    assert torch.equal(scores(twin, ROW), wanted)
