"""Fetch the base if it is not there, and say where it lies and how many tokens the rows have."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

import addenda
from addenda import data

base_name, rows_path, out = sys.argv[1:]
base = addenda.load_base(base_name, dtype=torch.bfloat16)
encoder = data.Encoder(base.tokenizer, base.chat_template, max_tokens=1024, overflow="cut")
encoded = data.encode_rows(data.read_dataset(rows_path).require_clean().conversations, encoder)
lengths = list(encoded.examples.lengths)
facts = {
    "folder": str(base.folder),
    "parameters": base.model.num_parameters(),
    "data": {
        "rows": len(lengths),
        "tokens": encoded.tokens,
        "tokens_per_row": {
            "mean": round(statistics.mean(lengths), 1),
            "median": statistics.median(lengths),
            "longest": max(lengths),
        },
        "share_of_tokens_in_answers": round(encoded.trained_tokens / encoded.tokens, 3),
    },
}
Path(out).write_text(json.dumps(facts), encoding="utf-8")
