"""GGUF adapters: written, proven in llama.cpp itself, read back; and every known fault of such files is named."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
import transformers

import addenda
from addenda.bases import load_base
from addenda.core import registry
from addenda.errors import CheckpointError, ConfigError, ExportError, MissingDependencyError
from addenda.export.foreign import foreign_adapter
from addenda.export.format import format_of, require_formats
from addenda.export.formats.gguf_lora import FILE, audit_adapter
from addenda.export.gguf.adapter import ALPHA, read_adapter, write_adapter
from addenda.export.gguf.factors import factors_of
from addenda.export.gguf.origin import origin_of
from addenda.export.job import Job
from addenda.export.probes import probes_of
from addenda.export.run import export_adapter
from addenda.export.runtimes import llama_cpp
from addenda.export.runtimes.llama_cpp import LlamaCpp

installed = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not installed (extra 'llamacpp')"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> addenda.LoadedBase:
    root = tmp_path_factory.mktemp("gguf")
    config = transformers.LlamaConfig(**{**tiny_gguf.LLAMA, "initializer_range": 0.15})
    path = tiny_gguf.write_gguf(
        root / "tiny.gguf", transformers.LlamaForCausalLM(config).eval(), quantize=["Q8_0"]
    )
    return load_base(path, cache_dir=root / "cache", weights="packed")


@pytest.fixture
def handle(base: addenda.LoadedBase) -> Iterator[addenda.Handle]:
    made = adapted(base, addenda.LoRA(rank=4, alpha=6.0, ranks={"down_proj": 2}), name="trained")
    yield made
    made.detach()


def adapted(
    base: addenda.LoadedBase, method: Any, targets: Any = "all-linear", **options: Any
) -> addenda.Handle:
    made = addenda.attach(base.model, method, targets, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.15)
    return made


def job_of(base: addenda.LoadedBase, handle: addenda.Handle) -> Job:
    return Job(base.model, handle, probes_of(base), base)


@installed
def test_it_answers_in_llama_cpp_as_trained(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    parity = export_adapter(base, handle, "gguf-lora", out)
    assert parity.verdict == "passed"
    assert parity.twin.runtime.startswith("llama.cpp")
    assert parity.twin.largest_difference < 1e-3 < parity.effect
    assert parity.real.effect_size.value == pytest.approx(1, abs=0.1)
    assert parity.chat.same_tokens == parity.chat.conversations >= 50
    assert sorted(path.name for path in out.iterdir()) == ["README.md", FILE, "export.json"]
    assert "llama-server -m BASE.gguf --lora adapter.gguf" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "settings",
    [{"name": "loha", "rank": 2}, {"name": "adalora", "target_rank": 4}, {"name": "vera"}],
    ids=str,
)
def test_any_method_whose_change_has_low_rank_is_carried(
    settings: dict[str, Any], base: addenda.LoadedBase, tmp_path: Path
) -> None:
    method = registry.get(settings["name"]).from_settings({k: v for k, v in settings.items() if k != "name"})
    made = adapted(base, method, ["q_proj", "k_proj", "up_proj"])
    origin = origin_of(base)
    write_adapter(made, origin, tmp_path / FILE)
    found = read_adapter(tmp_path / FILE, origin)
    for path, each in factors_of(made).items():
        weight, _ = made.folded(path)
        bare = base.model.get_submodule(path).dequantized()
        torch.testing.assert_close(bare + found[path].delta(), weight)
        torch.testing.assert_close(each.delta(), found[path].delta())
    made.detach()


@pytest.mark.parametrize(
    ("name", "targets", "text"),
    [
        ("dora", ["q_proj"], "'dora' is more at 'model.layers.0.self_attn.q_proj'"),
        ("ia3", None, "'ia3' is more at"),
        ("lora", ["lm_head"], "'lm_head' shares its weight"),
    ],
)
def test_what_it_cannot_carry_is_said_before_training(
    name: str, targets: Any, text: str, base: addenda.LoadedBase
) -> None:
    planned = addenda.plan(base.model, registry.get(name)(), targets)
    with pytest.raises(ConfigError, match=text):
        require_formats(["gguf-lora"], planned, base.model, base)


def test_a_module_that_was_not_loaded_has_no_such_form() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    planned = addenda.plan(model, addenda.LoRA(rank=1))
    [problem] = format_of("gguf-lora").problems(planned, model, None)
    assert "no GGUF form" in problem


def test_without_llama_cpp_it_is_written_and_said_to_be_unverified(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise MissingDependencyError("llama.cpp is not installed", hint="pip install 'addenda[llamacpp]'")

    monkeypatch.setattr("addenda.export.formats.gguf_lora.require_llama_cpp", missing)
    parity = export_adapter(base, handle, "gguf-lora", tmp_path / "out")
    assert parity.verdict == "unverified"
    assert "addenda[llamacpp]" in parity.words
    assert (tmp_path / "out" / FILE).is_file()


# ------------------------------------------------------------------------------------------- broken on purpose

Tensors = dict[str, np.ndarray]
Break = Callable[[Tensors, dict[str, Any]], None]
Q, K, DOWN = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_down.weight"


def unpermuted(name: str, heads: int) -> Break:
    def change(tensors: Tensors, meta: dict[str, Any]) -> None:
        B = tensors[f"{name}.lora_b"]
        tensors[f"{name}.lora_b"] = B.reshape(heads, -1, 2, B.shape[1]).swapaxes(1, 2).reshape(B.shape)

    return change


def dropped(*names: str) -> Break:
    return lambda tensors, meta: [tensors.pop(name) for name in names] and None


def swapped(one: str, other: str) -> Break:
    def change(tensors: Tensors, meta: dict[str, Any]) -> None:
        for half in ("lora_a", "lora_b"):
            first, second = f"{one}.{half}", f"{other}.{half}"
            tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def scaled(name: str, factor: float) -> Break:
    return lambda tensors, meta: tensors.update({name: tensors[name] * factor})


def one_bit(tensors: Tensors, meta: dict[str, Any]) -> None:
    bits = tensors[f"{DOWN}.lora_a"].copy()
    bits.reshape(-1).view(np.uint32)[7] ^= 1 << 23
    tensors[f"{DOWN}.lora_a"] = bits


def meta_of(key: str, value: Any) -> Break:
    return lambda tensors, meta: meta.update({key: value})


FAULTS: dict[str, tuple[Break, str]] = {
    "q not permuted": (unpermuted(Q, 4), "q_proj B' has its rows in the model's order"),
    "k not permuted": (unpermuted(K, 2), "k_proj B' has its rows in the model's order"),
    "no alpha": (meta_of(ALPHA, None), f"'{ALPHA}' is missing"),
    "another alpha": (meta_of(ALPHA, 3.0), "is scaled by 0.5"),
    "layers swapped": (
        swapped(DOWN, DOWN.replace("0", "1")),
        "holds what belongs to 'model.layers.1.mlp.down_proj",
    ),
    "target dropped": (
        dropped(f"{DOWN}.lora_a", f"{DOWN}.lora_b"),
        "'model.layers.0.mlp.down_proj A' is missing",
    ),
    "half dropped": (dropped(f"{DOWN}.lora_b"), "has one factor only"),
    "A transposed": (
        lambda tensors, meta: tensors.update({f"{DOWN}.lora_a": tensors[f"{DOWN}.lora_a"].T.copy()}),
        f"factors of '{DOWN}' are",
    ),
    "B zero": (scaled(f"{DOWN}.lora_b", 0.0), "down_proj B' is zero"),
    "scaling twice": (scaled(f"{DOWN}.lora_b", 1.5), "down_proj B' is scaled by 1.5"),
    "a bit flipped": (one_bit, "differs in 1 of"),
    "another architecture": (meta_of("general.architecture", "qwen2"), "its general.architecture is 'qwen2'"),
    "no adapter": (meta_of("general.type", "model"), "block_count"),
    "not finite": (scaled(f"{DOWN}.lora_a", float("nan")), "not finite"),
}


def rewrite(source: Path, target: Path, change: Break) -> None:
    reader = gguf.GGUFReader(source)
    tensors: Tensors = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    keys = ("general.architecture", "general.type", "adapter.type", ALPHA)
    meta = {key: reader.get_field(key).contents() for key in keys}
    change(tensors, meta)
    writer = gguf.GGUFWriter(target, meta["general.architecture"])
    writer.add_type(meta["general.type"])
    writer.add_string("adapter.type", meta["adapter.type"])
    if meta[ALPHA] is not None:
        writer.add_float32(ALPHA, meta[ALPHA])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_named(
    fault: str, base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    change, text = FAULTS[fault]
    write_adapter(handle, origin_of(base), tmp_path / FILE)
    job = job_of(base, handle)
    assert audit_adapter(job, tmp_path / FILE) == []
    rewrite(tmp_path / FILE, tmp_path / "broken.gguf", change)
    told = "; ".join(audit_adapter(job, tmp_path / "broken.gguf"))
    assert text in told


def test_a_cut_off_file_is_named(base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path) -> None:
    file = tmp_path / FILE
    write_adapter(handle, origin_of(base), file)
    file.write_bytes(file.read_bytes()[:-100])
    [told] = audit_adapter(job_of(base, handle), file)
    assert "past the end of the file" in told


@installed
def test_what_the_writer_gets_wrong_llama_cpp_shows(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer and a reader that forget the order of rows agree with each other, and the answers do not."""
    monkeypatch.setattr("addenda.bases.gguf_ways.Way.back", lambda way, weight: weight)
    monkeypatch.setattr("addenda.bases.gguf_ways.Way.there", lambda way, weight: weight)
    monkeypatch.setattr("addenda.export.gguf.told._unordered", lambda matrix, order: matrix + 1)
    with pytest.raises(ExportError, match="does not answer as the trained model does"):
        export_adapter(base, handle, "gguf-lora", tmp_path / "out", allow_drift=True)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_refused(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    write_adapter(handle, origin_of(base), tmp_path / FILE)
    rewrite(
        tmp_path / FILE,
        tmp_path / "other.gguf",
        lambda tensors, meta: tensors.update(
            {name.replace("blk.0", "blk.7"): tensors.pop(name) for name in list(tensors) if "blk.0" in name}
        ),
    )
    with pytest.raises(CheckpointError, match=r"the base has no tensor 'blk\.7"):
        read_adapter(tmp_path / "other.gguf", origin_of(base))


def test_an_adapter_that_somebody_made_answers_here_and_goes_out_as_it_came(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    ids = torch.arange(5, 30)[None]
    wanted = base.model(input_ids=ids).logits
    origin, file = origin_of(base), tmp_path / FILE
    write_adapter(handle, origin, file, base_name="tiny")
    with handle.disabled():
        foreign = foreign_adapter(tmp_path)
        assert foreign is not None
        assert foreign.base == "tiny"
        again = foreign.attach(base)
        torch.testing.assert_close(base.model(input_ids=ids).logits, wanted)
        assert not any(parameter.requires_grad for parameter in again.parameters())
        write_adapter(again, origin, tmp_path / "again.gguf", base_name="tiny")
        again.detach()
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def test_a_broken_foreign_adapter_leaves_the_model_as_it_was(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    write_adapter(handle, origin_of(base), tmp_path / FILE)
    rewrite(tmp_path / FILE, tmp_path / "bad.gguf", scaled(f"{DOWN}.lora_a", float("nan")))
    before = list(base.model.state_dict())
    with pytest.raises(CheckpointError, match="not finite"):
        foreign_adapter(tmp_path / "bad.gguf").attach(base)
    assert list(base.model.state_dict()) == before


@installed
def test_a_runtime_that_hung_up_is_asked_again_and_one_that_is_gone_is_not(
    base: addenda.LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = origin_of(base).path
    with LlamaCpp(path, exact=False, context=64, vocabulary=len(tiny_gguf.TOKENS)) as server:
        opened, failed = llama_cpp._OPENER.open, []

        def hanging_up(*given: Any, **more: Any) -> Any:
            if len(failed) < 2:
                failed.append(1)
                raise BrokenPipeError
            return opened(*given, **more)

        monkeypatch.setattr(llama_cpp._OPENER, "open", hanging_up)
        assert server.chat.encode("a")
        server._process.kill()
        server._process.wait()
        with pytest.raises(ExportError, match="does not answer"):
            server.chat.encode("a")
