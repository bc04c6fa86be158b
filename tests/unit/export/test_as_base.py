"""A merge in the base's own packing: the same bytes where nothing is adapted, the trained weights where it is."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_gguf
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import addenda
from addenda.bases import formats, load_base
from addenda.bases.packed_layers import packed_layers
from addenda.bases.place import in_float32
from addenda.core.layers import view_of
from addenda.core.through import merged_rows
from addenda.errors import ExportError
from addenda.export.as_base import audit_as_base, own_form, write_as_base
from addenda.export.formats.merged import FORMAT
from addenda.export.job import Job
from addenda.export.probes import probes_of
from addenda.export.run import export_adapter

needs_bitsandbytes = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("bitsandbytes", "accelerate")),
    reason="pip install -e '.[quantized]' for these",
)
UP = "model.layers.0.mlp.up_proj"
GATE = "model.layers.0.mlp.gate_proj"
WEIGHTS = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
FITTING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in float16 whose inner rows of 96 are no whole blocks of NF4."""
    root = tmp_path_factory.mktemp("dense")
    config = transformers.LlamaConfig(**{**tiny_gguf.LLAMA, "hidden_size": 64, "intermediate_size": 96})
    model = transformers.LlamaForCausalLM(config).eval()
    base = load_base(tiny_gguf.write_gguf(root / "tiny.gguf", model), cache_dir=root / "cache")
    base.model.half().save_pretrained(root / "base")
    base.tokenizer.save_pretrained(root / "base")
    return root / "base"


def attached(
    base: addenda.LoadedBase, targets: object = "all-linear", std: float = 0.2, **settings: object
) -> addenda.Handle:
    handle = addenda.attach(base.model, addenda.LoRA(rank=3), targets, seed=1, **settings)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=std)
    return handle


def written(base: addenda.LoadedBase, handle: addenda.Handle, to: Path) -> tuple[Job, dict[str, Tensor]]:
    job = Job(base.model, handle, probes_of(base), base, "base")
    to.mkdir(exist_ok=True)
    write_as_base(job, own_form(job), to)
    return job, load_file(to / WEIGHTS)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_that_changes_nothing_leaves_the_bases_own_codes(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    base = load_base(folder, weights=kind)
    layers = packed_layers(base.model)
    stored = load_file(folder / WEIGHTS)
    _, found = written(base, addenda.attach(base.model, addenda.LoRA(rank=3), "all-linear"), tmp_path / "out")
    assert layers
    for path, layer in layers.items():
        kept = {name: found.pop(name) for name in list(found) if name.startswith(path)}
        assert torch.equal(read_back(kept, path, layer.packed_shape), layer.dequantized())
        del stored[f"{path}.weight"]
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert all(found[name].dtype == torch.float16 for name in found)


def read_back(tensors: dict[str, Tensor], path: str, shape: tuple[int, int]) -> Tensor:
    """A weight from the tensors that bitsandbytes would read, by the definition of its layout."""
    codes = tensors[f"{path}.weight"]
    if codes.dtype == torch.int8:
        return codes.float() * tensors[f"{path}.SCB"][:, None] * (1 / 127)
    facts = json.loads(bytes(tensors[f"{path}.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert tuple(facts["shape"]) == shape
    levels = tensors[f"{path}.weight.quant_map"]
    pairs = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1, facts["blocksize"])
    return (levels[pairs.int()] * tensors[f"{path}.weight.absmax"][:, None]).view(shape)


@pytest.mark.parametrize("through", [None, "nf4"])
def test_adapted_weights_are_rounded_as_the_base_is(
    folder: Path, tmp_path: Path, through: str | None
) -> None:
    base = load_base(folder, weights="nf4")
    handle = attached(base, FITTING if through else "all-linear", through=through)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    _, found = written(base, handle, tmp_path / "out")
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
    entry = formats.get("NF4")
    packed = [path for path in handle.paths if path in packed_layers(base.model)]
    assert len(packed) == 12
    for path in packed:
        weight = read_back(found, path, packed_layers(base.model)[path].packed_shape)
        assert torch.equal(weight, entry.dequantize(merged_rows(handle, path, "NF4"), weight.shape[1]))
        if through:
            assert torch.equal(weight, handle.folded(path)[0]), "to the bit what was trained"


def test_a_dense_layer_of_a_packed_base_is_folded_and_others_stay(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, weights="nf4")
    down = "model.layers.0.mlp.down_proj"
    assert down not in packed_layers(base.model), "its rows are no whole blocks"
    _, found = written(base, attached(base, [down]), tmp_path / "out")
    stored = load_file(folder / WEIGHTS)[f"{down}.weight"]
    assert found[f"{down}.weight"].dtype == torch.float16
    assert (found[f"{down}.weight"] != stored).any()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert down in config["quantization_config"]["llm_int8_skip_modules"]
    assert UP not in config["quantization_config"]["llm_int8_skip_modules"]


@needs_bitsandbytes
def test_bitsandbytes_computes_with_the_weights_that_were_trained_through(
    folder: Path, tmp_path: Path
) -> None:
    base = load_base(folder, weights="nf4")
    handle = attached(base, FITTING, through="nf4")
    parity = export_adapter(base, handle, "merged", tmp_path / "out", type="base")
    assert parity.verdict == "passed", parity
    assert parity.real is not None
    assert parity.real.largest_difference < 1e-4, "the file itself is exact"
    again = load_base(tmp_path / "out", dtype=torch.float32)
    assert type(again.model.get_submodule(UP)).__name__ == "Linear4bit"
    assert "bitsandbytes" in (tmp_path / "out" / "README.md").read_text()


def test_without_bitsandbytes_it_is_written_and_said_to_be_unverified(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, find = load_base(folder, weights="nf4"), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    parity = export_adapter(base, attached(base), "merged", tmp_path / "out", type="base")
    assert parity.verdict == "unverified"
    assert "addenda[quantized]" in parity.words


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_lost_is_measured_in_bitsandbytes(folder: Path, tmp_path: Path, kind: str) -> None:
    base = load_base(folder, weights=kind)
    parity = export_adapter(base, attached(base), "merged", tmp_path / "out", type="base", allow_drift=True)
    assert parity.twin is not None
    assert parity.twin.exact
    assert parity.real is not None
    assert parity.real.largest_difference > parity.twin.largest_difference
    assert json.loads((tmp_path / "out" / "export.json").read_text())["type"] == "base"


def test_a_base_without_a_packing_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder)
    handle = attached(base)
    with pytest.raises(ExportError, match="weights are not packed") as caught:
        export_adapter(base, handle, "merged", tmp_path / "out", type="base")
    assert "bfloat16" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weights": "packed"}, "'--to gguf --type base' writes again"),
        ({}, "packed by torchao, which alone writes such"),
    ],
)
def test_packings_that_others_write_are_named(
    folder: Path, tmp_path: Path, changed: dict[str, str], words: str
) -> None:
    base = replace(load_base(folder), **changed)
    if not changed:
        base.model.config.quantization_config = {"quant_method": "torchao"}
    handle = attached(base)
    with pytest.raises(ExportError, match=words):
        own_form(Job(base.model, handle, probes_of(base), base, "base"))
    problems = FORMAT.problems(addenda.plan(load_base(folder).model, addenda.LoRA()), base.model, base)
    assert problems == (
        []
        if changed
        else ["the base keeps weights that torchao quantized, and folding would round them anew"]
    )


def test_a_tied_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, weights="nf4")
    base.model.lm_head.weight = base.model.model.embed_tokens.weight
    with pytest.raises(ExportError, match="'lm_head' shares its weight with"):
        export_adapter(base, attached(base, ["lm_head"]), "merged", tmp_path / "out", type="base")


def lost(base: addenda.LoadedBase, weights: dict[str, Tensor], ids: Tensor) -> float:
    """How far the adapted model's answers are from those of a model with these weights in its packed layers."""
    with torch.no_grad():
        wanted = base.model(ids).logits
        dense = transformers.LlamaForCausalLM(base.model.config).eval()
        state = dense.state_dict()
        own = {name: tensor for name, tensor in base.model.state_dict().items() if name in state}
        dense.load_state_dict({**state, **own, **{f"{path}.weight": w for path, w in weights.items()}})
        return float((dense(ids).logits - wanted).norm())


def test_care_keeps_more_of_a_small_change_than_plain_rounding(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, weights="nf4")
    handle = attached(base, FITTING, std=0.04)
    ids = torch.randint(5, 90, (16, 40))
    job = Job(base.model, handle, probes_of(base), base, calibration=({"input_ids": ids},))
    errors = []
    for kind in ("base", "careful"):
        each = replace(job, type=kind)
        (tmp_path / kind).mkdir()
        write_as_base(each, own_form(each), tmp_path / kind)
        assert audit_as_base(own_form(each), tmp_path / kind) == []
        tensors = load_file(tmp_path / kind / WEIGHTS)
        layers = packed_layers(base.model)
        weights = {path: read_back(tensors, path, layers[path].packed_shape) for path in handle.paths}
        errors.append(lost(base, weights | unadapted(base, handle), ids))
    assert errors[1] < 0.8 * errors[0]


def unadapted(base: addenda.LoadedBase, handle: addenda.Handle) -> dict[str, Tensor]:
    rest = packed_layers(base.model).keys() - set(handle.paths)
    return {path: packed_layers(base.model)[path].dequantized() for path in rest}


def test_care_needs_rows_of_the_task(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, weights="nf4")
    with pytest.raises(ExportError, match="needs rows of the task"):
        export_adapter(base, attached(base, FITTING), "merged", tmp_path / "out", type="careful")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- folders that bitsandbytes wrote

FORMS = {
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=FORMS)
def quantized(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base as transformers and bitsandbytes write it, computing in bfloat16, in several weight files."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    settings = transformers.BitsAndBytesConfig(**FORMS[request.param], bnb_4bit_compute_dtype=torch.bfloat16)
    made = tmp_path_factory.mktemp("quantized") / request.param
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=settings
    )
    model.save_pretrained(made, max_shard_size="30KB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(made)
    assert len(list(made.glob("*.safetensors"))) > 1
    return made


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_their_folder_keeps_its_bytes_where_nothing_changes(quantized: Path, tmp_path: Path) -> None:
    base = load_base(quantized)
    handle = attached(base, ["q_proj", "down_proj"])
    with torch.no_grad():
        handle.adapters[Q].B.zero_()
    before = tensors_in(quantized)
    job = Job(base.model, handle, probes_of(base), base, "base")
    write_as_base(job, own_form(job), tmp_path)
    after = tensors_in(tmp_path)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    down = {f"model.layers.{at}.mlp.down_proj.weight" for at in (0, 1)}
    assert down | {"model.layers.1.self_attn.q_proj.weight"} <= changed
    assert not any(name.startswith(Q) for name in changed)
    assert all(any(path in name for path in ("1.self_attn.q_proj", "down_proj")) for name in changed)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (quantized / "config.json").read_text()
    )
    assert audit_as_base(own_form(job), tmp_path) == []


def test_their_weights_are_rounded_as_bitsandbytes_rounds(quantized: Path, tmp_path: Path) -> None:
    import bitsandbytes

    base = load_base(quantized)
    handle = attached(base, "all-linear")
    job = Job(base.model, handle, probes_of(base), base, "base")
    write_as_base(job, own_form(job), tmp_path)
    again = load_base(tmp_path)
    for path in handle.paths:
        old, new = (view_of(each.model.get_submodule(path), path).exact_weight() for each in (base, again))
        with torch.no_grad():
            wanted, _ = handle.adapters[path].fold(old, None)
        layer = base.model.get_submodule(path)
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            codes, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(wanted.half())
            step = scale[:, None] / 127
            assert ((new - wanted).abs() <= 0.51 * step).all()
            continue
        codes, made = bitsandbytes.functional.quantize_4bit(
            wanted,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            compress_statistics=state.nested,
        )
        assert torch.equal(again.model.get_submodule(path).weight.data, codes)
        assert torch.equal(new, bitsandbytes.functional.dequantize_4bit(codes, made))


def test_care_writes_their_layout_too(quantized: Path, tmp_path: Path) -> None:
    base = load_base(quantized)
    handle = attached(base, FITTING)
    ids = torch.randint(5, 90, (8, 40))
    job = Job(base.model, handle, probes_of(base), base, "careful", calibration=({"input_ids": ids},))
    if quantized.name == "fp4":
        with pytest.raises(ExportError, match="int8 and NF4 in blocks of 64"):
            own_form(job)
        return
    write_as_base(job, own_form(job), tmp_path)
    assert audit_as_base(own_form(job), tmp_path) == []
    again = load_base(tmp_path)
    for path, merged in next(iter(job.kept.values())).items():
        found = view_of(again.model.get_submodule(path), path).exact_weight()
        wanted = merged.weight(found.shape[1])
        assert (found - wanted).norm() < 0.02 * wanted.norm(), "but for the rounding of the magnitudes"
        assert torch.equal(found.sign(), wanted.sign())


@pytest.mark.parametrize("kind", ["base", "float32"])
def test_their_base_goes_through_the_gate(quantized: Path, tmp_path: Path, kind: str) -> None:
    base = load_base(quantized)
    in_float32(base.model)
    handle = attached(base, "all-linear")
    parity = export_adapter(base, handle, "merged", tmp_path / "out", type=kind, allow_drift=True)
    assert parity.twin is not None
    assert parity.twin.exact
    again = load_base(tmp_path / "out")
    assert (type(again.model.get_submodule(Q)) is torch.nn.Linear) == (kind == "float32")
    if kind == "float32":
        assert parity.verdict == "passed", parity


# ------------------------------------------------------------------------------------------------------------ faults


def swap(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight"], tensors[f"{GATE}.weight"] = tensors[f"{GATE}.weight"], tensors[f"{UP}.weight"]


def halve(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight.absmax"][3:5] /= 2


def other_blocks(tensors: dict[str, Tensor]) -> None:
    name = f"{UP}.weight.quant_state.bitsandbytes__nf4"
    text = bytes(tensors[name].tolist()).replace(b'"blocksize": 64', b'"blocksize": 128')
    tensors[name] = torch.frombuffer(bytearray(text), dtype=torch.uint8)


def as_numbers(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight"] = torch.randn(96, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap, rf"'{UP}\.weight' holds what belongs to '{GATE}'"),
        (halve, rf"'{UP}\.weight\.absmax' is not as it was rounded at 2\.1% of its numbers"),
        (other_blocks, r'"blocksize": 128.*, not .*"blocksize": 64'),
        (as_numbers, rf"'{UP}\.weight' is \(96, 64\) float32, not \(3072, 1\) uint8"),
        (lambda t: t.pop(f"{UP}.weight.absmax"), rf"'{UP}\.weight\.absmax' is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "'extra' is there and should not be"),
    ],
)
def test_a_fault_is_named(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    base = load_base(folder, weights="nf4")
    job, tensors = written(base, attached(base), tmp_path)
    assert audit_as_base(own_form(job), tmp_path) == []
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    found = audit_as_base(own_form(job), tmp_path)
    assert any(re.search(words, each) for each in found), found


def test_a_layer_left_out_is_named(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, weights="nf4")
    handle = attached(base)
    with torch.no_grad():
        kept = handle.adapters[UP].B.clone()
        handle.adapters[UP].B.zero_()
        job, _ = written(base, handle, tmp_path)
        handle.adapters[UP].B.copy_(kept)
    found = audit_as_base(own_form(job), tmp_path)
    assert f"'{UP}.weight' is the base's own, without the adapter" in found


def test_settings_and_a_damaged_file_are_named(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, weights="nf4")
    job, _ = written(base, attached(base), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "quantization_config" in audit_as_base(own_form(job), tmp_path)[0]
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:1000])
    assert "cannot be read back" in audit_as_base(own_form(job), tmp_path)[0]
