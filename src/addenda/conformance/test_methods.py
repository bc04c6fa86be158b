"""What holds for every method with every declared variant on every layer where it stands."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import addenda
import addenda.errors
from addenda.conformance.cases import on_layers, only_on, parametrize
from addenda.conformance.layers import LAYERS, PATHS
from addenda.conformance.trying import fitting, same, seeded, snapshot, stirred, with_mixed  # noqa: F401 - a fixture of every test
from addenda.core.contract import Adapter, Method
from addenda.core.layers import LayerView, layer_at


def pytest_generate_tests(metafunc: Any) -> None:
    """Try a test on every layer where a method stands; one that asks for a reason, on those that refuse it."""
    parametrize(metafunc, on_layers, "layer")


@pytest.fixture
def case(method: Method, layer: str, path: str) -> tuple[nn.Module, Tensor]:
    model, batch = LAYERS[layer]()
    return with_mixed(model, method, path), batch


@pytest.fixture
def path(layer: str) -> str:
    return PATHS.get(layer, "layer")


def test_a_layer_it_cannot_adapt_is_refused_by_the_plan(
    method: Method, layer: str, path: str, reason: str
) -> None:
    model, _ = LAYERS[layer]()
    with pytest.raises((addenda.errors.TargetError, addenda.errors.MethodError)) as caught:
        addenda.plan(with_mixed(model, method, path), method, path)
    assert caught.value.hint
    assert reason.split("; ")[0] in str(caught.value)
    assert method.mixes() or type(model.layer).__name__ == type(LAYERS[layer]()[0].layer).__name__


def input_of(model: nn.Module, path: str, batch: Tensor) -> Tensor:
    """An input of the layer itself."""
    if path != "layer":
        return torch.randn(3, layer_at(model, path)._addenda.view.d_in, dtype=batch.dtype)
    return model.before(batch) if hasattr(model, "before") else batch


def why_unmergeable(method: Method, adapter: Adapter, view: LayerView) -> str | None:
    if not method.mergeable:
        return "cannot be merged"
    if not view.writable:
        return "keeps a quantized weight"
    placeless = view.bias_place() is None and adapter.fold(view.weight(), None)[1] is not None
    return "for which its module has no place" if placeless else None


def test_starts_equal_to_its_base(method: Method, path: str, case: tuple[nn.Module, Tensor]) -> None:
    model, batch = case
    before = model(batch)
    addenda.attach(model, method, path, probe=batch)
    if "identity" in method.exceptions:
        assert not torch.allclose(model(batch), before), "the declared exception does not hold"
    else:
        torch.testing.assert_close(model(batch), before, rtol=0, atol=1e-6)


def test_disabled_equals_base_and_detached_gives_the_base_back(
    method: Method, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    before, weights, kind = model(batch), snapshot(model), type(model.layer)
    trainable = [p.requires_grad for p in model.parameters()]
    handle = stirred(addenda.attach(model, method, path))
    assert not torch.allclose(model(batch), before), "a trained adapter must change the output"
    handle.disable()
    assert torch.equal(model(batch), before)
    handle.enable()
    assert not torch.allclose(model(batch), before)
    handle.detach()
    assert torch.equal(model(batch), before)
    assert same(snapshot(model), weights)
    assert type(model.layer) is kind
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert method.mixes() or not [key for key in vars(model.layer) if "addenda" in key]


def test_gradients_reach_every_adapter_parameter_and_no_base_parameter(
    method: Method, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    base = dict(model.named_parameters())
    handle = stirred(addenda.attach(model, method, path))
    weights = {name: p.detach().clone() for name, p in base.items()}
    (model(batch) * torch.randn_like(model(batch))).sum().backward()
    for name, parameter in handle.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None and torch.equal(p, weights[name]) for name, p in base.items())


def test_fold_agrees_with_forward(method: Method, path: str, case: tuple[nn.Module, Tensor]) -> None:
    model, batch = case
    model, batch = model.double(), batch.double() if batch.is_floating_point() else batch
    handle = stirred(addenda.attach(model, method, path))
    view = layer_at(model, path)._addenda.view
    if not method.mergeable:
        with pytest.raises(addenda.errors.MethodError, match="cannot be folded"):
            handle.adapters[path].fold(torch.zeros(1, 1), None)
        return
    weight, bias = handle.adapters[path].fold(view.weight(), view.bias())
    x = input_of(model, path, batch)
    torch.testing.assert_close(view.apply(x, weight, bias), layer_at(model, path)(x), rtol=1e-10, atol=1e-10)


def test_merge_then_unmerge_restores_the_base_bitwise(
    method: Method, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    handle = stirred(addenda.attach(model, method, path))
    adapted, weights = model(batch), snapshot(model)
    if why := why_unmergeable(method, handle.adapters[path], layer_at(model, path)._addenda.view):
        with pytest.raises(addenda.errors.MethodError, match=why):
            handle.merge()
        assert same(snapshot(model), weights)
        return
    handle.merge()
    assert handle.merged
    torch.testing.assert_close(model(batch), adapted, rtol=1e-4, atol=1e-4)
    handle.unmerge()
    assert same(snapshot(model), weights)
    assert torch.equal(model(batch), adapted)


def test_save_and_load_are_bitwise(
    method: Method, path: str, case: tuple[nn.Module, Tensor], tmp_path: object
) -> None:
    model, batch = case
    handle = stirred(addenda.attach(model, method, path, name="mine"))
    expected = model(batch)
    saved = {name: tensor.detach().clone() for name, tensor in handle.tensors().items()}
    addenda.save(model, f"{tmp_path}/adapter", name="mine")
    handle.detach()
    loaded = addenda.load(model, f"{tmp_path}/adapter")
    assert same({name: tensor.detach() for name, tensor in loaded.tensors().items()}, saved)
    assert torch.equal(model(batch), expected)
    assert (loaded.name, loaded.method) == ("mine", method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_follows_the_base_and_parameters_stay_wide(
    method: Method, path: str, case: tuple[nn.Module, Tensor], dtype: torch.dtype
) -> None:
    model, batch = case
    model, batch = model.to(dtype), batch.to(dtype) if batch.is_floating_point() else batch
    wide = {torch.promote_types(dtype, torch.float32)}
    handle = stirred(addenda.attach(model, method, path))
    output = model(batch)
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert {p.dtype for p in handle.parameters()} == wide
    output.to(*wide).sum().backward()
    assert {p.grad.dtype for p in handle.parameters()} == wide


def test_parameter_count_equals_the_plan(method: Method, path: str, case: tuple[nn.Module, Tensor]) -> None:
    model, _ = case
    state = torch.get_rng_state()
    planned = addenda.plan(model, method, path)
    handle = addenda.attach(model, method, path)
    assert handle.trainable_parameters == planned.parameters
    assert sum(t.numel() * t.element_size() for t in handle.tensors().values()) == planned.bytes
    assert torch.equal(torch.get_rng_state(), state), "attaching must not draw from the global generator"


def test_same_seed_gives_the_same_adapter(method: Method, path: str, case: tuple[nn.Module, Tensor]) -> None:
    model, _ = case
    first = {
        n: p.detach().clone()
        for n, p in addenda.attach(model, method, path, name="a", seed=7).named_parameters()
    }
    second = dict(addenda.attach(model, method, path, name="b", seed=7).named_parameters())
    assert same(first, {n: p.detach() for n, p in second.items()})


def test_deepcopy_is_independent(method: Method, path: str, case: tuple[nn.Module, Tensor]) -> None:
    model, batch = case
    handle = stirred(addenda.attach(model, method, path))
    expected = model(batch)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch), expected)
    stirred(addenda.core.handles(twin)["default"])
    assert torch.equal(model(batch), expected)
    assert not torch.allclose(twin(batch), expected)
    handle.detach()
    assert hasattr(layer_at(twin, path), "adapters")


def test_activation_checkpointing_gives_the_same_gradients(
    method: Method, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    handle = stirred(addenda.attach(model, method, path))
    model(batch).square().sum().backward()
    plain = [p.grad.clone() for p in handle.parameters()]
    model.zero_grad()
    checkpoint(model, batch, use_reentrant=False).square().sum().backward()
    for parameter, expected in zip(handle.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_two_adapters_stack(method: Method, path: str, case: tuple[nn.Module, Tensor]) -> None:
    model, batch = case
    first = stirred(addenda.attach(model, method, path, name="first"))
    alone = model(batch)
    second = addenda.attach(model, method, path, name="second")
    if "identity" not in method.exceptions:
        torch.testing.assert_close(model(batch), alone, rtol=0, atol=1e-5)
    stirred(second)
    both = model(batch)
    assert not torch.allclose(both, alone)
    second.disable()
    assert torch.equal(model(batch), alone)
    second.enable()
    assert torch.equal(model(batch), both)
    first.detach()
    second.detach()
    assert set(getattr(layer_at(model, path), "adapters", {})) == set(method.mixes())


def test_merging_what_another_stands_on_changes_nothing_or_is_refused(
    method: Method, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    model, batch = model.double(), batch.double() if batch.is_floating_point() else batch
    lower, upper = (stirred(addenda.attach(model, method, path, name=name)) for name in ("lower", "upper"))
    adapted, weights = model(batch), snapshot(model)
    reads = upper.adapters[path].reads_weight
    if reads or why_unmergeable(method, lower.adapters[path], layer_at(model, path)._addenda.view):
        with pytest.raises(addenda.errors.MethodError):
            lower.merge()
        assert same(snapshot(model), weights)
        return
    lower.merge()
    torch.testing.assert_close(model(batch), adapted, rtol=1e-9, atol=1e-9)


def test_what_is_declared_additive_commutes(
    method: Method, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    for name in ("first", "second"):
        stirred(addenda.attach(model, method, path, name=name))
    if not layer_at(model, path).adapters["first"].additive:
        return
    before = model(batch)
    addenda.activate(model, ["second", "first"])
    torch.testing.assert_close(model(batch), before, rtol=1e-4, atol=1e-4)
    x = input_of(model, path, batch)
    adapted = layer_at(model, path)
    if adapted.adapters["first"].reads_weight:
        return
    view = adapted._addenda.view
    term = adapted(x) - view(x)
    with torch.no_grad():
        for place in (view.weight_place(), view.bias_place()):
            if place is not None and place.parameter is not None:
                place.parameter.add_(1.0)
    moved = adapted(x) - view(x)
    torch.testing.assert_close(moved, term, rtol=1e-3, atol=1e-3)


@only_on("linear", "conv2d")
def test_compiled_equals_eager(method: Method, path: str, case: tuple[nn.Module, Tensor]) -> None:
    model, batch = case
    stirred(addenda.attach(model, method, path))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), model(batch), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


class Pair(nn.Module):
    """Two linear layers of different sizes in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Module(), nn.Module()
        self.first.layer, self.second.layer = nn.Linear(24, 20), nn.Linear(20, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.second.layer(torch.tanh(self.first.layer(x)))


def test_what_layers_share_is_held_once(method: Method, tmp_path: object) -> None:
    method = fitting(method, 24)
    model, batch = with_mixed(Pair(), method, "layer"), torch.randn(4, 5, 24)
    planned = addenda.plan(model, method, "layer")
    handle = stirred(addenda.attach(model, method, "layer"))
    commons = [adapter.common for adapter in handle.adapters.values()]
    assert commons[0] is commons[1]
    assert handle.trainable_parameters == planned.parameters
    held = {id(tensor) for tensor in handle.tensors().values()}
    assert len(held) == len(handle.tensors())
    model.double().float()
    twin = copy.deepcopy(model)
    assert len({id(a.common) for a in addenda.core.handles(twin)["default"].adapters.values()}) == 1
    assert {id(tensor) for tensor in handle.tensors().values()} >= {id(p) for p in handle.parameters()}
    expected = model(batch)
    assert torch.equal(twin(batch), expected)
    addenda.save(model, f"{tmp_path}/adapter", name="default")
    handle.detach()
    loaded = addenda.load(model, f"{tmp_path}/adapter")
    assert torch.equal(model(batch), expected)
    assert len({id(adapter.common) for adapter in loaded.adapters.values()}) == 1


def test_gradients_of_what_layers_share_come_from_all_of_them(method: Method) -> None:
    method = fitting(method, 24)
    model, batch = with_mixed(Pair(), method, "layer").double(), torch.randn(4, 5, 24).double()
    handle = stirred(addenda.attach(model, method, "layer"))
    model(batch).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters())
    shared = next(iter(handle.adapters.values())).common
    for parameter in shared.parameters() if shared is not None else ():
        flat, grad, size = parameter.data.view(-1), parameter.grad.view(-1), 1e-6
        place = int(grad.abs().argmax())
        sides = []
        for step in (size, -2 * size):
            flat[place] += step
            sides.append(float(model(batch).detach().square().sum()))
        torch.testing.assert_close(
            torch.tensor((sides[0] - sides[1]) / (2 * size)), grad[place].float(), rtol=1e-4, atol=1e-6
        )


def test_each_row_of_a_batch_may_have_an_adapter_of_its_own(
    method: Method, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    rows = batch.repeat(2, *[1] * (batch.dim() - 1))[:4]
    names = ["a", None, "b", "a"]
    loaded = {name: stirred(addenda.attach(model, method, path, name=name)) for name in ("a", "b")}
    if (
        path in PATHS.values()
    ):  # rows are not told apart by a weight, nor by an expert, to which they come in any order
        refused = pytest.raises((addenda.errors.MethodError, addenda.errors.TargetError), match="rows")
        with addenda.activated(model, addenda.Rows(tuple(names))), refused:
            model(rows)
        return
    whose = {name: torch.tensor([other == name for other in names]) for name in (*loaded, None)}

    def alone(name: str | None) -> Tensor:
        with addenda.activated(model, name):
            return model(rows[whose[name]])

    with addenda.activated(model, addenda.Rows(tuple(names))):
        routed = model(rows)
        weight = torch.randn_like(routed)
        (routed * weight).sum().backward()
    if "rows" in method.exceptions:
        assert not torch.allclose(routed[whose["a"]], alone("a")), "the declared exception does not hold"
        return
    for name, own in whose.items():
        torch.testing.assert_close(routed[own], alone(name), rtol=1e-4, atol=5e-5)
    mixed = {name: [p.grad for p in handle.parameters()] for name, handle in loaded.items()}
    model.zero_grad()
    for name in loaded:
        (alone(name) * weight[whose[name]]).sum().backward()
        for parameter, grad in zip(loaded[name].parameters(), mixed[name], strict=True):
            size = max(1.0, float(parameter.grad.abs().max()))
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-4 * size)


def test_a_weighted_sum_adds_what_each_alone_changes(
    method: Method, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    for name in ("a", "b"):
        stirred(addenda.attach(model, method, path, name=name))
    x = input_of(model, path, batch)

    def under(wanted: object) -> Tensor:
        with addenda.activated(model, wanted):
            model(batch)  # what looks ahead does so in a pass of the whole model
            return layer_at(model, path)(x)

    base = under(None)
    wanted = base + 0.7 * (under("a") - base) - 0.4 * (under("b") - base)
    torch.testing.assert_close(under(addenda.Sum({"a": 0.7, "b": -0.4})), wanted, rtol=1e-4, atol=1e-4)
