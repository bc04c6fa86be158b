"""Which recipes are planned alike, and so may be trained at once."""

from __future__ import annotations

import random

from addenda.recipe.shared import _cost_key
from addenda.settings import resolve


def test_a_recipe_finds_its_plan_when_the_micro_batch_was_derived() -> None:
    """Plans are made before the size of the micro-batch is settled, and looked up afterwards."""
    size = random.randrange(64, 4096)
    open_ = resolve(sets=["train.threads=1"])
    settled = open_.derive("train.tokens_per_micro_batch", size, "soonest over in the memory there is")
    assert _cost_key(settled) == _cost_key(open_)
    given = resolve(sets=["train.threads=1", f"train.tokens_per_micro_batch={size}"])
    assert _cost_key(given) != _cost_key(open_), "what is asked for is planned by itself"
    other = resolve(sets=["train.threads=2"])
    assert _cost_key(other) != _cost_key(open_)
