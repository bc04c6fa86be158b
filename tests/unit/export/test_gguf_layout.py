"""Where llama.cpp keeps what: names, rows in pairs, and what is refused."""

from __future__ import annotations

import pytest
import tiny_causal
import torch

from addenda.errors import ExportError
from addenda.export.gguf.architectures import ARCHITECTURES
from addenda.export.gguf.layout import layout_of

tiny_config, tiny_model, FAMILIES = tiny_causal.tiny_config, tiny_causal.tiny_model, tiny_causal.FAMILIES


def test_every_family_with_a_record_is_tried():
    assert sorted(FAMILIES) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_of_a_model_has_one_place(family):
    model = tiny_model(family)
    layout = layout_of(model.config)
    placed = {}
    for name, tensor in model.state_dict().items():
        made = layout.tensors(name, tensor)
        assert not set(made) & set(placed), name
        assert sum(part.numel() for part in made.values()) == tensor.numel() or name == "lm_head.weight"
        placed |= made
    own = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    assert sum(tensor.numel() for tensor in placed.values()) == own


def rotated_in_halves(rows: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    first, second = rows.chunk(2)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])


def rotated_in_pairs(rows: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    even, odd = rows[::2], rows[1::2]
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], 1)
    return turned.flatten()


@pytest.mark.parametrize(("layer", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_rows_in_pairs_turn_as_rows_in_halves_do(layer, heads):
    layout = layout_of(tiny_config("llama"))
    width = 16
    output, angle = torch.randn(heads * width), torch.randn(width // 2)
    ours = layout.rows(f"model.layers.1.self_attn.{layer}.weight", output[:, None])[:, 0]
    for head in range(heads):
        mine = slice(head * width, (head + 1) * width)
        expected = layout.rows(layer, rotated_in_halves(output[mine], angle).repeat(heads))[:width]
        torch.testing.assert_close(rotated_in_pairs(ours[mine], angle), expected)


def test_a_low_rank_factor_is_reordered_as_the_weight_it_is_added_to():
    layout = layout_of(tiny_config("granite"))
    name = "model.layers.0.self_attn.k_proj"
    weight, a, b = torch.randn(32, 64), torch.randn(3, 64), torch.randn(32, 3)
    whole = layout.rows(f"{name}.weight", weight + b @ a)
    torch.testing.assert_close(layout.rows(f"{name}.weight", weight) + layout.rows(name, b) @ a, whole)


def test_other_rows_stay_in_their_order():
    matrix = torch.randn(64, 3)
    assert layout_of(tiny_config("llama")).rows("model.layers.0.self_attn.v_proj", matrix) is matrix
    assert layout_of(tiny_config("qwen2")).rows("model.layers.0.self_attn.q_proj", matrix) is matrix


def test_a_tied_output_has_no_tensor_of_its_own():
    tied, free = (
        tiny_config("llama", tie_word_embeddings=True),
        tiny_config("llama", tie_word_embeddings=False),
    )
    assert layout_of(tied).tensor_name("lm_head.weight") is None
    assert layout_of(free).tensor_name("lm_head.weight") == "output.weight"
    assert layout_of(tied).tensor_name("model.layers.1.mlp.down_proj.weight") == "blk.1.ffn_down.weight"


def test_an_unknown_family_is_refused_with_those_that_are_known():
    class Config:
        model_type = "bloom"

    with pytest.raises(ExportError, match="bloom") as caught:
        layout_of(Config())
    assert all(family in str(caught.value) for family in FAMILIES)


def test_settings_that_llama_cpp_takes_for_granted_are_compared_all_at_once():
    config = tiny_config("gemma2", query_pre_attn_scalar=17, hidden_activation="relu")
    with pytest.raises(ExportError, match=r"hidden_activation is 'relu'.*query_pre_attn_scalar is 17"):
        layout_of(config)


def test_positions_that_cannot_be_carried_are_refused():
    stretched = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ExportError, match="dynamic"):
        layout_of(tiny_config("llama", rope_parameters=stretched))


def test_a_window_that_is_not_kept_bounds_the_context():
    limited = layout_of(tiny_config("mistral", sliding_window=48)).hyperparameters()
    assert limited["llama.context_length"] == 48
    assert (
        layout_of(tiny_config("mistral", sliding_window=None)).hyperparameters()["llama.context_length"]
        == 128
    )
    kept = layout_of(tiny_config("gemma2", sliding_window=48)).hyperparameters()
    assert (kept["gemma2.context_length"], kept["gemma2.attention.sliding_window"]) == (128, 48)
