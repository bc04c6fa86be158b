"""Poly in PEFT's folder: skills and router of each layer; PEFT's model asks for ``task_ids`` in every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.errors import CheckpointError
from addenda.export.peft.form import Form, form
from addenda.methods.poly import Poly, PolyAdapter

__all__ = ["PolyForm"]


@form
class PolyForm(Form):
    """PEFT's ``PolyConfig``."""

    peft_type = "POLY"
    method = Poly
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("r", "n_tasks", "n_skills", "n_splits", "poly_type")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)
    names: ClassVar[tuple[str, ...]] = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")
    why_unasked = "peft's model asks for more than the tokens"

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(Poly, handle.method)
        return {
            "r": method.rank,
            "n_tasks": method.tasks,
            "n_skills": method.skills,
            "n_splits": method.splits,
            "poly_type": "poly",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        if config.get("poly_type", "poly") != "poly":
            raise CheckpointError(
                f"poly_type {config['poly_type']!r} is not read; 'poly' is", hint="train it anew with 'poly'"
            )
        return Poly(
            rank=config.get("r", 8),
            tasks=config.get("n_tasks", 1),
            skills=config.get("n_skills", 4),
            splits=config.get("n_splits", 1),
        )

    def problems(self, handle: Handle) -> list[str]:
        task = cast(Poly, handle.method).task
        return [f"it runs task {task} where none is told, and PEFT has no place for that"] if task else []

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(PolyAdapter, adapter)
        return dict(zip(self.names, (ours.A, ours.B, ours.z), strict=True))
