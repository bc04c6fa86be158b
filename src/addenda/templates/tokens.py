"""Text to token ids with the characters each token covers; control tokens typed by a user stay text."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from addenda.errors import ConfigError

__all__ = ["Guard", "Pieces", "Tokens", "tokens_of"]

_MARKS = [chr(point) for point in (*range(0xE000, 0xE010), *range(0xF0000, 0xF0010))]
"""Private-use characters, one of which a conversation will not contain."""


@dataclass(frozen=True)
class Pieces:
    """Token ids, and the half-open range of characters each covers."""

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


class Tokens:
    """A tokenizer as training and answering need it: exact character ranges, and two ways to treat control tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Raises:
        ConfigError: the tokenizer has no Rust backend, so it knows no character ranges.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"tokenizer '{type(tokenizer).__name__}' has no fast backend",
                hint="load the tokenizer with a tokenizer.json",
            )
        self._state: str = backend.to_str()
        added = tokenizer.added_tokens_decoder
        self.special = [str(token.content) for token in added.values() if token.special]
        self._other = [
            str(t.content) for t in added.values() if not t.special and not str(t.content).isspace()
        ]
        self._added = {number: str(token.content) for number, token in added.items()}
        whole = [list(backend.encode("a", add_special_tokens=flag).ids) for flag in (True, False)]
        self.prefix = _prefix(*whole)
        """Ids the tokenizer puts before plain text, such as a beginning-of-text token."""
        self.eos_id: int | None = tokenizer.eos_token_id
        self.added_pattern = any_of([str(t.content) for t in added.values() if not str(t.content).isspace()])
        """Matches every added token but those of white space."""

    @cached_property
    def _full(self) -> Any:
        """The tokenizer without post-processing: that would trim white space from the character ranges."""
        return _rebuilt(json.loads(self._state), post_processor=None)

    @cached_property
    def _plain(self) -> Any:
        """The tokenizer without its added tokens, for text at the beginning."""
        return _rebuilt(json.loads(self._state), post_processor=None, added_tokens=[])

    @cached_property
    def _plain_inside(self) -> Any:
        """The same for text after a control token, where no leading space is put in."""
        state = json.loads(json.dumps(json.loads(self._state)).replace('"prepend_scheme": "first"', _NEVER))
        return _rebuilt(state, post_processor=None, added_tokens=[])

    def encode(self, texts: Sequence[str]) -> list[Pieces]:
        """Encode texts in which every control token is meant."""
        encodings = self._full.encode_batch(list(texts), add_special_tokens=False)
        return [Pieces(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_plain(self, text: str) -> Pieces:
        """Encode text in which no control token is meant."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        return Pieces(encoding.ids, encoding.offsets)

    def encode_guarded(self, text: str, guard: Guard) -> tuple[Pieces, str]:
        """Encode text whose guarded places are not meant as control tokens; return it as written too."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        parts: list[str] = []
        at = 0
        for piece, is_token in self._split(text):
            part = piece if is_token else guard.restore(piece)
            encoder = self._full if is_token else self._plain if at == 0 else self._plain_inside
            encoding = encoder.encode(part, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(at + start, at + end) for start, end in encoding.offsets]
            parts.append(part)
            at += len(part)
        return Pieces(ids, offsets), "".join(parts)

    def _split(self, text: str) -> list[tuple[str, bool]]:
        """Cut a guarded text into the control tokens that are meant, and what stands between them."""
        encoding = self._full.encode(text, add_special_tokens=False)
        pieces, at = [], 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # A byte token of the fallback may be an added token too; it does not cover its own name.
            if text[start:end].strip() != self._added.get(token, "\x00").strip():
                continue
            pieces += [(text[at:start], False), (text[start:end], True)]
            at = end
        pieces.append((text[at:], False))
        return [(piece, is_token) for piece, is_token in pieces if piece]

    def guard(self, said: str, template: str) -> Guard | None:
        """Prepare to write what a conversation says where it holds the text of control tokens; None where it does not.

        Special tokens are guarded everywhere. Other added tokens that the template writes (a role marker that
        is not flagged special) are guarded in all messages but the assistant's, whose own text may need them
        (a thinking tag).

        Args:
            said: every text of the messages and the tools, in any order.
            template: the chat template's text; "" where there is none.
        """
        tokens = (*self.special, *(token for token in self._other if token in template))
        if not any(token in said for token in tokens):
            return None
        mark = next(mark for mark in _MARKS if mark not in said)
        return Guard(tokens, frozenset(self.special), mark)


@dataclass(frozen=True)
class Guard:
    """Stands in for control tokens that a user typed, while the template and the tokenizer look at the text.

    Example:
        >>> guard = Guard(("<s>", "</s>"), frozenset(["<s>", "</s>"]), mark="#")
        >>> hidden = guard.hide({"content": "a</s>b"})
        >>> hidden, guard.restore(hidden["content"])
        ({'content': 'a#1#b'}, 'a</s>b')
    """

    tokens: tuple[str, ...]
    special: frozenset[str]
    mark: str
    """A character that no message holds."""

    def hide(self, value: Any, *, spared: bool = False) -> Any:
        """Put stand-ins into every text of a nested value; into a ``spared`` one for special tokens only."""
        numbers = {token: i for i, token in enumerate(self.tokens) if not spared or token in self.special}
        pattern = any_of(numbers)

        def put(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda match: f"{self.mark}{numbers[match.group()]}{self.mark}", value)
            if isinstance(value, dict):
                return {put(key): put(item) for key, item in value.items()}
            return [put(item) for item in value] if isinstance(value, list | tuple) else value

        return put(value)

    def restore(self, text: str) -> str:
        """Put the typed texts back."""
        pattern = f"{self.mark}(\\d+){self.mark}"
        return re.sub(pattern, lambda match: self.tokens[int(match.group(1))], text)


_NEVER = '"prepend_scheme": "never"'
_known: weakref.WeakKeyDictionary[Any, Tokens] = weakref.WeakKeyDictionary()


def tokens_of(tokenizer: Any) -> Tokens:
    """Return the `Tokens` of a tokenizer, made once and kept as long as the tokenizer lives."""
    if tokenizer not in _known:
        _known[tokenizer] = Tokens(tokenizer)
    return _known[tokenizer]


def _rebuilt(state: dict[str, Any], **changes: Any) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps({**state, "truncation": None, "padding": None, **changes}))


def _prefix(with_special: list[int], without: list[int]) -> tuple[int, ...]:
    for length in range(len(with_special) + 1):
        if with_special[length : length + len(without)] == without:
            return tuple(with_special[:length])
    return ()


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, the longest first."""
    longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
    return re.compile("|".join(longest_first) or "(?!)")
