"""Whole models within `addenda.lean` against the same models outside it: outputs, losses and adapter gradients."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from torch.nn import functional

import addenda

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IMAGE = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
DISTIL = {
    "vocab_size": 96,
    "dim": 64,
    "hidden_dim": 112,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = {**TEXT, "num_key_value_heads": 2}
POST_NORM = {"activation": 2, "layer norm": 5, "projections of one input": 2}
FAMILIES = {
    "bert": ("Bert", TEXT, POST_NORM),
    "roberta": ("Roberta", TEXT, POST_NORM),
    "distilbert": ("DistilBert", DISTIL, POST_NORM),
    "vit": ("ViT", IMAGE, POST_NORM),
    "deit": ("DeiT", IMAGE, POST_NORM),
    "llama": ("Llama", LLAMA, {"RMS norm": 5, "gated MLP": 2, "projections of one input": 2}),
}
"""Configuration, settings, and how many parts of each kind run fused."""


def whole_model(family: str, **settings):
    name, small, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**small, **settings})
    model = transformers.AutoModel.from_config(config)
    for parameter in model.parameters():
        # Else every norm and bias is the neutral one.
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    handle = addenda.attach(model, addenda.LoRA(rank=4, alpha=6), "all-linear")
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model, handle


def batch_of(family: str, lengths=(17, 5, 11)):
    if FAMILIES[family][1] is IMAGE:
        return {"pixel_values": torch.randn(len(lengths), 3, 24, 24)}
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(1, 96, mask.shape) * mask, "attention_mask": mask}


def states_and_gradients(model, batch, handle, form=None, *, real=...):
    """The states of every token, padding too, and the gradients of a loss that reads them all, or the real ones."""
    dtype = next(model.parameters()).dtype
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    wanted = torch.linspace(-1, 1, 64).to(dtype)
    torch.manual_seed(7)
    with form or contextlib.nullcontext():
        states = model(**batch).last_hidden_state
        loss = functional.mse_loss(states[real].tanh(), wanted.expand_as(states[real]))
        parameters = [p for p in handle.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return states.detach(), [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
    ]


def distance(ours, truth):
    ours, truth = (torch.cat([x.detach().double().flatten() for x in y]) for y in (ours, truth))
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("lengths", [(17, 5, 11), (9, 9)], ids=["padded", "full"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_states_and_gradients_equal_those_outside_the_block(family, dtype, bound, lengths, mode):
    model, handle = whole_model(family)
    model.eval()
    batch = batch_of(family, lengths)
    model.to(dtype).double()  # the weights as they are once rounded
    states, grads = states_and_gradients(model, batch, handle)
    model.to(dtype)
    form = addenda.lean(model)
    assert dict(form.fused) == FAMILIES[family][2], form.describe()
    lean_states, lean_grads = states_and_gradients(model, batch, handle, form)
    assert distance([lean_states], [states]) <= bound
    assert distance(lean_grads, grads) <= bound
    if dtype == torch.float32:
        assert all(distance([g], [w]) <= bound for g, w in zip(lean_grads, grads, strict=True) if w.any())


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_without_padding_the_other_tokens_and_their_gradients_are_the_same(family, dtype, bound, mode):
    model, handle = whole_model(family)
    model.eval()
    batch = batch_of(family)
    batch["attention_mask"][1], batch["input_ids"][1, :6] = (
        (torch.arange(17) > 5).long(),
        0,
    )  # padding in front
    real = batch["attention_mask"].bool()
    model.to(dtype).double()
    states, grads = states_and_gradients(model, batch, handle, real=real)
    model.to(dtype)
    form = addenda.lean(model, skip_padding=True)
    assert dict(form.fused) == {**FAMILIES[family][2], "stack without padding": 1}
    lean_states, lean_grads = states_and_gradients(model, batch, handle, form, real=real)
    assert not lean_states[~real].any()
    assert distance([lean_states[real]], [states[real]]) <= bound
    assert distance(lean_grads, grads) <= bound


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_dropout_draws_the_same_numbers_within_the_block_and_attention_says_that_it_drops(family):
    dropout = "attention_dropout" if family == "distilbert" else "attention_probs_dropout_prob"
    model, handle = whole_model(family, **{dropout: 0.3})
    model.train()
    batch, form = batch_of(family), addenda.lean(model)
    assert [(kind, count) for kind, why, count in form.unfused if "drops attention weights" in why] == [
        ("attention", 2)
    ]
    states, grads = states_and_gradients(model, batch, handle)
    lean_states, lean_grads = states_and_gradients(model, batch, handle, form)
    assert all(module.training for module in model.modules())
    assert distance([lean_states], [states]) <= 1e-5
    assert distance(lean_grads, grads) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_and_hidden_states_are_given_where_they_are_asked_for(family):
    model, _ = whole_model(family, attn_implementation="eager")
    model.eval()
    batch, form = batch_of(family), addenda.lean(model)
    assert any("eager" in why for kind, why, _ in form.unfused if kind == "attention")
    asked = {"output_attentions": True, "output_hidden_states": True}
    own = model(**batch, **asked)
    with form:
        ours = model(**batch, **asked)
    assert len(ours.attentions) == 2
    assert distance(ours.attentions, own.attentions) <= 1e-5
    assert distance(ours.hidden_states, own.hidden_states) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_less_is_kept_for_the_backward(family):
    model, _ = whole_model(family)
    model.eval()  # no dropout, whose masks are kept in any form
    batch, form = batch_of(family), addenda.lean(model)

    def bytes_kept():
        kept = {}

        def note(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = model(**batch)
        del out
        return sum(kept.values()) - sum(
            p.untyped_storage().nbytes() for p in model.parameters() if p.data_ptr() in kept
        )

    own = bytes_kept()
    with form:
        assert bytes_kept() < 0.8 * own


def test_gradient_checkpointing_gives_the_same_gradients_within_the_block():
    model, handle = whole_model("bert")
    model.train()
    batch, form = batch_of("bert"), addenda.lean(model)
    _, grads = states_and_gradients(model, batch, handle)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    _, lean_grads = states_and_gradients(model, batch, handle, form)
    assert distance(lean_grads, grads) <= 1e-4
