"""Whole models through every fused path against transformers' own, unpatched: states, loss and adapter gradients."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional

import addenda
from addenda.bases.packed import PackedModel
from addenda.train.loss import packed_loss

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
FAMILIES = {
    "llama": ("Llama", SMALL, {"RMS norm": 5, "gated MLP": 2, "self-attention": 2}),
    "mistral": (
        "Mistral",
        {**SMALL, "sliding_window": 7},
        {"RMS norm": 5, "gated MLP": 2, "self-attention": 2},
    ),
    "qwen2": ("Qwen2", SMALL, {"RMS norm": 5, "gated MLP": 2, "self-attention": 2}),
    "qwen3": ("Qwen3", SMALL, {"RMS norm": 9, "gated MLP": 2, "self-attention": 2}),
    "gemma2": (
        "Gemma2",
        {**SMALL, "query_pre_attn_scalar": 16, "sliding_window": 7},
        {"RMS norm": 9, "gated MLP": 2, "self-attention": 2},
    ),
    "gemma3": (
        "Gemma3",
        {**SMALL, "query_pre_attn_scalar": 16, "sliding_window": 7},
        {"RMS norm": 13, "gated MLP": 2, "self-attention": 2},
    ),
    "smollm3": (
        "SmolLM3",
        {**SMALL, "no_rope_layers": [1, 0]},
        {"RMS norm": 5, "gated MLP": 2, "self-attention": 2},
    ),
    "phi": ("Phi", {**SMALL, "resid_pdrop": 0.0}, {"activation": 2, "layer norm": 3, "self-attention": 2}),
    "phi3": ("Phi3", {**SMALL, "resid_pdrop": 0.0}, {"RMS norm": 5, "activation": 2}),
    "gpt2": ("GPT2", GPT2, {"activation": 2, "layer norm": 5}),
}
LENGTHS = (9, 1, 33, 21)


def causal_model(family: str, dtype: torch.dtype = torch.float32):
    name, settings, _ = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    torch.manual_seed(torch.initial_seed())
    model = transformers.AutoModelForCausalLM.from_config(config_class(**settings))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.2)  # else every norm and bias is the neutral one
            continue
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def with_adapter(model):
    handle = addenda.attach(model, addenda.LoRA(rank=4, alpha=6), "all-linear")
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return handle


def own_loss(model, samples):
    """Mean cross-entropy of all next tokens, sample by sample, by the model's own forward and PyTorch's autograd."""
    total, count = 0.0, sum(len(sample) - 1 for sample in samples)
    for sample in samples:
        if len(sample) > 1:
            logits = (
                model(input_ids=sample[None])
                .logits[0, :-1]
                .to(torch.promote_types(torch.float32, model.dtype))
            )
            total = total + functional.cross_entropy(logits, sample[1:], reduction="sum")
    return total / count


def fused_loss(packed, samples):
    row = torch.cat(samples)
    starts = torch.tensor([0, *[len(s) for s in samples[:-1]]]).cumsum(0).tolist()
    places = torch.cat([torch.arange(a, a + len(s) - 1) for a, s in zip(starts, samples, strict=True)])
    hidden = packed.hidden(row, [len(sample) for sample in samples])
    return packed_loss(packed, hidden, places, row[places + 1], denominator=len(places))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_the_unpatched_model(family, mode):
    model = causal_model(family)
    handle = with_adapter(model)
    parameters = [p for p in handle.parameters() if p.requires_grad]
    samples = list(torch.split(torch.randint(0, 96, (sum(LENGTHS),)), list(LENGTHS)))
    double = own_loss(model.double(), samples)
    exact = torch.autograd.grad(double, parameters)
    model.float()
    packed = PackedModel(model)
    assert packed.path == "packed", packed.reason
    assert dict(packed.fused) == FAMILIES[family][2], packed.unfused
    loss = fused_loss(packed, samples)
    ours = torch.autograd.grad(loss, [p for p in handle.parameters() if p.requires_grad])
    torch.testing.assert_close(loss.detach().double(), double.detach(), rtol=1e-5, atol=0)
    for got, wanted in zip(ours, exact, strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_gradients_are_those_of_the_unpatched_model_within_rounding(family, mode):
    model = causal_model(family, torch.bfloat16)
    handle = with_adapter(model)
    samples = list(torch.split(torch.randint(0, 96, (sum(LENGTHS),)), list(LENGTHS)))
    packed = PackedModel(model)
    assert packed.path == "packed", packed.reason

    def whole(loss):
        found = torch.autograd.grad(loss, [p for p in handle.parameters() if p.requires_grad])
        return torch.cat([grad.double().flatten() for grad in found])

    ours = whole(fused_loss(packed, samples))
    truth = whole(own_loss(model.double(), samples))
    assert (ours - truth).norm() <= 2e-2 * truth.norm()
