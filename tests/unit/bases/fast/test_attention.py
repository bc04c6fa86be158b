from __future__ import annotations

import pytest
import torch

from addenda.bases.fast import attention, plain_attention
from addenda.bases.fast.attention import attend, packed_attention
from addenda.bases.fast.segments import Rule, Segments
from addenda.errors import BaseModelError

LENGTHS = (5, 1, 12, 3)


def inputs(dtype=torch.float64, *, heads=6, kv_heads=2, lengths=LENGTHS, d=8, d_v=8):
    tokens = sum(lengths)
    # Laid out as a model's projections are: (T, heads, d) seen as (heads, T, d).
    shapes = ((heads, d), (kv_heads, d), (kv_heads, d_v))
    return [torch.randn(tokens, *s, dtype=dtype).transpose(0, 1).requires_grad_() for s in shapes]


def reference(query, key, value, lengths, rule):
    """The definition, with a mask over the whole row, through autograd."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(sample))
    seen = (sample[:, None] == sample) & (place[None] <= place[:, None])
    if rule.window is not None:
        seen &= place[None] > place[:, None] - rule.window
    scores = query @ key.transpose(1, 2) * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value


RULES = {
    "plain": Rule(0.35),
    "window": Rule(0.35, window=4),
    "softcap": Rule(0.35, softcap=2.0),
    "both": Rule(1.0, window=3, softcap=5.0),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("block", [512, 4], ids=["one-block", "many-blocks"])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_output_and_gradients_equal_the_definition(rule, block, kv_heads, monkeypatch):
    monkeypatch.setattr(plain_attention, "QUERY_BLOCK", block)
    tensors = inputs(kv_heads=kv_heads)
    weight = torch.randn(6, sum(LENGTHS), 8, dtype=torch.float64)
    ours = attend(*tensors, Segments(LENGTHS), rule)
    theirs = reference(*tensors, LENGTHS, rule)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    ours_grad = torch.autograd.grad((ours * weight).sum(), tensors)
    theirs_grad = torch.autograd.grad((theirs * weight).sum(), tensors)
    for ours_, theirs_ in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-9, atol=1e-9)


def test_value_dimension_may_differ_from_the_key_dimension():
    tensors = inputs(d_v=4)
    ours = attend(*tensors, Segments(LENGTHS), RULES["window"])
    torch.testing.assert_close(ours, reference(*tensors, LENGTHS, RULES["window"]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_bfloat16_gradients_are_as_near_to_the_definition_as_autograd_on_bfloat16(rule):
    lengths = (60, 33, 7)
    exact = inputs(lengths=lengths)
    half = [x.detach().to(torch.bfloat16).requires_grad_() for x in exact]
    weight = torch.randn(6, sum(lengths), 8, dtype=torch.float64)

    def gradients(function, tensors):
        out = function(*tensors)
        return torch.autograd.grad((out * weight.to(out.dtype)).sum(), tensors)

    truth = gradients(
        lambda *t: reference(*t, lengths, rule), [x.detach().double().requires_grad_() for x in half]
    )
    ours = gradients(lambda *t: attend(*t, Segments(lengths), rule), half)
    naive = gradients(lambda *t: reference(*t, lengths, rule), half)
    for t, a, b in zip(truth, ours, naive, strict=True):
        assert (a.double() - t).norm() <= 1.25 * (b.double() - t).norm() + 5e-3 * t.norm()


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_tokens_behind_the_last_segment_get_zeros_and_give_no_gradient(dropout):
    tensors = inputs(lengths=(*LENGTHS, 7))
    used, short = sum(LENGTHS), [x[:, : sum(LENGTHS)].detach().requires_grad_() for x in tensors]
    for rule in RULES.values():
        ours, theirs = (
            attend(*tensors, Segments(LENGTHS), rule, dropout=dropout),
            attend(*short, Segments(LENGTHS), rule),
        )
        torch.testing.assert_close(ours[:, :used], theirs, rtol=1e-6, atol=1e-6)
        assert not ours[:, used:].any()
        weight = torch.randn_like(ours)
        for long, exact in zip(
            torch.autograd.grad((ours * weight).sum(), tensors),
            torch.autograd.grad((theirs * weight[:, :used]).sum(), short),
            strict=True,
        ):
            torch.testing.assert_close(long[:, :used], exact, rtol=1e-6, atol=1e-6)
            assert not long[:, used:].any()


def test_dropout_zero_equals_the_library_path():
    tensors = inputs()
    for rule in RULES.values():
        ours = attend(*tensors, Segments(LENGTHS), rule)
        parts = [
            attention._library_attention(*(x[:, a:b] for x in tensors), rule, 0.0)
            for a, b in Segments(LENGTHS).bounds
        ]
        torch.testing.assert_close(ours, torch.cat(parts, 1), rtol=1e-6, atol=1e-6)


def test_dropout_drops_and_keeps_the_expectation():
    query, key, value = inputs(lengths=(16,))
    rule = Rule(0.3)
    plain = attend(query, key, value, Segments((16,)), rule)
    with torch.no_grad():
        draws = torch.stack(
            [attend(query, key, value, Segments((16,)), rule, dropout=0.3) for _ in range(800)]
        )
    assert (draws[0] - plain).abs().max() > 1e-3
    torch.testing.assert_close(draws.mean(0), plain.detach(), rtol=0, atol=0.15)


def test_one_segment_never_sees_another_bit_for_bit():
    query, key, value = (x.detach() for x in inputs(torch.float32))
    for rule in RULES.values():
        before = attend(query, key, value, Segments(LENGTHS), rule)
        changed = [x.clone() for x in (query, key, value)]
        for x in changed:
            x[:, :5] = torch.randn_like(x[:, :5])
        after = attend(*changed, Segments(LENGTHS), rule)
        assert torch.equal(before[:, 5:], after[:, 5:])
        assert not torch.equal(before[:, :5], after[:, :5])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"segments": None}, "no sample boundaries"),
        ({"attention_mask": torch.zeros(1)}, "an attention mask"),
        ({"s_aux": torch.zeros(6)}, "'s_aux'"),
        ({"position_bias": torch.zeros(6)}, "'position_bias'"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(arguments, named):
    tensors = [x[None] for x in inputs()]
    given = {"segments": Segments(LENGTHS), "attention_mask": None} | arguments
    mask = given.pop("attention_mask")
    with pytest.raises(BaseModelError, match=named):
        packed_attention(torch.nn.Identity(), *tensors, mask, **given)
