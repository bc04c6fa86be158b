"""PEANuT in PEFT's folder: the network of each layer, its hidden layers numbered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.methods.peanut import PEANuT, PEANuTAdapter

__all__ = ["PEANuTForm"]

_DEEPEST = 64
"""Most hidden layers on each side that are looked for."""


@form
class PEANuTForm(Form):
    """PEFT's ``PeanutConfig``."""

    peft_type = "PEANUT"
    method = PEANuT
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("r", "depth", "act_fn", "scaling")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)
    names: ClassVar[tuple[str, ...]] = (
        "peanut_A.weight",
        "peanut_B.weight",
        *(f"peanut_encoders.{i}.weight" for i in range(_DEEPEST)),
        *(f"peanut_decoders.{i}.weight" for i in range(_DEEPEST)),
    )

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(PEANuT, handle.method)
        return {
            "r": method.rank,
            "depth": method.depth,
            "act_fn": method.activation,
            "scaling": method.scaling,
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return PEANuT(
            rank=config.get("r", 32),
            depth=config.get("depth", 0),
            activation=config.get("act_fn", "relu"),
            scaling=config.get("scaling", 1.0),
        )

    def problems(self, handle: Handle) -> list[str]:
        depth = cast(PEANuT, handle.method).depth
        return [f"depth {depth} exceeds the {_DEEPEST} that are read again"] if depth > _DEEPEST else []

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(PEANuTAdapter, adapter)
        found: dict[str, Tensor] = {"peanut_A.weight": ours.A, "peanut_B.weight": ours.B}
        found.update({f"peanut_encoders.{i}.weight": E for i, E in enumerate(ours.encoders)})
        found.update({f"peanut_decoders.{i}.weight": D for i, D in enumerate(ours.decoders)})
        return found
