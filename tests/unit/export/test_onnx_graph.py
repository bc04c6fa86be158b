"""A written ONNX file: it answers as the model does, at any batch and length, and each weight has its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import addenda
from addenda.errors import ExportError, MissingDependencyError
from addenda.export.onnx.writing import FILE, graph_of, save

pytest.importorskip("onnx_ir", reason="the extra 'onnx' is not installed")
from addenda.export.runtimes.onnxruntime import Session

TINY = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def encoder() -> nn.Module:
    config = transformers.BertConfig(**TINY, intermediate_size=48, max_position_embeddings=64, num_labels=3)
    return transformers.BertForSequenceClassification(config).eval()


def rows_of(*shapes: tuple[int, int]) -> list[dict[str, torch.Tensor]]:
    rows = []
    for shape in shapes:
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, max(1, shape[1] - 2) :] = 0
        rows.append({"input_ids": torch.randint(5, 90, shape), "attention_mask": mask})
    return rows


def trained(model: nn.Module, method: addenda.Method, targets: object) -> addenda.Handle:
    handle = addenda.attach(model, method, targets, seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.2)
    return handle


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """An encoder whose adapter is not merged, and the folder that it was written into."""
    torch.manual_seed(0)
    model, folder = encoder(), tmp_path_factory.mktemp("written")
    trained(model, addenda.LoRA(rank=2), ["query", "intermediate.dense"])
    save(graph_of(model, rows_of((1, 9))), folder)
    return model, folder


def test_other_batches_and_lengths_than_traced(written: tuple[nn.Module, Path]) -> None:
    model, folder = written
    session = Session(folder / FILE)
    assert session.inputs == dict.fromkeys(("input_ids", "attention_mask"), ("batch", "length"))
    for row in rows_of((1, 1), (3, 29), (2, 7), (1, 13)):
        with torch.no_grad():
            assert torch.allclose(session.run(row)["logits"], model(**row).logits, atol=1e-5)


def test_weights_have_their_names_and_no_path_of_this_machine_is_told(
    written: tuple[nn.Module, Path],
) -> None:
    import onnx_ir

    model, folder = written
    found = {}
    for name, value in onnx_ir.load(folder / FILE).graph.initializers.items():
        tensor = torch.from_numpy(value.const_value.numpy().copy())
        found[name.removesuffix(".T")] = tensor.T if name.endswith(".T") else tensor
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert b".py" not in (folder / FILE).read_bytes()


class Vision(nn.Module):
    """Convolutions, a depthwise one too, and a norm with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.depthwise(torch.relu(self.norm(self.stem(image))))
        return self.head(features.mean((2, 3)))


def test_sizes_in_which_the_rows_differ_are_left_open(tmp_path: Path) -> None:
    model = Vision().eval()
    trained(model, addenda.LoRA(rank=2), ["stem", "depthwise"])
    rows = [{"image": torch.randn(1, 3, size, 16)} for size in (16, 20)]
    save(graph_of(model, rows), tmp_path)
    session = Session(tmp_path / FILE)
    assert session.inputs == {"image": ("batch", 3, "image_2", 16)}
    image = torch.randn(3, 3, 28, 16)
    with torch.no_grad():
        assert torch.allclose(session.run({"image": image})["output"], model(image), atol=1e-5)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model = encoder()
    with torch.no_grad():
        model.classifier.weight[1, 2] = float("nan")
    with pytest.raises(ExportError, match=r"'classifier\.weight' holds values that are not finite"):
        graph_of(model, rows_of((2, 9)))


def test_a_model_that_takes_one_batch_alone_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 4) * 2.0

    with pytest.raises(ExportError, match="PyTorch cannot trace"):
        graph_of(Fixed(), [{"x": torch.randn(2, 4)}])


def test_a_truncated_file_does_not_open(written: tuple[nn.Module, Path], tmp_path: Path) -> None:
    content = (written[1] / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match=r"cannot open 'model\.onnx'"):
        Session(tmp_path / FILE)


def test_what_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx_ir", None)
    with pytest.raises(MissingDependencyError, match=r"addenda\[onnx\]"):
        graph_of(encoder(), rows_of((2, 9)))
