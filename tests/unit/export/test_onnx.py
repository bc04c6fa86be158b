"""The format ``onnx``: written, proven in ONNX Runtime, read back; what is wrong with a file is found and named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import addenda
from addenda.bases import load_base
from addenda.core import registry
from addenda.errors import ExportError
from addenda.export.format import format_of
from addenda.export.run import export_adapter

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")

SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
spec = importlib.util.spec_from_file_location(
    "tiny_gguf", Path(__file__).parents[1] / "bases" / "tiny_gguf.py"
)
assert spec is not None
assert spec.loader is not None
tiny_gguf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_gguf)


def encoder() -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, num_hidden_layers=2, max_position_embeddings=64, num_labels=3, initializer_range=0.3
    )
    return transformers.BertForSequenceClassification(config).eval()


def trained(model: nn.Module, method: addenda.Method | None = None, targets: object = None) -> addenda.Handle:
    handle = addenda.attach(model, method or addenda.LoRA(rank=2), targets or ["query", "value"], seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.3)
    return handle


def sentences() -> list[dict[str, torch.Tensor]]:
    rows = []
    for shape in ((1, 9), (3, 21), (2, 5)):
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, -2:] = 0
        rows.append({"input_ids": torch.randint(5, 90, shape), "attention_mask": mask})
    return rows


def test_an_encoder_is_proven_and_the_model_left_as_it_was(tmp_path: Path) -> None:
    model = encoder()
    handle = trained(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parity = export_adapter(model, handle, "onnx", tmp_path / "out", inputs=sentences(), kind="classes")
    assert parity.verdict == "passed"
    assert parity.reader.startswith("ONNX Runtime")
    assert parity.twin is parity.real
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "README.md", "export.json"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert handle.active
    assert not handle.merged


def test_an_adapter_that_no_weight_can_hold_is_traced_with_its_forward(tmp_path: Path) -> None:
    model = encoder()
    handle = trained(model, registry.get("bottleneck")(), ["output.dense"])
    parity = export_adapter(model, handle, "onnx", tmp_path / "out", inputs=sentences(), kind="classes")
    assert parity.verdict == "passed"


def test_packed_weights_are_unpacked_and_come_with_their_tokenizer(tmp_path: Path) -> None:
    source = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_gguf.LLAMA)).eval()
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", source, quantize=["Q4_1", "Q8_0"])
    base = load_base(path, cache_dir=tmp_path / "cache", weights="packed")
    handle = trained(base.model, targets="all-linear")
    raw = {name: value.clone() for name, value in base.model.state_dict().items()}
    parity = export_adapter(base, handle, "onnx", tmp_path / "out")
    assert parity.verdict == "passed"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert all(torch.equal(value, raw[name]) for name, value in base.model.state_dict().items())
    unfoldable = addenda.plan(base.model, registry.get("bottleneck")())
    [problem] = format_of("onnx").problems(unfoldable, base.model, base)
    assert problem == "method 'bottleneck' cannot be folded into weights, and the base's are packed"


def test_nothing_is_left_behind_where_it_cannot_be_traced(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dense(x).reshape(2, 4)

    model = Fixed().eval()
    handle = trained(model, targets=["dense"])
    with pytest.raises(ExportError, match="PyTorch cannot trace"):
        export_adapter(
            model, handle, "onnx", tmp_path / "out", inputs=[{"x": torch.randn(2, 4)}], kind="features"
        )
    assert not list(tmp_path.iterdir())
    assert handle.active


def test_narrow_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    model = encoder().bfloat16()
    with pytest.raises(ExportError, match=r"the model's weights are torch\.bfloat16"):
        export_adapter(model, trained(model), "onnx", tmp_path / "out", inputs=sentences(), kind="classes")
    assert not list(tmp_path.iterdir())
