"""Every registered method, with every declared variant, on every layer kind: the properties that make it a method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import addenda
import addenda.errors
from addenda.core import registry
from addenda.core.contract import Adapter, Method
from addenda.core.layers import LayerView, kind_of, layer_at, view_of
from addenda.core.lowrank import frozen_linear


class FeedForward(nn.Module):
    """A gated feed-forward block, as most language models have."""

    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d, inner)
        self.up = nn.Linear(d, inner)
        self.down = nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Int8Linear(nn.Module):
    """A packed linear layer: one int8 code for each weight, one scale for each row."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.randn(out_features, in_features) / in_features**0.5
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.randn(out_features))

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def dequantized(self, rows: Tensor | None = None) -> Tensor:
        weight = self.codes * self.scale
        return weight if rows is None else weight[rows]

    def linear(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized(), self.bias)

    def grad_input(self, g: Tensor) -> Tensor:
        return g @ self.dequantized()

    def add_grad_input(self, total: Tensor, g: Tensor) -> Tensor:
        return total.addmm_(g, self.dequantized())

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)


class Small(nn.Module):
    """The layer under test between a fixed first part and a head, so that gradients must pass through it."""

    def __init__(self, layer: nn.Module, before: nn.Module, width: int) -> None:
        super().__init__()
        self.before = before
        self.layer = layer
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.before(x))
        return self.head(y.flatten(2).mean(-1) if y.dim() > 3 else y)


class Attending(nn.Module):
    """An attention whose keys and values may have other widths than its queries."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(24, 4, batch_first=True, **widths)
        nn.init.normal_(self.layer.in_proj_bias)
        nn.init.normal_(self.layer.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[..., : self.layer.kdim], x[..., : self.layer.vdim])[0]


class Recurring(nn.Module):
    """A recurrent module, of which the outputs of all steps count."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Mixing(nn.Module):
    """Three experts, two for each row, all of which get rows."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.layer = experts
        self.layer.config._experts_implementation = "eager"
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        chosen = (torch.arange(2 * len(rows)) % 3).view(-1, 2)
        gates = rows[:, :2].softmax(-1)
        return self.layer(rows, chosen, gates).view_as(x)


def _linear() -> tuple[nn.Module, Tensor]:
    return Small(nn.Linear(24, 20), nn.Identity(), 20), torch.randn(4, 5, 24)


def _linear_without_bias() -> tuple[nn.Module, Tensor]:
    return Small(nn.Linear(24, 20, bias=False), nn.Identity(), 20), torch.randn(4, 5, 24)


def _packed() -> tuple[nn.Module, Tensor]:
    return Small(Int8Linear(24, 20), nn.Identity(), 20), torch.randn(4, 5, 24)


def _transposed() -> tuple[nn.Module, Tensor]:
    layer = Conv1D(20, 24)
    nn.init.normal_(layer.bias)
    return Small(layer, nn.Identity(), 20), torch.randn(4, 5, 24)


def _conv(layer: nn.Module, *space: int) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model, torch.randn(2, layer.in_channels, *space)


def _embedding() -> tuple[nn.Module, Tensor]:
    return Small(nn.Embedding(30, 24), nn.Identity(), 24), torch.randint(30, (4, 7))


def _norm(layer: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=1.0, std=0.3)
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model, torch.randn(*shape)


def _block() -> tuple[nn.Module, Tensor]:
    return Small(FeedForward(24, 40), nn.Identity(), 24), torch.randn(4, 5, 24)


def _gated_experts() -> tuple[nn.Module, Tensor]:
    config = MixtralConfig(hidden_size=24, intermediate_size=10, num_local_experts=3)
    return Mixing(MixtralExperts(config)), torch.randn(4, 5, 24)


def _transposed_experts() -> tuple[nn.Module, Tensor]:
    config = GptOssConfig(hidden_size=24, intermediate_size=20, num_local_experts=3)
    return Mixing(GptOssExperts(config)), torch.randn(4, 5, 24)


def _transformer_block() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(24, 4, 40, dropout=0.0, batch_first=True)
    return Small(layer, nn.Identity(), 24), torch.randn(4, 5, 24)


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": _linear,
    "linear-no-bias": _linear_without_bias,
    "packed-linear": _packed,
    "conv1d-transposed": _transposed,
    "conv1d": lambda: _conv(nn.Conv1d(16, 20, 3, padding=1), 9),
    "conv2d": lambda: _conv(nn.Conv2d(16, 20, 3, stride=2, padding=1), 8, 9),
    "conv2d-grouped": lambda: _conv(nn.Conv2d(16, 32, 3, groups=4, dilation=2, bias=False), 8, 9),
    "conv2d-grouped-square": lambda: _conv(nn.Conv2d(16, 32, 2, groups=4), 8, 9),
    "conv2d-reflect": lambda: _conv(nn.Conv2d(16, 20, 3, padding="same", padding_mode="reflect"), 8, 9),
    "conv3d": lambda: _conv(nn.Conv3d(16, 20, (1, 2, 3)), 4, 5, 6),
    "transposed-conv1d": lambda: _conv(nn.ConvTranspose1d(16, 20, 3, stride=2, output_padding=1), 9),
    "transposed-conv2d-grouped": lambda: _conv(
        nn.ConvTranspose2d(16, 32, (2, 3), groups=4, dilation=2), 5, 6
    ),
    "embedding": _embedding,
    "embedding-padded": lambda: (
        Small(nn.Embedding(30, 24, padding_idx=3), nn.Identity(), 24),
        torch.randint(30, (4, 7)),
    ),
    "attention": lambda: (Attending(), torch.randn(4, 5, 24)),
    "attention-output": lambda: (Attending(), torch.randn(4, 5, 24)),
    "attention-separate": lambda: (Attending(kdim=20, vdim=16), torch.randn(4, 5, 24)),
    "lstm": lambda: (Recurring(nn.LSTM(24, 5, batch_first=True)), torch.randn(4, 5, 24)),
    "gru": lambda: (Recurring(nn.GRU(7, 24, num_layers=2, bidirectional=True)), torch.randn(4, 5, 7)),
    "expert": _gated_experts,
    "expert-transposed": _transposed_experts,
    "layer-norm": lambda: _norm(nn.LayerNorm(24), 4, 5, 24),
    "rms-norm": lambda: _norm(LlamaRMSNorm(24), 4, 5, 24),
    "group-norm": lambda: _norm(nn.GroupNorm(4, 16), 2, 16, 8, 9),
    "batch-norm": lambda: _norm(nn.BatchNorm2d(16).eval(), 2, 16, 8, 9),
    "block": _block,
    "transformer-block": _transformer_block,
}
"""Every layer on which every method is tried; the layer is called ``layer``."""

PATHS = {
    "attention": "layer.v_proj",
    "attention-output": "layer.out_proj",
    "attention-separate": "layer.q_proj",
    "lstm": "layer.weight_ih_l0",
    "gru": "layer.weight_hh_l1_reverse",
    "expert": "layer.1.gate_up_proj",
    "expert-transposed": "layer.2.down_proj",
}
"""Where the layer under test is not ``layer`` itself, but a part of it."""


def refused(method: Method, layer: str) -> bool:
    path = PATHS.get(layer, "layer")
    model = LAYERS[layer]()[0]
    if method.mixes():
        if refused(ON_BLOCKS if layer == "block" else ON_LAYERS, layer):
            return True
        with_mixed(model, method, path)
    view = view_of(layer_at(model, path), path)
    asked = kind_of(view.module).why_not(method) is None
    return not asked or bool(method.problems_at(view)) or bool(method.problems_among([path]))


ON_LAYERS, ON_BLOCKS = addenda.LoRA(rank=2), addenda.Bottleneck(size=2, placement="parallel")
"""What a mixture is given to mix."""


def with_mixed(model: nn.Module, method: Method, path: str) -> nn.Module:
    """Attach the adapters that a method mixes, if any; they do not run by themselves."""
    for name in method.mixes():
        on = ON_BLOCKS if isinstance(getattr(model, path, None), FeedForward) else ON_LAYERS
        stirred(addenda.attach(model, on, path, name=name, seed=len(name)), by=0.15).disable()
    return model


def stirred(handle: addenda.Handle, by: float = 0.3) -> addenda.Handle:
    """Give the adapter values of a trained size, so that nothing is zero."""
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return handle


EVERY_DAY = ("linear", "packed-linear", "conv1d-transposed", "conv2d", "embedding")
"""Layers on which the everyday suite tries all methods; on the others it tries three. The slow suite has all pairs."""
THREE = ("lora", "ia3", "bottleneck")


def pair(name: str, number: int, method: Method, layer: str) -> Any:
    """A method on a layer, marked slow where only the slow suite tries it."""
    often = layer == "linear" or (number == 0 and (layer in EVERY_DAY or method.name in THREE))
    return pytest.param(method, layer, id=name, marks=[] if often else [pytest.mark.slow])


NUMBERED = [
    (number, registry.get(name).from_settings(settings))
    for name in registry.names()
    for number, settings in enumerate(registry.get(name).variants)
]
PAIRS = [(f"{m.name}-{n}-{layer}", n, m, layer) for n, m in NUMBERED for layer in LAYERS]
SORTED = {True: [], False: []}
for each in PAIRS:
    SORTED[refused(*each[2:])].append(pair(*each))
CASES, REFUSED = SORTED[False], SORTED[True]


@pytest.fixture
def case(method: Method, layer: str, path: str) -> tuple[nn.Module, Tensor]:
    model, batch = LAYERS[layer]()
    return with_mixed(model, method, path), batch


@pytest.fixture
def path(layer: str) -> str:
    return PATHS.get(layer, "layer")


@pytest.mark.parametrize(("method", "layer"), REFUSED)
def test_a_layer_it_cannot_adapt_is_refused_by_the_plan(method: Method, layer: str, path: str) -> None:
    model, _ = LAYERS[layer]()
    with pytest.raises(
        (addenda.errors.TargetError, addenda.errors.MethodError, addenda.errors.NotFoundError)
    ) as caught:
        addenda.plan(model, method, path)
    assert caught.value.hint
    assert type(model.layer).__name__ == type(LAYERS[layer]()[0].layer).__name__


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


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_starts_equal_to_its_base(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    before = model(batch)
    addenda.attach(model, method, path, probe=batch)
    if "identity" in method.exceptions:
        assert not torch.allclose(model(batch), before), "the declared exception does not hold"
    else:
        torch.testing.assert_close(model(batch), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_disabled_equals_base_and_detached_gives_the_base_back(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
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


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_gradients_reach_every_adapter_parameter_and_no_base_parameter(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    base = dict(model.named_parameters())
    handle = stirred(addenda.attach(model, method, path))
    weights = {name: p.detach().clone() for name, p in base.items()}
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    before = [p.detach().clone() for p in handle.parameters()]
    (model(batch) * torch.randn_like(model(batch))).sum().backward()
    optimizer.step()
    for name, parameter in handle.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(not torch.equal(p, old) for p, old in zip(handle.parameters(), before, strict=True))
    assert all(p.grad is None and torch.equal(p, weights[name]) for name, p in base.items())


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_fold_agrees_with_forward(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
) -> None:
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


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_merge_then_unmerge_restores_the_base_bitwise(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
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


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_save_and_load_are_bitwise(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor], tmp_path: object
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


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_dtype_follows_the_base_and_parameters_stay_wide(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    model, batch = model.bfloat16(), batch.bfloat16() if batch.is_floating_point() else batch
    handle = stirred(addenda.attach(model, method, path))
    output = model(batch)
    assert output.dtype == torch.bfloat16
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    output.float().sum().backward()
    assert {p.grad.dtype for p in handle.parameters()} == {torch.float32}


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_parameter_count_equals_the_plan(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, _ = case
    state = torch.get_rng_state()
    planned = addenda.plan(model, method, path)
    handle = addenda.attach(model, method, path)
    assert handle.trainable_parameters == planned.parameters
    assert sum(t.numel() * t.element_size() for t in handle.tensors().values()) == planned.bytes
    assert torch.equal(torch.get_rng_state(), state), "attaching must not draw from the global generator"


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_same_seed_gives_the_same_adapter(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, _ = case
    first = {
        n: p.detach().clone()
        for n, p in addenda.attach(model, method, path, name="a", seed=7).named_parameters()
    }
    second = dict(addenda.attach(model, method, path, name="b", seed=7).named_parameters())
    assert same(first, {n: p.detach() for n, p in second.items()})


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_deepcopy_is_independent(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
) -> None:
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


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_activation_checkpointing_gives_the_same_gradients(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
) -> None:
    model, batch = case
    handle = stirred(addenda.attach(model, method, path))
    model(batch).square().sum().backward()
    plain = [p.grad.clone() for p in handle.parameters()]
    model.zero_grad()
    checkpoint(model, batch, use_reentrant=False).square().sum().backward()
    for parameter, expected in zip(handle.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_two_adapters_stack(method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]) -> None:
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


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_merging_what_another_stands_on_changes_nothing_or_is_refused(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
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


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_what_is_declared_additive_commutes(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
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


COMPILED = [case for case in CASES if case.values[1] in ("linear", "conv2d")]


@pytest.mark.parametrize(("method", "layer"), COMPILED)
def test_compiled_equals_eager(method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]) -> None:
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


def fitting(method: Method, width: int) -> Method:
    """The method for a model that ends in that many features."""
    return replace(method, hidden_size=width) if hasattr(method, "hidden_size") else method


ON_LINEAR = [pytest.param(case.values[0], id=case.id) for case in CASES if case.values[1] == "linear"]


@pytest.mark.parametrize("method", ON_LINEAR)
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


@pytest.mark.parametrize("method", ON_LINEAR)
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


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_each_row_of_a_batch_may_have_an_adapter_of_its_own(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
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
        torch.testing.assert_close(routed[own], alone(name), rtol=1e-4, atol=1e-5)
    mixed = {name: [p.grad for p in handle.parameters()] for name, handle in loaded.items()}
    model.zero_grad()
    for name in loaded:
        (alone(name) * weight[whose[name]]).sum().backward()
        for parameter, grad in zip(loaded[name].parameters(), mixed[name], strict=True):
            size = max(1.0, float(parameter.grad.abs().max()))
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_a_weighted_sum_adds_what_each_alone_changes(
    method: Method, layer: str, path: str, case: tuple[nn.Module, Tensor]
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
