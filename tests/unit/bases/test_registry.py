from __future__ import annotations

import pytest

from addenda.bases.registry import MODELS, ModelCard, find


def test_names_are_unique_and_found() -> None:
    assert len({card.name for card in MODELS}) == len(MODELS)
    assert all(find(card.name) is card for card in MODELS)
    assert find("no-such-model") is None


@pytest.mark.parametrize("card", MODELS, ids=lambda card: card.name)
def test_every_byte_of_a_card_is_pinned(card: ModelCard) -> None:
    digests = [card.sha256, *(wheel.sha256 for wheel in card.wheels)]
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)
    assert all(wheel.bytes > 0 and wheel.version and wheel.members for wheel in card.wheels)
    assert card.file in {name for wheel in card.wheels for _, name in wheel.members}
    assert not card.cached
