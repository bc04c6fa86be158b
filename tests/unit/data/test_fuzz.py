"""Damaged files of every kind: each ends in findings or in rows that can be read, never in another exception."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from addenda.data import read_dataset

SCRAPS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\n",
    b"\r",
    b"\x00",
    b"\xff",
    b"null",
    b"NaN",
    b"-",
]
SCRAPS += [
    b"1e999",
    b"9" * 40,
    b"\\ud800",
    b"\\u0000",
    b'"role"',
    b'"messages"',
    b"\xef\xbb\xbf",
    b"\t",
    b"  ",
    b"[]",
]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
ROWS: list[dict[str, object]] = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi é"}], "name": "Ada"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 1},
            {"role": "tool", "content": "3", "tool_call_id": "c"},
            {"role": "assistant", "content": "Three."},
        ],
        "tools": [{"type": "function"}],
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f"}'}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "s"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
    {
        "systemInstruction": {"parts": [{"text": "s"}]},
        "contents": [{"role": "model", "parts": [{"text": "a"}]}],
    },
    {"text": "a"},
]
FORMS: dict[str, Callable[[list[dict[str, object]]], bytes]] = {
    "t.jsonl": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "t.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "w.json": lambda rows: json.dumps({"data": rows}, indent=1).encode(),
    "t.csv": lambda rows: b"prompt,completion,system\n" + b'a,"b ""c""\n d",e\n' * len(rows),
    "m.csv": lambda rows: (
        b"messages\n"
        + b"".join(b'"' + json.dumps(r.get("messages")).replace('"', '""').encode() + b'"\n' for r in rows)
    ),
}


ROUNDS = 150


def damaged(rng: random.Random, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        upto = min(len(data), at + rng.choice([0, 0, 1, 3, 20]))
        data[at:upto] = rng.choice([*SCRAPS, b"", bytes([rng.randrange(256)])])
    return bytes(data[: rng.randint(0, len(data))]) if rng.random() < 0.1 else bytes(data)


@pytest.mark.parametrize("name", FORMS)
def test_damage_gives_findings_not_exceptions(name: str, tmp_path: Path, seeded: int) -> None:
    rng = random.Random(seeded)
    path = tmp_path / name
    wrong = 0
    for _ in range(ROUNDS):
        path.write_bytes(damaged(rng, FORMS[name](rng.sample(ROWS, 4))))
        dataset = read_dataset(path, row_limit=2000)
        assert len(list(dataset.conversations)) == len(dataset)
        assert all(
            conversation.digest == dataset.digest(i) for i, conversation in enumerate(dataset.conversations)
        )
        dataset.report.lines()
        wrong += dataset.report.has_errors
    assert wrong > ROUNDS // 5
