"""Norms as layers: recognised by what they hold, run in their own form, in any of their kinds."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import addenda
from addenda.core.layers import kind_of
from addenda.methods.ln_tuning import LNTuning

NORMS = {
    "layer": (lambda: nn.LayerNorm(12), (4, 5, 12)),
    "layer-no-bias": (lambda: nn.LayerNorm(12, bias=False), (4, 5, 12)),
    "rms": (lambda: nn.RMSNorm(12, eps=1e-6), (4, 5, 12)),
    "llama": (lambda: LlamaRMSNorm(12), (4, 5, 12)),
    "gemma": (lambda: GemmaRMSNorm(12), (4, 5, 12)),
    "t5": (lambda: T5LayerNorm(12), (4, 5, 12)),
    "cohere": (lambda: CohereLayerNorm(12), (4, 5, 12)),
    "batch": (lambda: nn.BatchNorm2d(12).eval(), (4, 12, 3, 5)),
    "group": (lambda: nn.GroupNorm(3, 12), (4, 12, 3, 5)),
    "instance": (lambda: nn.InstanceNorm1d(12, affine=True), (4, 12, 7)),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_adapted_norm_is_the_norm_with_other_values(name: str) -> None:
    make, shape = NORMS[name]
    norm, x = make().double(), torch.randn(*shape).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    if name == "batch":
        norm.running_mean.normal_()
    model = nn.Sequential(norm)
    handle = addenda.attach(model, LNTuning())
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    adapted, adapter = model(x), handle.adapters["0"]
    assert handle.trainable_parameters == sum(
        p.numel() for p in (norm.weight, norm._parameters.get("bias")) if p is not None
    )
    handle.detach()
    with torch.no_grad():
        norm.weight += adapter.weight[:, 0]
        if adapter.bias is not None:
            norm.bias += adapter.bias
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)


class Lookalike(nn.Module):
    """Holds a vector, but no epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize(
    "module", [Lookalike(), nn.PReLU(4), nn.LayerNorm(4, elementwise_affine=False), nn.LazyBatchNorm1d()]
)
def test_what_only_looks_like_a_norm_is_none(module: nn.Module) -> None:
    assert kind_of(module) is None


def test_a_target_names_all_norms() -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    handle = addenda.attach(transformers.LlamaForCausalLM(config), LNTuning())
    assert len(handle.paths) == 5
    assert handle.trainable_parameters == 5 * 16


def test_bitfit_takes_the_biases_of_norms_along_and_gives_none_to_a_norm_without() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    assert addenda.plan(model, addenda.BitFit(), ["all-linear", "all-norms"]).parameters == 16
    with pytest.raises(addenda.MethodError, match="no place for one"):
        addenda.plan(nn.Sequential(LlamaRMSNorm(8)), addenda.BitFit(), "all-norms")


def test_an_adapted_norm_is_not_passed_by_where_norms_run_in_a_leaner_form() -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(40, (2, 7))
    with addenda.lean(model) as form:
        assert dict(form.fused)["RMS norm"] == 5
        handle = addenda.attach(model, LNTuning())
        for parameter in handle.parameters():
            nn.init.normal_(parameter)
    adapted = model(ids).logits
    with form:
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    with addenda.lean(model):
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
