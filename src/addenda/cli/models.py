"""``addenda models``: the models that load by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from addenda.cli.console import Console, binary_size, table
from addenda.cli.verb import verb

if TYPE_CHECKING:
    from addenda.bases import ModelCard

__all__ = ["command"]


@verb("models", examples=["addenda models", "addenda models --json"])
def command(console: Console) -> None:
    """List the models that load by name, and which of them are on this machine.

    --base also takes a model folder (safetensors), a .gguf file, or a hub id such as org/name or org/name@revision.
    """
    from addenda.bases import list_models

    cards = list_models()
    console.result({"models": [_document(card) for card in cards]}, lambda: _listing(cards))


def _document(card: ModelCard) -> dict[str, object]:
    names = (
        "name",
        "summary",
        "kind",
        "parameters",
        "license",
        "package",
        "sha256",
        "bytes",
        "download_bytes",
        "cached",
    )
    return {name: getattr(card, name) for name in names}


def _listing(cards: tuple[ModelCard, ...]) -> str:
    rows = [
        [
            card.name,
            f"{card.parameters / 1e6:.0f}M",
            binary_size(card.download_bytes),
            card.license,
            _state(card),
            card.summary,
        ]
        for card in cards
    ]
    return table(rows, ["name", "parameters", "download", "licence", "state", "what it is"])


def _state(card: ModelCard) -> str:
    return "ready" if card.cached else "fetched when used"
