"""A merged export of a base whose weights are packed: a dense model folder that answers like base and adapter."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import tiny_gguf
import torch
import transformers

import addenda
from addenda.bases import load_base
from addenda.export.merged import write_merged
from addenda.export.run import export_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> addenda.LoadedBase:
    root = tmp_path_factory.mktemp("packed")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_gguf.LLAMA)).eval()
    path = tiny_gguf.write_gguf(root / "tiny.gguf", model, quantize=["Q4_1", "Q8_0"])
    return load_base(path, cache_dir=root / "cache", weights="packed")


def attached(base: addenda.LoadedBase, targets: object) -> addenda.Handle:
    handle = addenda.attach(base.model, addenda.LoRA(rank=2), targets, seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.2)
    return handle


def test_it_is_unpacked_and_answers_alike(base: addenda.LoadedBase, tmp_path: Path) -> None:
    handle = attached(base, "all-linear")
    ids = torch.randint(5, 90, (2, 11))
    raw = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    parity = export_adapter(base, handle, "merged", tmp_path / "merged", type="float32")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        wanted, found = base.model(ids).logits, again(ids).logits
    assert (wanted - found).abs().max() < 1e-4 * wanted.abs().max()
    assert parity.verdict == "passed"
    assert parity.real is parity.twin
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert all(torch.equal(tensor, raw[name]) for name, tensor in base.model.state_dict().items())
    handle.detach()


def test_a_few_weights_are_in_memory_at_a_time(
    base: addenda.LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = attached(base, "all-linear")
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    fold = addenda.Handle.folded

    def watched(self: addenda.Handle, path: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        alive.append(sum(each() is not None for each in made))
        weight, bias = fold(self, path)
        made.append(weakref.ref(weight))
        return weight, bias

    monkeypatch.setattr(addenda.Handle, "folded", watched)
    write_merged(base, handle, tmp_path, torch.bfloat16)
    handle.detach()
    assert len(made) == 14
    assert max(alive) <= 1
