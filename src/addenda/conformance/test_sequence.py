"""What holds for every method that changes the sequence or adds to attention, on every model where it stands."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import addenda
import addenda.errors
from addenda.bases.packed import PackedModel
from addenda.conformance.cases import on_models, only_on, parametrize
from addenda.conformance.models import MODELS, VOCABULARY, model_of
from addenda.conformance.trying import seeded, stirred  # noqa: F401 - a fixture of every test
from addenda.core import Method

CAUSAL = tuple(kind for kind in MODELS if kind != "bert")


def pytest_generate_tests(metafunc: Any) -> None:
    """Try a test on every model where a method stands; one that asks for a reason, on those that refuse it."""
    parametrize(metafunc, on_models, "kind")


@pytest.fixture
def model(kind: str) -> nn.Module:
    return model_of(kind)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9))


def logits(model: nn.Module, ids: Tensor, **arguments: object) -> Tensor:
    return model(ids, **arguments).logits


def test_only_attention_of_another_form_is_refused(method: Method, kind: str, reason: str) -> None:
    assert "attention" in method.kinds
    assert kind in ("gpt2", "bert")
    assert reason.startswith(f"method '{method.name}' finds nothing")


def test_starts_equal_to_its_base(method: Method, model: nn.Module, ids: Tensor) -> None:
    before = logits(model, ids)
    addenda.attach(model, method)
    if "identity" in method.exceptions:
        assert not torch.allclose(logits(model, ids), before), "the declared exception does not hold"
    else:
        torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-6)


def test_disabled_equals_base_and_detached_gives_the_base_back(
    method: Method, model: nn.Module, ids: Tensor
) -> None:
    before, keys = logits(model, ids), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    handle = stirred(addenda.attach(model, method))
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    adapted = logits(model, ids)
    assert adapted.shape == before.shape
    assert not torch.allclose(adapted, before)
    handle.disable()
    assert torch.equal(logits(model, ids), before)
    handle.enable()
    assert torch.equal(logits(model, ids), adapted)
    handle.detach()
    assert torch.equal(logits(model, ids), before)
    assert [type(module) for module in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert list(model.state_dict()) == keys


def test_gradients_reach_every_adapter_parameter_and_no_base_parameter(
    method: Method, model: nn.Module, ids: Tensor
) -> None:
    base = dict(model.named_parameters())
    handle = stirred(addenda.attach(model, method))
    model(ids, labels=ids).loss.backward()
    shared = getattr(method, "tasks", 1) == 1
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters()) or not shared
    assert all(p.grad is None for p in base.values())


def test_it_cannot_be_merged(method: Method, model: nn.Module) -> None:
    handle = addenda.attach(model, method)
    with pytest.raises(addenda.errors.MethodError, match="cannot be merged"):
        handle.merge()


def test_save_and_load_are_bitwise(method: Method, model: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    handle = stirred(addenda.attach(model, method, name="mine"))
    expected = logits(model, ids)
    addenda.save(model, tmp_path / "adapter")
    handle.detach()
    loaded = addenda.load(model, tmp_path / "adapter")
    assert torch.equal(logits(model, ids), expected)
    assert (loaded.name, loaded.method) == ("mine", method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_follows_the_base_and_parameters_stay_wide(
    method: Method, model: nn.Module, ids: Tensor, dtype: torch.dtype
) -> None:
    handle = stirred(addenda.attach(model.to(dtype), method))
    wide = {torch.promote_types(dtype, torch.float32)}
    output = logits(model, ids)
    assert output.dtype == dtype
    assert output.isfinite().all()
    output.to(*wide).square().sum().backward()
    assert {p.dtype for p in handle.parameters()} == wide
    assert {p.grad.dtype for p in handle.parameters()} == wide


def test_parameter_count_equals_the_plan_and_nothing_global_is_drawn(
    method: Method, model: nn.Module
) -> None:
    state = torch.get_rng_state()
    planned = addenda.plan(model, method)
    first = addenda.attach(model, method, name="a", seed=7)
    assert first.trainable_parameters == planned.parameters
    assert torch.equal(torch.get_rng_state(), state)
    first.disable()
    second = addenda.attach(model, method, name="b", seed=7)
    for one, other in zip(first.tensors().values(), second.tensors().values(), strict=True):
        assert torch.equal(one, other)


def test_deepcopy_is_independent(method: Method, model: nn.Module, ids: Tensor) -> None:
    stirred(addenda.attach(model, method))
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), expected)
    stirred(addenda.core.handles(twin)["default"])
    assert torch.equal(logits(model, ids), expected)
    assert not torch.allclose(logits(twin, ids), expected)


def test_two_adapters_stack(method: Method, model: nn.Module, ids: Tensor) -> None:
    first = stirred(addenda.attach(model, method, name="first"))
    alone = logits(model, ids)
    second = stirred(addenda.attach(model, method, name="second"))
    both = logits(model, ids)
    assert not torch.allclose(both, alone)
    assert both.shape == alone.shape
    second.disable()
    assert torch.equal(logits(model, ids), alone)
    second.enable()
    assert torch.equal(logits(model, ids), both)
    first.detach()
    second.detach()
    assert not any(hasattr(module, "adapters") for module in model.modules())


def test_padding_on_either_side_changes_nothing(
    method: Method, model: nn.Module, ids: Tensor, kind: str
) -> None:
    stirred(addenda.attach(model, method))
    alone = [logits(model, ids[:1]), logits(model, ids[1:, :6])]
    # A sliding window counts the padding between a prompt and its tokens, so there a prompt is out of sight sooner.
    for left in (False, True)[: 1 if kind == "gemma2" else 2]:
        rows, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        place = slice(3, 9) if left else slice(0, 6)
        rows[0], mask[0] = ids[0], 1
        rows[1, place], mask[1, place] = ids[1, :6], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = logits(model, rows, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(padded[:1], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(padded[1:, place], alone[1], rtol=1e-4, atol=1e-4)


def test_labels_and_states_are_those_of_the_given_tokens(
    method: Method, model: nn.Module, ids: Tensor
) -> None:
    stirred(addenda.attach(model, method))
    output = model(ids, labels=ids, output_hidden_states=True)
    shift = 0 if "Masked" in type(model).__name__ else 1
    scores, targets = output.logits[:, : ids.shape[1] - shift], ids[:, shift:]
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(output.loss, loss)
    assert len(output.hidden_states) == 3
    assert {states.shape for states in output.hidden_states} == {(2, 9, 32)}


def test_embeddings_may_be_given_for_ids(method: Method, model: nn.Module, ids: Tensor) -> None:
    stirred(addenda.attach(model, method))
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, logits(model, ids))


def _gradients(handle: addenda.Handle, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(handle.parameters()), allow_unused=True))


def assert_same_gradients(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-5 * float(other.abs().max()))


def test_activation_checkpointing_gives_the_same_gradients(
    method: Method, model: nn.Module, ids: Tensor
) -> None:
    handle = stirred(addenda.attach(model, method))
    plain = _gradients(handle, logits(model, ids).square().sum())
    whole = checkpoint(lambda x: logits(model, x), ids, use_reentrant=False)
    assert_same_gradients(_gradients(handle, whole.square().sum()), plain)


def test_gradient_checkpointing_by_transformers_gives_the_same_gradients_or_an_error(
    method: Method, model: nn.Module, ids: Tensor, kind: str
) -> None:
    handle = stirred(addenda.attach(model, method))
    model.train()
    plain = _gradients(handle, logits(model, ids).square().sum())
    model.activation_checkpointing_enable()
    if hasattr(next(iter(handle.adapters.values())), "prefix") and kind == "gpt2":
        with pytest.raises(addenda.errors.MethodError, match="did not read the prefix"):
            logits(model, ids)
        return
    assert_same_gradients(_gradients(handle, logits(model, ids).square().sum()), plain)


@only_on(*CAUSAL)
def test_packed_rows_give_what_single_samples_give(method: Method, model: nn.Module) -> None:
    handle = stirred(addenda.attach(model, method))
    packed = PackedModel(model)
    assert packed.path == "packed", packed.reason
    lengths = [5, 1, 8]
    row = torch.randint(3, VOCABULARY, (sum(lengths),))
    alone = [packed.hidden_alone(sample) for sample in torch.split(row, lengths)]
    wanted = _gradients(handle, torch.cat(alone).square().sum())
    for recompute in (0, 2):
        hidden = packed.hidden(row, lengths, recompute=recompute)
        torch.testing.assert_close(hidden, torch.cat(alone), rtol=1e-4, atol=1e-5)
        assert_same_gradients(_gradients(handle, hidden.square().sum()), wanted)


@only_on(*CAUSAL)
def test_a_packed_model_made_before_the_adapter_runs_it(method: Method, model: nn.Module) -> None:
    packed = PackedModel(model)
    stirred(addenda.attach(model, method))
    row = torch.randint(3, VOCABULARY, (11,))
    alone = [packed.hidden_alone(sample) for sample in torch.split(row, [4, 7])]
    torch.testing.assert_close(packed.hidden(row, [4, 7]), torch.cat(alone), rtol=1e-4, atol=1e-5)


@only_on(*CAUSAL)
def test_generation_with_a_cache_equals_generation_without(
    method: Method, model: nn.Module, ids: Tensor, kind: str
) -> None:
    stirred(addenda.attach(model, method))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    rows, mask = ids.clone(), torch.ones_like(ids)
    padding = 0 if kind == "gemma2" else 4
    rows[1, :padding], mask[1, :padding] = 0, 0
    written = model.generate(rows, attention_mask=mask, **settings)
    alone = [ids[:1], ids[1:, padding:]]
    for row, so_far in enumerate(alone):
        for _ in range(6):
            so_far = torch.cat([so_far, logits(model, so_far, use_cache=False)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(written[row, -6:], so_far[0, -6:])
    beams = model.generate(ids, num_beams=2, **settings)
    assert beams.shape == (2, 15)


@only_on(*CAUSAL)
def test_going_on_from_a_cache_equals_one_call(method: Method, model: nn.Module, ids: Tensor) -> None:
    stirred(addenda.attach(model, method))
    with torch.no_grad():
        whole = logits(model, ids)
        first = model(ids[:, :4])
        second = model(ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, rtol=1e-4, atol=1e-4)


def test_a_mask_of_pairs_is_refused_where_positions_are_added(
    method: Method, model: nn.Module, ids: Tensor
) -> None:
    addenda.attach(model, method)
    if not method.positions or "transformer" not in method.kinds:
        logits(model, ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
        return
    with pytest.raises(addenda.errors.MethodError, match="no room for virtual positions"):
        logits(model, ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))


@only_on("llama")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks, between two graphs
def test_compiled_equals_eager(method: Method, model: nn.Module, ids: Tensor) -> None:
    stirred(addenda.attach(model, method))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
