"""Attention as a GPU does it, uncompiled on the CPU; there PyTorch refuses only the backward, and only at its door."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as library

from addenda.bases.fast import flex
from addenda.bases.fast.attention import attend
from addenda.bases.fast.compiled import SETTINGS
from addenda.bases.fast.flex import BLOCK, flex_attend, flex_takes
from addenda.bases.fast.segments import Rule, Segments

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]

RULES = {
    "plain": Rule(0.35),
    "window": Rule(0.35, window=40),
    "softcap": Rule(0.35, softcap=2.0),
    "both": Rule(0.3, window=150, softcap=5.0),
    "both ways": Rule(0.35, causal=False),
    "both ways, window": Rule(0.35, window=40, causal=False),
}
LENGTHS = {
    "one block": (5, 1, 12, 3),
    "across blocks": (100, 1, 300, 60, 51),
    "whole blocks": (128, 256, 128),
    "one sample": (500,),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(library, "_validate_device", lambda *_: None)
    with torch._dynamo.config.patch(SETTINGS):
        yield


def inputs(tokens, heads=4, key_heads=2, d=8, d_v=8):
    shapes = ((heads, d), (key_heads, d), (key_heads, d_v))
    return [
        torch.randn(tokens, *shape, dtype=torch.float64).transpose(0, 1).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_output_and_gradients_equal_those_of_the_cpu(rule, lengths):
    # `attend` on the CPU is held to the definition by its own tests.
    used = sum(lengths)
    tokens = used + -used % BLOCK
    tensors = inputs(tokens, d_v=4)
    segments = Segments(lengths)
    ours, theirs = flex_attend(*tensors, segments, rule), attend(*tensors, Segments(lengths), rule)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert not ours[:, used:].any()
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), tensors),
        torch.autograd.grad((theirs * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_layers_of_the_same_window_share_a_mask():
    segments, tensors = Segments((100, 60)), inputs(256)
    for rule in (*RULES.values(), *RULES.values()):
        flex_attend(*tensors, segments, rule)
    assert set(segments.masks) == {
        (256, None, True),
        (256, 40, True),
        (256, 150, True),
        (256, None, False),
        (256, 40, False),
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 40, 128, 200, 10_000])
def test_the_blocks_are_those_that_pytorch_finds_by_looking_at_every_pair(window, causal):
    lengths = tuple(torch.randint(1, 200, (9,)).tolist())
    tokens = -(-sum(lengths) // BLOCK) * BLOCK
    made = flex._block_mask(Segments(lengths), tokens, Rule(1.0, window, causal=causal), torch.device("cpu"))
    found = library.create_block_mask(
        made.mask_mod, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK
    )
    for ours, theirs in (
        ((made.kv_num_blocks, made.kv_indices), (found.kv_num_blocks, found.kv_indices)),
        ((made.full_kv_num_blocks, made.full_kv_indices), (found.full_kv_num_blocks, found.full_kv_indices)),
        ((made.q_num_blocks, made.q_indices), (found.q_num_blocks, found.q_indices)),
        ((made.full_q_num_blocks, made.full_q_indices), (found.full_q_num_blocks, found.full_q_indices)),
    ):
        assert torch.equal(*(library._ordered_to_dense(*x, tokens // BLOCK) for x in (ours, theirs)))


def test_the_cpu_keeps_its_own_form():
    query, _, value = inputs(20, d=16, d_v=16)
    assert not flex_takes(query.float(), value.float())


@pytest.mark.parametrize("rule", [RULES["plain"], RULES["both"]], ids=["plain", "both"])
def test_compiled_whole_it_takes_any_length_after_a_few(rule, monkeypatch):
    torch._dynamo.reset()
    form = torch.compile(library.flex_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex, "_flex_on", lambda _: form)

    def there_and_back(tokens):
        tensors = inputs(tokens)
        lengths = (tokens // 3, tokens - tokens // 3 - 5)
        ours, theirs = (
            flex_attend(*tensors, Segments(lengths), rule),
            attend(*tensors, Segments(lengths), rule),
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        return torch.autograd.grad(ours.sum(), tensors)

    for tokens in (128, 256, 512):
        there_and_back(tokens)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (384, 640, 1024):
            assert all(bool(x.isfinite().all()) for x in there_and_back(tokens))
