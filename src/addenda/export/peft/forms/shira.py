"""SHiRA in PEFT's folder: ``shira_weight`` (k,) and ``shira_indices`` (2, k), rows and columns, of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.errors import CheckpointError
from addenda.export.peft.form import Form, form
from addenda.methods.shira import SHiRA, SparseAdapter

__all__ = ["SHiRAForm"]


@form
class SHiRAForm(Form):
    """PEFT's ``ShiraConfig``. It draws the mask, but keeps the places in the file, so that any mask fits."""

    peft_type = "SHIRA"
    method = SHiRA
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("r",)
    harmless: ClassVar[tuple[str, ...]] = ("init_weights", "mask_type", "random_seed")
    names: ClassVar[tuple[str, ...]] = ("shira_weight", "shira_indices")
    integers: ClassVar[tuple[str, ...]] = ("shira_indices",)

    def settings(self, handle: Handle) -> dict[str, Any]:
        return {"r": cast(SHiRA, handle.method).rank, "mask_type": "random", "init_weights": True}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return SHiRA(rank=config.get("r", 32))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(SparseAdapter, adapter)
        rows_and_columns = torch.stack([ours.places // layer.d_in, ours.places % layer.d_in])
        return {"shira_weight": ours.values, "shira_indices": rows_and_columns}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        ours = cast(SparseAdapter, adapter)
        rows, columns = given["shira_indices"].long()
        if not bool(((rows >= 0) & (rows < layer.d_out) & (columns >= 0) & (columns < layer.d_in)).all()):
            raise CheckpointError(
                f"places of '{layer.path}' lie outside its weight of ({layer.d_out}, {layer.d_in})",
                hint="export it anew for this base",
            )
        with torch.no_grad():
            ours.values.copy_(given["shira_weight"])
            ours.places.copy_(rows * layer.d_in + columns)
