"""Multitask prompt tuning: one prompt for several tasks, scaled by a low-rank matrix of each task's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from addenda.core.contract import Base
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.core.sequence import Inputs, PromptAdapter, SequenceMethod, Transformer
from addenda.core.virtual_starts import start_problems, start_problems_at, tokens_of_vocabulary, uniform

__all__ = ["MultitaskPromptTuning"]


@register("multitask-prompt-tuning")
@dataclass(frozen=True)
class MultitaskPromptTuning(SequenceMethod):
    """Virtual tokens in front of every sequence: a prompt all tasks share, scaled by a low-rank matrix of the task.

    h = model([P * (U_k V_k); embed(x)]),   P: (tokens, width),  U_k: (tokens, rank),  V_k: (rank, width)   for task k

    U_k V_k starts as ones, so that every task starts with the shared prompt. Not mergeable. Parameters:
    tokens * width, and rank * (tokens + width) for each task.

    Args:
        tokens: virtual tokens, >= 1.
        tasks: how many tasks, >= 1.
        task: the task of samples that do not say, 0 <= task < tasks. A call of the model may say for each sample:
            ``model(input_ids, task_ids=torch.tensor([0, 2]))``.
        rank: of each task's matrix, >= 1.
        start: where P starts, as in prompt tuning: ``vocabulary``, ``text`` or ``random``.
        text: a text to start from; where a run has a tokenizer, it makes ``ids`` of it.
        ids: the tokens of that text, repeated or cut to ``tokens``.

    **Cost**: no matrix product beside the model's own; every sample is longer by ``tokens``.

    **Use it when** there are many small tasks of a kind, or one that others like it were trained before.

    **Learning rate**: 3e-2, chosen here for AdamW and not tuned.

    Differs from: the paper distils P from prompts that were trained one by one; here all tasks are trained together.
    PEFT starts U and V near zero, which makes the first prompts nearly nothing.

    Example:
        >>> import addenda
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
        >>> addenda.attach(model, MultitaskPromptTuning(tokens=4, tasks=3)).trainable_parameters
        124

    References: Wang et al. 2023, arXiv:2303.02861, section 3.
    """

    learning_rate: ClassVar[float] = 3e-2
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"tokens": 4},
        {"tokens": 3, "tasks": 1, "rank": 2, "start": "text", "ids": (3, 1)},
    )

    tokens: int = 20
    """Virtual tokens."""
    tasks: int = 1
    """How many tasks."""
    task: int = 0
    """The task of samples that do not say."""
    rank: int = 1
    """Rank of each task's matrix."""
    start: str = "vocabulary"
    """vocabulary, text or random."""
    text: str = ""
    """Text to start from."""
    ids: tuple[int, ...] = ()
    """Tokens of the text to start from."""

    def problems(self) -> list[str]:
        found = integer("tokens", self.tokens) + integer("tasks", self.tasks) + integer("rank", self.rank)
        found += integer("task", self.task, least=0)
        if not found and self.task >= self.tasks:
            found.append(f"task must be less than tasks = {self.tasks}, got {self.task}")
        return found + start_problems(self.start, self.ids, self.text)

    def problems_at(self, base: Base) -> list[str]:
        return start_problems_at(self.start, self.ids, base)

    def build_on(self, model: Transformer) -> MultitaskPromptAdapter:
        ids = self.ids if self.start == "text" else ()
        init = uniform(0.5) if self.start == "random" else tokens_of_vocabulary(model, ids)
        return MultitaskPromptAdapter(
            model.parameter(self.tokens, model.width, init=init),
            model.parameter(self.tasks, self.tokens, self.rank, init=1.0),
            model.parameter(self.tasks, self.rank, model.width, init=1 / self.rank),
            task=self.task,
        )


class MultitaskPromptAdapter(PromptAdapter):
    """P: (tokens, width), U: (tasks, tokens, rank), V: (tasks, rank, width)."""

    def __init__(self, P: nn.Parameter, U: nn.Parameter, V: nn.Parameter, *, task: int) -> None:
        super().__init__()
        self.P, self.U, self.V, self.task = P, U, V, task

    def prompt(self, inputs: Inputs) -> Tensor:
        which = inputs.given.get("task_ids")
        which = self.task if which is None else which
        return self.P * (self.U[which] @ self.V[which])
