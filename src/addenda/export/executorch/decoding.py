"""A decoder as a program of ExecuTorch: its key-value cache inside, and told of as ExecuTorch's LLM runners ask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addenda.bases import LoadedBase
from addenda.bases.generate import stop_ids
from addenda.bases.stepwise import StaticDecoder
from addenda.export.executorch.lowering import refusing, rounded_program, save
from addenda.export.traceable import require_finite

__all__ = ["CONTEXT", "PART", "facts", "write_decoder"]

CONTEXT, PART = 1024, 128
"""Tokens for which a cache has room where nobody asks for other, and those that are read in one call at most.

Attention goes over the whole cache in every call, so that room which is not needed costs time too."""


def write_decoder(model: nn.Module, path: Path, *, context: int, int8: bool, told: dict[str, Any]) -> None:
    """Trace a causal model as it is now, adapters that are not merged included, and write its program.

    ``forward`` takes ``input_ids`` (1, n) and ``cache_position`` (n,), n from 1 to `PART`, and gives the logits
    (1, 1, vocabulary) after the last token; keys and values stay in the program.

    Args:
        model: in evaluation mode, in float32.
        path: the file.
        context: tokens for which the cache has room.
        int8: round the weights of linear layers to 8 bits, a scale a channel, and activations as they come.
        told: further methods without arguments and what they give, as of `facts`.

    Raises:
        BaseModelError: it keeps no key-value cache.
        ExportError: PyTorch or ExecuTorch cannot trace it, or a weight is not finite.
        MissingDependencyError: ExecuTorch is not installed.
    """
    require_finite(model)
    decoder, part = StaticDecoder(model, context), min(PART, context)
    length = torch.export.Dim("length", min=1, max=part)
    example: tuple[Tensor, ...] = (torch.zeros(1, 2, dtype=torch.long), torch.arange(2))
    shapes = ({1: length}, {0: length})
    with refusing(model), _plain_attention(model):
        program = torch.export.export(decoder, example, dynamic_shapes=shapes, strict=False)
        if int8:
            rounded = rounded_program(program, [example])
            program = torch.export.export(rounded, example, dynamic_shapes=shapes, strict=False)
        told = {**told, "get_max_seq_len": part, "get_max_context_len": context}
        save(program, path, told, singly=int8)


def facts(model: Any, base: LoadedBase | None) -> dict[str, Any]:
    """Return what ExecuTorch's LLM runners ask a program for, by the names of its methods, but for its sizes.

    Args:
        model: a causal language model.
        base: with its tokenizer, where there is one; else no ids are told.
    """
    found: dict[str, Any] = {
        "get_vocab_size": model.config.get_text_config().vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
    }
    if base is None:
        return found
    if base.tokenizer.bos_token_id is not None:
        found["get_bos_id"] = base.tokenizer.bos_token_id
    if stops := _stops(base):
        found["get_eos_ids"] = stops
    return found


def _stops(base: LoadedBase) -> list[int]:
    if base.chat_template is not None:
        return sorted(stop_ids(base, [{"role": "user", "content": "~"}]))
    return [base.tokenizer.eos_token_id] if base.tokenizer.eos_token_id is not None else []


@contextlib.contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Let attention be products and a softmax, which XNNPACK has; the other form guards against rows without a key."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
