"""Answering conversations: render the template, generate, stop where the assistant's turn ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from addenda.bases.packed import evaluating
from addenda.bases.template import render_chat
from addenda.errors import BaseModelError, ConfigError
from addenda.templates import Guard, tokens_of

if TYPE_CHECKING:
    from addenda.bases.loaded import LoadedBase

__all__ = ["BATCH", "Message", "generate", "prompt_ids"]

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``."""

BATCH = 8
"""Conversations answered at once; on a CPU one token for eight costs little more than one token for one."""


def generate(
    base: LoadedBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[str], None] | None = None,
) -> list[str]:
    """Write the assistant's next turn in each conversation.

    The model is in eval mode meanwhile and in its former modes afterwards; the caller's random numbers are untouched.
    Conversations of similar length are answered together, which in half precision may change an answer where two
    tokens are equally likely; hand them over one by one where that matters.

    Args:
        base: a causal language model with a chat template; adapters attached to it take part.
        conversations: messages each, the last one not the assistant's.
        max_new_tokens: longest answer in tokens, >= 1; shorter where the context ends first.
        temperature: 0 takes the likeliest token each time; above 0 samples from scores divided by it.
        seed: of the sampling.
        on_token: called with each piece of text as it is written, whole words at a time; for one conversation only.

    Returns:
        The answers in the order of the conversations, without special tokens.

    Raises:
        ConfigError: a setting is out of range, or `on_token` is given with several conversations.
        BaseModelError: the base cannot answer, or a conversation fills its whole context.
    """
    _check(base, conversations, max_new_tokens, temperature, streams=on_token is not None)
    prompts = [prompt_ids(base, messages) for messages in conversations]
    too_long = [i for i, ids in enumerate(prompts) if len(ids) >= base.room]
    if too_long:
        raise BaseModelError(
            "a conversation leaves no room for an answer",
            where={
                "conversations": ", ".join(map(str, too_long)),
                "tokens": max(len(prompts[i]) for i in too_long),
                "context": base.room,
            },
            hint="leave out the oldest turns",
        )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    with evaluating(base.model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            settings = _settings(base, max_new_tokens, temperature, longest=len(prompts[batch[-1]]))
            settings["eos_token_id"] = sorted(stop_ids(base, conversations[batch[0]]))
            texts = _answer(base, [prompts[i] for i in batch], settings, on_token)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
    return answers


def _check(
    base: LoadedBase,
    conversations: Sequence[object],
    max_new_tokens: int,
    temperature: float,
    *,
    streams: bool,
) -> None:
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature must be 0 or more and finite, got {temperature}")
    if streams and len(conversations) != 1:
        problems.append(f"on_token follows one conversation, got {len(conversations)}")
    if problems:
        raise ConfigError("; ".join(problems), hint="see the arguments of generate()")
    if base.kind != "causal-lm":
        raise BaseModelError(
            f"'{base.name}' is an encoder: it answers no conversations",
            hint="choose a causal language model: 'addenda models'",
        )


def prompt_ids(base: LoadedBase, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to where the answer begins, as training encodes it.

    The template's control tokens are control tokens; those that stand in a message's text stay text.
    """
    tokens = tokens_of(base.tokenizer)
    said = "\x00".join(str(value) for message in messages for value in message.values())
    guard = tokens.guard(said, base.chat_template or "")
    if guard is None:
        text = render_chat(base.tokenizer, messages, add_generation_prompt=True)
        return list(tokens.encode([text])[0].ids)
    hidden = [_hidden(message, guard) for message in messages]
    text = render_chat(base.tokenizer, hidden, add_generation_prompt=True)
    return list(tokens.encode_guarded(text, guard)[0].ids)


def _hidden(message: Message, guard: Guard) -> dict[str, Any]:
    role = message["role"]
    return {**guard.hide(dict(message), spared=role == "assistant"), "role": role}


def _settings(base: LoadedBase, max_new_tokens: int, temperature: float, *, longest: int) -> dict[str, Any]:
    """All that decides the decoding, said outright, so that no default of the model's own slips in."""
    padding = base.tokenizer.pad_token_id
    settings: dict[str, Any] = {
        "max_new_tokens": min(max_new_tokens, base.room - longest),
        "do_sample": temperature > 0,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "pad_token_id": padding if padding is not None else base.tokenizer.eos_token_id or 0,
        "use_cache": True,
    }
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    return settings


def stop_ids(base: LoadedBase, messages: Sequence[Message]) -> set[int]:
    """Ids that end an answer: the model's own, the tokenizer's, and what the template writes behind an answer."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(base.tokenizer.eos_token_id)
    answered = [*messages, {"role": "assistant", "content": "~"}]
    tail = render_chat(base.tokenizer, answered).rpartition("~")[2]
    special = [
        i
        for i in base.tokenizer(tail, add_special_tokens=False)["input_ids"]
        if i in base.tokenizer.all_special_ids
    ]
    return {i for i in (*ids, *special[:1]) if i is not None}


def _answer(
    base: LoadedBase,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    on_token: Callable[[str], None] | None,
) -> list[str]:
    from transformers import GenerationConfig

    ids, mask = _left_padded(prompts, settings["pad_token_id"], base.model.device)
    out = base.model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(**settings),
        streamer=_streamer(base, on_token) if on_token else None,
    )
    return [base.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in out]


def _left_padded(
    prompts: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids ``(n, longest)`` with the padding in front, and the mask that hides it."""
    longest = max(map(len, prompts))
    ids = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _streamer(base: LoadedBase, on_token: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001
            if text:
                on_token(text)

    return Streamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
