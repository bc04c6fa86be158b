"""BEFT: train the biases of the value projections alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from addenda.core.contract import Adapter, Base, Method
from addenda.core.registry import register
from addenda.core.targets import KEYS_AND_VALUES, suffixes_present
from addenda.methods.bitfit import BitFitAdapter

__all__ = ["BEFT"]

_VALUES = tuple(name for name in KEYS_AND_VALUES if name.rpartition(".")[2][0] == "v")


@register("beft")
@dataclass(frozen=True)
class BEFT(Method):
    """Bias-efficient fine-tuning: a shift of what the attention's value projections return.

    y = base(x) + b,   b: (channels_out,)

    b starts at zero, so the adapted layer starts equal to its base. Mergeable exactly into the bias; a layer without
    one gets it. Parameters: d_out per layer.

    Where the targets are not named they are the value projections, by the names that well-known models give them; a
    model that has none of these names is adapted at all linear layers, and the plan says so. Layers that hold query,
    key and value in one are not cut.

    **Cost**: one addition for each number of the output. **Use it when** there are some hundred samples and even the
    smallest low-rank adapter overfits; with much data it falls behind LoRA.

    **Learning rate**: 5e-3, as of BitFit here, which trains the same numbers on more layers; not tuned.

    **Differs from**: nothing in the formula. BitFit is this on every layer.

    Example:
        >>> import addenda
        >>> from torch import nn
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 4)})
        >>> addenda.attach(model, BEFT()).trainable_parameters
        4

    References: arXiv:2509.15974.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 5e-3
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "conv")

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        return suffixes_present(paths, _VALUES) or "all-linear"

    def build(self, base: Base) -> Adapter:
        return BitFitAdapter(base.parameter(base.channels_out))
