"""A base model in memory, with all that must travel with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["LoadedBase", "vocabulary_of"]


def vocabulary_of(model: Any) -> int:
    """Return the rows of a transformers model's input embedding, which may be packed."""
    table = model.get_input_embeddings()
    return table.num_embeddings if hasattr(table, "num_embeddings") else len(table.weight)


@dataclass(frozen=True)
class LoadedBase:
    """A pretrained model, its tokenizer and its chat template, ready to be adapted.

    The record is frozen; the model inside is not. See `load_base`, which makes one.
    """

    name: str
    """Short name: the registered name, the folder's or file's name, or ``org/name``."""
    source: str
    """Where it came from, exactly enough to fetch it again: package and version, path, or hub id and commit."""
    folder: Path
    """The directory the weights were read from."""
    model: PreTrainedModel
    """The model in evaluation mode, on the device it was loaded to."""
    tokenizer: PreTrainedTokenizerFast
    """Its tokenizer; ``tokenizer.chat_template`` equals ``chat_template``."""
    kind: Literal["causal-lm", "encoder"]
    """``causal-lm`` predicts the next token; ``encoder`` gives hidden states only."""
    chat_template: str | None
    """The Jinja template that turns messages into text, or None for a base never trained on conversations."""
    template_sha256: str | None
    """SHA-256 of the template's UTF-8 text, or None without a template."""
    tokenizer_sha256: str
    """SHA-256 of the bytes of ``tokenizer.json``."""
    context_length: int
    """Tokens of context the model was built for."""
    license: str
    """SPDX id or name, as the source states it; ``unknown`` where it states none."""
    weights: Literal["dense", "packed", "nf4", "int8"] = "dense"
    """Whether the weights are in memory as numbers, as they are packed in their file, or packed at the load."""
    weights_reason: str = ""
    """Why they are so."""
    notes: tuple[str, ...] = ()
    """What a reader of results must know, e.g. that weights were dequantised from 4 bits."""

    @property
    def room(self) -> int:
        """Tokens of context that the adapters at work leave; each prompt or prefix takes as many as it has."""
        from addenda.core.handle import handles

        at_work = (handle for handle in handles(self.model).values() if handle.active)
        return self.context_length - sum(handle.method.positions for handle in at_work)

    def describe(self) -> dict[str, Any]:
        """Return the facts of this base as JSON-able values, for listings and provenance."""
        from addenda.core.packed_layers import packed_numel

        return {
            "name": self.name,
            "source": self.source,
            "kind": self.kind,
            "architecture": self.model.config.model_type,
            "parameters": self.model.num_parameters() + packed_numel(self.model),
            "weights": self.weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "context_length": self.context_length,
            "vocabulary": len(self.tokenizer),
            "license": self.license,
            "chat_template": self.chat_template is not None,
            "template_sha256": self.template_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "folder": str(self.folder),
            "notes": list(self.notes),
        }
