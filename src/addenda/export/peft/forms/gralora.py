"""GraLoRA in PEFT's folder: the blocks' factors in two tensors, and those of the plain LoRA beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.methods.gralora import GraLoRA, GraLoRAAdapter

__all__ = ["GraLoRAForm"]

_NAMES = {
    "A": "gralora_A",
    "B": "gralora_B",
    "A_hybrid": "gralora_A_general.weight",
    "B_hybrid": "gralora_B_general.weight",
}


@form
class GraLoRAForm(Form):
    """PEFT's ``GraloraConfig``."""

    peft_type = "GRALORA"
    method = GraLoRA
    reads: ClassVar[tuple[str, ...]] = ("r", "hybrid_r", "alpha", "gralora_k")
    harmless: ClassVar[tuple[str, ...]] = ("gralora_dropout", "init_weights")
    names: ClassVar[tuple[str, ...]] = tuple(_NAMES.values())

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(GraLoRA, handle.method)
        total = method.rank + method.hybrid_rank
        return {
            "r": method.rank,
            "hybrid_r": method.hybrid_rank,
            "alpha": 2 * total if method.alpha is None else method.alpha,
            "gralora_k": method.blocks,
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return GraLoRA(
            rank=config.get("r", 32),
            hybrid_rank=config.get("hybrid_r", 0),
            alpha=config.get("alpha", 64),
            blocks=config.get("gralora_k", 2),
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        return {_NAMES[name]: tensor for name, tensor in cast(GraLoRAAdapter, adapter).named_parameters()}
