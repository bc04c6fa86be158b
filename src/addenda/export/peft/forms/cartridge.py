"""Cartridges in PEFT's folder: ``prompt_embeddings`` as of a prefix, the frozen tokens first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import form
from addenda.export.peft.prompts import EMBEDDINGS, PrefixForm
from addenda.methods.cartridge import Cartridge, CartridgeAdapter

__all__ = ["CartridgeForm"]


@form
class CartridgeForm(PrefixForm):
    """PEFT's ``CartridgeConfig``."""

    peft_type = "CARTRIDGE"
    method = Cartridge
    reads: ClassVar[tuple[str, ...]] = (*PrefixForm.measures, "num_frozen_tokens")

    def settings(self, handle: Handle) -> dict[str, Any]:
        return {**super().settings(handle), "num_frozen_tokens": cast(Cartridge, handle.method).frozen}

    def read_method(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Method:
        return Cartridge(
            tokens=len(tensors[EMBEDDINGS]), frozen=config.get("num_frozen_tokens", 1), start="vocabulary"
        )

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        ours = cast(CartridgeAdapter, adapter)
        with torch.no_grad():
            ours.first.copy_(given[EMBEDDINGS][: len(ours.first)])
            ours.others.copy_(given[EMBEDDINGS][len(ours.first) :])
