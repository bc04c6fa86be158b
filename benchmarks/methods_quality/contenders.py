"""What is compared: methods with settings near one number of trained parameters, and what is left out, with the reason.

The number is that of LoRA of rank 8 on all linear layers. A method whose settings can reach it within a factor of two
is set so; one that is made to be small, or whose parts are prompts, keeps its defaults. So does a method that is not
listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from addenda.core import Method, registry

__all__ = ["HEAD_ONLY", "LEFT_OUT", "LISTED", "STARTS_LEFT_OUT", "Contender", "contenders"]


@dataclass(frozen=True)
class Contender:
    """One method with its settings, under the name that the tables use."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    targets: str | None = None
    """Where it stands; None means where the method stands by itself."""
    tasks: tuple[str, ...] = ("banking77", "gsm8k")
    """Where it can be measured."""

    def made(self) -> Method:
        """Return the method."""
        return registry.get(self.method).from_settings(self.settings)

    def learning_rate(self) -> float | None:
        """Return the rate that the method names itself."""
        return None if self.method == HEAD_ONLY else self.made().usual_rate()


HEAD_ONLY = "head-only"
"""No adapter: the frozen base with a trained classifier on top, where a task has one."""


def _of(name: str, method: str | None = None, /, **settings: Any) -> Contender:
    return Contender(name, method or name, settings)


def _start(name: str) -> Contender:
    return _of(f"lora, {name}", "lora", rank=8, start=name)


# The best known first, so that a run which is cut short has those.
LISTED = (
    Contender(HEAD_ONLY, HEAD_ONLY, tasks=("banking77",)),
    Contender("full", "full", targets="all-linear"),  # by itself it takes the output head alone
    _of("lora", rank=8),
    _of("dora", rank=8),
    _of("rslora", "lora", rank=8, rank_stabilized=True),
    _of("lora+", "lora", rank=8, b_rate=16.0),
    _of("lora-fa", rank=16),
    _of("adalora"),
    _of("vera"),
    _of("ia3"),
    _of("oft"),
    _of("bottleneck"),
    _of("prefix-tuning"),
    _of("prompt-tuning"),
    _of("bitfit"),
    _of("miss", rank=16),
    _of("loha", rank=4),
    _of("lokr", rank=16, factor=2),
    _of("hra", rank=16),
    _of("road"),
    _start("pissa"),
    _of("ln-tuning"),
    _of("boft", block_size=16),
    _of("fourierft", coefficients=9216),
    _start("eva"),
    _start("lora_ga"),
    _start("olora"),
    _start("orthogonal"),
    _start("gaussian"),
    _start("corda"),
    _of("p-tuning"),
    _of("compacter"),
    _of("reft"),
    _of("vblora"),
    _of("randlora"),
    _of("shira", rank=8),
    _of("c3a", block_size=32),
    _of("hira", rank=8),
    _of("waveft", coefficients=9216),
    _of("delora"),
    _of("delora, strength 1", "delora", strength=1.0),
    _of("gralora", rank=8),
    _of("osf", kept=0.98),
    _of("psoft", rank=128),
    _of("poly", rank=2),
    _of("glora", rank=4),
    _of("unilora"),
    _of("tinylora"),
    _of("pvera"),
    _of("deft"),
    _of("para", rank=16),
    _of("peanut", rank=8),
    _of("lily", rank=16),
    _of("adamss", rank=8),
    _of("frod"),
    _of("beft"),
    _of("supertuning", sparsity=0.97),
    _of("multitask-prompt-tuning"),
    _of("kasa", rank=8),
    _of("lora-experts", rank=2),
    _of("monteclora", rank=8),
    _of("velora", rank=8),
    _of("cartridge", start="vocabulary", tokens=20),
    Contender("llama-adapter", "llama-adapter", tasks=("gsm8k",)),  # it stands on causal attention only
)

LEFT_OUT = {
    "adapter-fusion": "mixes adapters of several tasks, and these are measured one at a time",
    "alora": "without an invocation, which these tasks do not have, it is LoRA",
    "cpt": "what it adds to prompt tuning is a context of examples, which these tasks do not give",
    "trainable-tokens": "trains the embeddings of tokens that the base does not know yet, and these tasks have none",
    "xlora": "mixes adapters of several tasks, and these are measured one at a time",
}
"""Methods that no contender is of, each with the reason."""

STARTS_LEFT_OUT = {"loftq": "makes up for what quantizing took, and these bases are not quantized"}
"""Beginnings of LoRA that no contender has, each with the reason; that of plain LoRA is kaiming."""


def contenders(task: str) -> list[Contender]:
    """Return those that a task is measured with: the listed ones, then every other method with its defaults."""
    known = {each.method for each in LISTED} | set(LEFT_OUT)
    others = [_of(name) for name in registry.names() if name not in known]
    return [each for each in (*LISTED, *others) if task in each.tasks]
