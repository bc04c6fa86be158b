"""Experts of LoRA: the papers' formulas, and a penalty that counts each token once, whatever way a step is run."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import addenda
from addenda.bases.packed import PackedModel
from addenda.methods.lora_experts import LoRAExperts

D_IN, D_OUT = 12, 10


class Net(nn.Module):
    """Two adapted layers, one upon the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def stirred(model: nn.Module, method: LoRAExperts, name: str = "default") -> addenda.Handle:
    handle = addenda.attach(model, method, "all-linear", name=name)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return handle


@pytest.fixture
def model() -> nn.Module:
    return Net().double()


def soft(x: Tensor, A: Tensor, B: Tensor, R: Tensor) -> Tensor:
    """MoLoRA, a token at a time: all experts, weighed by the softmax of the router."""
    s = torch.exp(R @ x) / torch.exp(R @ x).sum()
    return sum((s[e] * (B[e] @ (A[e] @ x)) for e in range(len(s))), torch.zeros(len(B[0]), dtype=x.dtype))


def shared(x: Tensor, A: Tensor, B: Tensor, R: Tensor) -> Tensor:
    """HydraLoRA: as MoLoRA, with one A."""
    return soft(x, A.expand(len(B), -1, -1), B, R)


def chosen(x: Tensor, A: Tensor, B: Tensor, R: Tensor) -> Tensor:
    """MixLoRA: the two best experts, their softmax divided by its sum."""
    s = torch.exp(R @ x) / torch.exp(R @ x).sum()
    best = sorted(range(len(s)), key=lambda e: -float(s[e].detach()))[:2]
    return sum(s[e] / sum(s[b] for b in best) * (B[e] @ (A[e] @ x)) for e in best)


def only(x: Tensor, A: Tensor, B: Tensor, R: Tensor) -> Tensor:
    """The best expert alone, by its softmax."""
    s = torch.exp(R @ x) / torch.exp(R @ x).sum()
    e = int(s.argmax())
    return s[e] * (B[e] @ (A[e] @ x))


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({}, soft),
        ({"shared_a": True}, shared),
        ({"top_k": 2}, chosen),
        ({"top_k": 1, "renormalized": False}, only),
    ],
)
def test_it_is_the_papers_formula(
    settings: dict[str, object], reference: Callable[..., Tensor], model: nn.Module
) -> None:
    method = LoRAExperts.from_settings({"rank": 3, "alpha": 4.0, "experts": 4, **settings})
    handle = stirred(model, method)
    adapter, layer = handle.adapters["first"], model.first
    x = torch.randn(2, 5, D_IN, dtype=torch.float64, requires_grad=True)
    tensors = [x, *adapter.parameters()]
    wanted = torch.stack(
        [
            layer.weight @ row + layer.bias + 4.0 / 3 * reference(row, adapter.A, adapter.B, adapter.router)
            for row in x.flatten(0, 1)
        ]
    ).view(2, 5, D_OUT)
    found, weight = layer(x), torch.randn(2, 5, D_OUT, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad((y * weight).sum(), tensors) for y in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def balance_of(handle: addenda.Handle, inputs: dict[str, Tensor]) -> Tensor:
    """The penalty from its formula, for the inputs of each layer, (tokens, d_in)."""
    method, total = handle.method, torch.zeros((), dtype=torch.float64)
    for path, x in inputs.items():
        p = torch.softmax(x @ handle.adapters[path].router.t(), -1)
        hits = torch.zeros_like(p).scatter_(1, p.topk(method.chosen).indices, 1.0)
        f = hits.sum(0) / (len(x) * method.chosen)
        total = total + method.experts * (f * p.mean(0)).sum()
    return method.balance * total


def seen(model: nn.Module) -> dict[str, list[Tensor]]:
    """The inputs of both layers, noted as they come."""
    notes: dict[str, list[Tensor]] = {"first": [], "second": []}
    for path, kept in notes.items():
        getattr(model, path).register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0].detach().flatten(0, -2))
        )
    return notes


METHOD = LoRAExperts(rank=2, experts=5, top_k=2, balance=0.3)


def test_the_penalty_and_its_gradient_are_those_of_the_whole_step_however_it_is_cut(model: nn.Module) -> None:
    handle, x = stirred(model, METHOD), torch.randn(7, 4, D_IN, dtype=torch.float64)
    notes = seen(model)
    found = []
    for cut in (7, 3, 1):
        for kept in notes.values():
            kept.clear()
        for part in x.split(cut):
            model(part).square().sum().backward()
        handle.model.zero_grad()
        penalty = handle.penalty()
        penalty.backward()
        routers = [adapter.router for adapter in handle.adapters.values()]
        wanted = balance_of(handle, {path: torch.cat(kept) for path, kept in notes.items()})
        torch.testing.assert_close(penalty, wanted, rtol=1e-10, atol=1e-12)
        for router, grad in zip(routers, torch.autograd.grad(wanted, routers), strict=True):
            assert grad.abs().sum() > 0
            torch.testing.assert_close(router.grad, grad, rtol=1e-9, atol=1e-12)
        assert all(
            p.grad is None or not p.grad.any() for n, p in handle.named_parameters() if "router" not in n
        )
        found.append(penalty.detach())
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_is_done_twice_counts_once(model: nn.Module, reentrant: bool) -> None:
    handle = stirred(model, METHOD)
    x = torch.randn(6, 4, D_IN, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    plain = [total.clone() for total in handle.sums()]
    handle.forget()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(handle.sums(), plain, strict=True)
    )
    assert any(total.any() for total in plain)


def test_nothing_is_left_of_a_step_and_nothing_counts_but_training(model: nn.Module) -> None:
    handle, x = stirred(model, METHOD), torch.randn(6, 4, D_IN, dtype=torch.float64)
    model(x).sum().backward()
    assert handle.penalty() is not None
    assert handle.penalty() is None
    with torch.no_grad():
        model(x)
    model.eval()
    model(x).sum().backward()
    model.train()
    model(x)  # a pass of which no gradient is asked
    assert handle.penalty() is None
    model(x).sum().backward()
    handle.forget()
    assert handle.penalty() is None


def test_tokens_without_a_part_in_the_loss_do_not_count(model: nn.Module) -> None:
    handle, x = stirred(model, METHOD), torch.randn(6, 4, D_IN, dtype=torch.float64)
    model(x[:4, :3]).square().sum().backward()
    wanted = [total.clone() for total in handle.sums()]
    handle.forget()
    model(x)[:4, :3].square().sum().backward()
    for total, expected in zip(handle.sums(), wanted, strict=True):
        torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-12)
    load = handle.adapters["first"].load
    assert math.isclose(float(load[1].sum()), 12)
    assert float(load[0].sum()) == 12 * METHOD.chosen


def test_each_adapter_of_a_batch_counts_its_own_rows(model: nn.Module) -> None:
    a, b = (stirred(model, METHOD, name) for name in ("a", "b"))
    x = torch.randn(5, 4, D_IN, dtype=torch.float64)
    with addenda.activated(model, addenda.Rows(("a", "b", "b", None, "a"))):
        model(x).square().sum().backward()
    counted = {h.name: float(h.adapters["first"].load[1].sum()) for h in (a, b)}
    assert {name: round(tokens) for name, tokens in counted.items()} == {"a": 8, "b": 8}
    with addenda.activated(model, "a"):
        together = a.penalty()
        model(x[[0, 4]]).square().sum().backward()
        torch.testing.assert_close(a.penalty(), together)


def test_packed_rows_and_padded_ones_count_the_same_however_much_is_run_again() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=31, **sizes)).train()
    # Of a first query nothing depends, as it sees one key only: whether it counts is up to rounding.
    handle = addenda.attach(llama, METHOD, ["v_proj", "down_proj"])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    lengths, packed = [5, 2, 7], PackedModel(llama)
    assert packed.path == "packed", packed.reason
    row, found = torch.randint(31, (14,)), []
    for recompute in (0, 1, 2):
        packed.hidden(row, lengths, recompute=recompute).square().sum().backward()
        found.append([total.clone() for total in handle.sums()])
        handle.forget()
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for place, sample in enumerate(row.split(lengths)):
        ids[place, : len(sample)], mask[place, : len(sample)] = sample, 1
    states = llama.model(ids, attention_mask=mask).last_hidden_state
    states[mask.bool()].square().sum().backward()
    found.append([total.clone() for total in handle.sums()])
    assert {float(load[1].sum().round()) for load in found[0][::2]} == {14.0}
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_where_all_experts_are_chosen_there_is_no_penalty(model: nn.Module) -> None:
    handle = stirred(model, LoRAExperts(rank=2))
    model(torch.randn(3, D_IN, dtype=torch.float64)).sum().backward()
    assert handle.sums() == []
    assert handle.penalty() is None


def test_the_penalty_evens_out_the_use_of_experts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    handle = addenda.attach(model, LoRAExperts(rank=2, experts=4, top_k=1, renormalized=False, balance=1.0))
    adapter = handle.adapters["0"]
    x = torch.randn(256, D_IN) + 1.0
    with torch.no_grad():
        adapter.router[0] += 0.3  # the first expert is preferred by most tokens
    optimizer = torch.optim.SGD([adapter.router], lr=0.1)
    shares = []
    for _ in range(200):
        model(x).sum().backward()
        shares.append(adapter.load[0].max() / 256)
        optimizer.zero_grad()
        handle.penalty().backward()
        optimizer.step()
    assert shares[0] > 0.6
    assert shares[-1] < 0.4


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"top_k": 5}, "exceeds"),
        ({"top_k": 1}, "router"),
        ({"experts": 1}, "experts"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], word: str) -> None:
    with pytest.raises(addenda.errors.ConfigError, match=word):
        LoRAExperts.from_settings(settings)
