"""MiSS in PEFT's folder: one ``miss_block`` a layer, whose shape and meaning depend on ``init_weights``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.methods.miss import BatAdapter, MiSS, MiSSAdapter

__all__ = ["MiSSForm"]


@form
class MiSSForm(Form):
    """PEFT's ``MissConfig``."""

    peft_type = "MISS"
    method = MiSS
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("r", "mini_r", "init_weights")
    harmless: ClassVar[tuple[str, ...]] = ("miss_dropout",)
    names: ClassVar[tuple[str, ...]] = ("miss_block",)

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(MiSS, handle.method)
        mode = True if method.mode == "balance" else method.mode
        return {"r": method.rank, "mini_r": method.mini_rank, "init_weights": mode}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        mode = config.get("init_weights", True)
        return MiSS(
            rank=config.get("r", 64),
            mini_rank=config.get("mini_r", 1),
            mode="balance" if isinstance(mode, bool) else mode,
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        B = cast(MiSSAdapter | BatAdapter, adapter).B
        return {"miss_block": B if isinstance(adapter, BatAdapter) else B.t()}
