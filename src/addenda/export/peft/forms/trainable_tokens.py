"""Trainable tokens in PEFT's folder: the new rows, ``trainable_tokens_delta`` (tokens, features), of each embedding.

PEFT adapts a tied head along with its embedding, and may keep the same rows for it once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.layers import layer_at
from addenda.export.peft.form import Form, form
from addenda.methods.trainable_tokens import TrainableTokens, TrainableTokensAdapter

__all__ = ["TrainableTokensForm"]

_ROWS = "trainable_tokens_delta"


@form
class TrainableTokensForm(Form):
    """PEFT's ``TrainableTokensConfig``."""

    peft_type = "TRAINABLE_TOKENS"
    method = TrainableTokens
    kinds: ClassVar[tuple[str, ...]] = ("embedding", "linear")
    reads: ClassVar[tuple[str, ...]] = ("token_indices",)
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "modules_to_save")
    names: ClassVar[tuple[str, ...]] = (_ROWS,)
    optional: ClassVar[tuple[str, ...]] = (_ROWS,)

    def settings(self, handle: Handle) -> dict[str, Any]:
        adapters = {path: cast(TrainableTokensAdapter, adapter) for path, adapter in handle.adapters.items()}
        return {
            "token_indices": list(cast(TrainableTokens, handle.method).tokens),
            "target_modules": [path for path, adapter in adapters.items() if not _follows(adapter)],
            "init_weights": True,
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return TrainableTokens(tokens=tuple(config.get("token_indices") or ()))

    def along(self, model: nn.Module, paths: Sequence[str]) -> list[str]:
        read = [path for path in paths if isinstance(layer_at(model, path), nn.Embedding)]
        return list(_tied(model, read))

    def problems(self, handle: Handle) -> list[str]:
        read = [path for path, a in handle.adapters.items() if cast(TrainableTokensAdapter, a).is_read]
        heads = [path for path in handle.paths if path not in read]
        alone = [path for path in _tied(handle.model, read) if path not in handle.paths]
        shifted = [path for path in heads if getattr(layer_at(handle.model, path), "bias", None) is not None]
        return [f"PEFT trains '{path}' along, which shares its weight with a target" for path in alone] + [
            f"PEFT leaves out the bias of '{path}'" for path in shifted
        ]

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(TrainableTokensAdapter, adapter)
        return {_ROWS: _rows(ours, layer) + ours.rows}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        ours = cast(TrainableTokensAdapter, adapter)
        if not _follows(ours):
            with torch.no_grad():
                ours.rows.copy_(given[_ROWS].to(ours.rows) - _rows(ours, layer))


def _rows(adapter: TrainableTokensAdapter, layer: Base) -> Tensor:
    """The base's rows of the tokens, (tokens, features)."""
    weight = layer.weight()
    return (weight.t() if adapter.is_read else weight)[list(adapter.tokens)].to(adapter.rows)


def _follows(adapter: TrainableTokensAdapter) -> bool:
    """Whether the layer is a head whose rows are those of an embedding."""
    owner = adapter.common.owner_of
    first = next(path for path, index in owner.items() if index == owner[adapter.path])
    return first != adapter.path


def _tied(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """Other modules that hold the weight of one of these, by path."""
    weights = {id(layer_at(model, path)._parameters.get("weight")) for path in paths} - {id(None)}
    return {
        path: module
        for path, module in model.named_modules()
        if path not in paths and id(module._parameters.get("weight")) in weights
    }
