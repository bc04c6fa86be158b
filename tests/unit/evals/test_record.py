"""A record that cannot be read says which field is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from addenda.errors import CheckpointError
from addenda.evals.record import RunRecord

MakeRecord = Callable[..., RunRecord]


def test_wrong_fields_are_all_named(made_up_record: MakeRecord) -> None:
    fields = json.loads(made_up_record().to_json())
    del fields["base"]["license"]
    fields["cost"]["steps"] = "many"
    with pytest.raises(CheckpointError, match="run record cannot be read") as caught:
        RunRecord.from_json(json.dumps(fields))
    assert set(caught.value.where) == {"base.license", "cost.steps"}
    assert "another version" in caught.value.hint


def test_text_that_is_no_record_is_refused() -> None:
    with pytest.raises(CheckpointError, match="run record cannot be read"):
        RunRecord.from_json('{"name": "cut o')
