"""What a row of the table of layer kinds says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from addenda.core.contract import Method
from addenda.core.views import LayerView

__all__ = ["LayerKind"]


@dataclass(frozen=True)
class LayerKind:
    """One row of the table: which modules are of this kind, and how they are shown."""

    name: str
    matches: Callable[[nn.Module], bool]
    view: type[LayerView]
    linear: bool = False
    """Whether 'all-linear' takes it."""
    stands_for: str = ""
    """The kind whose operation it does with a weight kept otherwise: what adapts that kind adapts this one."""

    def among(self, kinds: Sequence[str]) -> bool:
        """Whether what can adapt these kinds can adapt this one."""
        return self.name in kinds or self.stands_for in kinds

    def why_not(self, method: Method) -> str | None:
        """Return why the method can adapt no layer of this kind, or None where it can."""
        if not self.among(method.layer_kinds()):
            return f"method '{method.name}' adapts no layer of kind '{self.name}'"
        if self.view.folded and not method.mergeable:
            return (
                f"a weight of kind '{self.name}' is read, not called: only a method that merges can adapt it"
            )
        return None
