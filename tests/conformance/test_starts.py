"""Every registered start of a low-rank update, on every layer kind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda import LoRA
from addenda.conformance.layers import LAYERS, PATHS
from addenda.conformance.trying import same, snapshot, stirred
from addenda.core import starts
from addenda.core.layers import kind_of, view_of

OWN_SETTINGS = {
    "pissa": {"iterations": 3},
    "eva": {"rho": 2.0},
    "corda": {"mode": "kpm"},
    "lora_ga": {"direction": "ArBr"},
}


def method_of(start: str, *, own: bool = False, **settings: object) -> LoRA:
    return LoRA(
        rank=4, alpha=6.0, start=start, start_settings=OWN_SETTINGS.get(start, {}) if own else {}, **settings
    )


def refused(start: str, layer: str) -> bool:
    model = LAYERS[layer]()[0].layer
    view = view_of(model, "layer")
    return bool(method_of(start).problems_at(view))


FACTORED = [
    layer for layer in LAYERS if layer not in PATHS and kind_of(LAYERS[layer]()[0].layer).among(LoRA.kinds)
]
PAIRS = [(start, layer) for start in starts.names() for layer in FACTORED]
CASES = [pytest.param(*pair, id="-".join(pair)) for pair in PAIRS if not refused(*pair)]
REFUSED = [pytest.param(*pair, id="-".join(pair)) for pair in PAIRS if refused(*pair)]


@pytest.fixture
def case(layer: str) -> tuple[nn.Module, Tensor]:
    return LAYERS[layer]()


def original_of(model: nn.Module) -> nn.Module:
    """A model whose layer has other weights, which this one's could have been rounded from."""
    original = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in original.layer.state_dict().items():
            if tensor.is_floating_point() and name != "bias":
                tensor.add_(0.1 * tensor.std() * torch.randn_like(tensor))
    return original


def observed(model: nn.Module, method: LoRA, batch: Tensor) -> addenda.core.Observed | None:
    needs = method.needs()
    if needs in (None, "weight"):
        return None
    if needs == "original":
        return addenda.observe(model, method, "layer", original=original_of(model))
    batches = [batch] if needs == "inputs" else [lambda m: m(batch).square().sum()]
    return addenda.observe(model, method, "layer", batches)


def attached(model: nn.Module, method: LoRA, batch: Tensor, **settings: object) -> addenda.Handle:
    found = observed(model, method, batch)
    return addenda.attach(model, found.method if found else method, "layer", observed=found, **settings)


@pytest.mark.parametrize(("start", "layer"), REFUSED)
def test_a_layer_on_which_it_cannot_begin_is_refused_by_the_plan(start: str, layer: str) -> None:
    with pytest.raises(addenda.MethodError, match=f"start '{start}'"):
        addenda.plan(LAYERS[layer]()[0], method_of(start), "layer")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("start", "layer"), CASES)
def test_starts_equal_to_its_base_unless_it_says_otherwise(
    start: str, layer: str, own: bool, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    before = model(batch)
    handle = attached(model, method_of(start, own=own), batch, probe=batch)
    cls = starts.get(start)
    A, B = handle.adapters["layer"].A, handle.adapters["layer"].B
    assert (float((B @ A).detach().abs().max()) > 1e-4) == (cls.moved or not cls.exact)
    if not cls.exact:
        assert not torch.allclose(model(batch), before)
    elif cls.moved:
        assert torch.equal(model(batch), before)
    else:
        torch.testing.assert_close(model(batch), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("start", "layer"), CASES)
def test_the_base_stays_as_it_was_and_a_detach_leaves_nothing(
    start: str, layer: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    before, trained = snapshot(model), [p.requires_grad for p in model.parameters()]
    handle = attached(model, method_of(start), batch)
    base = {name: value for name, value in snapshot(model).items() if ".adapters." not in name}
    assert same(base, before)
    handle.detach()
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not [key for key in vars(model.layer) if "addenda" in key]


@pytest.mark.parametrize(("start", "layer"), CASES)
def test_plan_counts_what_is_made_and_the_seed_decides_it(
    start: str, layer: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    planned = addenda.plan(model, method_of(start), "layer")
    state = torch.get_rng_state()
    first = attached(model, method_of(start), batch, name="a", seed=3) if start != "loftq" else None
    assert torch.equal(torch.get_rng_state(), state)
    if first is None:
        return
    tensors = {name: value.detach().clone() for name, value in first.tensors().items()}
    assert first.trainable_parameters == planned.parameters
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == planned.bytes
    first.detach()
    again = attached(model, method_of(start), batch, name="a", seed=3)
    assert same({n: t.detach() for n, t in again.tensors().items()}, tensors)


@pytest.mark.parametrize(("start", "layer"), CASES)
def test_folding_agrees_with_the_forward_pass(start: str, layer: str, case: tuple[nn.Module, Tensor]) -> None:
    model, batch = case
    model, batch = model.double(), batch.double() if batch.is_floating_point() else batch
    handle = stirred(attached(model, method_of(start), batch))
    view = model.layer._addenda.view
    weight, bias = handle.adapters["layer"].fold(view.weight(), view.bias())
    x = model.before(batch) if hasattr(model, "before") else batch
    torch.testing.assert_close(view.apply(x, weight, bias), model.layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("start", starts.names())
def test_loading_computes_no_start(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = LAYERS["linear"]()
    handle = stirred(attached(model, method_of(start), batch))
    expected = model(batch)
    addenda.save(model, tmp_path / "adapter")
    handle.detach()
    monkeypatch.setattr(starts.get(start), "factors", None)
    loaded = addenda.load(model, tmp_path / "adapter")
    assert torch.equal(model(batch), expected)
    assert loaded.method.start == start


@pytest.mark.parametrize("start", starts.names())
def test_a_narrow_base_gets_wide_factors_that_start_where_it_is(start: str) -> None:
    model, batch = LAYERS["linear"]()
    model, batch = model.bfloat16(), batch.bfloat16()
    before = model(batch)
    handle = attached(model, method_of(start), batch)
    assert {t.dtype for t in handle.tensors().values()} == {torch.float32}
    if starts.get(start).moved:
        assert torch.equal(model(batch), before)
    elif starts.get(start).exact:
        torch.testing.assert_close(model(batch), before, rtol=0.02, atol=0.02)


def test_a_small_change_keeps_its_precision_in_sixteen_bits() -> None:
    model, batch = LAYERS["linear"]()
    handle = attached(model, method_of("pissa"), batch)
    adapter = handle.adapters["layer"]
    with torch.no_grad():
        adapter.A.add_(1e-4 * torch.randn_like(adapter.A))
        adapter.B.add_(1e-4 * torch.randn_like(adapter.B))
    x, (A, B, A0, B0) = (
        batch.reshape(-1, 24),
        (t.detach() for t in (adapter.A, adapter.B, adapter.A0, adapter.B0)),
    )
    exact = x.double() @ (B.double() @ A.double() - B0.double() @ A0.double()).t()

    def error(factors: tuple[Tensor, Tensor]) -> float:
        small, large = (factor.detach().bfloat16() for factor in factors)
        found = view_of(model.layer, "layer").low_rank(x.bfloat16(), small, large)
        return float((found.double() - exact).norm() / exact.norm())

    assert error(adapter.factors()) < 0.02
    assert error((torch.cat([A, A0]), torch.cat([B, -B0], 1))) > 0.5


def test_adapters_that_began_otherwise_combine_and_stack() -> None:
    model, batch = LAYERS["linear"]()
    for name, start in (("one", "pissa"), ("two", "lora_ga")):
        stirred(attached(model, method_of(start), batch, name=name))
    both = model(batch)
    addenda.combine(model, {"one": 1.0, "two": 1.0}, name="sum")
    addenda.activate(model, "sum")
    torch.testing.assert_close(model(batch), both, rtol=1e-4, atol=1e-4)
