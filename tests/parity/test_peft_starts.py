"""The starts of a low-rank update give what PEFT's initializations give, and train as those do."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda import LoRA

peft = pytest.importorskip("peft")
lora = pytest.importorskip("peft.tuners.lora.config")

RANK, ALPHA, TARGETS = 5, 8.0, ["0", "2"]


class Model(nn.Sequential):
    """Two layers whose inputs are not negative: PEFT divides them by their largest value, we by the absolute one.

    Singular values are well apart, so that the vectors are what they are.
    """

    def __init__(self) -> None:
        super().__init__(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 24))
        with torch.no_grad():
            for layer in (self[0], self[2]):
                U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
                layer.weight.copy_(U * 0.8 ** torch.arange(len(S)) @ Vh)


@pytest.fixture
def base() -> nn.Module:
    return Model()


@pytest.fixture
def x() -> Tensor:
    # The spectrum falls off: PEFT sketches some of its decompositions.
    return (torch.randn(64, 24) * 0.7 ** torch.arange(24) @ torch.linalg.qr(torch.randn(24, 24)).Q).abs()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.flip(1)).square().sum(1).mean()


def config(init: str, **settings: Any) -> Any:
    return peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=init, lora_dropout=0.0, **settings
    )


def ours(model: nn.Module, x: Tensor, start: str, **settings: Any) -> addenda.Handle:
    method = LoRA(rank=RANK, alpha=ALPHA, start=start, start_settings=settings)
    found = None
    if method.needs() == "inputs":
        # PEFT goes over the data until EVA's vectors stay the same, which here is twice.
        found = addenda.observe(model, method, TARGETS, [x, x])
    if method.needs() == "gradients":
        found = addenda.observe(model, method, TARGETS, [lambda m: loss_of(m, x)])
    return addenda.attach(model, method, TARGETS, observed=found)


def plain(init: str, **_: Any) -> Callable[[nn.Module, Tensor], nn.Module]:
    return lambda model, x: peft.get_peft_model(model, config(init))


def corda(mode: str) -> Callable[[nn.Module, Tensor], nn.Module]:
    def make(model: nn.Module, x: Tensor) -> nn.Module:
        chosen = config("corda", corda_config=lora.CordaConfig(corda_method=mode))
        # PEFT's file asks the package attrs for a dataclass, and for nothing else.
        stand_in = types.ModuleType("attr")
        stand_in.dataclass = dataclasses.dataclass
        with mock.patch.dict(sys.modules, {"attr": sys.modules.get("attr", stand_in)}):
            from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, chosen, run_model=lambda: model(x[None]))
        return peft.get_peft_model(model, chosen)

    return make


def lora_ga(direction: str) -> Callable[[nn.Module, Tensor], nn.Module]:
    def make(model: nn.Module, x: Tensor) -> nn.Module:
        chosen = config("lora_ga", lora_ga_config=peft.LoraGAConfig(direction=direction))
        peft.preprocess_loraga(model, chosen, lambda: loss_of(model, x.clone().requires_grad_()).backward())
        return peft.get_peft_model(model, chosen)

    return make


def eva(*, whiten: bool) -> Callable[[nn.Module, Tensor], nn.Module]:
    def make(model: nn.Module, x: Tensor) -> nn.Module:
        chosen = config("eva", eva_config=peft.EvaConfig(rho=1.0, whiten=whiten))
        made = peft.get_peft_model(model, chosen, low_cpu_mem_usage=True)
        peft.initialize_lora_eva_weights(
            made,
            dataloader=[x],
            forward_fn=lambda m, batch: m(batch),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
        return made

    return make


CASES = {
    "pissa": ("pissa", {}, plain("pissa")),
    "olora": ("olora", {}, plain("olora")),
    "corda-ipm": ("corda", {"mode": "ipm"}, corda("ipm")),
    "corda-kpm": ("corda", {"mode": "kpm"}, corda("kpm")),
    "eva": ("eva", {}, eva(whiten=False)),
    "eva-whitened": ("eva", {"whiten": True}, eva(whiten=True)),
    "lora_ga": ("lora_ga", {"scale": "gradient"}, lora_ga("ArB2r")),
    "lora_ga-A2rBr": ("lora_ga", {"scale": "gradient", "direction": "A2rBr"}, lora_ga("A2rBr")),
    "lora_ga-ArBr": ("lora_ga", {"scale": "gradient", "direction": "ArBr"}, lora_ga("ArBr")),
}


@pytest.mark.parametrize("name", CASES)
def test_factors_and_three_steps_of_training_are_those_of_peft(name: str, base: nn.Module, x: Tensor) -> None:
    start, settings, make = CASES[name]
    near = {
        "rtol": 1e-3,
        "atol": 5e-3 if start == "eva" or "kpm" in name else 1e-4,
    }  # PEFT sketches the former
    mine, theirs = copy.deepcopy(base), make(copy.deepcopy(base), x)
    handle = ours(mine, x, start, **settings)
    for path in TARGETS:
        layer, adapter = theirs.base_model.model.get_submodule(path), handle.adapters[path]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():  # singular vectors have no sign of their own
            for mine_, theirs_, dim in ((adapter.A, A, 1), (adapter.B, B, 0)):
                signs = (mine_ * theirs_).sum(dim, keepdim=True).sign()
                kept = adapter.A0 if dim == 1 else adapter.B0
                for tensor in (mine_, kept) if kept is not None else (mine_,):
                    tensor.mul_(torch.where(signs == 0, 1.0, signs))
        torch.testing.assert_close(A, adapter.A, **near)
        torch.testing.assert_close(B, adapter.B, **near)
    torch.testing.assert_close(mine(x), base(x), rtol=0, atol=0)
    before = theirs(x).detach()
    torch.testing.assert_close(before, base(x), rtol=1e-4, atol=1e-4)
    for model in (mine, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
    change, expected = mine(x) - base(x), theirs(x) - before
    assert float(expected.detach().abs().max()) > 1e-5
    torch.testing.assert_close(change, expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))


def test_a_sketched_pissa_is_as_near_to_the_whole_one_as_that_of_peft(base: nn.Module, x: Tensor) -> None:
    whole = ours(copy.deepcopy(base), x, "pissa")
    sketched = ours(copy.deepcopy(base), x, "pissa", iterations=8)
    theirs = peft.get_peft_model(copy.deepcopy(base), config("pissa_niter_8"))
    for path in TARGETS:
        layer = theirs.base_model.model.get_submodule(path)
        product = {
            n: h.adapters[path].B @ h.adapters[path].A for n, h in (("whole", whole), ("ours", sketched))
        }
        product["theirs"] = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        missed = {n: float((value - product["whole"]).detach().norm()) for n, value in product.items()}
        assert missed["ours"] <= missed["theirs"] + 1e-4
        assert missed["ours"] < 0.05 * float(product["whole"].detach().norm())


def test_loftq_begins_with_the_decomposition_that_peft_makes_of_the_error(base: nn.Module) -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    rounded = copy.deepcopy(base)
    with torch.no_grad():
        for path in TARGETS:
            weight = rounded.get_submodule(path).weight
            weight.copy_((weight * 16).round() / 16)
    method = LoRA(rank=RANK, alpha=ALPHA, start="loftq")
    found = addenda.observe(rounded, method, TARGETS, original=base)
    handle = addenda.attach(rounded, method, TARGETS, observed=found)
    for path, adapter in handle.adapters.items():
        error = (base.get_submodule(path).weight - rounded.get_submodule(path).weight).detach()
        parts = _low_rank_decomposition(error, RANK)
        torch.testing.assert_close(
            adapter.scaling * adapter.B @ adapter.A, parts["L"] @ parts["R"], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("start", ["kaiming", "gaussian", "orthogonal"])
def test_drawn_factors_are_as_large_as_those_of_peft(start: str) -> None:
    model = nn.Sequential(nn.Linear(256, 192))
    handle = addenda.attach(copy.deepcopy(model), LoRA(rank=8, start=start), ["0"])
    init = True if start == "kaiming" else start
    settings = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=init)
    layer = peft.get_peft_model(model, settings).base_model.model[0]
    for mine, theirs in (("A", layer.lora_A), ("B", layer.lora_B)):
        sizes = [
            float(t.detach().square().mean().sqrt())
            for t in (getattr(handle.adapters["0"], mine), theirs["default"].weight)
        ]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.2)
