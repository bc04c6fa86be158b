"""LoHa in PEFT's folder: four factors of each layer, and for convolutions in Tucker form two cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.export.peft.lycoris import core_shape, patterns, read_patterns, volumes
from addenda.methods.loha import LoHa, LoHaAdapter

__all__ = ["LoHaForm"]


@form
class LoHaForm(Form):
    """PEFT's ``LoHaConfig``."""

    peft_type = "LOHA"
    method = LoHa
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    reads: ClassVar[tuple[str, ...]] = ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights", "rank_dropout", "module_dropout")
    names: ClassVar[tuple[str, ...]] = tuple(
        f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    )

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(LoHa, handle.method)
        return {**patterns(method, handle.paths), "use_effective_conv2d": method.tucker}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return LoHa(**read_patterns(config), tucker=bool(config.get("use_effective_conv2d")))

    def problems(self, handle: Handle) -> list[str]:
        return volumes(handle)

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(LoHaAdapter, adapter)
        found = {"hada_w1_b": ours.A1, "hada_w2_b": ours.A2}
        if ours.T1 is None or ours.T2 is None:
            return {**found, "hada_w1_a": ours.B1, "hada_w2_a": ours.B2}
        shape = core_shape(layer)
        cores = {"hada_t1": ours.T1.unflatten(2, shape), "hada_t2": ours.T2.unflatten(2, shape)}
        return {**found, **cores, "hada_w1_a": ours.B1.t(), "hada_w2_a": ours.B2.t()}
