"""MonteCLoRA: its draws have the distribution of PEFT's, its penalty is a divergence, and at rest it is LoRA."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import nn
from torch.distributions import Dirichlet, Wishart, kl_divergence

import addenda
from addenda.methods.monteclora import MonteCLoRA, MonteCLoRAAdapter, dirichlet_divergence

D_IN, D_OUT, RANK = 6, 5, 3


def adapted(model: nn.Module, **settings: object) -> MonteCLoRAAdapter:
    method = MonteCLoRA.from_settings({"rank": RANK, "samples": 4, "noise": 0.5, **settings})
    adapter = addenda.attach(model, method, targets=["0"]).adapters["0"]
    nn.init.normal_(adapter.B)
    return adapter


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(D_IN, D_OUT))


def test_what_is_drawn_has_the_moments_of_pefts_draws(model: nn.Module) -> None:
    ours = adapted(model)
    theirs = MontecloraSampler(D_IN, RANK, 4, sample_scaler=0.5, buffer_size=4000, device="cpu")
    with torch.no_grad():
        theirs.std_prior.copy_(ours.log_s)
        theirs.expert_weights_prior.copy_(ours.log_a)
        found = torch.stack([ours.drawn() - ours.A for _ in range(8000)])
        wanted = []
        for _ in range(4000):
            noise, weights = theirs()
            wanted.append(torch.einsum("n,nij->ji", weights, noise))
    wanted = torch.stack(wanted)
    assert found.shape[1:] == wanted.shape[1:] == (RANK, D_IN)
    for power in (2, 4):
        per_row = [x.pow(power).mean(dim=(0, 2)) for x in (found, wanted)]
        torch.testing.assert_close(*per_row, rtol=0.15, atol=0)
    assert found.mean(dim=0).abs().max() < 0.1 * found.std()
    assert (per_row[0] > 0).all()


def test_drawing_ends_with_training_and_what_is_kept_is_lora(model: nn.Module) -> None:
    adapter, x = adapted(model), torch.randn(7, D_IN)
    assert not torch.allclose(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    layer, scaling = model[0], 2.0
    wanted = nn.functional.linear(x, layer.weight + scaling * adapter.B @ adapter.A, layer.bias)
    torch.testing.assert_close(model(x), wanted)
    handle = addenda.core.handles(model)["default"]
    handle.merge()
    torch.testing.assert_close(model(x), wanted)


def test_every_parameter_learns_from_a_draw(model: nn.Module) -> None:
    adapter = adapted(model.train())
    model(torch.randn(4, D_IN)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert {name for name, _ in adapter.named_parameters()} == {"A", "B", "log_s", "log_a"}


def test_the_penalty_is_the_divergence_from_the_priors(model: nn.Module) -> None:
    adapter = adapted(model.double(), prior=0.3, kl=0.7)
    with torch.no_grad():
        adapter.log_s.normal_()
    s2, a = (2 * adapter.log_s).exp().detach(), adapter.log_a.exp().detach()
    one = torch.eye(RANK, dtype=torch.float64)
    df = torch.tensor(float(RANK), dtype=torch.float64)
    wishart = kl_divergence(Wishart(df, torch.diag(s2)), Wishart(df, one))
    torch.manual_seed(0)
    v = s2 * torch.randn(200_000, RANK, RANK, dtype=torch.float64).square().sum(-1)
    normal = 4 * 0.5 * (v - v.log() - 1).sum(-1).mean()  # of four samples, for each column of A
    weights = kl_divergence(Dirichlet(a), Dirichlet(torch.full((4,), 0.3, dtype=torch.float64)))
    penalty = addenda.core.handles(model)["default"].penalty()
    torch.testing.assert_close(penalty.detach(), 0.7 * (wishart + normal + weights), rtol=1e-2, atol=0)
    penalty.backward()
    assert adapter.A.grad is None
    assert adapter.log_s.grad.all()
    assert adapter.log_a.grad.all()


def test_dirichlets_divergence() -> None:
    a, b = torch.rand(2, 5, dtype=torch.float64) * 3 + 0.1
    torch.testing.assert_close(dirichlet_divergence(a, b), kl_divergence(Dirichlet(a), Dirichlet(b)))


def test_a_loaded_adapter_goes_on_with_its_spread(model: nn.Module, tmp_path) -> None:
    adapter = adapted(model)
    kept = {name: value.detach().clone() for name, value in adapter.named_parameters()}
    addenda.save(model, tmp_path / "adapter")
    addenda.core.handles(model)["default"].detach()
    again = addenda.load(model, tmp_path / "adapter").adapters["0"]
    assert all(torch.equal(value, kept[name]) for name, value in again.named_parameters())
    assert len(kept) == 4
