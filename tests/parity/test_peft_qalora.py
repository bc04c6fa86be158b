"""QA-LoRA against PEFT's arithmetic, which PEFT has for GPTQ's layers alone: it is called without such a layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import addenda
from addenda.export.peft import import_peft, write_peft
from addenda.methods.qa_lora import QALoRA

peft = pytest.importorskip("peft")
from peft.tuners.lora.variants import QALoraLinearVariant  # noqa: E402

D_IN, D_OUT, RANK = 24, 10, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D_IN, D_OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def under_peft(x: Tensor, base: nn.Linear, folder: Path) -> Tensor:
    """What a layer of PEFT's answers with the folder's tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.proj.lora_{name}.weight"] for name in "AB")
    layer = SimpleNamespace(
        lora_A={"x": SimpleNamespace(weight=A)},
        lora_B={"x": SimpleNamespace(weight=B)},
        lora_dropout={"x": nn.Identity()},
        scaling={"x": config["lora_alpha"] / config["r"]},
        qalora_group_size={"x": config["qalora_group_size"]},
        in_features=D_IN,
        training=False,
    )
    return QALoraLinearVariant.forward(layer, "x", x, base(x))


@pytest.mark.parametrize("size", [1, 4, 12])
def test_our_adapter_answers_the_same_under_peft(
    size: int, tmp_path: Path, differing: Callable[..., float]
) -> None:
    model, x = Net(), torch.randn(2, 5, D_IN)
    handle = addenda.attach(
        model, QALoRA(rank=RANK, alpha=5.0, group_size=size), targets=["proj"], name="default"
    )
    nn.init.normal_(handle.adapters["proj"].B)
    write_peft(handle, tmp_path)
    wanted = model(x)
    with handle.disabled():
        bare = model.proj
        assert differing(handle, "written", under_peft(x, bare, tmp_path), wanted) <= 1e-5
    handle.detach()
    import_peft(model, tmp_path)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 8])
def test_their_adapter_answers_the_same_here(
    size: int, tmp_path: Path, differing: Callable[..., float]
) -> None:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=7, target_modules=["proj"], use_qalora=True, qalora_group_size=size
    )
    config.save_pretrained(tmp_path)
    tensors = {"A": torch.randn(RANK, D_IN // size), "B": torch.randn(D_OUT, RANK)}
    named = {f"base_model.model.proj.lora_{name}.weight": value for name, value in tensors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    model, x = Net(), torch.randn(4, D_IN)
    wanted = under_peft(x, model.proj, tmp_path)
    handle = import_peft(model, tmp_path)
    assert differing(handle, "read", model(x), wanted) <= 1e-5


def test_the_update_is_that_of_the_sums_of_groups() -> None:
    model, x = Net().double(), torch.randn(6, D_IN, dtype=torch.float64)
    handle = addenda.attach(model, QALoRA(rank=RANK, alpha=5.0, group_size=4), targets=["proj"])
    adapter, base = handle.adapters["proj"], nn.functional.linear(x, model.proj.weight, model.proj.bias)
    nn.init.normal_(adapter.B)
    sums = torch.stack([x[:, 4 * g : 4 * g + 4].sum(1) for g in range(D_IN // 4)], 1)
    torch.testing.assert_close(model(x), base + 5.0 / RANK * sums @ adapter.A.t() @ adapter.B.t())
