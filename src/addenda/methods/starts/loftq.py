"""LoftQ: the factors begin as what quantizing took from the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.decomposition import leading_svd
from addenda.core.observations import Observer
from addenda.core.starts import Start, start
from addenda.methods.starts.kaiming import Kaiming
from addenda.methods.starts.pissa import balanced

__all__ = ["LoftQ"]


@start("loftq")
@dataclass(frozen=True)
class LoftQ(Start):
    """The best approximation, of the adapter's rank, of the error of a quantized weight.

    scaling * B0 A0 = best of rank r of (W - Q),   W: the original weight,  Q: the layer's own

    The adapted layer starts nearer to the original than its base does, and not equal to its base. A layer
    that was not quantized starts as usual. It needs the model
    that the base was quantized from: ``addenda.observe(model, method, original=...)``; a recipe loads it for that time.

    **Cost**: the original model in memory while it is compared, and a decomposition of each error. Afterwards LoRA's.

    **Use it when** the base is held in 4 bits or fewer: at 8 there is little error to make up for.

    Differs from: the paper, and PEFT's ``loftq``, quantize the weight anew less what the factors hold, in turns. Here
    the base never changes, so there is one turn, as in PEFT's ``replace_lora_weights_loftq``. Both leave out the
    scaling and so need one of 1; here it is divided out.

    References: Li et al. 2023, arXiv:2310.08659, section 3.
    """

    needs = "original"
    exact = False

    def observer(self, base: Base, rank: int) -> Observer:
        return _Error(base, rank)

    def factors(
        self, base: Base, rank: int, scaling: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if not base.observed:  # a layer that was not quantized
            return Kaiming().factors(base, rank, scaling, generator)
        return balanced(base.observed["U"], base.observed["S"], base.observed["Vh"], scaling)


class _Error(Observer):
    """The leading part of the error; the error itself is not kept."""

    def __init__(self, base: Base, rank: int) -> None:
        self._path, self._rank = base.path, rank
        self._svd: tuple[Tensor, Tensor, Tensor] | None = None

    def see(self, seen: Tensor) -> None:
        if bool(seen.any()):
            self._svd = leading_svd(seen, self._rank)

    def found(self) -> dict[str, Tensor]:
        if self._svd is None:
            return {}
        return dict(zip(("U", "S", "Vh"), (part.clone() for part in self._svd), strict=True))
