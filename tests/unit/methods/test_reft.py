"""ReFT against the paper's formula in float64, and at which positions: padded, packed, checkpointed, generated."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

import addenda
from addenda.bases.packed import PackedModel
from addenda.core.prompts import Prompts
from addenda.methods.reft import ReFT

FORMS = ("loreft", "noreft", "direft")


def llama(layers: int = 2, **settings: object) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).eval()


def stirred(model: nn.Module, method: ReFT, name: str = "default") -> addenda.Handle:
    handle = addenda.attach(model, method, name=name)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return handle


def edited(h: Tensor, adapter: nn.Module, form: str) -> Tensor:
    """The paper's formulas, row by row."""
    R, W, b = (adapter.get_parameter(name) for name in "RWb")
    if form == "loreft":  # the nearest in the span: Gram and Schmidt's rows
        rows: list[Tensor] = []
        for row in R:
            left = row - sum(((row @ known) * known for known in rows), torch.zeros_like(row))
            rows.append(left / left.norm())
        R = torch.stack(rows)
        torch.testing.assert_close(R @ R.t(), torch.eye(len(R), dtype=R.dtype))
    if form == "direft":
        return h + R.t() @ (W @ h + b)
    return h + R.t() @ (W @ h + b - R @ h)


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_the_papers_formula_at_the_ends(form: str) -> None:
    block = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True).double()
    model, x = nn.Sequential(block), torch.randn(3, 9, 12).double()
    h = model(x)
    handle = stirred(model, ReFT(rank=3, first=2, last=1, form=form))
    y, adapter = model(x), handle.adapters["0"]
    for position in range(9):
        for row in range(3):
            meant = position in (0, 1, 8)
            expected = edited(h[row, position], adapter, form) if meant else h[row, position]
            torch.testing.assert_close(y[row, position], expected, rtol=1e-10, atol=1e-10)


def test_the_directions_of_loreft_are_orthonormal_whatever_is_trained() -> None:
    handle = stirred(llama(), ReFT(rank=5))
    for adapter in handle.adapters.values():
        R = adapter.directions()
        assert (R @ R.t() - torch.eye(5)).abs().max() <= 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model = llama()
    stirred(model, ReFT(rank=2, first=2, last=2))
    rows = [torch.randint(3, 61, (n,)) for n in (9, 5, 3)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for n, row in enumerate(rows):
        place = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[n, place], mask[n, place] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for n, row in enumerate(rows):
        alone = model(input_ids=row[None]).logits[0]
        torch.testing.assert_close(together[n, mask[n].bool()], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_packed_rows_give_what_single_samples_give(known: bool) -> None:
    model = llama()
    packed = PackedModel(model)
    assert packed.path == "packed"
    stirred(model, ReFT(rank=2, first=1, last=2))
    lengths, prompts = (7, 4, 11), (5, 1, 11)
    ids = torch.randint(3, 61, (sum(lengths),))
    with torch.no_grad():
        together = packed.hidden(ids, lengths, prompts=prompts if known else None)
        alone = [
            model.model(input_ids=row[None], **({"prompt_lengths": torch.tensor([prompt])} if known else {}))[
                0
            ][0]
            for row, prompt in zip(ids.split(lengths), prompts, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_the_answer_is_not_edited_and_the_prompt_lengths_matter() -> None:
    model, ids = llama(layers=1), torch.randint(3, 61, (1, 8))
    stirred(model, ReFT(rank=2, first=1, last=1))
    model.model.norm = nn.Identity()
    told = model.model(input_ids=ids, prompt_lengths=torch.tensor([4]))[0]
    plain = model.model(input_ids=ids)[0]
    changed = (told - plain).abs().sum(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [3, 7]  # the end of the prompt, and what was taken for it


def test_a_blocks_recomputation_edits_the_same_tokens() -> None:
    model = llama()
    packed = PackedModel(model)
    handle = stirred(model, ReFT(rank=2, first=1, last=2))
    ids, lengths, prompts = torch.randint(3, 61, (20,)), (12, 8), (7, 3)
    gradients = []
    for recompute in (0, 2):
        packed.hidden(ids, lengths, prompts=prompts, recompute=recompute).square().sum().backward()
        gradients.append([p.grad.clone() for p in handle.parameters()])
        model.zero_grad()
        for parameter in handle.parameters():
            parameter.grad = None
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_of_transformers_gives_the_same_gradients() -> None:
    model, ids = llama().train(), torch.randint(3, 61, (2, 10))
    handle = stirred(model, ReFT(rank=2))
    gradients = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in handle.parameters()])
        for parameter in handle.parameters():
            parameter.grad = None
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-4, atol=1e-7)


def test_generation_edits_the_prompt_and_goes_on_from_the_cache() -> None:
    model = llama()
    stirred(model, ReFT(rank=2, first=2, last=2))
    prompt = torch.randint(3, 61, (1, 6))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    ids = prompt
    for _ in range(5):  # without a cache, told where the prompt ends
        scores = model(input_ids=ids, prompt_lengths=torch.tensor([6]), use_cache=False).logits
        ids = torch.cat([ids, scores[:, -1].argmax(-1)[:, None]], dim=1)
    assert written.tolist() == ids.tolist()


def test_a_block_that_is_not_batch_first_is_refused() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
    with pytest.raises(addenda.MethodError, match="not the batch"):
        addenda.plan(model, ReFT(rank=2))


def test_places_in_prompts() -> None:
    class Row:
        bounds, prompts = ((0, 3), (3, 5)), (2, 2)

    places = Prompts.of_samples(Row(), 6, torch.device("cpu"))
    assert places.before.tolist() == [[0, 1, -1, 0, 1, -1]]
    assert places.behind.tolist() == [[1, 0, -1, 1, 0, -1]]
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert Prompts.of_rows(real).behind.tolist() == [[-1, 2, 1, 0], [1, 0, -1, -1]]
    told = Prompts.of_rows(real, torch.tensor([2, 1]))
    assert told.before.tolist() == [[-1, 0, 1, -1], [0, -1, -1, -1]]
    assert told.ends(0, 1).tolist() == [[False, False, True, False], [True, False, False, False]]


def test_rows_of_a_batch_may_each_have_an_edit_of_their_own() -> None:
    model = llama()
    for name in ("a", "b"):
        stirred(model, ReFT(rank=2, first=1, last=2), name)
    ids, mask = torch.randint(3, 61, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    alone = []
    for row, name in enumerate(("b", None, "a")):
        with addenda.activated(model, name):
            alone.append(model(input_ids=ids, attention_mask=mask).logits[row])
    with addenda.activated(model, addenda.Rows(("b", None, "a"))):
        routed = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(routed, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_a_model_that_runs_sample_by_sample_is_told_where_the_prompts_end() -> None:
    config = transformers.GptOssConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        pad_token_id=0,
    )
    model = transformers.GptOssForCausalLM(config).eval()
    packed = PackedModel(model)
    assert packed.path == "general"
    stirred(model, ReFT(rank=2, first=1, last=1))
    ids = torch.randint(3, 61, (12,))
    with torch.no_grad():
        found = packed.hidden(ids, (7, 5), prompts=(4, 5))
        told = model.model(input_ids=ids[None, :7], prompt_lengths=torch.tensor([4]))[0][0]
        untold = model.model(input_ids=ids[None, :7])[0][0]
        rest = model.model(input_ids=ids[None, 7:])[0][0]
    torch.testing.assert_close(found, torch.cat([told, rest]))
    assert not torch.allclose(told, untold)
