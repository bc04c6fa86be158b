"""The table of what goes to PEFT and back is whole, and of the installed PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from addenda.errors import CheckpointError
from addenda.export.peft import CONFIG, import_peft
from addenda.export.peft.form import TENSORS, forms
from addenda.export.peft.reading import UNREAD

peft = pytest.importorskip("peft")

TYPES = {kind.value for kind in peft.PeftType}
READ = {form.peft_type for form in forms().values()}
ELSEWHERE = {"lora-fa": "lora", "p-tuning": "prompt-tuning"}
"""Ours whose folders PEFT does not tell from those of another; they are read as that one."""


@pytest.fixture
def table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("peft_differences.json").read_text(encoding="utf-8"))


def test_every_type_of_pefts_is_read_or_says_why_not() -> None:
    assert TYPES - READ - UNREAD.keys() == set(), "to be read, or named in UNREAD with the reason"
    assert READ & UNREAD.keys() == set(), "read now: to be taken out of UNREAD"
    assert READ | UNREAD.keys() <= TYPES


@pytest.mark.parametrize("kind", UNREAD)
def test_what_is_not_read_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": kind}))
    (tmp_path / TENSORS).touch()
    with pytest.raises(CheckpointError) as refused:
        import_peft(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    assert UNREAD[kind] in str(refused.value)


def test_every_form_was_measured_and_no_difference_is_larger_than_rounding(table: dict[str, Any]) -> None:
    differences = table["differences"]
    assert differences.keys() == forms().keys(), "make parity-table measures them"
    for name, ways in differences.items():
        for way, found in ways.items():
            assert (found["cases"] > 0) == (way == "written" or name not in ELSEWHERE), (name, way)
            assert found["largest"] is None or found["largest"] <= 1e-5, (name, way)


def test_the_settings_that_are_refused_are_those_of_the_installed_peft(
    of_peft: Callable[[], dict[str, Any]], table: dict[str, Any]
) -> None:
    assert table["refused"] == of_peft()["refused"], "make parity-table writes them anew"
