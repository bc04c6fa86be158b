"""What an export is asked: inputs that nobody trained on, and what the model answers to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from addenda.bases import LoadedBase
from addenda.errors import ConfigError
from addenda.export.conversations import CONVERSATIONS
from addenda.templates import TemplateRefusal, render, tokens_of

__all__ = ["Kind", "Probes", "Row", "answer", "named_output", "probes_of", "scored"]

Kind = Literal["next-token", "classes", "features"]
Row = Mapping[str, Tensor]
"""The keyword arguments of one forward, batch first."""

_CHATS, _LONGEST = 3, 34
_TEXTS = Path(__file__).with_name("texts.json")
"""Texts of several kinds that nobody trains on."""


@dataclass(frozen=True)
class Probes:
    """Inputs for one kind of model."""

    rows: tuple[Row, ...]
    kind: Kind
    """``next-token``: rows are ``{"input_ids": (1, T)}``, answers log-probabilities of the token after each.
    ``classes``: answers are log-probabilities of the classes. ``features``: the output as it is."""


def probes_of(base: LoadedBase) -> Probes:
    """Return texts and conversations as token rows: five or six hundred positions, as the context allows."""
    texts = [
        base.tokenizer(text, return_tensors="pt") for text in json.loads(_TEXTS.read_text(encoding="utf-8"))
    ]
    if base.kind == "encoder":
        return Probes(tuple(_cut(dict(row), base.room) for row in texts), "features")
    rows = [
        _cut(
            {"input_ids": row["input_ids"]}, min(base.room, _LONGEST if base.chat_template else 2 * _LONGEST)
        )
        for row in texts
    ]
    return Probes((*rows, *(_cut(row, min(base.room, 2 * _LONGEST)) for row in _chats(base))), "next-token")


def _chats(base: LoadedBase) -> Iterable[dict[str, Tensor]]:
    if base.chat_template is None:
        return
    specials, tokens = base.tokenizer.special_tokens_map, tokens_of(base.tokenizer)
    taken = 0
    for conversation in CONVERSATIONS:
        if taken == _CHATS or conversation.tools:
            continue
        try:
            text = render(base.chat_template, conversation.messages, special_tokens=specials)
        except TemplateRefusal:
            continue
        taken += 1
        yield {"input_ids": torch.tensor([list(tokens.encode([text])[0].ids)])}


def _cut(row: dict[str, Tensor], room: int) -> Row:
    return {name: tensor[:, :room] for name, tensor in row.items()}


def answer(model: nn.Module, row: Row, kind: Kind) -> Tensor:
    """Run a model on one row, in the mode it is in.

    Args:
        model: called with the row as keyword arguments, moved to where its weights are.
        row: see `Row`.
        kind: what its output means.

    Returns:
        (n, d) float32 on the CPU: log-probabilities, or features.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        output: Any = model(**{name: tensor.to(device) for name, tensor in row.items()})
    return scored(named_output(output)[1], kind)


def scored(output: Tensor, kind: Kind) -> Tensor:
    """Turn an output into an answer: (n, d) float32 on the CPU, log-probabilities where they are scores.

    Example:
        >>> scored(torch.zeros(1, 3, 4), "next-token").exp().sum(-1)
        tensor([1., 1., 1.])
    """
    flat = output.detach().float().cpu().reshape(-1, output.shape[-1])
    return flat if kind == "features" else flat.log_softmax(-1)


def named_output(output: Any) -> tuple[str, Tensor]:
    """Return the tensor that a model is asked for, with its name: logits, the last hidden states, or the only output.

    Raises:
        ConfigError: there is none.
    """
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return name, found
    found = next(iter(output)) if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"the model gives a {type(output).__name__}, of which it is not known what is compared",
            hint="wrap it in a module that gives one tensor",
        )
    return "output", found
