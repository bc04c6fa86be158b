"""A whole run through a rounding: it learns, goes on where it stopped, and its merge answers as what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import addenda
from addenda.bases import formats
from addenda.core.through import merged_rows
from addenda.export.careful import answering_as, plain_merge
from addenda.recipe.adapted import load_adapted
from addenda.settings import resolve


def test_a_run_through_q4_0_learns_and_its_merge_is_what_was_trained(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    values = {
        "base.source": str(tiny_model), "base.dtype": "float32", "data.path": str(chat_rows), "evals.samples": 0,
        "train.through": "Q4_0", "train.epochs": 3, "train.learning_rate": 1e-2, "train.threads": 1,
        "out": str(tmp_path / "run"),
    }  # fmt: skip
    summary = addenda.run(resolve(flags=values), on_event=lambda event: None)
    assert summary is not None
    told = json.loads((tmp_path / "run/summary.json").read_text())
    assert told["heldout_nll_after"] < 0.8 * told["heldout_nll_before"]
    base, handle, provenance = load_adapted(tmp_path / "run", on_event=lambda event: None)
    assert (handle.through, provenance["recipe"]["train.through"]) == ("Q4_0", "q4_0")
    ids = torch.randint(4, 60, (1, 30))
    with torch.no_grad():
        answer = base.model(input_ids=ids).logits
        with answering_as(handle, plain_merge(handle, "q4_0")):
            assert torch.allclose(base.model(input_ids=ids).logits, answer, atol=1e-4)
        with handle.disabled():
            assert not torch.allclose(base.model(input_ids=ids).logits, answer, atol=1e-2)
    path = handle.paths[0]
    rows = merged_rows(handle, path, "Q4_0")
    handle.merge()
    d_in = handle.view(path).d_in
    assert torch.equal(handle.view(path).weight(), formats.get("Q4_0").dequantize(rows, d_in))
