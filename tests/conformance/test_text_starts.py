"""What starts as a text in front of every sequence answers as with that text in front."""

from __future__ import annotations

import pytest
import torch

import addenda
from addenda.conformance.models import VOCABULARY, model_of
from addenda.core import registry

TEXT = (5, 9, 4, 30)
STARTED = {
    "prompt-tuning": {"tokens": 4, "start": "text", "ids": TEXT},
    "multitask-prompt-tuning": {"tokens": 4, "start": "text", "ids": TEXT, "tasks": 3, "rank": 2},
    "prefix-tuning": {"tokens": 4, "start": "text", "ids": TEXT},
    "cartridge": {"tokens": 4, "start": "text", "ids": TEXT},
    "cpt": {"ids": TEXT},
}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("name", STARTED)
def test_started_from_a_text_it_answers_as_with_that_text_in_front(name: str, kind: str) -> None:
    model, ids = model_of(kind), torch.randint(3, VOCABULARY, (2, 9))
    front = torch.tensor(TEXT).expand(2, -1)
    wanted = model(torch.cat([front, ids], dim=1)).logits[:, len(TEXT) :]
    addenda.attach(model, registry.get(name).from_settings(STARTED[name]))
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
