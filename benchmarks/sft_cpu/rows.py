"""The rows of a comparison: written as chats for every contestant, counted, and the base found."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["SUPPORT", "prepare"]

HERE = Path(__file__).resolve().parent
SUPPORT = HERE.parent.parent / "examples" / "data" / "support.jsonl"


def prepare(options: argparse.Namespace, work: Path, base: str) -> dict[str, Any]:
    """Write the rows as chats, and find the model's folder and the number of tokens in a child process."""
    rows = [as_chat(json.loads(line)) for line in first_lines(options.data, options.rows)]
    path = work / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, str(HERE / "prepare.py"), base, str(path), str(work / "prepared.json")]
    subprocess.run(command, check=True)
    prepared: dict[str, Any] = json.loads((work / "prepared.json").read_text(encoding="utf-8"))
    prepared["data"] |= {
        "title": options.title or options.data.stem,
        "sha256_of_chats": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    return prepared


def first_lines(path: Path, count: int) -> list[str]:
    source = path / "train.jsonl" if path.is_dir() else path
    with source.open(encoding="utf-8") as lines:
        return [line for line, _ in zip((line for line in lines if line.strip()), range(count), strict=False)]


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as ``messages``, whatever else it holds left out."""
    if "messages" in row:
        kept = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        return {"messages": kept}
    user, assistant = ("user", row["question"]), ("assistant", row["answer"])
    return {"messages": [{"role": role, "content": text} for role, text in (user, assistant)]}
