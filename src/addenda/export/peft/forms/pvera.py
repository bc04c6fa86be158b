"""PVeRA in PEFT's folder: two vectors a layer, and the frozen pair once, as ``pvera_A`` and ``pvera_B``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.products import FrozenPair
from addenda.export.peft.form import SHARED_PREFIX, Form, agreed, form
from addenda.export.peft.forms.vera import drawn_pair
from addenda.methods.pvera import PVeRA, PVeRAAdapter

__all__ = ["PVeRAForm"]


@form
class PVeRAForm(Form):
    """PEFT's ``PveraConfig``."""

    peft_type = "PVERA"
    method = PVeRA
    reads: ClassVar[tuple[str, ...]] = (
        "r",
        "d_initial",
        "sample_at_inference",
        "projection_prng_key",
        "save_projection",
    )
    harmless: ClassVar[tuple[str, ...]] = ("generator_seed", "init_weights", "pvera_dropout")
    names: ClassVar[tuple[str, ...]] = ("pvera_lambda_b", "pvera_lambda_d")
    shared_names: ClassVar[tuple[str, ...]] = ("pvera_A", "pvera_B")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(PVeRA, handle.method)
        return {
            "r": method.rank,
            "d_initial": method.d_initial,
            "sample_at_inference": method.sample == "always",
            "save_projection": True,
            "pvera_dropout": 0.0,
            "bias": "none",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        sample = "always" if config.get("sample_at_inference") else "training"
        return PVeRA(rank=config.get("r", 256), d_initial=config.get("d_initial", 0.1), sample=sample)

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        found = dict(tensors)
        if not config.get("save_projection", True) and f"{SHARED_PREFIX}pvera_A" not in found:
            rank = agreed(config, "r", 256, (len(t) // 2 for k, t in found.items() if k.endswith("lambda_d")))
            pair = drawn_pair(model, config, rows=2 * rank, rank=rank)
            found.update(zip((SHARED_PREFIX + name for name in self.shared_names), pair, strict=True))
        return dict(config), found

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(PVeRAAdapter, adapter)
        return {"pvera_lambda_b": ours.b, "pvera_lambda_d": ours.d}

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        pair = cast(FrozenPair, common)
        return {"pvera_A": pair.A, "pvera_B": pair.B}
