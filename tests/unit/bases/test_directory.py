from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import transformers

from addenda.bases.directory import open_directory
from addenda.errors import BaseModelError, NotFoundError, UnsafeError


def opened(folder: Path, **options):
    return open_directory(folder, name=folder.name, source=str(folder), **options)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_a_loaded_base_answers_as_the_saved_model_and_says_nothing(llama_folder: Path, capfd) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    capfd.readouterr()
    base = opened(llama_folder)
    out, err = capfd.readouterr()
    ids = torch.randint(4, 60, (2, 11))
    assert torch.equal(logits(base.model, ids), logits(reference, ids))
    assert (out, err) == ("", "")
    assert not base.model.training
    assert base.kind == "causal-lm"
    assert base.context_length == 256
    assert base.notes == ()
    assert base.tokenizer_sha256 == sha256((llama_folder / "tokenizer.json").read_bytes()).hexdigest()
    assert base.template_sha256 == sha256(base.chat_template.encode()).hexdigest()
    assert base.tokenizer.decode(base.tokenizer("What now?")["input_ids"]) == "What now?"


def test_the_description_is_made_of_json_values(llama_folder: Path) -> None:
    import json

    base = opened(llama_folder)
    facts = base.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["parameters"] == base.model.num_parameters()
    assert facts["dtype"] == "float32"


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_are_read_as_they_were_written(tmp_path: Path, tied: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=small_tokenizer()).save_pretrained(tmp_path)
    base = opened(tmp_path)
    assert (base.model.lm_head.weight is base.model.get_input_embeddings().weight) is tied
    assert torch.equal(base.model.lm_head.weight, model.lm_head.weight)


def small_tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({str(number): number for number in range(40)}, unk_token="0"))


def test_sharded_weights_load_as_one(llama_folder: Path) -> None:
    before = opened(llama_folder)
    (llama_folder / "model.safetensors").unlink()
    before.model.save_pretrained(llama_folder, max_shard_size="50KB")
    assert len(list(llama_folder.glob("*.safetensors"))) > 2
    ids = torch.randint(4, 60, (1, 9))
    assert torch.equal(logits(opened(llama_folder).model, ids), logits(before.model, ids))


@pytest.mark.parametrize(
    ("stored", "asked", "got"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_the_dtype_is_the_one_asked_for_or_the_stored_one_widened_from_float16(
    llama_folder: Path, stored: torch.dtype, asked: torch.dtype | None, got: torch.dtype
) -> None:
    opened(llama_folder).model.to(stored).save_pretrained(llama_folder)
    base = opened(llama_folder, dtype=asked)
    assert {parameter.dtype for parameter in base.model.parameters()} == {got}


LAYER = "model.layers.1.mlp.up_proj.weight"


def without(weights):
    return {name: value for name, value in weights.items() if name != LAYER}


def with_more(weights):
    return {**weights, "model.layers.7.extra.weight": torch.zeros(3)}


def with_other_shape(weights):
    return {**weights, LAYER: torch.zeros(5, 64)}


@pytest.mark.parametrize(
    ("edit", "problem", "named"),
    [
        (without, "missing from the files", LAYER),
        (with_more, "in the files but not in the model", "model.layers.7.extra.weight"),
        (with_other_shape, "of another shape", LAYER),
    ],
)
def test_weights_that_do_not_fit_the_config_are_an_error_not_a_new_initialisation(
    llama_folder: Path, change_weights, edit, problem: str, named: str
) -> None:
    change_weights(llama_folder, edit)
    with pytest.raises(BaseModelError, match="do not fit") as caught:
        opened(llama_folder)
    assert named in str(caught.value.where[problem])


@pytest.mark.parametrize("length", [0, 4, 100, 5000])
def test_cut_weights_are_a_typed_error(llama_folder: Path, length: int) -> None:
    os.truncate(llama_folder / "model.safetensors", length)
    with pytest.raises(BaseModelError, match=r"'model\.safetensors' is not a whole safetensors file"):
        opened(llama_folder)


def test_a_config_no_model_can_be_made_of_is_a_typed_error(llama_folder: Path, change_json, capfd) -> None:
    change_json(llama_folder / "config.json", rope_parameters={"rope_type": "no-such-type"})
    capfd.readouterr()
    with pytest.raises(BaseModelError, match="weights cannot be loaded"):
        opened(llama_folder)
    assert capfd.readouterr() == ("", "")


def test_a_missing_tokenizer_names_the_files_looked_for(llama_folder: Path) -> None:
    (llama_folder / "tokenizer.json").rename(llama_folder / "tokenizer.model")
    with pytest.raises(NotFoundError, match=r"no 'tokenizer\.json'") as caught:
        opened(llama_folder)
    assert caught.value.where["tokenizer files found"] == "tokenizer.model"
    (llama_folder / "tokenizer.json").write_text("{")
    with pytest.raises(BaseModelError, match="tokenizer cannot be read"):
        opened(llama_folder)


def test_code_in_the_folder_is_refused_and_not_run(llama_folder: Path, change_json) -> None:
    (llama_folder / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()\nclass Evil: ...\n")
    change_json(llama_folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(UnsafeError, match="auto_map"):
        opened(llama_folder)
    assert not Path("ran").exists()


def test_a_model_without_a_template_says_so(llama_folder: Path) -> None:
    (llama_folder / "chat_template.jinja").unlink()
    base = opened(llama_folder)
    assert base.chat_template is None
    assert base.template_sha256 is None
    assert any(note.startswith("no chat template") for note in base.notes)


def test_of_several_templates_the_default_one_is_used(llama_folder: Path, change_json) -> None:
    (llama_folder / "chat_template.jinja").unlink()
    several = [{"name": "default", "template": "{{ 1 }}"}, {"name": "rag", "template": "{{ 2 }}"}]
    change_json(llama_folder / "tokenizer_config.json", chat_template=several)
    base = opened(llama_folder)
    assert base.chat_template == base.tokenizer.chat_template == "{{ 1 }}"


def test_a_tokenizer_larger_than_the_model_is_noted(llama_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(llama_folder)
    assert any("2 last ones" in note for note in opened(llama_folder).notes)


def test_the_licence_comes_from_the_readme(llama_folder: Path) -> None:
    assert opened(llama_folder).license == "unknown"
    (llama_folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: none\n")
    assert opened(llama_folder).license == "apache-2.0"
    assert opened(llama_folder, license_name="mit").license == "mit"


def test_an_encoder_gives_hidden_states(bert_folder: Path) -> None:
    base = opened(bert_folder)
    assert base.kind == "encoder"
    assert base.chat_template is None
    assert base.notes == ()
    with torch.no_grad():
        assert base.model(torch.randint(0, 60, (1, 5))).last_hidden_state.shape == (1, 5, 32)


def test_a_context_length_no_config_states_comes_from_the_tokenizer_or_is_noted(
    tmp_path: Path, change_json
) -> None:
    config = transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=small_tokenizer()).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", seq_length=...)
    base = opened(tmp_path)
    assert base.context_length == 2048
    assert any("2048 assumed" in note for note in base.notes)
    change_json(tmp_path / "tokenizer_config.json", model_max_length=77)
    assert opened(tmp_path).context_length == 77


def test_a_template_that_takes_all_memory_is_refused_when_loaded(llama_folder: Path) -> None:
    (llama_folder / "chat_template.jinja").write_text("{{ 'a' * 200000000 }}")
    with pytest.raises(UnsafeError, match="the chat template takes more than"):
        open_directory(llama_folder, name="tiny", source="here")


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
def test_a_config_far_larger_than_its_files_takes_no_memory(
    key: str, llama_folder: Path, change_json, monkeypatch
) -> None:
    """transformers would first make, and fill, what does not fit."""
    change_json(llama_folder / "config.json", **{key: 100_000_000})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(BaseModelError, match=r"^'config.json' describes .* parameters, the files hold"):
        opened(llama_folder)


def test_a_template_that_is_no_text_is_a_typed_error(llama_folder: Path, change_json) -> None:
    (llama_folder / "chat_template.jinja").unlink()
    change_json(llama_folder / "tokenizer_config.json", chat_template=5)
    with pytest.raises(BaseModelError, match="no text but of type 'int'"):
        opened(llama_folder)
