"""Sixteen kinds of file, as users have them: three that are right in an unusual way, thirteen that are wrong.

Each wrong one is named with its code, line, path and remedy, and no run may start on it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from addenda.data import Finding, read_dataset
from addenda.errors import DataError

ROWS = [
    {"messages": [{"role": "user", "content": f"Café {n}?"}, {"role": "assistant", "content": f"Yes, {n}."}]}
    for n in range(12)
]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]


def file_with(bad: bytes, at: int = 5) -> bytes:
    """Twelve rows, one of them replaced."""
    return b"\n".join([*LINES[:at], bad, *LINES[at + 1 :]]) + b"\n"


def row(**answer: object) -> bytes:
    """A row whose answer has other fields."""
    messages = [ROWS[0]["messages"][0], {"role": "assistant", "content": "Yes.", **answer}]
    return json.dumps({"messages": messages}).encode()


RIGHT = {
    "byte order mark": b"\xef\xbb\xbf" + b"\n".join(LINES) + b"\n",
    "CRLF line ends": b"\r\n".join(LINES) + b"\r\n",
    "JSON array": b"[\n  " + b",\n  ".join(LINES) + b"\n]\n",
}


# name: (the wrong row, code, the text in it the column points at, path, part of what was found, part of the remedy)
WRONG_ROWS: dict[str, tuple[bytes, str, bytes, str, str, str]] = {
    "a byte that is not UTF-8": (
        LINES[5].replace("é".encode(), b"\xe9"),
        *("invalid_utf8", b"\xe9", "$", "byte 0xe9, 'é' in Latin-1 (byte offset 551)", "iconv -f LATIN1"),
    ),
    "NaN": (
        row(weight=float("nan")),
        *("non_finite_number", b"NaN", "$", "the number NaN", "write a finite number"),
    ),
    "no messages": (
        b'{"question": "Open?", "answer": "Yes."}',
        *(
            "missing_messages_list",
            b"{",
            "$",
            "keys found: 'question', 'answer'",
            "--set data.prompt=question",
        ),
    ),
    "a misspelt key": (
        row(wieght=0),
        *(
            "message_unrecognized_key",
            b"0}",
            "$.messages[1].wieght",
            "key 'wieght'",
            "did you mean 'weight'?",
        ),
    ),
    "content that is a number": (
        row(content=42),
        *("missing_content", b"42", "$.messages[1].content", "the number 42", "write the text"),
    ),
    "a row of 20 MB": (
        row(content="x" * 20_000_000),
        *("row_too_long", b"{", "$", "a row of 20,000,0", "split or shorten the row"),
    ),
    "a NUL": (
        LINES[5].replace(b"Yes", b"Y\x00s"),
        *("nul_character", b"\x00", "$", "a zero byte", "remove the NUL"),
    ),
    "a trailing comma": (
        LINES[5].replace(b'5."}', b'5.",}'),
        *("invalid_json", b",}", "$", "trailing comma", "remove the comma"),
    ),
    "a row cut off": (
        LINES[5][:-20],
        *("invalid_json", b"", "$", "", "restore the rest of the line"),
    ),
    "single quotes": (
        str(ROWS[5]).encode(),
        *("invalid_json", b"'messages'", "$", "expected a string key", "double quotes"),
    ),
    "nesting 5,000 deep": (
        b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        *("nested_too_deep", b"[" * 4937 + b"]", "$", "more than 64 deep", "flatten"),
    ),
    "a key twice": (
        LINES[5].replace(b'{"role": "user",', b'{"role": "user", "role": "system",'),
        *("duplicate_key", b'"system"', "$.messages[0].role", "key 'role' a second time", "keep one"),
    ),
    "a wrong role": (
        row(role="bot"),
        *(
            "unrecognized_role",
            b'"bot"',
            "$.messages[1].role",
            "the string 'bot'",
            "did you mean 'assistant'?",
        ),
    ),
    "half an emoji": (
        LINES[5].replace(b"Yes", b"Yes \\ud83d"),
        *("lone_surrogate", b"\\ud83d", "$", r"half a character, \ud83d", "restore the whole one"),
    ),
    "preferences": (
        b'{"prompt": "Hi.", "chosen": "Hello.", "rejected": "What?"}',
        *("preference_row", b'"Hello."', "$.chosen", "(chosen, rejected)", "--set data.completion=chosen"),
    ),
}
# name: (the wrong file, code, line, part of what was found, part of the remedy)
WRONG_FILES: dict[str, tuple[bytes, str, int, str, str]] = {
    "UTF-16": (
        b"\n".join(LINES).decode().encode("utf-16"),
        *("wrong_encoding", 0, "UTF-16 (little-endian)", "iconv -f UTF-16 -t UTF-8"),
    ),
    "UTF-32": (
        b"\n".join(LINES).decode().encode("utf-32"),
        *("wrong_encoding", 0, "UTF-32 (little-endian)", "iconv -f UTF-32 -t UTF-8"),
    ),
    "an empty file": (b"", "empty_file", 0, "no rows", "at least one row"),
    "an array cut off": (
        b"[" + b",\n".join(LINES),
        *("invalid_json", 12, "the file ends inside the array", "restore the rest"),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_file_in_an_unusual_form_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(RIGHT[name])
    dataset = read_dataset(path).require_clean()
    assert [c.messages[1].content for c in dataset.conversations] == [f"Yes, {n}." for n in range(12)]
    assert dataset.report.counts == {}
    assert "12 rows" in dataset.detected


def errors_of(content: bytes, file: Path) -> list[Finding]:
    """The errors of a file, after checking that they are found at once and stop a run."""
    file.write_bytes(content)
    start = time.process_time()
    dataset = read_dataset(file)
    assert time.process_time() - start < 1.0
    errors = [finding for finding in dataset.report if finding.severity == "error"]
    with pytest.raises(DataError) as caught:
        dataset.require_clean()
    assert caught.value.exit_code == 3
    assert all(str(error) in str(caught.value) for error in errors[:1])
    assert len(errors) > 20 or all(str(error) in str(caught.value) for error in errors)
    return errors


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_row_is_named_with_code_place_and_remedy(name: str, tmp_path: Path) -> None:
    bad, code, needle, path, found, fix = WRONG_ROWS[name]
    (error,) = errors_of(file_with(bad), tmp_path / "data.jsonl")
    at = bad.index(needle) if needle else len(bad)
    column = len(bad[:at].decode("utf-8", "replace")) + 1
    assert (error.code, error.line, error.column, error.path) == (code, 6, column, path)
    assert found in error.found
    assert fix in error.fix


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_named_with_code_and_remedy(name: str, tmp_path: Path) -> None:
    content, code, line, found, fix = WRONG_FILES[name]
    (error,) = errors_of(content, tmp_path / "data.jsonl")
    assert (error.code, error.line) == (code, line)
    assert found in error.found
    assert fix in error.fix


HOSTILE = {
    "a million columns": b'{"a": 1, ' + b", ".join(b'"k%d": 1' % n for n in range(1_000_000)) + b"}",
    "70,000 columns": b'{"a": 1, ' + b", ".join(b'"k%d": 1' % n for n in range(70_000)) + b"}",
    "a message of 70,000 keys": b'{"messages": [{'
    + b", ".join(b'"k%d": 1' % n for n in range(70_000))
    + b"}]}",
    "50,000 wrong messages": b'{"messages": [' + b", ".join([b'{"rol": 1}'] * 50_000) + b"]}",
    "300,000 numbers for messages": b'{"messages": [' + b", ".join([b"1"] * 300_000) + b"]}",
    "70,000 times one key": b"{" + b", ".join([b'"key": 1'] * 70_000) + b"}",
    "60 levels of a megabyte": b'{"a":' * 60 + b"[" + b"1," * 400_000 + b"1]" + b"}" * 60,
    "100,000 NaN": b"[" + b", ".join([b"NaN"] * 100_000) + b"]",
    "a megabyte of quotes": b'{"text": 1, "x": "' + b'\\"' * 500_000 + b'"}',
    "a megabyte of backslashes": b'{"text": "' + b"\\" * 1_000_000,
    "a megabyte of brackets": b"[" * 1_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", ["row", "file"])
def test_a_hostile_row_is_refused_within_a_second(name: str, form: str, tmp_path: Path) -> None:
    content = file_with(HOSTILE[name]) if form == "row" or HOSTILE[name][:2] == b"[N" else HOSTILE[name]
    errors = errors_of(content, tmp_path / "data.json")
    assert 1 <= len(errors) <= 60


def test_a_gigantic_row_is_refused_in_flat_memory(tmp_path: Path) -> None:
    """A row of 128 MB may cost no more than a few times the row limit."""
    file = tmp_path / "data.jsonl"
    with file.open("wb") as out:
        out.write(LINES[0] + b'\n{"text": "')
        for _ in range(128):
            out.write(b"x" * (1 << 20))
        out.write(b'"}\n' + LINES[1] + b"\n")
    grown, counts = read_in_a_process(file)
    assert counts == {"row_too_long": 1}
    assert grown < 32 << 20


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_memory_stays_flat_on_a_large_file(form: str, tmp_path: Path) -> None:
    """64 MB of rows cost some bytes a row, not the file."""
    file = tmp_path / f"data.{form}"
    body = json.dumps({"prompt": "N?", "completion": "word " * 400}).encode()
    rows = (64 << 20) // len(body)
    with file.open("wb") as out:
        out.write(b"[" if form == "json" else b"")
        for number in range(rows):
            separator = b"" if number == 0 else b",\n" if form == "json" else b"\n"
            out.write(separator + body.replace(b"N", str(number).encode()))
        out.write(b"]" if form == "json" else b"\n")
    grown, counts = read_in_a_process(file)
    assert counts == {}
    assert grown < 16 << 20


def read_in_a_process(file: Path) -> tuple[int, dict[str, int]]:
    """Read a file in a fresh process; how many bytes its peak memory grew by, and the counts of its report."""
    code = (
        "import json, resource, sys, numpy\n"
        "from addenda.data import read_dataset\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "counts = read_dataset(sys.argv[1]).report.counts\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(json.dumps([grown * 1024, counts]))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    grown, counts = json.loads(answer.stdout)
    return int(grown), counts
