from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from addenda.bases.gguf_convert import _fix_splitting, storage_dtype
from addenda.bases.gguf_header import GGUFHeader


@pytest.mark.parametrize("exact", [torch.bfloat16, torch.float16])
def test_values_that_fit_exactly_are_stored_in_their_own_dtype(exact: torch.dtype) -> None:
    tensors = [torch.randn(50, 20).to(exact).float() * scale for scale in (1.0, 2.0)]
    stored = storage_dtype(tensors)
    assert all(torch.equal(tensor.to(stored).float(), tensor) for tensor in tensors)
    assert stored is exact


def test_other_values_are_rounded_within_the_stated_bound() -> None:
    tensor = torch.randn(1000) * torch.logspace(-9, 4, 1000)
    assert storage_dtype([tensor, torch.ones(3)]) is torch.float16
    error = (tensor.half().float() - tensor).abs()
    assert bool((error <= (tensor.abs() * 2**-11).clamp_min(3e-8)).all())


def test_values_that_would_overflow_stay_float32() -> None:
    assert storage_dtype([torch.randn(10), torch.tensor([70_001.3])]) is torch.float32


class Wrapped:
    """The part of a tokenizer that the splitting is about."""

    def __init__(self) -> None:
        self.backend_tokenizer = Tokenizer(models.BPE())
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def pieces(self, text: str) -> list[str]:
        return [piece for piece, _ in self.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def header(pre: str, model: str = "gpt2") -> GGUFHeader:
    keys = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.model": model}
    return GGUFHeader(3, {"general.architecture": "llama", **keys}, ())


def test_digits_stand_alone_where_the_model_was_trained_so() -> None:
    tokenizer = Wrapped()
    assert _fix_splitting(tokenizer, header("smollm")) == ""
    # the two line ends stay together, as they do not before a number the GPT-2 way
    assert tokenizer.pieces("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert Wrapped().pieces("a\n\n12") == ["a", "Ċ", "Ċ", "12"]


@pytest.mark.parametrize("pre", ["default", "gpt-2"])
def test_the_gpt2_splitting_is_left_as_it_is(pre: str) -> None:
    tokenizer = Wrapped()
    assert _fix_splitting(tokenizer, header(pre)) == ""
    assert tokenizer.pieces("a 12") == Wrapped().pieces("a 12")


def test_an_unknown_splitting_is_noted_and_a_handled_one_is_not() -> None:
    assert "'new-model'" in _fix_splitting(Wrapped(), header("new-model"))
    assert _fix_splitting(Wrapped(), header("new-model", model="llama")) == ""
    handled = Wrapped()
    handled.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    assert _fix_splitting(handled, header("new-model")) == ""
