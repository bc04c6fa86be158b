"""``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells: weights of all gates, read by one operation for all steps."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from addenda.core.layers.folded import FoldedHolder, FoldedView
from addenda.core.layers.kind import LayerKind
from addenda.core.parts import Part, Place

__all__ = ["RECURRENT", "RecurrentPart"]


class _RecurrentHolder(FoldedHolder):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as `FoldedHolder` does, and let it forget the folded weights."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            if isinstance(self, nn.RNNBase):  # it keeps a list of the tensors that it read last
                self._init_flat_weights()


class RecurrentPart(Part):
    """One weight, named as its parameter: ``weight_ih_l0`` reads the input, ``weight_hh_l0`` the state before."""

    holder = _RecurrentHolder

    @classmethod
    def held_by(cls, module: nn.Module) -> bool:
        """Whether the module is one of PyTorch's recurrent ones, or a cell, with weights of its own."""
        names = cls.names(module) if isinstance(module, nn.RNNBase | nn.RNNCellBase) else []
        weights = [module._parameters[name] for name in names]
        return bool(weights) and all(weight is not None and weight.is_floating_point() for weight in weights)

    @classmethod
    def names(cls, module: nn.Module) -> list[str]:
        """Return the names of the weights, layer by layer."""
        return [name for name in module._parameters if name.startswith("weight_")]

    @classmethod
    def of(cls, module: Any, name: str) -> Self:
        """Make the part of this weight."""
        bias = name.replace("weight_", "bias_")
        has_bias = module._parameters.get(bias) is not None
        return cls(module, name, Place(module, name), Place(module, bias) if has_bias else None)


class _RecurrentView(FoldedView):
    kind = "recurrent"


RECURRENT = LayerKind(
    "recurrent", lambda m: isinstance(m, RecurrentPart), _RecurrentView, stands_for="linear"
)
