"""(IA)3: some layers scaled at their output, one at its input."""

from __future__ import annotations

import peft

from addenda import IA3

INNER = {"llama": "down_proj", "gpt2": "c_fc"}
OURS = {"ia3": lambda kind: IA3(feed_forward=(INNER[kind],))}
THEIRS = {"ia3": lambda kind, **targets: peft.IA3Config(feedforward_modules=[INNER[kind]], **targets)}
