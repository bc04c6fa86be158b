"""Adapters mixed by Arrow answer as under PEFT's Arrow, with and without general knowledge subtracted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import addenda
from addenda.export.peft import write_peft

peft = pytest.importorskip("peft")
arrow = pytest.importorskip("peft.tuners.lora.arrow")

NAMES = ("law", "style", "code", "wiki", "news")


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ours(tmp_path: Path) -> LlamaForCausalLM:
    """A model with five adapters, each of which is also in a folder of PEFT's form under its name."""
    model = make()
    torch.manual_seed(1)
    for alpha, name in enumerate(NAMES, start=3):
        method = addenda.LoRA(rank=3, alpha=float(alpha))
        handle = addenda.attach(model, method, ["q_proj", "down_proj"], name=name)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.normal_(0.0, 0.2)
            for adapter in handle.adapters.values():
                adapter.B[:, 0] *= 8.0  # PEFT's power iteration ends early where singular values are close
        (tmp_path / name).mkdir()
        write_peft(handle, tmp_path / name)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 3.0)])
@pytest.mark.parametrize("general", [(), ("wiki", "news")])
def test_tokens_are_routed_as_pefts(
    ours: LlamaForCausalLM, tmp_path: Path, top_k: int, temperature: float, general: tuple[str, ...]
) -> None:
    tasks = NAMES[:3]
    config = peft.ArrowConfig(top_k=top_k, router_temperature=temperature, use_gks=bool(general), rng_seed=0)
    folders = {name: str(tmp_path / name) for name in NAMES}
    theirs = arrow.create_arrow_model(
        make(),
        [folders[name] for name in tasks],
        config,
        general_adapter_paths=[folders[name] for name in general] or None,
    ).eval()
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
        with addenda.activated(ours, None):
            plain = ours(ids).logits
        mixed = addenda.Arrow(tasks, top_k=top_k, temperature=temperature, general=general)
        with addenda.activated(ours, mixed):
            found = ours(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)
