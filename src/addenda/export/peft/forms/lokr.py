"""LoKr in PEFT's folder: the two matrices of each layer, or the factors of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.errors import CheckpointError
from addenda.export.peft.form import Form, form
from addenda.export.peft.lycoris import core_shape, patterns, read_patterns, volumes
from addenda.export.peft.reading import view_at
from addenda.methods.lokr import LoKr, LoKrAdapter

__all__ = ["LoKrForm"]

_NAMES = {
    "W1": "lokr_w1",
    "B1": "lokr_w1_a",
    "A1": "lokr_w1_b",
    "W2": "lokr_w2",
    "B2": "lokr_w2_a",
    "A2": "lokr_w2_b",
    "T2": "lokr_t2",
}


@form
class LoKrForm(Form):
    """PEFT's ``LoKrConfig``."""

    peft_type = "LOKR"
    method = LoKr
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    reads: ClassVar[tuple[str, ...]] = (
        "r",
        "alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_effective_conv2d",
        "decompose_both",
        "decompose_factor",
    )
    harmless: ClassVar[tuple[str, ...]] = (
        "init_weights",
        "rank_dropout",
        "rank_dropout_scale",
        "module_dropout",
    )
    names: ClassVar[tuple[str, ...]] = tuple(_NAMES.values())

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(LoKr, handle.method)
        return {
            **patterns(method, handle.paths),
            "use_effective_conv2d": method.tucker,
            "decompose_both": method.decompose_both,
            "decompose_factor": -1 if method.factor is None else method.factor,
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        factor = config.get("decompose_factor", -1)
        return LoKr(
            **read_patterns(config),
            factor=None if factor == -1 else factor,
            decompose_both=bool(config.get("decompose_both")),
            tucker=bool(config.get("use_effective_conv2d")),
        )

    def problems(self, handle: Handle) -> list[str]:
        found = volumes(handle)
        odd = [path for path, made in handle.adapters.items() if _scrambled(made, view_at(handle, path))]
        return [*found, f"{_SCRAMBLED}, first '{odd[0]}'"] if odd else found

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {_NAMES[name]: tensor for name, tensor in adapter.named_parameters()}
        if layer.kernel_volume > 1 and "lokr_w2" in found:
            kernel = cast(Any, layer).module.kernel_size
            found["lokr_w2"] = found["lokr_w2"].unflatten(1, (-1, *kernel))
        elif layer.kind == "conv" and "lokr_w2" in found:
            found["lokr_w2"] = found["lokr_w2"].unflatten(
                1, (-1, *[1] * len(cast(Any, layer).module.kernel_size))
            )
        if "lokr_t2" in found:
            found["lokr_t2"] = found["lokr_t2"].unflatten(2, core_shape(layer))
            found["lokr_w2_a"] = found["lokr_w2_a"].t()
        return found

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        if _scrambled(adapter, layer):
            raise CheckpointError(
                f"{_SCRAMBLED}, such as '{layer.path}'",
                hint="train it with a lower rank, which factors the matrix",
            )
        super().fill(adapter, layer, given)


_SCRAMBLED = "PEFT multiplies the matrices of a one-dimensional convolution in another order than LoKr's"


def _scrambled(adapter: Adapter, layer: Base) -> bool:
    """Whether PEFT's update of the layer is no Kronecker product.

    It takes the product of a (p, m) matrix with a (q, n, kernel) one by torch.kron, which aligns the last dimensions
    of the two, and reshapes what comes out.
    """
    kernel = cast(Any, layer).module.kernel_size if layer.kind == "conv" else ()
    return len(kernel) == 1 and cast(LoKrAdapter, adapter).has("W2")
