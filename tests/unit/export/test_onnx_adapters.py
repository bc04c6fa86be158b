"""Adapters switched over one session of ONNX Runtime: each answers as its own model, and without any, the base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import addenda
from addenda.core import registry
from addenda.core.handle import handles
from addenda.errors import ExportError
from addenda.export.format import format_of
from addenda.export.job import Job
from addenda.export.onnx.adapters import add_adapter, write_adapter
from addenda.export.probes import Probes
from addenda.export.run import export_adapter

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
from addenda.export.runtimes.onnxruntime import AdapterFile, Decoder, Session

SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def trained(model: nn.Module, method: addenda.Method, name: str, targets: object = None) -> addenda.Handle:
    handle = addenda.attach(model, method, targets or ["q_proj", "up_proj"], name=name, seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.3)
    return handle


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(5, 90, (1, n))} for n in (12, 25)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model, out = llama(), tmp_path_factory.mktemp("switched") / "out"
    handle = trained(model, addenda.LoRA(rank=2), "law")
    parity = export_adapter(
        model, handle, "onnx", out, type="float32-adapter", inputs=rows(), kind="next-token"
    )
    assert parity.verdict == "passed"
    card = (out / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    exec(card.replace("this folder", str(out)), made := {})
    assert len(made["answer"]) == 64
    handle.disable()
    return model, out


def test_several_take_turns_over_one_session(exported: tuple[nn.Module, Path]) -> None:
    model, out = exported
    style = trained(model, addenda.LoRA(rank=2), "style")
    assert add_adapter(style, out) == out / "style.onnx_adapter"
    session = Session(out / "model.onnx")
    files = {name: AdapterFile(out / f"{name}.onnx_adapter") for name in ("law", "style")}
    ids = torch.randint(5, 90, (14,))
    for name in ("law", "", "style", "law"):
        addenda.activate(model, [name] if name else [])
        with torch.no_grad():
            wanted = model(input_ids=ids[None]).logits[0]
        decoder = Decoder(session, files.get(name))
        found = torch.cat([decoder.read(piece) for piece in ids.split(6)])
        assert torch.allclose(found, wanted, atol=1e-5), name
    style.detach()


def test_an_adapter_that_does_not_fit_is_refused(exported: tuple[nn.Module, Path]) -> None:
    model, out = exported
    others = {
        "its method or its settings are others": trained(model, addenda.LoRA(rank=2, alpha=1), "alpha"),
        "another shape": trained(model, addenda.LoRA(rank=3), "rank"),
        "it has no 'model.layers.0.mlp.up_proj": trained(model, addenda.LoRA(rank=2), "few", ["q_proj"]),
        "the graph has no 'model.layers.0.self_attn.v_proj": trained(
            model, addenda.LoRA(rank=2), "more", ["q_proj", "v_proj", "up_proj"]
        ),
    }
    for message, handle in others.items():
        with pytest.raises(ExportError) as caught:
            add_adapter(handle, out)
        assert message in str(caught.value)
        assert not (out / f"{handle.name}.onnx_adapter").exists()
        handle.detach()


def test_faults_in_an_adapters_file_are_found(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    import onnxruntime

    model, out = exported
    job = Job(model, handles(model)["law"], Probes(tuple(rows()), "next-token"), type="float32-adapter")
    form, path = format_of("onnx"), tmp_path / "law.onnx_adapter"
    for name in ("model.onnx", "law.onnx_adapter"):
        shutil.copy(out / name, tmp_path / name)
    assert form.audit(job, tmp_path) == []
    held = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    values = {name: torch.from_numpy(value.numpy().copy()) for name, value in held.items()}
    first, last = min(values), max(values)
    write_adapter({**values, first: values[first] + 1e-6}, path)
    found = form.audit(job, tmp_path)
    assert found == [f"'law.onnx_adapter' holds other values than the trained '{first.removesuffix('.T')}'"]
    write_adapter({name: value for name, value in values.items() if name != last}, path)
    assert form.audit(job, tmp_path) == [f"'law.onnx_adapter' has no '{last.removesuffix('.T')}'"]
    path.write_bytes(path.read_bytes()[:40])
    assert form.audit(job, tmp_path)[0].startswith("'law.onnx_adapter' cannot be read")
    with pytest.raises(ExportError, match=r"cannot open 'law\.onnx_adapter'"):
        form.open(job, tmp_path, exact=True)


def test_a_method_that_does_more_than_add_is_refused(tmp_path: Path) -> None:
    model = llama()
    handle = trained(model, registry.get("dora")(rank=2), "law")
    with pytest.raises(ExportError, match="does not just add to the output of"):
        export_adapter(
            model, handle, "onnx", tmp_path / "out", type="float32-adapter", inputs=rows(), kind="next-token"
        )
    assert not list(tmp_path.iterdir())
