"""DeLoRA in PEFT's folder: two factors, the strength, and the norms of the weight's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.export.peft.lycoris import most_common
from addenda.methods.delora import DeLoRA, DeLoRAAdapter

__all__ = ["DeLoRAForm"]


@form
class DeLoRAForm(Form):
    """PEFT's ``DeloraConfig``."""

    peft_type = "DELORA"
    method = DeLoRA
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("r", "delora_lambda", "rank_pattern", "lambda_pattern")
    harmless: ClassVar[tuple[str, ...]] = ("module_dropout", "init_weights")
    names: ClassVar[tuple[str, ...]] = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(DeLoRA, handle.method)
        rank, ranks = most_common({path: method.rank_at(path) for path in handle.paths})
        strength, strengths = most_common({path: method.strength_at(path) for path in handle.paths})
        return {"r": rank, "delora_lambda": strength, "rank_pattern": ranks, "lambda_pattern": strengths}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        # PEFT takes the first pattern that matches, DeLoRA here the last suffix.
        ranks, strengths = (
            dict(reversed((config.get(key) or {}).items())) for key in ("rank_pattern", "lambda_pattern")
        )
        return DeLoRA(
            rank=config.get("r", 8),
            strength=config.get("delora_lambda", 15),
            ranks=ranks,
            strengths=strengths,
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(DeLoRAAdapter, adapter)
        return {
            "delora_A": ours.A,
            "delora_B": ours.B,
            "delora_lambda": ours.strength,
            "delora_w_norm": ours.norms,
        }
