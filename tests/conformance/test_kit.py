"""The suite fails for a method that is not right: each here breaks one property, and the test of that one notices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from addenda.conformance import test_methods as suite
from addenda.conformance.__main__ import main
from addenda.conformance.layers import LAYERS
from addenda.core import Adapter, Base, Method
from addenda.errors import MissingDependencyError, NotFoundError


class Scale(Adapter):
    """A sound one: y = (1 + g) * base(x)."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.g = base.parameter(base.channels_out)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base.outputs_back(base.outputs_last(base(x)) * (1 + self.g).to(base.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = (1 + self.g).to(weight.dtype)
        return weight * scale[:, None], None if bias is None else bias * scale


class FoldsWithoutBias(Scale):
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return super().fold(weight, None)[0], bias


class Detached(Scale):
    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base.outputs_back(base.outputs_last(base(x)) * (1 + self.g.detach()).to(base.dtype))


class HalfTrained(Scale):
    """Has a parameter that nothing reads."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.idle = base.parameter(3)


class WritesTheBase(Scale):
    def forward(self, x: Tensor, base: Base) -> Tensor:
        with torch.no_grad():
            base.weight().add_(0.01)
        return super().forward(x, base)


class Ahead(Scale):
    """Does not start as its base."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        nn.init.ones_(self.g)


class DrawsFromTheGlobalGenerator(Scale):
    def __init__(self, base: Base) -> None:
        super().__init__(base)
        nn.init.normal_(self.g)


class Widens(Scale):
    """Answers in its own precision instead of the base's."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base.outputs_back(base.outputs_last(base(x)) * (1 + self.g))


class ClaimsToAdd(Scale):
    additive = True


class MixesRows(Scale):
    """What it does to one row depends on the others."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return super().forward(x, base) + self.g.sum() * x.mean()


@dataclass(frozen=True)
class Scaling(Method):
    adapter: ClassVar[type[Scale]] = Scale
    mergeable: ClassVar[bool] = True

    def build(self, base: Base) -> Adapter:
        return self.adapter(base)


def method_with(adapter: type[Scale]) -> Method:
    return type(adapter.__name__, (Scaling,), {"adapter": adapter, "name": "broken"})()


BROKEN = {
    FoldsWithoutBias: suite.test_fold_agrees_with_forward,
    Detached: suite.test_gradients_reach_every_adapter_parameter_and_no_base_parameter,
    HalfTrained: suite.test_gradients_reach_every_adapter_parameter_and_no_base_parameter,
    WritesTheBase: suite.test_disabled_equals_base_and_detached_gives_the_base_back,
    Ahead: suite.test_starts_equal_to_its_base,
    DrawsFromTheGlobalGenerator: suite.test_same_seed_gives_the_same_adapter,
    ClaimsToAdd: suite.test_what_is_declared_additive_commutes,
    MixesRows: suite.test_each_row_of_a_batch_may_have_an_adapter_of_its_own,
}


@pytest.mark.parametrize("adapter", BROKEN)
def test_a_broken_method_fails_where_a_sound_one_passes(adapter: type[Scale]) -> None:
    property_of: Callable[..., None] = BROKEN[adapter]
    property_of(method_with(Scale), "layer", LAYERS["linear"]())
    with pytest.raises((AssertionError, RuntimeError)):
        property_of(method_with(adapter), "layer", LAYERS["linear"]())


def test_one_that_answers_in_another_precision_fails() -> None:
    holds = suite.test_dtype_follows_the_base_and_parameters_stay_wide
    holds(method_with(Scale), "layer", LAYERS["linear"](), torch.bfloat16)
    with pytest.raises((AssertionError, RuntimeError)):
        holds(method_with(Widens), "layer", LAYERS["linear"](), torch.bfloat16)


def test_a_name_that_no_method_has_is_refused_before_anything_runs() -> None:
    with pytest.raises(NotFoundError, match="no method is called 'lorra'") as refused:
        main(["lora", "lorra"])
    assert "lora" in refused.value.hint


def test_without_pytest_the_extra_that_brings_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(MissingDependencyError) as refused:
        main([])
    assert "addenda[conformance]" in refused.value.hint
