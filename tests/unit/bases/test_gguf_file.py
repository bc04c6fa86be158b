from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import tiny_gguf
import torch
import transformers

from addenda.bases import gguf_file, load_base
from addenda.bases.gguf_convert import _convert_dense, _empty_model
from addenda.bases.gguf_header import read_header
from addenda.core.progress import Progress
from addenda.errors import BaseModelError, UnsafeError

LLAMA, TEMPLATE, TOKENS, write_gguf = (
    tiny_gguf.LLAMA,
    tiny_gguf.TEMPLATE,
    tiny_gguf.TOKENS,
    tiny_gguf.write_gguf,
)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, model):
    """A GGUF file loaded once: the base, the file, the cache, and what was reported."""
    root = tmp_path_factory.mktemp("gguf")
    path = write_gguf(root / "Tiny Model.gguf", model)
    events: list[Progress] = []
    return load_base(path, cache_dir=root / "cache", on_progress=events.append), path, root / "cache", events


def test_a_gguf_file_answers_as_the_model_it_was_made_from(converted, model) -> None:
    base = converted[0]
    ids = torch.randint(0, len(TOKENS), (2, 17))
    with torch.no_grad():
        ours, theirs = base.model(ids).logits, model(ids).logits
    # random float32 weights are stored as float16
    assert (ours - theirs).abs().max() < 2e-3 * theirs.abs().max()
    assert base.model.dtype == torch.float32
    assert base.model.lm_head.weight is base.model.get_input_embeddings().weight
    assert torch.equal(
        base.model.get_input_embeddings().weight, model.get_input_embeddings().weight.half().float()
    )


def test_tokenizer_template_and_end_token_come_with_the_file(converted) -> None:
    base = converted[0]
    assert base.chat_template == TEMPLATE
    assert base.tokenizer.eos_token == "<|im_end|>"
    assert base.model.generation_config.eos_token_id == 2
    assert base.tokenizer.model_max_length == base.context_length == 128
    ids = base.tokenizer("the\n\n12<|im_end|>", add_special_tokens=False)["input_ids"]
    assert ids == [TOKENS.index(token) for token in ("the", "Ċ", "Ċ", "1", "2", "<|im_end|>")]
    assert base.tokenizer.decode(ids) == "the\n\n12<|im_end|>"


def test_what_was_done_to_the_weights_is_noted(converted) -> None:
    base, path, _, events = converted
    assert base.name == "Tiny Model"
    assert base.license == "mit"
    assert base.source == str(path)
    assert base.notes == ("weights dequantised from GGUF (20 tensors F32), stored as float16",)
    assert {event.task for event in events} == {
        f"convert: {step}" for step in ("tokenizer", "weights", "write", "done")
    }


def test_the_converted_folder_is_a_plain_one_that_transformers_reads_alike(converted) -> None:
    base, _, cache, _ = converted
    assert base.folder.parent == cache / "models"
    assert not any("gguf" in path.name for path in base.folder.iterdir())
    settings = json.loads((base.folder / "config.json").read_text())
    assert "quantization_config" not in settings
    plain = transformers.AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    ids = torch.randint(0, len(TOKENS), (1, 8))
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, base.model(ids).logits)


def test_a_second_load_does_not_convert_again(converted, monkeypatch: pytest.MonkeyPatch) -> None:
    base, path, cache, _ = converted
    monkeypatch.setattr(gguf_file, "convert", lambda *a, **k: pytest.fail("converted again"))
    again = load_base(path, cache_dir=cache, verify=True)
    for first, second in zip(base.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_another_file_of_the_same_name_is_another_model(converted, tmp_path: Path, monkeypatch) -> None:
    _, path, cache, _ = converted
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    other = tmp_path / path.name
    other.write_bytes(raw)
    seen: list[Path] = []

    def convert(source: Path, folder: Path, **options: object) -> dict[str, str]:
        seen.append(source)
        raise BaseModelError("stopped here", hint="none")

    monkeypatch.setattr(gguf_file, "convert", convert)
    with pytest.raises(BaseModelError, match="stopped here"):
        load_base(other, cache_dir=cache)
    assert seen == [other]
    assert len(list((cache / "models").iterdir())) == 1


def test_a_file_that_cannot_be_converted_is_a_typed_error_and_leaves_nothing(model, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", model, architecture="no-such-family")
    with pytest.raises(BaseModelError, match="cannot be converted") as caught:
        load_base(path, cache_dir=tmp_path / "cache")
    assert "no-such-family" in str(caught.value.where["converter said"])
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_tensor_the_model_would_not_take_is_an_error(model, tmp_path: Path) -> None:
    extra = {"blk.0.unknown.weight": numpy.zeros((3, 32), dtype=numpy.float32)}
    path = write_gguf(tmp_path / "more.gguf", model, tensors=extra)
    held = model.num_parameters() + 96
    with pytest.raises(ValueError, match=f"holds {held:,} values but the model takes {held - 96:,}"):
        header = read_header(path)
        _convert_dense(path, tmp_path, header, _empty_model(path, header))


def test_stretched_positions_are_refused_rather_than_dropped(model, tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": numpy.ones(8, dtype=numpy.float32)}
    with pytest.raises(BaseModelError, match=r"rope_freqs\.weight"):
        load_base(write_gguf(tmp_path / "a.gguf", model, tensors=factors), cache_dir=tmp_path)
    scaled = write_gguf(tmp_path / "b.gguf", model, **{"llama.rope.scaling.type": "yarn"})
    with pytest.raises(BaseModelError, match="yarn"):
        load_base(scaled, cache_dir=tmp_path)


def test_a_hostile_file_never_reaches_the_converter(
    gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "convert", lambda *a, **k: pytest.fail("converted"))
    gguf.tensors = [gguf.tensor("a", (2**33, 2**31), 0, 0)]
    with pytest.raises(UnsafeError):
        load_base(gguf.write(tmp_path / "hostile.gguf"), cache_dir=tmp_path)
