"""FourierFT: a weight update by a few coefficients of its discrete Fourier transform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from addenda.core.contract import Base
from addenda.core.registry import register
from addenda.core.spectral import SpectralAdapter, SpectralMethod

__all__ = ["FourierFT"]


@register("fourierft")
@dataclass(frozen=True)
class FourierFT(SpectralMethod):
    """Add the inverse Fourier transform of a sparse spectrum to the weight: train its few coefficients.

    y = base(x) + scaling * Re(F^-1(S)) x,   S: (d_out, d_in), zero but for ``coefficients`` places

    The places are drawn once, the same in all layers of a size, and kept with the adapter. The coefficients start at
    zero, so the adapted layer starts equal to its base. Mergeable exactly into an unquantized weight.
    Parameters: ``coefficients`` per layer.

    Args:
        coefficients: trained numbers in a layer, >= 1 and at most d_in * d_out. The paper takes 1000.
        scaling: factor of the update, dimensionless, > 0.
        seed: what the places are drawn from, >= 0.
        counts: another number of coefficients for the layers a literal suffix names; the last that matches counts.

    **Cost:** the update is formed in each step by a transform of d_out * d_in numbers, and the layer runs a second
    time, forward and for the gradient of its weight, where LoRA adds products of its rank; d_out * d_in numbers more in
    memory while a layer runs. Merged it costs nothing.

    **Use it when** the adapter file has to be as small as can be: it grows with neither width nor rank.

    **Learning rate:** 1e-2; not tuned. It belongs to the scaling: their product is the size of a step.

    Differs from: the paper starts with coefficients from a standard normal distribution, so that training starts off
    the base. PEFT keeps the seed of the places only, here they are saved, because a generator's numbers are not
    promised to stay the same.

    Example:
        >>> import addenda
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, FourierFT(coefficients=10), targets=["0"]).trainable_parameters
        10

    References: Gao et al. 2024, arXiv:2405.03003, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"coefficients": 30},
        {"coefficients": 50, "scaling": 20.0, "seed": 3},
    )

    coefficients: int = 1000
    """Trained coefficients of a layer."""
    scaling: float = 150.0
    """Factor of the update."""
    seed: int = 777
    """What the places of the coefficients are drawn from."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Number of coefficients for the layers a literal suffix names."""

    def build(self, base: Base) -> FourierFTAdapter:
        return FourierFTAdapter(*self.made(base), base, self)


class FourierFTAdapter(SpectralAdapter):
    """spectrum: (coefficients,); places: (coefficients,), whole numbers, row by row in (d_out, d_in); frozen."""

    def delta(self) -> Tensor:
        delta: Tensor = torch.fft.ifft2(self.dense()).real
        return delta
