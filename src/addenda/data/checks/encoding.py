"""Checks of the characters: encodings, NUL, half surrogates."""

from __future__ import annotations

import re
from collections.abc import Iterator

from addenda.data.checks.base import Check, register
from addenda.data.problem import Problem

__all__ = ["InvalidUtf8", "LoneSurrogate", "NulCharacter", "WrongEncoding"]

_GOOD = (
    b'{"messages": [{"role": "user", "content": "caf\xc3\xa9?"}, {"role": "assistant", "content": "Yes."}]}\n'
)
_ESCAPED = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


@register
class WrongEncoding(Check):
    """The file is UTF-16 or UTF-32, or not text at all.

    What it finds: a UTF-16 or UTF-32 byte order mark, the pattern of zero bytes those encodings leave, or the first
    bytes of a compressed file.
    Why it matters: every row would be unreadable; the first message would complain about row 1 only.
    Example: a table saved as "Unicode text" by a spreadsheet.
    What to do: convert the file to UTF-8, for instance ``iconv -f UTF-16 -t UTF-8 in > out``.
    """

    code, severity, stage = "wrong_encoding", "error", "file"
    fix = "save the file as UTF-8"
    bad = '{"text": "hello"}\n'.encode("utf-16")
    good = b'\xef\xbb\xbf{"text": "hello"}\n'


@register
class InvalidUtf8(Check):
    r"""A row has a byte that is not UTF-8.

    What it finds: the first such byte of a row, with its offset in the file.
    Why it matters: readers that replace or skip it train on damaged words, silently.
    Example: ``caf\xe9`` written by a program that uses Latin-1.
    What to do: convert the file (``iconv -f LATIN1 -t UTF-8``), or repair the one row if the rest is UTF-8.
    """

    code, severity, stage = "invalid_utf8", "error", "bytes"
    fix = "convert the file to UTF-8, or repair this row"
    bad = _GOOD.replace(b"\xc3\xa9", b"\xe9")
    good = _GOOD

    @classmethod
    def find(cls, raw: bytes) -> Iterator[Problem]:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = raw[error.start]
            guess = bytes([byte]).decode("latin-1")
            likely = f", '{guess}' in Latin-1" if byte >= 0xA0 else ""
            fix = "iconv -f LATIN1 -t UTF-8 IN > OUT, or repair this row" if likely else ""
            yield cls.problem(f"byte 0x{byte:02x}{likely}", offset=error.start, fix=fix)


@register
class NulCharacter(Check):
    r"""A row holds a NUL character, raw or as an escape.

    What it finds: a zero byte, or ``\u0000`` inside a string.
    Why it matters: it is the trace of a damaged file or of binary data; tokenizers give it a token of its own.
    Example: a row written over a hole that a crash left.
    What to do: remove the character, or restore the row from its source.
    """

    code, severity, stage = "nul_character", "error", "bytes"
    fix = "remove the NUL character, or restore the row from its source"
    bad = b'{"text": "be\x00fore"}\n'
    good = b'{"text": "the escape \\\\u0000 as text"}\n'

    @classmethod
    def find(cls, raw: bytes) -> Iterator[Problem]:
        at = raw.find(b"\x00")
        if at >= 0:
            return iter([cls.problem("a zero byte", offset=at)])
        escapes = (match for match in _ESCAPED.finditer(raw) if match.group(1) == b"0000")
        first = next(escapes, None)
        return iter([cls.problem("the escape \\u0000", offset=first.start())] if first else [])


@register
class LoneSurrogate(Check):
    r"""A string has half of a surrogate pair.

    What it finds: an escape like ``\ud83d`` without its second half, which is no character.
    Why it matters: the text cannot be written as UTF-8; most tools fail on it later, far from the cause.
    Example: an emoji cut in two by a limit counted in UTF-16 units.
    What to do: remove the escape, or restore the whole character.
    """

    code, severity, stage = "lone_surrogate", "error", "bytes"
    fix = "remove the half character, or restore the whole one"
    bad = b'{"text": "smile \\ud83d"}\n'
    good = b'{"text": "smile \\ud83d\\ude00"}\n'

    @classmethod
    def find(cls, raw: bytes) -> Iterator[Problem]:
        units = [(match, int(match.group(1), 16)) for match in _ESCAPED.finditer(raw) if match.group(1)]
        high: re.Match[bytes] | None = None
        for match, unit in [*units, (None, 0)]:
            is_low = 0xDC00 <= unit < 0xE000
            if high is not None and (match is None or not is_low or high.end() != match.start()):
                yield cls._at(high)
                return
            if is_low and high is None and match is not None:
                yield cls._at(match)
                return
            high = match if 0xD800 <= unit < 0xDC00 else None

    @classmethod
    def _at(cls, escape: re.Match[bytes]) -> Problem:
        return cls.problem(f"half a character, {escape.group().decode()}", offset=escape.start())
