from __future__ import annotations

from pathlib import Path

import pytest

from addenda.bases.model_config import load_config
from addenda.errors import BaseModelError, MissingDependencyError, NotFoundError, UnsafeError


def test_the_config_object_and_the_kind_are_those_of_the_folder(
    llama_folder: Path, bert_folder: Path
) -> None:
    config, kind = load_config(llama_folder, tensors=100)
    assert (config.model_type, config.hidden_size, kind) == ("llama", 64, "causal-lm")
    config, kind = load_config(bert_folder, tensors=100)
    assert (config.model_type, kind) == ("bert", "encoder")


def test_a_config_without_architectures_is_a_causal_model_where_one_exists(
    llama_folder: Path, change_json
) -> None:
    change_json(llama_folder / "config.json", architectures=...)
    assert load_config(llama_folder, tensors=100)[1] == "causal-lm"


def test_an_unknown_model_type_names_the_nearest(llama_folder: Path, change_json) -> None:
    change_json(llama_folder / "config.json", model_type="lama")
    with pytest.raises(BaseModelError, match="'lama'") as caught:
        load_config(llama_folder, tensors=100)
    assert "llama" in caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ...},
        {"model_type": 3},
        {"hidden_size": "many"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["NoSuchModel"]},
        {"architectures": [3]},
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization_config": "evil"},
        {"num_hidden_layers": 10**9},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_used_is_a_typed_error(llama_folder: Path, change_json, changes) -> None:
    change_json(llama_folder / "config.json", **changes)
    with pytest.raises(BaseModelError) as caught:
        load_config(llama_folder, tensors=100)
    assert caught.value.hint


def test_quantized_weights_without_their_library_name_the_extra(
    llama_folder: Path, change_json, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_json(llama_folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="bitsandbytes") as caught:
        load_config(llama_folder, tensors=100)
    assert "addenda[quantized]" in caught.value.hint


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_every_settings_file_is_held_to_the_guard(llama_folder: Path, change_json, name: str) -> None:
    change_json(llama_folder / name, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    with pytest.raises(UnsafeError, match=name.replace(".", r"\.")):
        load_config(llama_folder, tensors=100)


def test_an_adapter_in_the_folder_is_never_attached_silently(llama_folder: Path, change_json) -> None:
    change_json(llama_folder / "adapter_config.json", peft_type="LORA")
    with pytest.raises(BaseModelError, match="adapter beside the base"):
        load_config(llama_folder, tensors=100)
    (llama_folder / "config.json").unlink()
    with pytest.raises(BaseModelError, match="adapter, not a base"):
        load_config(llama_folder, tensors=100)
    (llama_folder / "adapter_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"config\.json"):
        load_config(llama_folder, tensors=100)
