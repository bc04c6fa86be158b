from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import addenda
from addenda.bases.fast.find import find_fusions
from addenda.bases.fast.fusion import fused_on

NORMS = {
    "llama": lambda: LlamaRMSNorm(24, eps=1e-5),
    "gemma": lambda: Gemma3RMSNorm(24, eps=1e-6),
    "torch": lambda: nn.RMSNorm(24, eps=1e-3),
}


def frozen(module, dtype=torch.float32):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
        parameter.requires_grad_(False)
    return module.to(dtype)


def config(activation="silu"):
    return LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=4, hidden_act=activation)


def mlp(activation="silu", dtype=torch.float32):
    return frozen(LlamaMLP(config(activation)), dtype)


def run(module, x, weight):
    x = x.clone().requires_grad_()
    out = module(x)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    return out.detach(), grad


def lean(module, *args):
    ((fusion,), _) = find_fusions(module)
    with fused_on([fusion]):
        return run(module, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", NORMS)
def test_a_norm_and_its_gradient_equal_the_modules_own(family, dtype):
    module = frozen(NORMS[family](), dtype)
    # (batch, heads, tokens, d) seen through a transpose, as norms of queries and keys are.
    x, weight = (torch.randn(2, 5, 3, 24, dtype=dtype).transpose(1, 2) for _ in range(2))
    for ours, theirs in zip(lean(module, x * 3, weight), run(module, x * 3, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours.dtype == dtype


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_gated_mlp_and_its_gradient_equal_the_modules_own(activation):
    module = mlp(activation, torch.float64)
    x, weight = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(2, 7, 24, dtype=torch.float64)
    for ours, theirs in zip(lean(module, x, weight), run(module, x, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [NORMS["llama"], NORMS["gemma"], mlp], ids=["llama", "gemma", "mlp"])
def test_in_bfloat16_the_lean_form_is_as_near_to_the_truth_as_the_modules_own(make):
    exact = frozen(make(), torch.float32)
    x, weight = torch.randn(64, 24), torch.randn(64, 24)
    half = frozen(make(), torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    x, weight = x.bfloat16(), weight.bfloat16()
    truth = run(exact, x.float(), weight.float())
    for ours, own, true in zip(lean(half, x, weight), run(half, x, weight), truth, strict=True):
        assert (ours.float() - true).norm() <= 1.1 * (own.float() - true).norm() + 1e-4 * true.norm()


@pytest.mark.parametrize(("make", "at_most"), [(NORMS["llama"], 0.55), (mlp, 0.7)], ids=["norm", "mlp"])
def test_less_is_kept_for_the_backward(make, at_most):
    module, x = frozen(make(), torch.bfloat16), torch.randn(64, 24, dtype=torch.bfloat16, requires_grad=True)

    def kept():
        sizes = {}
        own = {parameter.data_ptr() for parameter in module.parameters()}

        def note(t):
            if t.data_ptr() not in own:
                sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = module(x)
        assert out.requires_grad
        return sum(sizes.values())

    whole = kept()
    with fused_on(find_fusions(module)[0]):
        assert 0 < kept() <= at_most * whole


def test_a_norm_whose_weight_learns_runs_its_own_forward():
    module = frozen(NORMS["llama"]())
    fusions, _ = find_fusions(module)
    module.weight.requires_grad_()
    with fused_on(fusions):
        (grad,) = torch.autograd.grad(module(torch.randn(5, 24)).sum(), module.weight)
    assert grad.norm() > 0


def test_adapters_inside_an_mlp_run_and_learn():
    module = nn.Sequential(mlp(dtype=torch.float64))
    handle = addenda.attach(
        module, addenda.LoRA(rank=3), "all-linear", probe=torch.randn(2, 24, dtype=torch.float64)
    )
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, parameters = torch.randn(5, 24, dtype=torch.float64), list(handle.parameters())
    own = module(x)
    expected = torch.autograd.grad(own.square().sum(), parameters)
    fusions, _ = find_fusions(module)
    assert len(fusions) == 1
    with fused_on(fusions):
        out = module(x)
        ours = torch.autograd.grad(out.square().sum(), parameters)
    torch.testing.assert_close(out, own, rtol=1e-10, atol=1e-12)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


class WrongMlp(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


class WrongNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * 1.01


class OddLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 1.01


class OddArguments(LlamaMLP):
    def forward(self, x, router):
        return super().forward(x) * router


@pytest.mark.parametrize(
    "module",
    [
        frozen(OddLayerNorm(24)),
        frozen(WrongNorm(24)),
        frozen(WrongMlp(config())),
        frozen(OddArguments(config())),
        mlp("relu"),
        nn.RMSNorm(24, eps=1e-5, device="meta"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_only_looks_alike_is_left_alone(module):
    inside = dict(find_fusions(module).fused)
    inside.pop("activation", 0)  # the activation of an MLP that is not as it looks
    assert not inside


@pytest.mark.parametrize("norm", [nn.LayerNorm(24), nn.LayerNorm(24, bias=False)], ids=["bias", "no bias"])
def test_a_layer_norm_is_not_taken_for_an_rms_norm(norm):
    assert find_fusions(frozen(norm)).fused == (("layer norm", 1),)


def test_a_module_whose_class_or_forward_changed_since_is_left_alone():
    module, other = frozen(NORMS["llama"]()), frozen(NORMS["llama"]())
    fusions, _ = find_fusions(nn.ModuleList([module, other]))
    module.__class__ = WrongNorm
    other.forward = F.silu
    x = torch.randn(3, 24)
    with fused_on(fusions):
        assert torch.equal(module(x), WrongNorm.forward(module, x))
        assert torch.equal(other(x), F.silu(x))
    assert other.forward is F.silu


def test_forwards_are_put_back_when_the_block_raises():
    module = mlp()
    fusions, _ = find_fusions(module)
    with pytest.raises(ZeroDivisionError), fused_on(fusions):
        assert "forward" in vars(module)
        raise ZeroDivisionError
    assert "forward" not in vars(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_off_by_one_hundredth_is_not_taken_for_an_rms_norm(dtype):
    assert not find_fusions(frozen(WrongNorm(24), dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_each_activation_is_told_from_the_others_in_any_dtype(activation, dtype):
    module = mlp(activation, dtype)
    ((fusion,), _) = find_fusions(module)
    x = torch.randn(3, 24, dtype=dtype)
    torch.testing.assert_close(fusion.forward(x), module(x))
