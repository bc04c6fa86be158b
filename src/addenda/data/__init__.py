"""Training data: read and check rows, mask what is learned, split, pack."""

from __future__ import annotations

from addenda.data.dataset import Dataset, Rows
from addenda.data.encode import Encoded, Encoder, encode, encode_rows
from addenda.data.findings import Finding, Report
from addenda.data.pack import PackedBatch, collate, epoch_order, plan_batches, plan_steps
from addenda.data.read import read_dataset
from addenda.data.rows import Conversation, Example, Message, RowRef
from addenda.data.show import bracketed, segments
from addenda.data.split import Split, split
from addenda.data.store import ExampleStore

__all__ = [
    "Conversation",
    "Dataset",
    "Encoded",
    "Encoder",
    "Example",
    "ExampleStore",
    "Finding",
    "Message",
    "PackedBatch",
    "Report",
    "RowRef",
    "Rows",
    "Split",
    "bracketed",
    "collate",
    "encode",
    "encode_rows",
    "epoch_order",
    "plan_batches",
    "plan_steps",
    "read_dataset",
    "segments",
    "split",
]
