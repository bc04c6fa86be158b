"""C3A: circular convolution adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import integer, suffixes
from addenda.core.registry import register
from addenda.core.rotation import nearest_divisor
from addenda.core.targets import matches, unmatched

__all__ = ["C3A"]


@register("c3a")
@dataclass(frozen=True)
class C3A(Method):
    """Add a block-circulant matrix to the weight, applied by fast Fourier transforms.

    y = base(x) + C x / d_in,   C: (d_out, d_in) of m x n circulant blocks (b, b),   m = d_out / b,   n = d_in / b

    Row k of a block is its kernel, moved k places to the right in a circle. The kernels start at zero, so the adapted
    layer starts equal to its base. Its rank is not limited by the number of parameters. Mergeable exactly into an
    unquantized weight. Parameters: d_in * d_out / b per layer.

    Args:
        block_size: b, >= 1; a layer takes the common divisor of d_in and d_out that is nearest to it. The larger, the
            fewer parameters.
        block_sizes: another block size for the layers a literal suffix names, such as ``{"down_proj": 64}``; the last
            that matches counts.

    **Cost:** on linear layers transforms of 2.5 * log2(b) * (d_in + d_out) operations and 2 * d_in * d_out / b
    multiplications per token, beside LoRA's rank * (d_in + d_out), in float32 whatever the base's dtype. On other
    layers the matrix is formed in each step and the layer runs twice.

    **Use it when** an update of high rank is wanted for few parameters.

    **Learning rate:** 0.3, that of PEFT's published comparison on MetaMathQA (Llama 3.2 3B, block size 64) for it; not
    tuned here. It is large because C is divided by d_in.

    Differs from: PEFT starts the kernels Xavier-uniform, so that the adapted layer starts off its base, and refuses
    block sizes that do not divide the layer's sizes.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, C3A(block_size=4), targets=["0"]).trainable_parameters
        8

    References: Chen et al. 2024, arXiv:2407.19342, section 3.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 0.3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"block_size": 4}, {"block_size": 2})

    block_size: int = 128
    """Size of a circulant block."""
    block_sizes: Mapping[str, int] = field(default_factory=dict)
    """Block size for the layers a literal suffix names."""

    def problems(self) -> list[str]:
        found = integer("block_size", self.block_size)
        if not isinstance(self.block_sizes, Mapping):
            return [*found, f"block_sizes must map suffixes to whole numbers, got {self.block_sizes!r}"]
        found += suffixes("keys of block_sizes", list(self.block_sizes))
        for suffix, size in self.block_sizes.items():
            found += integer(f"block_sizes[{suffix!r}]", size)
        return found

    def problems_among(self, paths: Sequence[str]) -> list[str]:
        return [f"block_sizes names no target by '{suffix}'" for suffix in unmatched(paths, self.block_sizes)]

    def block_at(self, base: Base) -> int:
        """Return the block size that applies to the layer."""
        named = [size for suffix, size in self.block_sizes.items() if matches(base.path, suffix)]
        return nearest_divisor(math.gcd(base.d_in, base.d_out), [self.block_size, *named][-1])

    def build(self, base: Base) -> C3AAdapter:
        block = self.block_at(base)
        return C3AAdapter(base.parameter(base.d_out // block, base.d_in // block, block))


class C3AAdapter(Adapter):
    """kernel: (d_out / b, d_in / b, b)."""

    additive = True

    def __init__(self, kernel: nn.Parameter) -> None:
        super().__init__()
        self.kernel = kernel

    def delta(self) -> Tensor:
        """Return C / d_in: (d_out, d_in)."""
        m, n, b = self.kernel.shape
        places = torch.arange(b, device=self.kernel.device)
        blocks = self.kernel[:, :, (places[None, :] - places[:, None]) % b]
        return blocks.transpose(1, 2).reshape(m * b, n * b) / (n * b)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if base.channels_in == base.d_in and base.kind != "conv":
            return base(x) + base.outputs_back(self._convolved(base.inputs_last(x))).to(base.dtype)
        return base(x) + base.apply(x, self.delta().to(base.dtype))

    def _convolved(self, x: Tensor) -> Tensor:
        """x: (..., d_in) -> C x / d_in: (..., d_out)."""
        _, n, b = self.kernel.shape
        spectrum = torch.fft.rfft(torch.unflatten(x.to(self.kernel.dtype), -1, (n, b)))
        # Conjugated, the kernel runs backwards: rows move to the right.
        kernel = torch.fft.rfft(self.kernel / (n * b)).conj()
        y: Tensor = torch.fft.irfft(torch.einsum("...nf,mnf->...mf", spectrum, kernel), n=b)
        return y.flatten(-2)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta().to(weight.dtype), bias
