"""DEFT and PaRa in PEFT's folder: ``deft_P`` and, where something is injected, ``deft_R``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.methods.deft import DEFT, DEFTAdapter
from addenda.methods.para import PaRa

__all__ = ["DEFTForm", "PaRaForm"]

_WORDS = {"relu": "relu", "orthogonal": "qr"}


@form
class DEFTForm(Form):
    """PEFT's ``DeftConfig``."""

    peft_type = "DEFT"
    method: ClassVar[type[Method]] = DEFT
    reads: ClassVar[tuple[str, ...]] = ("r", "decomposition_method", "alpha", "para")
    harmless: ClassVar[tuple[str, ...]] = ("init_scale", "init_weights", "deft_dropout")
    names: ClassVar[tuple[str, ...]] = ("deft_P", "deft_R")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(DEFT | PaRa, handle.method)
        return {
            "r": method.rank,
            "decomposition_method": _WORDS[method.projection],
            "alpha": getattr(method, "alpha", None),
            "para": isinstance(method, PaRa),
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        word = config.get("decomposition_method", "relu")
        projection = next((ours for ours, theirs in _WORDS.items() if theirs == word), word)
        rank = config.get("r", 8)
        if config.get("para"):
            return PaRa(rank=rank, projection=projection)
        return DEFT(rank=rank, projection=projection, alpha=config.get("alpha"))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(DEFTAdapter, adapter)
        return {"deft_P": ours.P} if ours.R is None else {"deft_P": ours.P, "deft_R": ours.R}


@form
class PaRaForm(DEFTForm):
    """PEFT's ``DeftConfig`` with ``para=True``; both are read by `DEFTForm`."""

    method = PaRa
