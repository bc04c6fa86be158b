"""A base that came as safetensors is exported to GGUF like one that came from such a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_causal
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers

import addenda
from addenda.bases import formats, load_base
from addenda.bases.gguf_header import read_header
from addenda.bases.packed_layers import pack_linears
from addenda.errors import ConfigError
from addenda.export.bundle import write_bundle
from addenda.export.format import format_of, require_formats
from addenda.export.gguf.made import made_gguf
from addenda.export.gguf.origin import dense, origin_of
from addenda.export.gguf.writing import write_base
from addenda.export.job import Job
from addenda.export.own import OwnTensors, narrowest
from addenda.export.probes import answer, probes_of
from addenda.export.run import export_adapter

installed = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not installed (extra 'llamacpp')"
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADDENDA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def saved(folder: Path, family: str, splitting: Any = None, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder with a byte-level tokenizer, as a hub has it."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*control, *letters, "th", "the"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = splitting or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=control[1], eos_token=control[2], pad_token=control[0]
    )
    tokenizer.chat_template = TEMPLATE
    tiny_causal.tiny_model(family).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(base: addenda.LoadedBase) -> addenda.Handle:
    handle = addenda.attach(base.model, addenda.LoRA(rank=4, alpha=6.0), "all-linear")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.15)
    return handle


@installed
@pytest.mark.parametrize(
    ("family", "to"),
    [("llama", "gguf"), ("gemma2", "gguf"), ("granite", "gguf-lora"), ("gemma2", "gguf-lora")],
)
def test_it_answers_in_llama_cpp_as_trained(family: str, to: str, tmp_path: Path) -> None:
    base = load_base(saved(tmp_path / "base", family))
    parity = export_adapter(base, adapted(base), to, tmp_path / "out")
    assert parity.verdict == "passed"
    assert parity.twin.largest_difference < parity.twin.limit < parity.effect
    # llama.cpp reads the GELU of a Gemma from a table of float16 numbers; what that changes is asked of the model.
    least, most = (1.3e-3, 0.1) if family == "gemma2" else (0.999e-3, 1.3e-3)
    assert least < parity.twin.limit < most
    assert parity.chat.same_tokens == parity.chat.conversations


@installed
def test_an_adapter_that_is_switched_leaves_nothing_in_the_runtime(tmp_path: Path) -> None:
    base = load_base(saved(tmp_path / "base", "qwen3"))
    job = Job(base.model, adapted(base), probes_of(base), base)
    (tmp_path / "out").mkdir()
    form, rows = format_of("gguf-lora"), job.probes.rows
    form.write(job, tmp_path / "out")
    with form.open(job, tmp_path / "out", exact=True) as runtime:
        for _ in range(2):
            list(runtime.answers(rows, "next-token", adapted=False))
            for row, found in zip(rows, runtime.answers(rows, "next-token"), strict=True):
                torch.testing.assert_close(found, answer(base.model, row, "next-token"), atol=1e-3, rtol=0)


def test_the_file_holds_the_weights_exactly_and_is_made_once(tmp_path: Path, home: Path) -> None:
    base = load_base(saved(tmp_path / "base", "llama", dtype=torch.bfloat16))
    file = made_gguf(base)
    written = file.stat().st_mtime_ns
    adapted(base)  # an adapter on it makes no other base of it
    assert made_gguf(base) == file
    assert file.stat().st_mtime_ns == written
    assert file.is_relative_to(home)
    assert {tensor.type for tensor in read_header(file).tensors} == {"BF16", "F32"}
    origin = origin_of(base)
    for tensor in gguf.GGUFReader(file).tensors:
        name = origin.parameters[tensor.name]
        found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        there = origin.ways[name].there(found.view(origin.tensors[tensor.name].shape))
        torch.testing.assert_close(there, dense(base.model, name).float(), rtol=0, atol=0)


def test_a_folder_that_bears_a_registered_name_is_no_registered_model(tmp_path: Path, home: Path) -> None:
    base = load_base(saved(tmp_path / "smollm2-135m-instruct", "llama"))
    assert origin_of(base).path.is_relative_to(home)


def test_other_weights_make_another_file(tmp_path: Path) -> None:
    one, other = (load_base(saved(tmp_path / name / "base", "qwen2")) for name in ("one", "other"))
    assert made_gguf(one) != made_gguf(other)


def test_packed_weights_are_unpacked(tmp_path: Path) -> None:
    base = load_base(saved(tmp_path / "base", "llama"))
    before = dict(OwnTensors(base.model))
    pack_linears(base.model, formats.get("Q8_0"), keep=base.model.get_output_embeddings())
    state = OwnTensors(base.model)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0.02)
    write_base(base, tmp_path / "model.gguf")
    assert read_header(tmp_path / "model.gguf").elements == sum(tensor.numel() for tensor in state.values())


@installed
def test_a_bundle_takes_the_made_file_along(tmp_path: Path) -> None:
    base = load_base(saved(tmp_path / "base", "llama"))
    write_bundle(base, adapted(base), [("gguf-lora", None)], tmp_path / "bundle", with_base=True)
    assert (tmp_path / "bundle" / "base.gguf").read_bytes() == made_gguf(base).read_bytes()


def test_what_llama_cpp_has_no_place_for_is_refused_before_training(tmp_path: Path) -> None:
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    base = load_base(saved(tmp_path / "base", "llama", words))
    planned = addenda.plan(base.model, addenda.LoRA(), "all-linear")
    with pytest.raises(ConfigError, match=r"splits text by .*Whitespace"):
        require_formats(["gguf", "gguf-lora"], planned, base.model, base)


@pytest.mark.parametrize("to", ["gguf", "gguf-lora"])
def test_transposed_weights_are_refused_before_training(to: str, tmp_path: Path) -> None:
    base = load_base(saved(tmp_path / "base", "gpt2"))
    planned = addenda.plan(base.model, addenda.LoRA(), "all-linear")
    with pytest.raises(ConfigError, match=r"'transformer\.h\.0\.attn\.c_attn' lies transposed"):
        require_formats([to], planned, base.model, base)


@pytest.mark.parametrize(
    ("value", "kind"), [(1.0, "BF16"), (1 + 2**-10, "F16"), (2.0**100, "BF16"), (1 + 2**-20, "F32")]
)
def test_the_narrowest_kind_loses_nothing(value: float, kind: str) -> None:
    assert narrowest({"norm": torch.tensor([0.1]), "matrix": torch.full((2, 2), value)}) == kind
