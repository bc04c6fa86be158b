"""HiRA in PEFT's folder: ``hira_A`` and ``hira_B``, shaped as LoRA's; an embedding's as ``hira_embedding_A``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.export.peft.forms.lora import KINDS, factors, layer_problems
from addenda.methods.hira import HiRA, HiRAAdapter

__all__ = ["HiRAForm"]


@form
class HiRAForm(Form):
    """PEFT's ``HiraConfig``."""

    peft_type = "HIRA"
    method = HiRA
    kinds: ClassVar[tuple[str, ...]] = KINDS
    reads: ClassVar[tuple[str, ...]] = ("r", "hira_dropout")
    # PEFT builds every layer with r, whatever rank_pattern says: the tensors' shapes count.
    harmless: ClassVar[tuple[str, ...]] = ("init_weights", "rank_pattern")
    names: ClassVar[tuple[str, ...]] = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(HiRA, handle.method)
        return {"r": method.rank_at(handle.paths[0]), "hira_dropout": method.dropout}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> HiRA:
        return HiRA(rank=config.get("r", 32), dropout=config.get("hira_dropout", 0.0))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(HiRAAdapter, adapter)
        return factors(ours.A, ours.B, layer, prefix="hira", suffix="")

    def problems(self, handle: Handle) -> list[str]:
        ranks = {cast(HiRA, handle.method).rank_at(path) for path in handle.paths}
        uneven = ["PEFT builds every layer of HiRA with one rank"] * (len(ranks) > 1)
        return uneven + layer_problems(handle, dilation=True)
