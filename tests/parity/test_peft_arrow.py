"""Arrow computes what PEFT's does, general knowledge taken off or not; and what its definition says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import addenda
from addenda.export.peft import write_peft

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(1))


def make() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def adapted(names: list[str], folder: Path) -> tuple[nn.Module, list[str]]:
    """Our model with adapters whose first singular value stands out, so that PEFT's iteration has converged."""
    model = make()
    for seed, name in enumerate(names):
        handle = addenda.attach(
            model, addenda.LoRA(rank=4, alpha=2.0 * seed + 4.0), ["q_proj", "down_proj"], name=name
        )
        with torch.no_grad():
            for adapter in handle.adapters.values():
                adapter.A.normal_(0.0, 0.1)
                adapter.A[0].mul_(20.0)
                adapter.B.normal_(0.0, 0.2)
        (folder / name).mkdir()
        write_peft(handle, folder / name)
    return model, [str(folder / name) for name in names]


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.3), (3, 1.0)])
def test_logits_are_pefts(tmp_path: Path, top_k: int, temperature: float, general: bool) -> None:
    names, known = ["a", "b", "c"], ["g", "h"] if general else []
    ours, paths = adapted([*names, *known], tmp_path)
    config = peft.ArrowConfig(top_k=top_k, router_temperature=temperature, use_gks=general, rng_seed=5)
    theirs = peft.create_arrow_model(
        base_model=make(),
        task_specific_adapter_paths=paths[:3],
        arrow_config=config,
        general_adapter_paths=paths[3:] or None,
    ).eval()
    addenda.activate(ours, addenda.Arrow(tuple(names), top_k, temperature, tuple(known)))
    found, wanted = ours(IDS).logits, theirs(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    addenda.activate(ours, None)
    assert not torch.allclose(ours(IDS).logits, wanted, atol=1e-2)
