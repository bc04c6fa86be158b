"""Modules that read their weights in one operation of PyTorch's: the weights are folded with their adapters before.

Nothing can be put between such a module and its weights, so an adapter acts by the weight it folds into, formed once
for each call of the module: in training as in use, and with the gradient of what was formed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from addenda.core.contract import Adapter
from addenda.core.host import Host, compositions_on, count_call, fold
from addenda.core.parts import Holder, Part, reading
from addenda.core.views import PartView

__all__ = ["FoldedHolder", "FoldedView"]


class FoldedView(PartView):
    """A part that is read and never called."""

    folded = True


class FoldedHolder(Holder):
    """Runs the module's own forward on weights into which the active adapters are folded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the active adapters of its parts; arguments as the module's own."""
        with reading(_folded(cast(Iterable[Part], self.adapted_parts.values()))):
            return self.original_class.forward(cast(nn.Module, self), *args, **kwargs)


def _folded(parts: Iterable[Part]) -> dict[tuple[nn.Module, str], Tensor]:
    """Return the parameters that the active adapters change, by the module and the name that they are kept under."""
    changed: dict[tuple[nn.Module, str], Tensor] = {}
    for part in parts:
        host = cast(Host, part)
        acting = compositions_on(host)
        if not acting:
            continue
        count_call(host)
        adapters = cast(Mapping[str, Adapter], host.adapters)
        folds = [functools.partial(composition.fold, adapters=adapters) for composition in acting]
        folded = fold(host._addenda.view, folds)
        for place, value in zip((part.weight_at, part.bias_at), folded, strict=True):
            if place is not None and value is not None:
                key = place.module, place.name
                changed[key] = place.into(changed.get(key), value)
    return changed
