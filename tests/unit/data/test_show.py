"""What is shown is the whole row, and what is marked is what is trained."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerFast

from addenda.data import Example, RowRef, bracketed, segments

ROW = RowRef("a.jsonl", 1, 0)


def test_segments_join_to_the_whole_text(any_tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    for _ in range(50):
        text = " ".join(rng.choices(["the order", "café 😀", "a\nb", "<|im_end|>", "x"], k=8))
        ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]
        example = Example(tuple(ids), tuple(rng.random() < 0.5 for _ in ids), ROW)
        parts = segments(example, any_tokenizer)
        assert "".join(part for part, _ in parts) == any_tokenizer.decode(ids)


def test_trained_parts_are_bracketed(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("Where is", add_special_tokens=False)["input_ids"]
    more = tokenizer(" my order?<|im_end|>", add_special_tokens=False)["input_ids"]
    example = Example((*ids, *more), (*[False] * len(ids), *[True] * len(more)), ROW)
    assert bracketed(example, tokenizer) == "Where is[ my order?<|im_end|>]"


def test_control_characters_of_a_row_are_written_out(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a\x1b[2J\rb\tc\nd", add_special_tokens=False)["input_ids"]
    example = Example(tuple(ids), (False,) * len(ids), RowRef("a", 1, 0))
    assert bracketed(example, tokenizer) == "a\\x1b[2J\\rb\tc\nd"
