"""The model card states what is known and has no holes."""

from __future__ import annotations

from addenda.export.card import model_card
from addenda.export.parity import Closeness, Parity

FOUND = Closeness("a test", 100, 1e-6, 1e-3, None, 1.0, None, None)
PARITY = Parity("passed", "all is well", 0.7, FOUND, FOUND)


def card(provenance: dict[str, object]) -> str:
    return model_card(
        title="T", library="peft", tags=["lora"], usage="x = 1", provenance=provenance, parity=PARITY
    )


def test_facts_of_the_run_are_on_the_card() -> None:
    text = card(
        {
            "base": {"name": "tiny", "source": "org/tiny@abc", "license": "mit", "notes": ["from 4 bits"]},
            "data": {"name": "rows.jsonl", "sha256": "f00", "train_rows": 36},
            "seed": 7,
            "versions": {"torch": "2"},
            "figures": {"heldout_nll_before": 2.0, "heldout_nll_after": 1.25},
        }
    )
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert head.splitlines() == [
        "base_model: org/tiny",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "license: mit",
        "tags:",
        "- lora",
    ]
    for fact in (
        "from 4 bits",
        "rows.jsonl",
        "f00",
        "- Seed: 7",
        "torch 2",
        "nats per token: 1.2500",
        "| loaded with | a test |",
        "all is well",
    ):
        assert fact in body


def test_what_is_not_known_has_no_line() -> None:
    text = card({})
    assert "None" not in text
    assert "base_model:" not in text
    assert "license:" not in text
    assert "## Measured" not in text


def test_a_local_base_is_not_passed_off_as_a_hub_id() -> None:
    assert "base_model:" not in card({"base": {"source": "/srv/models/mine"}})
