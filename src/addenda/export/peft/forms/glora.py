"""GLoRA in PEFT's folder: five parts a layer, of which those that are not trained are kept as zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.errors import CheckpointError
from addenda.export.peft.form import Form, form
from addenda.methods.glora import GLoRA, GLoRAAdapter

__all__ = ["GLoRAForm"]

_PARTS = "ABCDE"
_WORDS = {"low-rank": "lora", "vector": "vector", "constant": "constant", "none": "none"}
_OURS = {theirs: ours for ours, theirs in _WORDS.items()}


@form
class GLoRAForm(Form):
    """PEFT's ``GloraConfig``."""

    peft_type = "GLORA"
    method = GLoRA
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = ("r", "config_A_B", "config_C", "config_D_E")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    names: ClassVar[tuple[str, ...]] = tuple(
        f"glora_{part}.{tensor}" for part in _PARTS for tensor in ("Xd", "Xu", "X", "zeros")
    )

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(GLoRA, handle.method)
        return {
            "r": method.rank,
            "config_A_B": _WORDS[method.weight],
            "config_C": _WORDS[method.prompt],
            "config_D_E": _WORDS[method.bias],
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        words = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
        parts = {key: _OURS.get(word, word) for key, word in words.items()}
        return GLoRA(
            rank=config.get("r", 8),
            weight=parts["config_A_B"],
            prompt=parts["config_C"],
            bias=parts["config_D_E"],
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(GLoRAAdapter, adapter)
        found: dict[str, Tensor] = {}
        for part in _PARTS:
            if ours.has(f"{part}_up"):
                found[f"glora_{part}.Xd"] = ours.get_parameter(f"{part}_up")
                found[f"glora_{part}.Xu"] = ours.get_parameter(f"{part}_down")
            elif ours.has(part):
                values = ours.get_parameter(part)
                column = part in "ABC" and len(values) > 1
                found[f"glora_{part}.X"] = values[:, None] if column else values
            else:
                found[f"glora_{part}.zeros"] = torch.zeros(_shape(part, layer))
        return found

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        odd = [name for name, tensor in given.items() if name.endswith(".zeros") and bool(tensor.any())]
        if odd:
            raise CheckpointError(
                f"'{layer.path}.{odd[0]}' stands for a part that is not trained, and is not zero",
                hint="export it anew",
            )
        super().fill(adapter, layer, given)


_DEFAULTS = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}


def _shape(part: str, layer: Base) -> tuple[int, ...]:
    return {"C": (layer.d_in, 1), "D": (layer.d_out,), "E": (layer.d_out,)}.get(
        part, (layer.d_out, layer.d_in)
    )
