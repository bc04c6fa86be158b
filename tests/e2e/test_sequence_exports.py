"""Prompts, prefixes and adaption prompts exported as a user would, and read again before the folder appears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import addenda
from addenda.core import registry
from addenda.export.peft import import_peft
from addenda.export.run import export_adapter
from addenda.methods.xlora import XLoRA

pytest.importorskip("peft")

# PEFT 0.21 asks transformers 5.23 for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

READERS = {
    "prompt-tuning": "peft",
    "prefix-tuning": "peft",
    "llama-adapter": "peft",
    "shadow": "addenda's own reader (peft makes its mirror of a model's own class)",
    "multitask-prompt-tuning": "addenda's own reader (peft's model asks for more than the tokens)",
}


@pytest.mark.parametrize("name", READERS)
def test_an_export_is_read_again_and_the_model_is_as_before(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = addenda.load_base(str(tiny_model), dtype="float32")
    handle = addenda.attach(base.model, registry.get(name).from_settings(registry.get(name).variants[0]))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.arange(4, 16)[None]
    before = base.model(ids).logits
    classes = [type(module) for module in base.model.modules()]
    parity = export_adapter(base, handle, "peft", tmp_path / "out")
    assert parity.reader.startswith(READERS[name])
    assert torch.equal(base.model(ids).logits, before)
    assert [type(module) for module in base.model.modules()] == classes
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


def test_a_mixture_is_exported_with_what_it_mixes(tiny_model: Path, tmp_path: Path) -> None:
    base = addenda.load_base(str(tiny_model), dtype="float32")
    for name in ("law", "style"):
        addenda.attach(base.model, addenda.LoRA(rank=2), ["q_proj"], name=name)
    with torch.no_grad():
        for parameter in (p for each in addenda.handles(base.model).values() for p in each.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    method = XLoRA(of=("law", "style"), hidden_size=base.model.config.hidden_size)
    handle = addenda.attach(base.model, method, name="mix")
    ids = torch.arange(4, 16)[None]
    before = base.model(ids).logits
    parity = export_adapter(base, handle, "peft", tmp_path / "out")
    assert parity.reader.startswith("addenda's own reader (peft has to be told where")
    assert torch.equal(base.model(ids).logits, before)
    assert list(addenda.handles(base.model)) == ["law", "style", "mix"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'config.adapters = {name: "this folder/" + name for name in config.adapters}' in card
    assert "import PeftConfig, PeftModel" in card
    again = addenda.load_base(str(tiny_model), dtype="float32")
    import_peft(again.model, tmp_path / "out", name="mix")
    torch.testing.assert_close(again.model(ids).logits, before)
