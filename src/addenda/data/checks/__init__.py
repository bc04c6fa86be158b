"""Every check of training data, by code; see `addenda.data.checks.base` for the form of one."""

from __future__ import annotations

from addenda.data.checks import conversation, encoding, files, messages, record, syntax, templates
from addenda.data.checks.base import CHECKS, Check

__all__ = [
    "CHECKS",
    "Check",
    "conversation",
    "encoding",
    "files",
    "messages",
    "record",
    "syntax",
    "templates",
]
