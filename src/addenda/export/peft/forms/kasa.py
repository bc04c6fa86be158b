"""KaSA in PEFT's folder: LoRA's tensors and ``lora_diag`` (rank,); what is taken off follows from the base's weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.starts import wide_weight
from addenda.export.peft.form import form
from addenda.export.peft.forms.lora import READS, LowRankForm, read_low_rank
from addenda.methods.kasa import KaSA, KaSAAdapter, least_components

__all__ = ["KaSAForm"]


@form
class KaSAForm(LowRankForm):
    """PEFT's ``LoraConfig(kasa_config=...)``."""

    method = KaSA
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = (*READS, "kasa_config")
    names: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight", "lora_diag")
    mark = "kasa_config"

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(KaSA, handle.method)
        penalties = {"beta": method.beta, "gamma": method.gamma}
        return {**super().settings(handle), "kasa_config": penalties}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> KaSA:
        given = config["kasa_config"]
        penalties = {key: given[key] for key in ("beta", "gamma") if key in given}
        return KaSA(**read_low_rank(config), **penalties)

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        return {**super().tensors(adapter, layer), "lora_diag": cast(KaSAAdapter, adapter).values}

    def prepare(self, adapter: Adapter, layer: Base, method: Method) -> None:
        ours = cast(KaSAAdapter, adapter)
        with torch.no_grad():
            for place, value in zip(
                (ours.A0, ours.B0), least_components(wide_weight(layer), len(ours.A)), strict=True
            ):
                place.copy_(value)
