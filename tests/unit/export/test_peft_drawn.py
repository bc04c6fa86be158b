"""Folders in which PEFT left things to be drawn anew, or wrote indices: what does not agree is refused by name."""

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
from addenda.core.contract import Method
from addenda.core.handle import handles
from addenda.errors import CheckpointError
from addenda.export.peft import CONFIG, TENSORS, import_peft, write_peft
from addenda.methods.frod import FRoD
from addenda.methods.pvera import PVeRA
from addenda.methods.randlora import RandLoRA
from addenda.methods.tinylora import TinyLoRA
from addenda.methods.unilora import UniLoRA
from addenda.methods.vblora import VBLoRA

UP = "base_model.model.up"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def drop(*parts: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """Leave out the tensors of these names, and say in the configuration that they are to be drawn."""

    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config.update(save_projection=False, save_indices=False)
        for key in [k for k in tensors if any(part in k for part in parts)]:
            del tensors[key]

    return edit


def also(
    edit: Callable[[dict[str, Any], dict[str, Tensor]], None], **settings: object
) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def both(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        edit(config, tensors)
        config.update(settings)

    return both


def chosen(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the chosen vectors alone, one of which the bank does not have."""
    config.update(save_only_topk_weights=True)
    for name in ("up.vblora_logits_A", "up.vblora_logits_B", "down.vblora_logits_A", "down.vblora_logits_B"):
        logits = tensors.pop(f"base_model.model.{name}")
        values, places = logits.topk(2)
        tensors[f"base_model.model.{name}_topk_weights"] = values.softmax(-1)[..., :-1].contiguous()
        tensors[f"base_model.model.{name}_topk_indices"] = (places + 5).to(torch.uint8)


def scaled(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.unilora_scales_A"][0, 0] += 1.0


def beyond(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] = 99

    return edit


RANDOM = drop("randlora_A", "randlora_B")
INDICES = drop("unilora_indices", "unilora_scales")
REFUSED = {
    "randlora-size": (RandLoRA(rank=3), also(RANDOM, r=10**9), r"r = 1000000000, and its tensors show 3"),
    "randlora-seed": (
        RandLoRA(rank=3),
        also(RANDOM, projection_prng_key="x"),
        "projection_prng_key = 'x' is no",
    ),
    "pvera-size": (PVeRA(rank=3), also(drop("pvera_A", "pvera_B"), r=10**9), "its tensors show 3"),
    "tinylora-size": (TinyLoRA(size=3), also(drop("tinylora_P"), u=10**9), "its tensors show 3"),
    "unilora-size": (UniLoRA(size=30), also(INDICES, theta_d_length=10**12), "its tensors show 30"),
    "unilora-rank": (UniLoRA(size=30), also(INDICES, r=10**9), "rank 1000000000 exceeds"),
    "unilora-scales": (UniLoRA(size=30), scaled, "gives one number several scales"),
    "unilora-indices": (UniLoRA(size=30), beyond(f"{UP}.unilora_indices_A"), "points beyond the vector"),
    "vblora-indices": (VBLoRA(vectors=5), chosen, "points beyond the 5 vectors"),
    "frod-indices": (FRoD(share=0.1), beyond("base_model.frod_s_indices.up"), "points beyond its matrix"),
}


@pytest.mark.parametrize(("method", "edit", "why"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_does_not_agree_is_refused(
    method: Method, edit: Callable[[dict[str, Any], dict[str, Tensor]], None], why: str, tmp_path: Path
) -> None:
    write_peft(addenda.attach(Net(), method), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    tensors = load_file(tmp_path / TENSORS)
    edit(config, tensors)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / TENSORS)
    model = Net()
    with pytest.raises(CheckpointError, match=why):
        import_peft(model, tmp_path)
    assert not handles(model)
    assert type(model.up) is nn.Linear
