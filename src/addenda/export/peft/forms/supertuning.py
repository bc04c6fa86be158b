"""Super-tuning in PEFT's folder: values and flat places of each layer, and a low-rank pair where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.errors import CheckpointError
from addenda.export.peft.form import Form, form
from addenda.methods.shira import SparseAdapter, chosen
from addenda.methods.supertuning import SuperTuning, SupraAdapter

__all__ = ["SuperTuningForm"]

_VALUES, _PLACES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


@form
class SuperTuningForm(Form):
    """PEFT's ``SupertuningConfig``. Without the places, which it may leave out, they are those of the magnitudes."""

    peft_type = "SUPERTUNING"
    method = SuperTuning
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("sparsity", "select_top", "r", "lora_alpha", "lora_dropout")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights", "save_precomputed_indices")
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)
    names: ClassVar[tuple[str, ...]] = (_VALUES, _PLACES, _A, _B)
    integers: ClassVar[tuple[str, ...]] = (_PLACES,)
    optional: ClassVar[tuple[str, ...]] = (_PLACES,)

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(SuperTuning, handle.method)
        return {
            "sparsity": method.sparsity,
            "select_top": not method.smallest,
            "r": method.rank or None,
            "lora_alpha": (method.alpha or 2 * method.rank) if method.rank else None,
            "lora_dropout": method.dropout,
            "save_precomputed_indices": True,
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        rank = config.get("r") or 0
        return SuperTuning(
            sparsity=config.get("sparsity", 0.99),
            smallest=not config.get("select_top", True),
            rank=rank,
            alpha=config.get("lora_alpha") if rank else None,
            dropout=config.get("lora_dropout", 0.0) if rank else 0.0,
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        if isinstance(adapter, SupraAdapter):
            return {**self.tensors(adapter.sparse, layer), _A: adapter.A, _B: adapter.B}
        ours = cast(SparseAdapter, adapter)
        return {_VALUES: ours.values, _PLACES: ours.places}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        if isinstance(adapter, SupraAdapter):
            with torch.no_grad():
                adapter.A.copy_(given[_A])
                adapter.B.copy_(given[_B])
        sparse = adapter.sparse if isinstance(adapter, SupraAdapter) else cast(SparseAdapter, adapter)
        places = given.get(_PLACES)
        if places is None:
            chosen(layer, sparse.how)(sparse.places, torch.Generator())
        elif bool(((places >= 0) & (places < layer.d_in * layer.d_out)).all()):
            sparse.places.copy_(places)
        else:
            raise CheckpointError(
                f"places of '{layer.path}' lie outside its weight of ({layer.d_out}, {layer.d_in})",
                hint="export it anew for this base",
            )
        with torch.no_grad():
            sparse.values.copy_(given[_VALUES])
