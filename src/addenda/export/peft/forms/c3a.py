"""C3A in PEFT's folder: one ``c3a_kernel`` a layer, (d_out / b, d_in / b, b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.export.peft.layers import common_and_others, sizes_at
from addenda.methods.c3a import C3A, C3AAdapter

__all__ = ["C3AForm"]


@form
class C3AForm(Form):
    """PEFT's ``C3AConfig``."""

    peft_type = "C3A"
    method = C3A
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("block_size", "block_size_pattern")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)
    names: ClassVar[tuple[str, ...]] = ("c3a_kernel",)

    def settings(self, handle: Handle) -> dict[str, Any]:
        adapters = handle.adapters.items()
        blocks = {path: cast(C3AAdapter, adapter).kernel.shape[-1] for path, adapter in adapters}
        common, others = common_and_others(blocks)
        return {"block_size": common, "block_size_pattern": others, "init_weights": True, "bias": "none"}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        block = config.get("block_size", 256)
        others = {path: size for path, size in sizes_at(tensors, "c3a_kernel").items() if size != block}
        return C3A(block_size=block, block_sizes=others)

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        return {"c3a_kernel": cast(C3AAdapter, adapter).kernel}
