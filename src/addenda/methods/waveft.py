"""WaveFT: a weight update by a few of its wavelet coefficients."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Base
from addenda.core.registry import register
from addenda.core.spectral import SpectralAdapter, SpectralMethod

__all__ = ["WaveFT", "daubechies"]

_ORDERS = {"none": 0, "haar": 1, **{f"db{order}": order for order in range(1, 11)}}


@register("waveft")
@dataclass(frozen=True)
class WaveFT(SpectralMethod):
    """Add the inverse wavelet transform of a sparse matrix to the weight: train its few coefficients.

    y = base(x) + scaling * IDWT(S) x,   S: (d_out, d_in), zero but for ``coefficients`` places

    One level of the two-dimensional transform: the quarters of S are the approximation and the details along columns,
    rows and both, so that each coefficient is a small pattern at one place of the weight. The places are drawn once,
    the same in all layers of a size, and kept with the adapter. The coefficients start at zero, so the adapted layer
    starts equal to its base. Mergeable exactly into an unquantized weight. Parameters: ``coefficients`` per layer.

    Args:
        coefficients: trained numbers in a layer, >= 1 and at most d_in * d_out.
        scaling: factor of the update, dimensionless, > 0.
        seed: what the places are drawn from, >= 0.
        counts: another number of coefficients for the layers a literal suffix names; the last that matches counts.
        wavelet: ``haar`` (also ``db1``), ``db2`` to ``db10`` (Daubechies, with that many vanishing moments), or
            ``none``, which trains single weights.

    **Cost:** as FourierFT's: the update is formed in each step, and the layer runs twice, forward and for the gradient
    of its weight; the transform itself takes time in proportion to the weight's size times the wavelet's length.

    **Use it when** the adapter file has to be very small and FourierFT's patterns, which span the whole weight, are too
    coarse.

    **Learning rate:** 1e-4, that of PEFT's published comparison on MetaMathQA (Llama 3.2 3B), with the same scaling;
    not tuned here. It belongs to the scaling: their product is the size of a step.

    Differs from: PEFT keeps the seed of the places only, here they are saved, because a generator's numbers are not
    promised to stay the same. It also lists symlets, coiflets and longer Daubechies wavelets.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, WaveFT(coefficients=10), targets=["0"]).trainable_parameters
        10

    References: Bilican et al. 2025, arXiv:2505.12532. Daubechies 1992, Ten Lectures on Wavelets, chapter 6.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"coefficients": 30},
        {"coefficients": 40, "wavelet": "db3", "seed": 3},
        {"coefficients": 40, "wavelet": "none"},
    )

    coefficients: int = 2592
    """Trained coefficients of a layer."""
    scaling: float = 25.0
    """Factor of the update."""
    seed: int = 777
    """What the places of the coefficients are drawn from."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Number of coefficients for the layers a literal suffix names."""
    wavelet: str = "haar"
    """haar, db1 to db10, or none."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.wavelet not in _ORDERS:
            found.append(f"wavelet must be one of {', '.join(_ORDERS)}, got {self.wavelet!r}")
        return found

    def build(self, base: Base) -> WaveFTAdapter:
        return WaveFTAdapter(*self.made(base), base, self)


@functools.cache
def daubechies(order: int) -> tuple[float, ...]:
    """Return the 2 * order taps of Daubechies' scaling filter, whose wavelet has ``order`` vanishing moments.

    The filter is (1 + z)^order times the minimum-phase factor of the half-band polynomial
    sum_k C(order - 1 + k, k) y^k with y = (2 - z - 1/z) / 4.

    Example:
        >>> [round(tap, 4) for tap in daubechies(2)]
        [0.483, 0.8365, 0.2241, -0.1294]
    """
    taps = torch.ones(1, dtype=torch.complex128)
    for root in _half_band_roots(order):
        # y = (2 - z - 1/z) / 4 gives two z with product one; the one inside the circle has minimum phase.
        middle = 1 - 2 * root
        z = middle + torch.sqrt(middle * middle - 1)
        taps = _times(taps, -(z if z.abs() < 1 else 1 / z))
    for _ in range(order):
        taps = _times(taps, torch.ones((), dtype=torch.complex128))
    real = taps.real * (math.sqrt(2) / taps.real.sum())
    return tuple(real.tolist())


def _half_band_roots(order: int) -> Tensor:
    """The roots of sum_k C(order - 1 + k, k) y^k, as eigenvalues of its companion matrix."""
    if order == 1:
        return torch.zeros(0, dtype=torch.complex128)
    factors = torch.tensor([math.comb(order - 1 + k, k) for k in range(order)], dtype=torch.float64)
    companion = torch.diag(torch.ones(order - 2, dtype=torch.float64), -1)
    companion[:, -1] = -factors[:-1] / factors[-1]
    roots: Tensor = torch.linalg.eigvals(companion)
    return roots


def _times(taps: Tensor, constant: Tensor) -> Tensor:
    """Multiply a polynomial, highest power first, by z + constant."""
    zero = taps.new_zeros(1)
    return torch.cat((taps, zero)) + constant * torch.cat((zero, taps))


class WaveFTAdapter(SpectralAdapter):
    """spectrum: (coefficients,); places: (coefficients,), whole numbers, row by row in (d_out, d_in); frozen."""

    def __init__(self, spectrum: nn.Parameter, places: Tensor, base: Base, settings: WaveFT) -> None:
        super().__init__(spectrum, places, base, settings)
        order = _ORDERS[settings.wavelet]
        self.taps = daubechies(order) if order else ()

    def delta(self) -> Tensor:
        dense = self.dense()
        return self._synthesized(dense) if self.taps else dense

    def _synthesized(self, dense: Tensor) -> Tensor:
        """Return the inverse transform of (d_out, d_in) coefficients, which lie in the middle of a wider matrix.

        Near its edges a transform is shorter than its coefficients, by the filter's length less two.
        """
        more = [len(self.taps) - 2 + size % 2 for size in dense.shape]
        before = [size // 2 for size in more]
        wide = F.pad(dense, (before[1], more[1] - before[1], before[0], more[0] - before[0]))
        low = torch.tensor(self.taps, dtype=dense.dtype, device=dense.device)
        high = low.flip(0) * torch.tensor([1.0, -1.0], dtype=low.dtype, device=low.device).repeat(
            len(low) // 2
        )
        bank = torch.stack(
            [torch.outer(a, b) for a, b in ((low, low), (high, low), (low, high), (high, high))]
        )
        quarters = torch.stack([part for half in wide.chunk(2, 0) for part in half.chunk(2, 1)])
        made = F.conv_transpose2d(quarters[None], bank[:, None], stride=2)[0, 0]
        cut = len(self.taps) - 2
        return made[cut : cut + self.d_out, cut : cut + self.d_in]
