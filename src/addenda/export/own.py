"""The tensors of a model itself, in full, without those of the adapters on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from addenda.bases.packed_layers import packed_layers
from addenda.core.host import adapter_prefixes

__all__ = ["OwnTensors", "narrowest"]


class OwnTensors(Mapping[str, Tensor]):
    """A model's state dict, where a packed weight is unpacked each time that it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        inside = adapter_prefixes(model)
        self._packed = packed_layers(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
        raw = {f"{path}.raw": f"{path}.weight" for path in self._packed}
        self.kept = {raw.get(name, name): tensor for name, tensor in state.items()}
        """As the model keeps them, packed ones as bytes; tied ones share theirs."""

    def __getitem__(self, name: str) -> Tensor:
        packed = self._packed.get(name.removesuffix(".weight"))
        return packed.dequantized() if packed is not None and name.endswith(".weight") else self.kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


def narrowest(state: Mapping[str, Tensor]) -> str:
    """Return the first of ``BF16``, ``F16`` and ``F32`` that holds every matrix as it is.

    Example:
        >>> narrowest({"a": torch.ones(2, 2)}), narrowest({"a": torch.full((1, 1), 0.1)})
        ('BF16', 'F32')
    """
    kept = {"BF16": torch.bfloat16, "F16": torch.float16}
    for name in state:
        tensor = state[name]
        if tensor.ndim > 1:
            kept = {
                kind: dtype
                for kind, dtype in kept.items()
                if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
            }
        if not kept:
            break
    return next(iter(kept), "F32")
