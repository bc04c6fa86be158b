"""A GGUF file loaded with its weights kept packed: the same model as with unpacked ones, in the file's own bytes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import gguf as gguf_library
import numpy
import psutil
import pytest
import tiny_gguf
import torch
import transformers
from torch import nn

import addenda
from addenda.bases import load_base, weights
from addenda.bases.generate import generate
from addenda.bases.packed import PackedModel
from addenda.bases.packed_folder import _scale_of
from addenda.bases.packed_layers import PackedEmbedding, PackedLinear, packed_layers
from addenda.core import fingerprint
from addenda.errors import BaseModelError, CheckpointError

TOKENS, write_gguf = tiny_gguf.TOKENS, tiny_gguf.write_gguf

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def tiny() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_gguf.LLAMA)).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a model whose matrices are in five formats, and its cache beside it."""
    return write_gguf(tmp_path_factory.mktemp("packed") / "tiny.gguf", tiny(), quantize=FORMATS)


def loaded(path: Path, weights: str = "packed", **options: object) -> addenda.LoadedBase:
    return load_base(path, cache_dir=path.parent / "cache", weights=weights, **options)  # type: ignore[arg-type]


def logits(base: addenda.LoadedBase, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scores: torch.Tensor = base.model(ids).logits
    return scores


def test_it_answers_as_the_unpacked_model(file: Path) -> None:
    packed, dense = loaded(file), loaded(file, "dense")
    ids = torch.randint(0, len(TOKENS), (2, 17))
    ours, theirs = logits(packed, ids), logits(dense, ids)
    assert (ours - theirs).abs().max() < 2e-3 * theirs.abs().max()  # the dense ones are stored in float16
    assert (packed.weights, dense.weights) == ("packed", "dense")
    assert packed.notes[0].startswith("weights kept packed as in GGUF (5 tensors F32, 3 tensors")
    assert packed.describe()["parameters"] == dense.describe()["parameters"]


def test_its_numbers_are_those_of_the_unpacked_model_before_rounding(file: Path) -> None:
    packed, dense = loaded(file), loaded(file, "dense").model.state_dict()
    for path, layer in packed_layers(packed.model).items():
        assert torch.equal(layer.dequantized().half().float(), dense[f"{path}.weight"]), path


def test_what_is_held_are_the_files_own_bytes(file: Path) -> None:
    base = loaded(file)
    layers = packed_layers(base.model)
    assert len(layers) == 16
    head, table = base.model.lm_head, base.model.get_input_embeddings()
    assert isinstance(head, PackedLinear)
    assert isinstance(table, PackedEmbedding)
    assert head.raw is table.raw
    raw = {tensor.name: tensor.data for tensor in gguf_library.GGUFReader(file).tensors}
    down = base.model.model.layers[1].mlp.down_proj
    assert torch.equal(down.raw, torch.from_numpy(raw["blk.1.ffn_down.weight"].copy()))


def test_every_stage_runs_on_it_and_its_adapter_comes_back(file: Path, tmp_path: Path) -> None:
    base = loaded(file)
    packed = PackedModel(base.model)
    assert packed.path == "packed"
    assert dict(packed.fused) == {"RMS norm": 5, "gated MLP": 2, "self-attention": 2}
    handle = addenda.attach(base.model, addenda.LoRA(rank=2), seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.3)
    addenda.save(base.model, tmp_path / "adapter")
    prompts = [[{"role": "user", "content": "the"}]]
    answer = generate(base, prompts, max_new_tokens=8)
    again = loaded(file)
    addenda.load(again.model, tmp_path / "adapter")
    assert generate(again, prompts, max_new_tokens=8) == answer
    dense = loaded(file, "dense")
    assert fingerprint(dense.model) != fingerprint(again.model)
    with pytest.raises(CheckpointError, match="another base"):
        addenda.load(dense.model, tmp_path / "adapter")


def test_it_computes_in_the_dtype_that_is_asked_for(file: Path) -> None:
    narrow, wide = loaded(file, dtype=torch.bfloat16), loaded(file)
    ids = torch.randint(0, len(TOKENS), (1, 9))
    ours, theirs = logits(narrow, ids), logits(wide, ids)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()
    assert fingerprint(narrow.model) == fingerprint(wide.model)


def test_tensors_that_cannot_stay_packed_are_named_and_auto_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny(), quantize=["MXFP4"])
    with pytest.raises(BaseModelError, match=r"tensor 'token_embd\.weight' is in format MXFP4") as caught:
        loaded(path)
    assert "base.weights=dense" in caught.value.hint
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    base = loaded(path, "auto")
    assert base.weights == "dense"
    assert base.weights_reason.startswith("dense weights would take 0.00 GB of the 0.00 GB available, more")
    assert "MXFP4" in base.weights_reason


def test_stacked_experts_are_refused(tmp_path: Path) -> None:
    extra = {"blk.0.ffn_up_exps.weight": numpy.zeros((4, 96, 64), dtype=numpy.float32)}
    path = write_gguf(tmp_path / "experts.gguf", tiny(), quantize=["Q8_0"], tensors=extra)
    with pytest.raises(BaseModelError, match=r"'blk\.0\.ffn_up_exps\.weight' stacks 4 matrices"):
        loaded(path)


def test_a_folder_of_dense_weights_is_not_called_packed(llama_folder: Path) -> None:
    with pytest.raises(BaseModelError, match="the weights of 'tiny-llama' are dense, not packed"):
        load_base(llama_folder, weights="packed")
    assert load_base(llama_folder).weights == "dense"


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_any_model_is_packed_when_it_is_loaded(name: str, llama_folder: Path) -> None:
    base, dense = load_base(llama_folder, weights=name), load_base(llama_folder)  # type: ignore[arg-type]
    packed = packed_layers(base.model)
    # The down projection's rows of 96 are no whole blocks of 64; the head is tied to the embedding.
    widths = {layer.width for layer in packed.values()}
    assert (len(packed), widths) == ((12, {64}) if name == "nf4" else (14, {64, 96}))
    assert type(base.model.lm_head) is nn.Linear
    assert base.weights == name
    assert base.notes[-1] == f"{len(packed)} linear layers packed as {name.upper()} when they were loaded"
    ids = torch.randint(4, 60, (1, 12))
    ours, theirs = logits(base, ids), logits(dense, ids)
    assert 0 < (ours - theirs).norm() < (0.3 if name == "nf4" else 0.03) * theirs.norm()
    again = load_base(llama_folder, weights=name)  # type: ignore[arg-type]
    assert fingerprint(again.model) == fingerprint(base.model) != fingerprint(dense.model)
    assert addenda.attach(base.model, addenda.LoRA(rank=2)).paths


def test_an_encoder_is_packed_too(bert_folder: Path) -> None:
    base, dense = load_base(bert_folder, weights="int8"), load_base(bert_folder)
    ids = torch.randint(4, 60, (1, 12))
    with torch.no_grad():
        ours, theirs = base.model(ids)[0], dense.model(ids)[0]
    assert len(packed_layers(base.model)) == 13
    assert 0 < (ours - theirs).norm() < 0.03 * theirs.norm()


def test_raw_rows_of_another_model_are_refused(file: Path, tmp_path: Path) -> None:
    base = loaded(file)
    config = base.folder / "config.json"
    settings = {**json.loads(config.read_text()), "intermediate_size": 64}
    other = tmp_path / "copied"
    other.mkdir()
    for path in base.folder.iterdir():
        if path.name != "manifest.json":
            (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BaseModelError, match=r"do not fit 'config\.json'"):
        load_base(other)


def test_the_form_follows_the_memory_there_is() -> None:
    parameters = 10**8
    assert weights.choose("auto", parameters=parameters, itemsize=4, available=8 * parameters).form == "dense"
    assert (
        weights.choose("auto", parameters=parameters, itemsize=4, available=8 * parameters - 1).form
        == "packed"
    )
    assert (
        weights.choose("auto", parameters=parameters, itemsize=2, available=8 * parameters - 1).form
        == "dense"
    )
    assert weights.choose("packed", parameters=1, itemsize=4, available=10**12).form == "packed"


class Doubled(nn.Embedding):
    """An embedding that scales what it looks up, as Gemma's."""

    embed_scale = 2.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


class Shifted(nn.Embedding):
    """One that does what no scale does."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1


def test_a_scale_on_an_embedding_is_found_and_anything_more_refused() -> None:
    assert _scale_of("e", nn.Embedding(9, 4)) is None
    assert _scale_of("e", Doubled(9, 4, padding_idx=7)) == 2.0
    with pytest.raises(BaseModelError, match=r"'e' \(Shifted\) does more"):
        _scale_of("e", Shifted(9, 4))
