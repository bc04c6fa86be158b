"""Convolutions and embeddings go to PEFT and come back, and what PEFT computes otherwise there is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import addenda
from addenda.errors import CheckpointError, ExportError
from addenda.export.peft import CONFIG, TENSORS, import_peft, write_peft
from addenda.methods.dora import DoRA
from addenda.methods.hira import HiRA

peft = pytest.importorskip("peft")

TARGETS = ["embed_tokens", "one", "two", "three", "head"]


class Layers(nn.Module):
    """An embedding, convolutions over one, two and three dimensions, and a linear layer."""

    def __init__(self, seed: int, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(31, 12)
        self.one = nn.Conv1d(12, 10, 3, padding=1, **settings)
        self.two = nn.Conv2d(10, 8, (3, 2), stride=2, padding=1)
        self.three = nn.Conv3d(8, 6, (2, 1, 3), padding=1)
        self.head = nn.Linear(6, 5)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, ids: Tensor) -> Tensor:
        y = self.one(self.embed_tokens(ids).transpose(1, 2)).tanh()
        y = self.two(y[..., None].expand(*y.shape, 4)).tanh()
        y = self.three(y[..., None].expand(*y.shape, 3))
        return self.head(y.flatten(2).mean(-1))


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10))


def stir(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))


OURS = {
    "lora": lambda: addenda.LoRA(rank=3),
    "lora-per-layer": lambda: addenda.LoRA(
        rank=3, rank_stabilized=True, ranks={"two": 4}, alphas={"one": 2.5}
    ),
    "dora": lambda: DoRA(rank=3),
    "hira": lambda: HiRA(rank=3),
}
THEIRS = {
    "lora": lambda **targets: peft.LoraConfig(r=3, rank_pattern={"two": 2}, **targets),
    "dora": lambda **targets: peft.LoraConfig(r=3, use_dora=True, **targets),
    "hira": lambda **targets: peft.HiraConfig(r=3, **targets),
}
embeddings_are_saved = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")


@pytest.mark.parametrize("make", OURS.values(), ids=OURS.keys())
def test_our_adapter_answers_the_same_under_peft(
    make: Callable[[], addenda.Method], tmp_path: Path, seeded: int
) -> None:
    ours = Layers(seeded)
    before = answer(ours)
    handle = addenda.attach(ours, make(), targets=TARGETS)
    stir(handle.parameters())
    wanted = answer(ours)
    write_peft(handle, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Layers(seeded), tmp_path)
    torch.testing.assert_close(answer(theirs), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-2
    again = Layers(seeded)
    import_peft(again, tmp_path)
    torch.testing.assert_close(answer(again), wanted, rtol=0, atol=1e-6)


@embeddings_are_saved
@pytest.mark.parametrize("make", THEIRS.values(), ids=THEIRS.keys())
def test_their_adapter_answers_the_same_here(make: Callable[..., Any], tmp_path: Path, seeded: int) -> None:
    theirs = peft.get_peft_model(Layers(seeded), make(target_modules=TARGETS)).eval()
    stir(p for p in theirs.parameters() if p.requires_grad)
    wanted = answer(theirs)
    theirs.save_pretrained(tmp_path)
    ours = Layers(seeded)
    import_peft(ours, tmp_path)
    torch.testing.assert_close(answer(ours), wanted, rtol=1e-5, atol=1e-5)


@embeddings_are_saved
def test_weights_of_another_base_in_the_folder_are_refused(tmp_path: Path, seeded: int) -> None:
    theirs = peft.get_peft_model(Layers(seeded), THEIRS["lora"](target_modules=["embed_tokens", "two"]))
    theirs.save_pretrained(tmp_path)
    key = "base_model.model.embed_tokens.base_layer.weight"
    tensors = load_file(tmp_path / TENSORS)
    import_peft(Layers(seeded), tmp_path)
    tensors[key][3, 2] += 1
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match="not this base's"):
        import_peft(Layers(seeded), tmp_path)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"groups": 2}, "groups"), ({"dilation": 2}, "dilation"), ({"padding_mode": "reflect"}, "padding mode")],
)
def test_a_convolution_that_peft_does_not_follow_is_refused(
    settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    odd = Layers(0, **settings)
    handle = addenda.attach(odd, addenda.LoRA(rank=2), targets=["one"])
    with pytest.raises(ExportError, match=name):
        write_peft(handle, tmp_path)
    handle.detach()
    write_peft(addenda.attach(Layers(0), addenda.LoRA(rank=2), targets=["one"]), tmp_path)
    with pytest.raises((CheckpointError), match=f"{name}|has shape"):
        import_peft(odd, tmp_path)
    assert type(odd.one) is nn.Conv1d


def test_dora_and_activated_lora_together_are_refused_by_name(tmp_path: Path) -> None:
    write_peft(addenda.attach(Layers(0), DoRA(rank=2), targets=["head"]), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "alora_invocation_tokens": [1, 2]}))
    with pytest.raises(CheckpointError, match="alora_invocation_tokens"):
        import_peft(Layers(0), tmp_path)
