"""BOFT in PEFT's folder: ``boft_R`` (factors, blocks, b, b), whose skew-symmetric part counts, and ``boft_s``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.rotation import skew
from addenda.export.peft.form import Form, form
from addenda.export.peft.layers import uneven_convolutions
from addenda.methods.boft import BOFT, BOFTAdapter

__all__ = ["BOFTForm"]


@form
class BOFTForm(Form):
    """PEFT's ``BOFTConfig``."""

    peft_type = "BOFT"
    method = BOFT
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    reads: ClassVar[tuple[str, ...]] = ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor")
    harmless: ClassVar[tuple[str, ...]] = ("boft_dropout", "init_weights")
    names: ClassVar[tuple[str, ...]] = ("boft_R", "boft_s")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(BOFT, handle.method)
        return {
            "boft_block_size": 0 if method.blocks else method.block_size,
            "boft_block_num": method.blocks or 0,
            "boft_n_butterfly_factor": method.factors,
            "boft_dropout": 0.0,
            "bias": "none",
        }

    def problems(self, handle: Handle) -> list[str]:
        uneven = uneven_convolutions(handle)
        return (
            [f"PEFT runs {len(uneven)} of the convolutions otherwise, first '{uneven[0]}'"] if uneven else []
        )

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        # Without its CUDA kernel PEFT makes one factor, whatever the configuration says.
        factors = {
            tensor.shape[0] for key, tensor in tensors.items() if key.endswith(".boft_R") and tensor.dim()
        }
        return BOFT(
            block_size=config.get("boft_block_size") or 4,
            blocks=config.get("boft_block_num") or None,
            factors=max(factors, default=1),
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(BOFTAdapter, adapter)
        scale = ours.scale[None, :] if layer.kind == "conv" else ours.scale[:, None]
        return {"boft_R": -skew(ours.generator, ours.block), "boft_s": scale}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        ours = cast(BOFTAdapter, adapter)
        rows, columns = torch.triu_indices(ours.block, ours.block, 1)
        theirs = given["boft_R"]
        with torch.no_grad():
            ours.generator.copy_((theirs.mT - theirs)[..., rows, columns] / 2)
            ours.scale.copy_(given["boft_s"].flatten())
