"""Experts whose weights are stacked in one tensor of three dimensions, as transformers keeps those of a mixture.

Each expert's projections are linear layers with adapters of their own. The module runs the experts that the router has
chosen one after another; without an active adapter it runs as it always does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.host import compositions_on
from addenda.core.layers.kind import LayerKind
from addenda.core.parts import Holder, Part, Place, part_key
from addenda.core.views import PartView

__all__ = ["EXPERT", "ExpertPart"]

_DOWN = "down_proj"


class _ExpertsHolder(Holder):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts with their active adapters; arguments as the module's own."""
        module = cast(Any, self)
        if not any(compositions_on(part) for part in module.adapted_parts.values()):
            return self.original_class.forward(module, *args, **kwargs)
        given = inspect.signature(self.original_class.forward).bind(module, *args, **kwargs).arguments
        _, x, chosen, gates = given.values()
        return _mixture(module, x, chosen, gates, self._linear)

    def _linear(self, expert: int, name: str, x: Tensor) -> Tensor:
        key = part_key(f"{expert}.{name}")
        if key in self.adapted_parts:
            y: Tensor = self.adapted_parts[key](x)
            return y
        return _bare_linear(self, expert, name, x)


def _bare_linear(module: Any, expert: int, name: str, x: Tensor) -> Tensor:
    weight, bias = _places(module, expert, name)
    return F.linear(x, weight.tensor(), None if bias is None else bias.tensor())


def _places(module: Any, expert: int, name: str) -> tuple[Place, Place | None]:
    """Where a projection of an expert is kept."""
    weight = Place(module, name, expert, transposed=module.is_transposed)
    return weight, Place(module, f"{name}_bias", expert) if module.has_bias else None


def _mixture(
    module: Any, x: Tensor, chosen: Tensor, gates: Tensor, linear: Callable[[int, str, Tensor], Tensor]
) -> Tensor:
    """Run each row through the experts chosen for it, and add up what they give, each times its gate.

    Args:
        module: the experts.
        x: ``(rows, hidden)``.
        chosen: ``(rows, top_k)``, indices of experts; one past the last stands for an expert of another process.
        gates: ``(rows, top_k)``.
        linear: what a projection gives, told the expert's index and the projection's name.
    """
    total = torch.zeros_like(x)
    for expert in torch.unique(chosen).tolist():
        if expert >= module.num_experts:
            continue
        row, place = torch.where(chosen == expert)
        inner = linear(expert, _up(module), x[row])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        y = linear(expert, _DOWN, inner)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        total.index_add_(0, row, (y * gates[row, place, None]).to(total.dtype))
    return total


def _up(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


class ExpertPart(Part):
    """One projection of one expert, such as ``3.down_proj``."""

    holder = _ExpertsHolder

    @classmethod
    def held_by(cls, module: nn.Module) -> bool:
        """Whether the module has the attributes of transformers' stacked experts."""
        if not all(
            hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "is_transposed")
        ):
            return False
        stacks = [module._parameters.get(name) for name in (_up(module), _DOWN)]
        return all(stack is not None and stack.dim() == 3 and stack.is_floating_point() for stack in stacks)

    @classmethod
    def names(cls, module: Any) -> list[str]:
        """Return the names of the projections, expert by expert."""
        return [f"{expert}.{name}" for expert in range(module.num_experts) for name in (_up(module), _DOWN)]

    @classmethod
    def of(cls, module: Any, name: str) -> Self:
        """Make the part of this projection of this expert."""
        expert, _, stack = name.partition(".")
        return cls(module, name, *_places(module, int(expert), stack))


class _ExpertView(PartView):
    kind = "expert"
    routed = True

    def problems(self) -> list[str]:
        module = self.module.owner
        name = getattr(type(module), "original_class", type(module)).__name__
        try:
            right = self.stored().is_meta or self._computes_a_mixture()
        except (AttributeError, RuntimeError, TypeError, ValueError) as problem:
            return [f"{name} is no mixture of a known form ({type(problem).__name__}: {problem})"]
        return [] if right else [f"{name} computes otherwise than a mixture of a known form"]

    def _computes_a_mixture(self) -> bool:
        """Run a few rows through the module and through the loop that adapters need, and compare."""
        module: Any = self.module.owner
        experts, several = module.num_experts, min(2, module.num_experts)
        width = _places(module, 0, _up(module))[0].tensor().shape[1]
        x = self._random(experts, width)
        chosen = (torch.arange(experts * several, device=self.device) % experts).view(experts, several)
        gates = self._random(experts, several).softmax(-1)
        with torch.no_grad():
            forward = getattr(type(module), "original_class", type(module)).forward
            wanted: Tensor = forward(module, x, chosen, gates)
            found = _mixture(module, x, chosen, gates, partial(_bare_linear, module))
        rounding = (
            8 * torch.finfo(wanted.dtype).eps
        )  # where the largest value is what little two experts leave
        return not bool((found - wanted).abs().max() > max(0.02, rounding) * wanted.abs().max())


EXPERT = LayerKind(
    "expert", lambda m: isinstance(m, ExpertPart), _ExpertView, linear=True, stands_for="linear"
)
