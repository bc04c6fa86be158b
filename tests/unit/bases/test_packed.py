from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from addenda.bases.packed import PackedModel
from addenda.errors import BaseModelError

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
LENGTHS = (9, 1, 14, 5)


def gpt2():
    return transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )


PACKABLE = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "gpt2": gpt2,
    "phi": lambda: transformers.PhiConfig(**SIZES),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
}
GENERAL = {
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        "other states",
    ),
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
        "other states",
    ),
    "gpt-oss": (
        lambda: transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4),
        "GptOssAttention",
    ),
}


def build(config, dtype=torch.float64):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.6)
    return model


def row(lengths=LENGTHS):
    return torch.randint(3, VOCAB, (sum(lengths),))


def alone(model, ids, lengths=LENGTHS):
    return torch.cat(
        [model(input_ids=part[None], use_cache=False).logits[0] for part in ids.split(list(lengths))]
    )


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_logits_and_gradients_equal_those_of_single_samples(family):
    # PyTorch multiplies stacked experts in fp32 at most.
    dtype, tolerance = (torch.float32, 1e-4) if family == "mixtral" else (torch.float64, 1e-5)
    model = build(PACKABLE[family](), dtype)
    packed = PackedModel(model)
    assert packed.path == "packed", packed.reason
    ids, weight = row(), torch.randn(sum(LENGTHS), VOCAB, dtype=dtype)

    ours = packed.logits(packed.hidden(ids, LENGTHS))
    theirs = alone(model, ids)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b, (name, _) in zip(
        torch.autograd.grad((ours * weight).sum(), parameters, allow_unused=True),
        torch.autograd.grad((theirs * weight).sum(), parameters, allow_unused=True),
        model.named_parameters(),
        strict=True,
    ):
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a - b).norm() <= tolerance * b.norm() + 1e-9, name


@pytest.mark.parametrize("family", PACKABLE)
def test_changing_one_sample_changes_nothing_in_the_others(family):
    packed = PackedModel(build(PACKABLE[family](), torch.float32))
    ids = row()
    other = ids.clone()
    other[:9] = (other[:9] - 3 + 7) % (VOCAB - 3) + 3
    with torch.no_grad():
        before, after = packed.hidden(ids, LENGTHS), packed.hidden(other, LENGTHS)
    if family == "mixtral":
        # The tokens that one expert gets are one product, so how it rounds depends on their number.
        torch.testing.assert_close(before[9:], after[9:], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(before[9:], after[9:])
    assert (before[:9] != after[:9]).any(1).all()


@pytest.mark.parametrize("family", GENERAL)
def test_a_model_that_cannot_be_packed_runs_one_sample_at_a_time_and_says_why(family):
    config, reason = GENERAL[family]
    model = build(config(), torch.float32)
    packed = PackedModel(model)
    assert packed.path == "general"
    assert reason in packed.reason
    ids = row()
    torch.testing.assert_close(
        packed.logits(packed.hidden(ids, LENGTHS)), alone(model, ids), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
def test_what_fills_a_row_up_is_never_seen(tokens):
    model = build(PACKABLE["gemma3"]())
    packed = PackedModel(model)
    ids = row((tokens,))
    ours = packed.hidden(ids, [tokens])
    assert ours.shape[0] == tokens
    torch.testing.assert_close(packed.logits(ours), alone(model, ids, (tokens,)), rtol=1e-6, atol=1e-6)


class Bigram(nn.Module):
    """The least a language model can be."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids):
        return self.table(input_ids)


def test_a_model_without_a_decoder_gives_its_logits_as_hidden_states():
    model = Bigram()
    packed = PackedModel(model)
    ids = row()
    assert packed.path == "general"
    assert "no decoder" in packed.reason
    assert torch.equal(packed.logits(packed.hidden(ids, LENGTHS)), model(ids))


def test_nothing_of_the_model_differs_outside_a_call():
    model = build(PACKABLE["gemma2"](), torch.float32)
    model.model.layers[1].train()
    modes = [m.training for m in model.modules()]
    ids = row()[None]
    before, implementation = model(ids).logits, model.config._attn_implementation
    packed = PackedModel(model)
    packed.logits(packed.hidden(row(), LENGTHS))
    assert model.config._attn_implementation == implementation
    assert [m.training for m in model.modules()] == modes
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(model(ids).logits, before)


def test_the_attention_of_the_model_is_put_back_when_a_forward_fails():
    model = build(PACKABLE["llama"](), torch.float32)
    packed = PackedModel(model)
    with pytest.raises(IndexError):
        packed.hidden(torch.tensor([VOCAB + 5, 1]), [2])
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("lengths", [[], [4], [5, 0], [6, -1], [3, 3]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    packed = PackedModel(build(PACKABLE["llama"](), torch.float32))
    with pytest.raises(BaseModelError, match="lengths do not fit"):
        packed.hidden(torch.tensor([3, 4, 5, 6, 7]), lengths)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bfloat16_models_pass_the_probe(family):
    packed = PackedModel(build(PACKABLE[family](), torch.bfloat16))
    assert packed.path == "packed", packed.reason


def test_a_window_too_wide_to_cross_is_trusted_only_where_attention_is_told_of_it():
    told = PACKABLE["mistral"]()
    told.sliding_window = 4096
    assert PackedModel(build(told, torch.float32)).path == "packed"
    untold = PACKABLE["llama"]()
    untold.sliding_window = 4096
    packed = PackedModel(build(untold, torch.float32))
    assert packed.path == "general"
    assert "4096" in packed.reason


def test_the_gradient_of_scores_reaches_the_head_without_a_copy():
    model = build(PACKABLE["llama"](), torch.float32)
    packed, seen = PackedModel(model), []
    logits = packed.logits(torch.randn(5, 32, requires_grad=True))
    slope = torch.randn_like(logits)
    # The first node that is no view: the head's product.
    node = logits.grad_fn
    while node.name() in {"SqueezeBackward1", "UnsafeViewBackward0", "ViewBackward0", "SelectBackward0"}:
        node.register_hook(lambda given, _: seen.append(given[0].data_ptr()))
        node = node.next_functions[0][0]
    logits.backward(slope)
    assert seen
    assert set(seen) == {slope.data_ptr()}
