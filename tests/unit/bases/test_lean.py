"""Lean forms in batches: on within the block alone, exact, and off where they would not be."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from torch import nn

import addenda
from addenda.core.remaking import remade_of
from addenda.errors import TargetError, TrainingError


class Block(nn.Module):
    """A norm, three layers on its output, an activation between two more; no transformers model."""

    def __init__(self, act: nn.Module | None = None, width: int = 24) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.three = Three(width)
        self.up, self.act, self.down = nn.Linear(width, 40), act or nn.GELU(), nn.Linear(40, width)

    def forward(self, x):
        x = x + self.three(self.norm(x))
        return self.down(self.act(self.up(x)))


class Three(nn.Module):
    """Two layers read the input, the third what they made; a fourth is never called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.third, self.idle = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden_states, swap=False):
        left, right = self.first(hidden_states), self.second(hidden_states)
        return self.third(right * left.sigmoid() if swap else left * right.sigmoid())


def adapted(module: nn.Module, rank: int = 3):
    names = [
        name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and "idle" not in name
    ]
    handle = addenda.attach(module, addenda.LoRA(rank=rank), names)
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    return handle


def gradients(module, x):
    out = module(x)
    parameters = [p for p in module.parameters() if p.requires_grad]
    return out.detach(), torch.autograd.grad(out.square().sum(), parameters)


def assert_same(ours, theirs):
    for got, wanted in zip(ours, (x.detach() for x in theirs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_gradients_equal_those_outside_the_block_for_a_module_of_ones_own():
    module, x = Block(), torch.randn(2, 5, 24)
    adapted(module)
    out, grads = gradients(module, x)
    form = addenda.lean(module)
    assert form.fused == (("activation", 1), ("layer norm", 1), ("projections of one input", 1))
    assert form.describe() == "fused parts: 1 activation, 1 layer norm, 1 projections of one input"
    with form:
        lean_out, lean_grads = gradients(module, x)
    assert_same([lean_out], [out])
    assert_same(lean_grads, grads)


def test_only_the_layers_that_read_the_input_are_run_together():
    module, seen = Three(24), []
    adapted(module)
    form = addenda.lean(module)
    with form:
        for name in ("first", "second", "third"):
            module.get_submodule(name).register_forward_hook(lambda layer, *_: seen.append(layer))
        module.second._forward_hooks.popitem()  # leaves the hook of its host alone
        module(torch.randn(4, 24))
    # A hook of somebody else's on the first keeps the module as it is: each layer is called, once.
    assert seen == [module.first, module.third]


def test_arguments_by_name_and_further_ones_reach_the_module():
    module, x = Three(24), torch.randn(4, 24)
    adapted(module)
    wanted = module(x, swap=True)
    with addenda.lean(module):
        torch.testing.assert_close(module(hidden_states=x, swap=True), wanted)


def test_nothing_is_left_behind_by_the_block_even_where_it_raises():
    module = Block()
    handle = adapted(module)
    before = {name: dict(vars(part)) for name, part in module.named_modules()}
    form = addenda.lean(module)
    with pytest.raises(ZeroDivisionError), form, form:
        1 / 0  # noqa: B018
    assert {name: dict(vars(part)) for name, part in module.named_modules()} == before
    handle.detach()
    assert not any(vars(part).get("forward") for part in module.modules())


def test_adapters_attached_within_the_block_run():
    module, x = Block(), torch.randn(6, 24)
    form = addenda.lean(module)
    with form:
        adapted(module)
        out, grads = gradients(module, x)
    wanted_out, wanted = gradients(module, x)
    assert_same([out, *grads], [wanted_out, *wanted])


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()], ids=str)
def test_an_activation_and_a_norm_are_not_kept_twice(act):
    module, x = Block(act), torch.randn(6, 24, requires_grad=True)
    adapted(module)
    norms, widened = set(), set()

    def note(tensor):
        found = {(6, 24): norms, (6, 40): widened}.get(tuple(tensor.shape), set())
        found.add(tensor.untyped_storage().data_ptr())
        return tensor

    def kept(form):
        norms.clear(), widened.clear()
        with form, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = module(x)
        del out
        return len(norms), len(widened)

    own, ours = kept(contextlib.nullcontext()), kept(addenda.lean(module))
    assert own[1] == 2  # what goes into the activation, and what comes out of it
    assert ours == (own[0] - 1, 1)


@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU(), nn.Dropout(0.5), nn.Identity(), nn.PReLU()], ids=str)
def test_other_leaves_stay_as_they_are(act):
    assert "activation" not in dict(addenda.lean(Block(act)).fused)


def test_trained_norms_get_their_gradients():
    module, x = Block(), torch.randn(6, 24)
    adapted(module)
    module.norm.requires_grad_(True)
    nn.init.normal_(module.norm.weight)
    _, grads = gradients(module, x)
    with addenda.lean(module):
        assert_same(gradients(module, x)[1], grads)


def test_under_autocast_everything_runs_as_it_is():
    module, x = Block(), torch.randn(6, 24)
    adapted(module)
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = gradients(module, x)
        with addenda.lean(module):
            lean_out, lean_grads = gradients(module, x)
    for got, wanted in zip([lean_out, *lean_grads], [out, *grads], strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


def test_a_second_derivative_is_refused_where_an_input_is_made_again():
    module, x = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 8)), torch.randn(6, 24, requires_grad=True)
    adapted(module)
    out = module(x).square().sum()
    (slope,) = torch.autograd.grad(out, x, create_graph=True)
    slope.square().sum().backward()  # outside the block it is there
    with addenda.lean(module), pytest.raises(TrainingError, match="no second derivative") as caught:
        torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    assert "outside addenda.lean" in str(caught.value)


def test_a_tensor_written_to_is_not_made_again():
    norm, x = nn.LayerNorm(24), torch.randn(6, 24, requires_grad=True)
    with addenda.lean(norm):
        marked, written = norm(x), norm(x).mul_(2)
    assert remade_of(marked) is not None
    assert remade_of(written) is None
    assert remade_of(norm(x.detach().requires_grad_())) is None


def test_a_model_is_needed():
    with pytest.raises(TargetError, match="a model is a torch"):
        addenda.lean("bert")


# ------------------------------------------------------------------------------------------------------- padding


def classifier(**settings):
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**small, intermediate_size=40, pad_token_id=0, **settings)
    model = transformers.BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def padded_batch():
    mask = (torch.arange(12) < torch.tensor([12, 4, 7])[:, None]).long()
    return {"input_ids": torch.randint(1, 50, (3, 12)) * mask, "attention_mask": mask}


@pytest.fixture
def rows_seen(monkeypatch):
    """The shapes of the states that went through the first block."""
    shapes = []
    own = transformers.models.bert.modeling_bert.BertLayer.forward

    def noting(self, hidden_states, *args, **kwargs):
        shapes.append(tuple(hidden_states.shape[:2]))
        return own(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(transformers.models.bert.modeling_bert.BertLayer, "forward", noting)
    return shapes


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_classifier_answers_the_same_and_computes_only_real_tokens(implementation, rows_seen):
    model, batch = classifier(attn_implementation=implementation), padded_batch()
    wanted = model(**batch, labels=torch.tensor([0, 1, 1]))
    form = addenda.lean(model, skip_padding=True)
    rows_seen.clear()
    with form:
        found = model(**batch, labels=torch.tensor([0, 1, 1]))
    assert rows_seen == [(1, 64)] * 2  # 23 tokens, filled up to 64
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.ones(3, 12).long()},
        {"attention_mask": torch.ones(3, 12).long().index_fill(0, torch.tensor([1]), 0)},
        {"attention_mask": torch.ones(3, 1, 12, 12).tril().bool()},
        {"attention_mask": torch.linspace(-3, 0, 12).expand(3, 1, 12, 12)},
        {"output_hidden_states": True},
    ],
    ids=[
        "no padding",
        "a sample of padding alone",
        "a mask for each query",
        "a bias",
        "states of each block",
    ],
)
def test_padding_is_taken_along_where_leaving_it_out_would_show(change, rows_seen):
    model, batch = classifier(), {**padded_batch(), **change}
    wanted, form = model(**batch), addenda.lean(model, skip_padding=True)
    rows_seen.clear()
    with form:
        found = model(**batch)
    assert rows_seen == [(3, 12)] * 2
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    if "output_hidden_states" in change:
        assert_same(found.hidden_states, wanted.hidden_states)


def test_a_hook_on_a_block_sees_the_batch_with_its_padding(rows_seen):
    model, batch = classifier(), padded_batch()
    form, seen = addenda.lean(model, skip_padding=True), []
    hook = model.bert.encoder.layer[1].register_forward_hook(lambda _, __, y: seen.append(y))
    wanted = model(**batch).logits
    with form:
        assert_same(model(**batch).logits, wanted)
    torch.testing.assert_close(*([y[0] if isinstance(y, tuple) else y for y in seen]))
    hook.remove()
    rows_seen.clear()
    with form:
        model(**batch)
    assert rows_seen == [(1, 64)] * 2


def test_states_that_travel_along_the_blocks_are_as_without_lean_forms():
    model, batch = classifier().bert, padded_batch()
    handle = addenda.attach(model, addenda.Shadow(rank=2, dropout=0.0))
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    wanted = model(**batch).last_hidden_state
    with addenda.lean(model, skip_padding=True):
        found = model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_takes_the_padding_along(rows_seen):
    model, batch = (
        classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(),
        padded_batch(),
    )
    handle = addenda.attach(model.bert, addenda.LoRA(rank=2), ["query", "value"])
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    wanted = torch.autograd.grad(model(**batch).logits.sum(), list(handle.parameters()))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    form = addenda.lean(model, skip_padding=True)
    rows_seen.clear()
    with form:
        found = torch.autograd.grad(model(**batch).logits.sum(), list(handle.parameters()))
    assert set(rows_seen) == {(3, 12)}
    assert_same(found, wanted)


def test_a_causal_stack_keeps_its_padding():
    model = transformers.BertLMHeadModel(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, is_decoder=True
        )
    )
    assert "stack without padding" not in dict(addenda.lean(model, skip_padding=True).fused)
