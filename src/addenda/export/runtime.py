"""What a program that runs exported files offers, so that its answers can be compared with the model's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from addenda.export.probes import Kind, Row, answer

__all__ = ["Chat", "ModelRuntime", "Runtime", "TokenizerChat"]


class Chat(Protocol):
    """How a runtime turns conversations into token ids."""

    tools: bool
    """Whether tools offered to it are written as the template writes them."""

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return the prompt for an answer to these messages."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered text."""

    def begin(self, text: str) -> list[int]:
        """Return the token ids of a plain text, with what the runtime puts before it."""

    def ends(self, token: int) -> bool:
        """Return whether this token ends an answer."""


class Runtime(ABC):
    """A loaded export; a context manager that gives back what it holds."""

    name: str = ""
    """The program and its version, such as ``ONNX Runtime 1.31.1``."""
    chat: Chat | None = None
    """None where the runtime takes token ids or tensors only."""
    has_base: ClassVar[bool] = False
    """Whether it can answer without the adapter too."""

    @abstractmethod
    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        """Run one row: (n, d) float32 on the CPU, as `addenda.export.probes.answer`; NaN where it does not tell.

        Args:
            row: see `Row`.
            kind: what the output means.
            adapted: False asks for the base alone; only of runtimes with `has_base`.
        """

    def answers(self, rows: Sequence[Row], kind: Kind, *, adapted: bool = True) -> Iterator[Tensor]:
        """Run rows, in their order; several at once where that is faster."""
        return (self.answer(row, kind, adapted=adapted) for row in rows)

    def close(self) -> None:  # noqa: B027  (most hold nothing that Python does not free)
        """Give back what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ModelRuntime(Runtime):
    """A PyTorch model that was loaded from an export.

    Args:
        name: what loaded it.
        model: called with a row as keyword arguments.
        chat: how it reads conversations, if it does.
    """

    def __init__(self, name: str, model: nn.Module, chat: Chat | None = None) -> None:
        self.name, self.model, self.chat = name, model.eval(), chat

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        return answer(self.model, row, kind)


class TokenizerChat:
    """The chat of a runtime that takes its tokenizer and template from files in Hugging Face's layout.

    Args:
        tokenizer: as loaded from the export.
        stops: the token ids that end an answer there.
    """

    tools = True

    def __init__(self, tokenizer: Any, stops: set[int]) -> None:
        self._tokenizer, self._stops = tokenizer, stops

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
        )
        return text

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def begin(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def ends(self, token: int) -> bool:
        return token in self._stops
