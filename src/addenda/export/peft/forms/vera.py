"""VeRA in PEFT's folder: two vectors a layer, and the frozen pair once, as ``vera_A`` and ``vera_B``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.methods.vera import Projections, VeRA, VeRAAdapter

__all__ = ["VeRAForm"]


@form
class VeRAForm(Form):
    """PEFT's ``VeraConfig``."""

    peft_type = "VERA"
    method = VeRA
    reads: ClassVar[tuple[str, ...]] = ("r", "d_initial")
    harmless: ClassVar[tuple[str, ...]] = (
        "init_weights",
        "projection_prng_key",
        "save_projection",
        "vera_dropout",
    )
    names: ClassVar[tuple[str, ...]] = ("vera_lambda_b", "vera_lambda_d")
    shared_names: ClassVar[tuple[str, ...]] = ("vera_A", "vera_B")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(VeRA, handle.method)
        return {
            "r": method.rank,
            "d_initial": method.d_initial,
            "save_projection": True,
            "vera_dropout": 0.0,
            "bias": "none",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return VeRA(rank=config.get("r", 256), d_initial=config.get("d_initial", 0.1))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(VeRAAdapter, adapter)
        return {"vera_lambda_b": ours.b, "vera_lambda_d": ours.d}

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        pair = cast(Projections, common)
        return {"vera_A": pair.A, "vera_B": pair.B}
