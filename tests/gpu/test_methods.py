"""Every method on the GPU, attached there or moved there, answers and learns as it does on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.conformance.cases import Case, on_layers, on_models
from addenda.conformance.layers import LAYERS, PATHS
from addenda.conformance.models import VOCABULARY, model_of
from addenda.conformance.trying import stirred, with_mixed
from addenda.core import Handle, registry

CASES = [
    case
    for name in registry.names()
    for case in (*on_layers(name), *on_models(name))
    if case.refusal is None and (case.variant == 0 or case.place in ("linear", "llama"))
]


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Keep convolutions and recurrent layers in float32, as on the CPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def made(case: Case) -> tuple[nn.Module, Callable[[nn.Module], Any], str | None]:
    """Return the model of a case, what runs it, and where the method stands; the same each time."""
    if case.place not in LAYERS:
        ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
        return model_of(case.place), lambda model: model(ids.to(next(model.parameters()).device)).logits, None
    torch.manual_seed(1)
    model, batch = LAYERS[case.place]()
    path = PATHS.get(case.place, "layer")
    model = with_mixed(model, case.method, path)
    return model, lambda model: model(batch.to(next(model.parameters()).device)), path


def learnt(handle: Handle, answer: Tensor) -> dict[str, Tensor]:
    """Return what a model answers, and all gradients of its adapter in one row: some are nothing but rounding."""
    torch.manual_seed(2)
    (answer * torch.randn(answer.shape).to(answer)).sum().backward()
    grads = [p.grad.flatten() for p in handle.parameters() if p.grad is not None]
    return {"answer": answer.detach().cpu(), "gradient": torch.cat(grads).cpu()}


def assert_alike(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_method_answers_and_learns_as_on_the_cpu(case: Case, device: torch.device) -> None:
    model, run, path = made(case)
    handle = stirred(addenda.attach(model, case.method, path))
    moved = copy.deepcopy(model).to(device)
    fresh = made(case)[0].to(device)
    there = addenda.attach(fresh, case.method, path)
    with torch.no_grad():
        for ours, theirs in zip(there.tensors().values(), handle.tensors().values(), strict=True):
            assert ours.device.type == device.type
            ours.copy_(theirs)
    expected = learnt(handle, run(model))
    found = learnt(there, run(fresh))
    assert_alike(found["answer"], expected["answer"])
    assert_alike(found["gradient"], expected["gradient"])
    assert_alike(run(moved).detach().cpu(), expected["answer"])
