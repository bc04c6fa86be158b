"""What a GGUF file says of a model before its tensors."""

from __future__ import annotations

from addenda.bases import LoadedBase
from addenda.bases.loaded import vocabulary_of
from addenda.export.gguf.architectures import Value
from addenda.export.gguf.layout import Layout
from addenda.export.gguf.tokenizer import tokenizer_keys

__all__ = ["base_keys"]


def base_keys(base: LoadedBase, layout: Layout) -> dict[str, Value]:
    """Return all keys that llama.cpp needs to run a base: sizes, positions, tokenizer and chat template.

    Raises:
        ExportError: llama.cpp has no tokenizer like the base's.
    """
    rows = vocabulary_of(base.model)
    keys: dict[str, Value] = {"general.type": "model", "general.name": base.name}
    if base.license:
        keys["general.license"] = base.license
    keys |= layout.hyperparameters()
    keys[f"{layout.architecture.name}.vocab_size"] = rows
    keys |= tokenizer_keys(base.tokenizer, rows)
    if base.chat_template:
        keys["tokenizer.chat_template"] = base.chat_template
    return keys
