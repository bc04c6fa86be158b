"""The format ``onnx``: written, proven in ONNX Runtime, read back; what is wrong with a file is found and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_gguf
import torch
import transformers
from torch import nn

import addenda
from addenda.bases import load_base
from addenda.core import registry
from addenda.errors import ExportError
from addenda.export.format import format_of
from addenda.export.job import Job
from addenda.export.onnx.writing import save
from addenda.export.probes import Probes, answer
from addenda.export.run import export_adapter

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")

SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


class Block(nn.Module):
    """Two matrices and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.norm = nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(states + self.query(states).sigmoid() * self.value(states))


class Encoder(nn.Module):
    """Classifies sentences; small, for it is traced often."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(90, 32), nn.Linear(32, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states, seen = self.embed(input_ids), attention_mask[..., None]
        for block in self.blocks:
            states = block(states)
        return self.head((states * seen).sum(1) / seen.sum(1))


def encoder() -> nn.Module:
    return Encoder().eval()


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


def used(folder: Path) -> dict[str, Any]:
    """Run the code of an export's card, and return what it made."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    made: dict[str, Any] = {}
    exec(code.replace("this folder", str(folder)), made)
    return made


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
    assert used(tmp_path / "out")["output"].shape == (1, 3)


def test_an_adapter_that_no_weight_can_hold_is_traced_with_its_forward(tmp_path: Path) -> None:
    model = encoder()
    handle = trained(model, registry.get("bottleneck")(), ["blocks.0.value"])
    parity = export_adapter(model, handle, "onnx", tmp_path / "out", inputs=sentences(), kind="classes")
    assert parity.verdict == "passed"


@pytest.mark.slow
def test_packed_weights_are_unpacked_and_come_with_their_tokenizer(tmp_path: Path) -> None:
    source = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_gguf.LLAMA)).eval()
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", source, quantize=["Q4_1", "Q8_0"])
    base = load_base(path, cache_dir=tmp_path / "cache", weights="packed")
    handle = trained(base.model, targets="all-linear")
    raw = {name: value.clone() for name, value in base.model.state_dict().items()}
    parity = export_adapter(base, handle, "onnx", tmp_path / "out")
    assert parity.verdict == "passed"
    assert 0 < len(used(tmp_path / "out")["answer"]) <= 64
    assert all(torch.equal(value, raw[name]) for name, value in base.model.state_dict().items())
    unfoldable = addenda.plan(base.model, registry.get("bottleneck")())
    [problem] = format_of("onnx").problems(unfoldable, base.model, base)
    assert problem == "method 'bottleneck' cannot be folded into weights, and the base's are packed"


@pytest.mark.parametrize("type", ["float16", "int8"])
def test_rounded_files_are_smaller_and_say_what_they_lost(type: str, tmp_path: Path) -> None:
    model = encoder()
    handle, rows = trained(model), sentences()
    parity = export_adapter(
        model, handle, "onnx", tmp_path / "out", type=type, inputs=rows, kind="classes", allow_drift=True
    )
    assert parity.twin is not None
    assert parity.real is not None
    assert parity.twin.exact
    assert parity.real.largest_difference > parity.twin.largest_difference
    assert parity.real.effect_cosine.value > 0.9
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "out" / "model.onnx").stat().st_size < weights
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


# ----------------------------------------------------------------------------------------------------------- faults


QUERY, OTHER = "blocks.0.query", "blocks.1.query"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    torch.manual_seed(0)
    model = encoder()
    handle = trained(model)
    job = Job(model, handle, Probes(tuple(sentences()), "classes"), type="float32")
    folder = tmp_path_factory.mktemp("written")
    format_of("onnx").write(job, folder)
    return job, folder


def edited(written: tuple[Job, Path], folder: Path, change: Callable[[Any], None]) -> list[str]:
    """Change a copy of the written graph, and return what reading it back finds."""
    import onnx_ir

    model = onnx_ir.load(written[1] / "model.onnx")
    change(model.graph)
    onnx_ir.save(model, folder / "model.onnx")
    return format_of("onnx").audit(written[0], folder)


def put(graph: Any, name: str, tensor: torch.Tensor) -> None:
    import onnx_ir

    graph.initializers[name].const_value = onnx_ir.tensor(tensor.contiguous().numpy(), name=name)


def values(graph: Any, name: str) -> torch.Tensor:
    return torch.from_numpy(graph.initializers[name].const_value.numpy().copy())


def test_an_untouched_file_reads_back_as_meant(written: tuple[Job, Path], tmp_path: Path) -> None:
    assert edited(written, tmp_path, lambda graph: None) == []


def test_one_changed_number_is_found(written: tuple[Job, Path], tmp_path: Path) -> None:
    name = f"{QUERY}.weight.T"

    def change(graph: Any) -> None:
        weight = values(graph, name)
        weight[3, 4] += 1e-6
        put(graph, name, weight)

    assert edited(written, tmp_path, change) == [
        f"'{QUERY}.weight' holds other values than the trained model"
    ]


def test_swapped_layers_are_found(written: tuple[Job, Path], tmp_path: Path) -> None:
    def change(graph: Any) -> None:
        first, second = (values(graph, f"{path}.weight.T") for path in (QUERY, OTHER))
        put(graph, f"{QUERY}.weight.T", second)
        put(graph, f"{OTHER}.weight.T", first)

    assert sorted(edited(written, tmp_path, change)) == [
        f"'{path}.weight' holds other values than the trained model" for path in (QUERY, OTHER)
    ]


def test_a_layer_that_computes_with_another_ones_weight_is_found(
    written: tuple[Job, Path], tmp_path: Path
) -> None:
    def change(graph: Any) -> None:
        first, second = (graph.initializers[f"{path}.weight.T"] for path in (QUERY, OTHER))
        [(node, index)], [(other, place)] = (list(value.uses()) for value in (first, second))
        node.replace_input_with(index, second)
        other.replace_input_with(place, first)

    assert sorted(edited(written, tmp_path, change)) == [
        f"'{QUERY}' computes with '{OTHER}.weight'",
        f"'{OTHER}' computes with '{QUERY}.weight'",
    ]


def test_a_target_that_was_not_folded_is_found(written: tuple[Job, Path], tmp_path: Path) -> None:
    bare = dict(written[0].model.named_parameters())[f"{QUERY}.weight"].detach()
    found = edited(written, tmp_path, lambda graph: put(graph, f"{QUERY}.weight.T", bare.T))
    assert found == [f"'{QUERY}.weight' holds other values than the trained model"]


def test_a_truncated_file_is_found(written: tuple[Job, Path], tmp_path: Path) -> None:
    content = (written[1] / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[:-4000])
    [found] = format_of("onnx").audit(written[0], tmp_path)
    assert found.startswith("'model.onnx' cannot be read")


def test_weights_too_many_for_one_file_lie_beside_it(
    written: tuple[Job, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from addenda.export.onnx import writing

    monkeypatch.setattr(writing, "_ONE_FILE", 1024)
    job, form = written[0], format_of("onnx")
    form.write(job, tmp_path)
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size >= 4 * sum(parameter.numel() for parameter in job.handle.parameters())
    assert form.audit(job, tmp_path) == []
    with form.open(job, tmp_path, exact=True) as runtime:
        row = job.probes.rows[0]
        assert torch.allclose(runtime.answer(row, "classes"), answer(job.model, row, "classes"), atol=1e-5)
    data.write_bytes(data.read_bytes()[:-8000])
    [found] = form.audit(job, tmp_path)
    assert "cannot be read" in found


def test_a_scale_that_was_changed_is_found(written: tuple[Job, Path], tmp_path: Path) -> None:
    import onnx_ir

    job = dataclasses.replace(written[0], type="int8")
    format_of("onnx").write(job, tmp_path)
    assert format_of("onnx").audit(job, tmp_path) == []
    model = onnx_ir.load(tmp_path / "model.onnx")
    name = f"{QUERY}.weight.T.scale"
    put(model.graph, name, values(model.graph, name) * 1.02)
    onnx_ir.save(model, tmp_path / "changed.onnx")
    (tmp_path / "changed.onnx").rename(tmp_path / "model.onnx")
    assert format_of("onnx").audit(job, tmp_path) == [
        f"'{QUERY}.weight' holds other values than the trained model"
    ]


def test_what_reading_back_finds_stops_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from addenda.export.formats import onnx

    def spoilt(graph: Any, folder: Path) -> None:
        put(graph.graph, "head.bias", torch.zeros(3) + 0.5)
        save(graph, folder)

    monkeypatch.setattr(onnx, "save", spoilt)
    model = encoder()
    with pytest.raises(ExportError, match=r"'head\.bias' holds other values"):
        export_adapter(model, trained(model), "onnx", tmp_path / "out", inputs=sentences(), kind="classes")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_a_decoder_cannot_carry_is_said_beforehand() -> None:
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2)
    base = SimpleNamespace(model=transformers.LlamaForCausalLM(config).eval(), kind="causal-lm")
    said = {
        name: format_of("onnx").problems(addenda.plan(base.model, registry.get(name)()), base.model, base)
        for name in ("prefix-tuning", "shadow", "lily", "reft", "lora", "bottleneck")
    }
    assert "positions in front of each sequence" in said["prefix-tuning"][0]
    assert "acts on a sequence as a whole" in said["shadow"][0]
    assert "averages over a sequence" in said["lily"][0]
    assert "ONNX has no operator" in said["reft"][0]
    assert said["lora"] == said["bottleneck"] == []


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
