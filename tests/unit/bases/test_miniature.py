"""A model cut down to some of its blocks, before its weights are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from addenda.bases import load_base
from addenda.bases.empty import empty_model
from addenda.bases.miniature import block_paths, layer_kinds, miniature
from addenda.bases.packed_layers import packed_layers

SIZES = {"vocab_size": 40_000, "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=False),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, **HEADS, sliding_window=8, layer_types=["sliding_attention"] * 3 + ["full_attention"]
    ),
    "gpt2": transformers.GPT2Config(vocab_size=40_000, n_layer=4, n_embd=64, n_head=4),
}


def weightless(family: str) -> transformers.PreTrainedModel:
    return empty_model(transformers.AutoModelForCausalLM, CONFIGS[family], torch.float32)


@pytest.mark.parametrize("family", CONFIGS)
def test_its_blocks_have_the_shapes_of_those_chosen_and_it_runs(family: str) -> None:
    base = weightless(family)
    paths = block_paths(base)
    small = miniature(base, [3, 0])
    assert all(parameter.is_meta for parameter in base.parameters() if parameter.dim() > 1)
    assert [there for there, _ in small.places] == [paths[3], paths[0]]
    for there, here in small.places:
        theirs, ours = base.get_submodule(there), small.model.get_submodule(here)
        assert {n: p.shape for n, p in ours.named_parameters()} == {
            n: p.shape for n, p in theirs.named_parameters()
        }
    assert small.vocabulary == 16_384
    scores = small.model(torch.tensor([[1, 2, 3]])).logits
    assert scores.shape == (1, 3, small.vocabulary)
    assert scores.isfinite().all()
    assert scores.std() > 0


def test_kinds_of_attention_go_with_the_blocks() -> None:
    base = weightless("gemma3")
    assert layer_kinds(base.config, 4) == ("sliding_attention",) * 3 + ("full_attention",)
    small = miniature(base, [3, 0])
    assert layer_kinds(small.model.config, 2) == ("full_attention", "sliding_attention")
    assert layer_kinds(weightless("llama").config, 4) == ("",) * 4


def test_paths_are_found_in_every_copy_of_a_block_and_around_the_blocks() -> None:
    base = weightless("llama")
    twice = miniature(base, [1, 1])
    assert twice.paths_of("model.layers.1.mlp.up_proj") == [f"model.layers.{n}.mlp.up_proj" for n in (0, 1)]
    assert twice.paths_of("model.layers.2.mlp.up_proj") == []
    assert twice.paths_of("lm_head") == ["lm_head"]
    weights = [
        twice.model.get_submodule(path).weight for path in twice.paths_of("model.layers.1.mlp.up_proj")
    ]
    assert not torch.equal(*weights)


def test_tied_weights_stay_tied() -> None:
    for family, tied in (("llama", True), ("qwen2", False)):
        model = miniature(weightless(family), [0]).model
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no repeated blocks"):
        miniature(torch.nn.Linear(2, 2), [0])


def test_the_base_without_its_weights_tells_the_same_of_itself(llama_folder: Path) -> None:
    empty, whole = load_base(llama_folder, weightless=True), load_base(llama_folder)
    assert empty.describe() == whole.describe()
    assert all(parameter.is_meta for parameter in empty.model.parameters() if parameter.dim() > 1)
    buffers = dict(empty.model.named_buffers())
    assert buffers
    assert all(torch.equal(value, buffers[name]) for name, value in whole.model.named_buffers())


def test_weights_packed_at_the_load_are_planned_with_as_many_bytes(llama_folder: Path) -> None:
    empty, whole = (load_base(llama_folder, weights="nf4", weightless=w) for w in (True, False))
    sizes = [
        {path: layer.raw.nbytes for path, layer in packed_layers(base.model).items()}
        for base in (empty, whole)
    ]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 12  # rows of down_proj are no whole blocks
    small = miniature(empty.model, [0, 0])
    assert len(packed_layers(small.model)) == 12
    assert small.model(torch.tensor([[1, 2]])).logits.isfinite().all()
