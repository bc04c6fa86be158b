"""Whether a runtime turns conversations into the token ids that the training did."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from addenda.bases import LoadedBase
from addenda.bases.generate import stop_ids
from addenda.export.conversations import CONVERSATIONS, Conversed
from addenda.export.job import Job
from addenda.export.runtime import Chat
from addenda.templates import TemplateRefusal, render, tokens_of

__all__ = ["ChatParity", "compare_chats"]


@dataclass(frozen=True)
class ChatParity:
    """What the comparison found."""

    conversations: int
    """How many the training's template can write; each was rendered and tokenized by the runtime too."""
    same_text: int
    same_tokens: int
    problems: tuple[str, ...]
    """What differs, each named with its first example; empty where all is equal, but for letters of two code points
    that only the training's tokenizer composes (those of Qwen do)."""


def compare_chats(job: Job, chat: Chat) -> ChatParity:
    """Render and tokenize `CONVERSATIONS` both ways, and compare byte for byte.

    What a conversation's text becomes is compared too for a plain text without any template, where a token may be put
    in front; and which tokens end an answer.
    """
    base = job.base
    assert base is not None
    problems = _plain(base, chat) + _ending(base, chat)
    written = same_text = same_tokens = 0
    differing: list[str] = []
    for number, conversation in enumerate(_for(chat)):
        wanted = _written(base, conversation)
        if wanted is None:
            continue
        written += 1
        found = chat.render(conversation.messages, conversation.tools)
        same_text += found == wanted
        if found != wanted and same_text == written - 1:
            problems.append(f"the chat template is another: {_where(wanted, found)}")
        ids, told = list(tokens_of(base.tokenizer).encode([wanted])[0].ids), chat.encode(wanted)
        same_tokens += told == ids
        if told != ids and not _composed(chat, wanted, ids):
            differing.append(f"token ids differ: {_differing(ids, told)}")
        job.say("compare conversations", number + 1, len(CONVERSATIONS), "conversations")
    return ChatParity(written, same_text, same_tokens, (*problems, *differing[:1]))


def _composed(chat: Chat, text: str, ids: list[int]) -> bool:
    """Whether a text is read alike once its letters are composed, as some tokenizers do and llama.cpp does not."""
    return chat.encode(unicodedata.normalize("NFC", text)) == ids


def _for(chat: Chat) -> list[Conversed]:
    return [each for each in CONVERSATIONS if chat.tools or not each.tools]


def _written(base: LoadedBase, conversation: Conversed) -> str | None:
    if base.chat_template is None:
        return None
    specials = base.tokenizer.special_tokens_map
    try:
        return render(
            base.chat_template,
            conversation.messages,
            tools=list(conversation.tools) or None,
            add_generation_prompt=True,
            special_tokens=specials,
        )
    except TemplateRefusal:
        return None


def _plain(base: LoadedBase, chat: Chat) -> list[str]:
    text = "Water boils at"
    ids, told = list(base.tokenizer(text)["input_ids"]), chat.begin(text)
    if ids == told:
        return []
    first = base.tokenizer.bos_token_id
    counts = [sum(1 for token in each[:2] if token == first) for each in (ids, told)]
    if first is not None and counts[0] != counts[1]:
        return [f"a text begins with {counts[1]} beginning-of-text tokens, trained with {counts[0]}"]
    return [f"token ids of a plain text differ: {_differing(ids, told)}"]


def _ending(base: LoadedBase, chat: Chat) -> list[str]:
    wanted = stop_ids(base, [{"role": "user", "content": "a"}]) if base.chat_template else set()
    missing = [token for token in sorted(wanted) if not chat.ends(token)]
    names = ", ".join(repr(base.tokenizer.decode([token])) for token in missing)
    return [f"the runtime does not stop at {names}, which ends an answer"] if missing else []


def _where(wanted: str, found: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
        min(len(wanted), len(found)),
    )
    return f"{wanted[max(0, at - 10) : at + 20]!r} is written {found[max(0, at - 10) : at + 20]!r}"


def _differing(ids: list[int], told: list[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(ids, told, strict=False)) if a != b), min(len(ids), len(told))
    )
    return f"at token {at} of {len(ids)}, {ids[at : at + 4]} became {told[at : at + 4]}"
