"""Merged GGUF files: the base's bytes where nothing changed, proven in llama.cpp, every known fault named."""

from __future__ import annotations

import dataclasses
import importlib.util
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_gguf
import torch
import transformers

import addenda
from addenda.bases import load_base
from addenda.bases.gguf_header import read_header
from addenda.core import registry
from addenda.errors import ConfigError, ExportError
from addenda.export.format import require_formats
from addenda.export.formats.gguf import FILE
from addenda.export.gguf.copying import Changes, pack, read_tensor, unpack, write_like
from addenda.export.gguf.merging import TYPES, audit_merged, write_merged_gguf
from addenda.export.gguf.origin import Origin, dense, origin_of
from addenda.export.job import Job
from addenda.export.probes import probes_of
from addenda.export.run import export_adapter

installed = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not installed (extra 'llamacpp')"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> addenda.LoadedBase:
    root = tmp_path_factory.mktemp("gguf")
    config = transformers.LlamaConfig(**{**tiny_gguf.LLAMA, "initializer_range": 0.15})
    model = transformers.LlamaForCausalLM(config).eval()
    path = tiny_gguf.write_gguf(root / "tiny.gguf", model, quantize=["Q8_0", "Q4_1"])
    return load_base(path, cache_dir=root / "cache", weights="packed")


@pytest.fixture
def handle(base: addenda.LoadedBase) -> Iterator[addenda.Handle]:
    made = addenda.attach(base.model, addenda.LoRA(rank=4), ["q_proj", "k_proj", "down_proj"])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2)
    yield made
    made.detach()


def job_of(base: addenda.LoadedBase, handle: addenda.Handle) -> Job:
    return Job(base.model, handle, probes_of(base), base)


def numbers(file: Path, name: str) -> torch.Tensor:
    [tensor] = [each for each in read_header(file).tensors if each.name == name]
    with file.open("rb") as opened:
        return unpack(read_tensor(opened, tensor), tensor.type).reshape(tensor.shape)


@installed
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_it_answers_in_llama_cpp_as_trained(
    kind: str, base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    parity = export_adapter(base, handle, "gguf", out, type=kind)
    assert parity.verdict == "passed"
    assert parity.twin.largest_difference < 1e-3 < parity.effect
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "README.md", "export.json", FILE]
    told = (out / "Modelfile").read_text()
    assert told.startswith(f"FROM ./{FILE}\n")
    assert 'PARAMETER stop "<|im_end|>"' in told
    assert not list(tmp_path.glob(".*"))


def test_an_adapter_that_changes_nothing_leaves_the_bytes(base: addenda.LoadedBase, tmp_path: Path) -> None:
    handle = addenda.attach(base.model, addenda.LoRA(rank=2))
    origin = origin_of(base)
    write_merged_gguf(job_of(base, handle), origin, tmp_path / FILE, "base")
    assert (tmp_path / FILE).read_bytes() == origin.path.read_bytes()
    handle.detach()


@pytest.mark.parametrize(
    "kind",
    [kind for kind in TYPES if not kind.startswith("careful") and "_k" not in kind and "_xs" not in kind],
)
def test_every_tensor_is_in_the_type_that_was_asked_for(
    kind: str, base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    origin, file = origin_of(base), tmp_path / FILE
    if kind.startswith("iq"):
        pytest.importorskip("xllamacpp")
    write_merged_gguf(job_of(base, handle), origin, file, kind)
    adapted = {"attn_q", "attn_k", "ffn_down"}
    for tensor in gguf.GGUFReader(file).tensors:
        was, now = origin.tensors[tensor.name], tensor.tensor_type.name
        if len(was.shape) < 2 or kind == "base":
            assert now == was.type
        elif kind == "base+q8_0":
            assert now == ("Q8_0" if tensor.name.split(".")[-2] in adapted else was.type)
        else:
            assert now == kind.upper()
    assert audit_merged(job_of(base, handle), origin, file, kind) == []
    if kind not in {"base", "base+q8_0"}:
        key = gguf.GGUFReader(file).get_field("general.file_type")
        assert key is None or key.contents() == int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])


def test_folded_weights_lie_in_the_file_s_order(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    origin = origin_of(base)
    write_merged_gguf(job_of(base, handle), origin, tmp_path / FILE, "f32")
    for name, heads in (("q", 4), ("k", 2)):
        weight, _ = handle.folded(f"model.layers.1.self_attn.{name}_proj")
        torch.testing.assert_close(
            numbers(tmp_path / FILE, f"blk.1.attn_{name}.weight"), tiny_gguf.interleaved(weight, heads)
        )
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(numbers(tmp_path / FILE, "blk.0.ffn_up.weight"), dense(base.model, untouched))


def test_a_careful_merge_changes_the_layers_outputs_less(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    origin, rows = origin_of(base), torch.randint(5, 90, (6, 60))
    with pytest.raises(ExportError, match="needs rows of the task"):
        write_merged_gguf(job_of(base, handle), origin, tmp_path / "none.gguf", "careful")
    job = dataclasses.replace(
        job_of(base, handle), calibration=tuple({"input_ids": row[None]} for row in rows)
    )
    write_merged_gguf(job, origin, tmp_path / "careful.gguf", "careful")
    write_merged_gguf(job, origin, tmp_path / "plain.gguf", "base")
    assert audit_merged(job, origin, tmp_path / "careful.gguf", "careful") == []
    sizes = {(tmp_path / f"{each}.gguf").stat().st_size for each in ("careful", "plain")}
    assert len(sizes) == 1
    name = next(
        each
        for each in ("blk.0.ffn_down", "blk.1.ffn_down")
        if origin.tensors[f"{each}.weight"].type == "Q4_1"
    )
    path = f"model.layers.{name[4]}.mlp.down_proj"
    seen: list[torch.Tensor] = []
    hook = base.model.get_submodule(path).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        base.model(input_ids=rows)
    hook.remove()
    wanted, _ = handle.folded(path)
    errors = [
        float(
            (
                (numbers(tmp_path / f"{each}.gguf", f"{name}.weight") - wanted) @ seen[0].reshape(-1, 96).T
            ).norm()
        )
        for each in ("careful", "plain")
    ]
    assert errors[0] < 0.9 * errors[1]


def test_a_careful_merge_keeps_the_layers_wide_that_lose_most_up_to_a_tenth_of_the_file(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    origin, file, said = origin_of(base), tmp_path / FILE, []
    job = dataclasses.replace(
        job_of(base, handle),
        calibration=tuple({"input_ids": row[None]} for row in torch.randint(5, 90, (6, 60))),
        on_progress=said.append,
    )
    write_merged_gguf(job, origin, file, "careful+q8_0")
    there = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    changed = {name for name, kind in there.items() if kind != origin.tensors[name].type}
    adapted = {origin.way(path).tensor for path in handle.paths}
    assert changed
    assert changed <= adapted
    assert {there[name] for name in changed} == {"Q8_0"}
    assert origin.path.stat().st_size < file.stat().st_size <= 1.1 * origin.path.stat().st_size
    assert "try layers at Q8_0" in {each.task for each in said}
    before = len(said)
    assert audit_merged(job, origin, file, "careful+q8_0") == []
    assert "try layers at Q8_0" not in {each.task for each in said[before:]}  # found out once


def test_what_was_trained_through_a_type_is_in_the_file_to_the_bit(
    base: addenda.LoadedBase, tmp_path: Path
) -> None:
    handle = addenda.attach(base.model, addenda.LoRA(rank=4), ["q_proj", "up_proj"], through="q4_1")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.2)
    write_merged_gguf(job_of(base, handle), origin_of(base), tmp_path / FILE, "q4_1")
    again = load_base(tmp_path / FILE, cache_dir=tmp_path / "cache", weights="packed")
    for path in handle.paths:
        trained, _ = handle.folded(path)
        assert torch.equal(dense(again.model, f"{path}.weight"), trained)
    handle.detach()


def test_what_it_cannot_carry_is_said_before_training(base: addenda.LoadedBase) -> None:
    planned = addenda.plan(base.model, registry.get("reft")())
    with pytest.raises(ConfigError, match="cannot be merged"):
        require_formats(["gguf"], planned, base.model, base)


def test_a_bias_without_a_place_is_refused(base: addenda.LoadedBase, tmp_path: Path) -> None:
    handle = addenda.attach(base.model, addenda.LoRA(rank=2, bias=True), ["up_proj"])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    with pytest.raises(ExportError, match=r"no tensor for 'model\.layers\.0\.mlp\.up_proj\.bias'"):
        export_adapter(base, handle, "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    handle.detach()


# ------------------------------------------------------------------------------------------- broken on purpose


class Broken(Changes):
    """A good merged file with some raw rows changed."""

    def __init__(self, file: Path, change: Callable[[str, torch.Tensor, Any], torch.Tensor | None]) -> None:
        self.file, self.change = file, change

    def rows_of(self, tensor: Any) -> torch.Tensor | None:
        with self.file.open("rb") as opened:
            return self.change(tensor.name, read_tensor(opened, tensor), opened)


def rows_in_model_order(origin: Origin, name: str) -> Callable[..., torch.Tensor | None]:
    order = origin.ways[origin.parameters[name]].order
    return lambda tensor, rows, file: rows[order] if tensor == name else None


def layers_swapped(file: Path, one: str, other: str) -> Callable[..., torch.Tensor | None]:
    tensors = {each.name: each for each in read_header(file).tensors}
    pair = {one: tensors[other], other: tensors[one]}
    return lambda tensor, rows, opened: read_tensor(opened, pair[tensor]) if tensor in pair else None


def alike(file: Path) -> tuple[str, str]:
    """Tensors of two layers with the same shape in the same type."""
    tensors = [each for each in read_header(file).tensors if len(each.shape) == 2]
    return next(
        (one.name, other.name)
        for one in tensors
        for other in tensors
        if (one.shape, one.type) == (other.shape, other.type)
        if one.name.startswith("blk.0") and other.name.startswith("blk.1")
    )


def bit_flipped(name: str) -> Callable[..., torch.Tensor | None]:
    def change(tensor: str, rows: torch.Tensor, file: Any) -> torch.Tensor | None:
        if tensor == name:
            rows[3, 9] ^= 4
        return rows

    return change


def without_adapter(origin: Origin, name: str) -> Callable[..., torch.Tensor | None]:
    def change(tensor: str, rows: torch.Tensor, file: Any) -> torch.Tensor | None:
        with origin.path.open("rb") as own:
            return read_tensor(own, origin.tensors[name]) if tensor == name else None

    return change


def rounded_twice(file: Path, name: str) -> Callable[..., torch.Tensor | None]:
    [found] = [each for each in read_header(file).tensors if each.name == name]

    def change(tensor: str, rows: torch.Tensor, opened: Any) -> torch.Tensor | None:
        if tensor != name:
            return None
        return pack(unpack(pack(unpack(rows, found.type), "Q4_0", name), "Q4_0"), found.type, name)

    return change


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("q in model order", "'blk.0.attn_q.weight' has its rows in the model's order"),
        ("k in model order", "'blk.1.attn_k.weight' has its rows in the model's order"),
        ("layers swapped", "holds what belongs to 'blk.1."),
        ("bit flipped", "'blk.0.ffn_down.weight' differs in"),
        ("adapter left out", "'blk.0.attn_q.weight' is the base's own, without the adapter"),
        ("rounded twice", "'blk.0.ffn_down.weight' was rounded to Q4_0 on the way"),
    ],
)
def test_a_broken_tensor_is_named(
    fault: str, text: str, base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    origin, good, job = origin_of(base), tmp_path / "good.gguf", job_of(base, handle)
    write_merged_gguf(job, origin, good, "base")
    change = {
        "q in model order": lambda: rows_in_model_order(origin, "blk.0.attn_q.weight"),
        "k in model order": lambda: rows_in_model_order(origin, "blk.1.attn_k.weight"),
        "layers swapped": lambda: layers_swapped(good, *alike(good)),
        "bit flipped": lambda: bit_flipped("blk.0.ffn_down.weight"),
        "adapter left out": lambda: without_adapter(origin, "blk.0.attn_q.weight"),
        "rounded twice": lambda: rounded_twice(good, "blk.0.ffn_down.weight"),
    }[fault]()
    write_like(good, tmp_path / "bad.gguf", Broken(good, change))
    assert text in "; ".join(audit_merged(job, origin, tmp_path / "bad.gguf", "base"))


def _text(key: str, old: str, new: str) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert len(old) == len(new)
        assert old.encode() in data
        return data.replace(old.encode(), new.encode(), 1)

    return change


def _number(key: str, code: str, value: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = data.index(key.encode()) + len(key) + 4
        size = struct.calcsize(code)
        return data[:at] + struct.pack(code, value) + data[at + size :]

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            _number("llama.rope.freq_base", "<f", 500_000.0),
            "'llama.rope.freq_base' is 500000.0, in the base 10000.0",
        ),
        (
            _number("tokenizer.ggml.eos_token_id", "<I", 3),
            "'tokenizer.ggml.eos_token_id' is 3, in the base 2",
        ),
        (
            _number("tokenizer.ggml.add_bos_token", "<B", 1),
            "'tokenizer.ggml.add_bos_token' is True, in the base False",
        ),
        (_number("llama.attention.head_count", "<I", 8), "'llama.attention.head_count' is 8, in the base 4"),
        (_text("tokenizer.chat_template", "{{ m.role }}", "{{ m.mode }}"), "'tokenizer.chat_template' is"),
        (_text("tokenizer.ggml.tokens", "|im_start|", "|im_stars|"), "a list of the tokenizer's differs"),
        (lambda data: data[:-64], "past the end of the file"),
        (lambda data: data[:100], "it ends inside"),
    ],
)
def test_broken_metadata_is_named(
    change: Callable[[bytes], bytes],
    text: str,
    base: addenda.LoadedBase,
    handle: addenda.Handle,
    tmp_path: Path,
) -> None:
    origin, file, job = origin_of(base), tmp_path / FILE, job_of(base, handle)
    write_merged_gguf(job, origin, file, "base")
    file.write_bytes(change(file.read_bytes()))
    assert text in "; ".join(audit_merged(job, origin, file, "base"))


def test_a_file_of_another_base_is_told(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_gguf.LLAMA)).eval()
    tiny_gguf.write_gguf(tmp_path / FILE, model, quantize=["Q8_0", "Q4_1"])
    told = audit_merged(job_of(base, handle), origin_of(base), tmp_path / FILE, "base")
    assert len(told) > 10
