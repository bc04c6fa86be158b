"""MonteCLoRA: LoRA whose A is drawn around its mean in training, with a spread that is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.ranges import integer, number
from addenda.core.registry import register
from addenda.methods.lora import LoRAAdapter, LowRank, add_low_rank

__all__ = ["MonteCLoRA"]

_LEAST = 1e-3
"""Lower bound on a variance."""


@register("monteclora")
@dataclass(frozen=True)
class MonteCLoRA(LowRank):
    """Low-rank update with a distribution over A: its mean is trained and kept, and training sees a draw from it.

    y = base(x) + scaling * B (A' x),   A' = A + noise * sum over n of w_n diag(sqrt(v)) Z_n,   n = 1 .. samples

    A: (rank, d_in),  B: (d_out, rank),  Z_n: (rank, d_in), standard normal, drawn in each pass. The variances are drawn
    too, v_i = s_i^2 chi^2 with rank degrees of freedom (the diagonal of a Wishart matrix), and so are the weights, w =
    softmax of a Gaussian around log a, which stands for a Dirichlet distribution of parameters a. log s: (rank,) and
    log a: (samples,) are trained. A penalty, summed over layers, is kl times what the three distributions are away
    from their priors (Kullback-Leibler). Where nothing is trained, A' is A. A starts Kaiming-uniform, B zero and log s
    and log a in [0, 1), so the adapted layer starts equal to its base. Mergeable exactly into an unquantized weight,
    as its mean. Parameters: rank * (d_in + d_out + 1) + samples per layer.

    Args:
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.
        samples: how many draws are mixed, >= 2.
        noise: factor on what is drawn, >= 0; at 0 this is LoRA, and s and a are frozen.
        prior: each parameter of the weights' prior, a Dirichlet distribution, > 0.
        kl: weight of the penalty, >= 0.

    **Cost**: LoRA's, and rank * d_in random numbers a pass, whatever the number of samples.

    **Use it when** LoRA's result hangs on its learning rate or seed more than it should, or its answers should be less
    sure of themselves.

    **Learning rate**: LoRA's default; not tuned. The other settings have PEFT's defaults.

    **Differs from**: PEFT draws every sample apart. A sum of Gaussian draws with weights w is one draw with the weight
    |w|, and that is what is drawn here. The penalty takes the mean over v where PEFT takes the last draw, and in the
    Dirichlet's part the sign that makes it a divergence. PEFT's term for the entropy of w is not here.

    Example:
        >>> import addenda
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> addenda.attach(model, MonteCLoRA(rank=2, samples=5), targets=["0"]).trainable_parameters
        31

    References: Sengupta et al. 2024, arXiv:2411.04358.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        # The properties compare one run with another, so nothing may be drawn in between.
        {"rank": 4, "noise": 0.0},
        {"rank": 3, "noise": 0.0, "samples": 3, "alpha": 5.0},
    )

    samples: int = 8
    """How many draws are mixed."""
    noise: float = 1e-4
    """Factor on what is drawn."""
    prior: float = 0.1
    """Each parameter of the weights' prior."""
    kl: float = 1e-5
    """Weight of the penalty."""

    def problems(self) -> list[str]:
        found = super().problems() + integer("samples", self.samples, least=2)
        found += number("noise", self.noise, least=0.0) + number("kl", self.kl, least=0.0)
        return found + number("prior", self.prior, above=0.0)

    def build(self, base: Base) -> MonteCLoRAAdapter:
        A, B = self.pair_for(base)
        make = base.parameter if self.noise else base.constant
        adapter = MonteCLoRAAdapter(A, B, self.scaling_at(base.path), dropout=self.dropout)
        adapter.hold(log_s=make(len(A), init=_uniform), log_a=make(self.samples, init=_uniform))
        adapter.noise = self.noise
        return adapter

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        if not (self.kl and self.noise and adapters):
            return None
        every = [cast(MonteCLoRAAdapter, adapter).divergence(self.prior) for adapter in adapters.values()]
        return self.kl * torch.stack(every).sum()


def _uniform(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(generator=generator)


class MonteCLoRAAdapter(LoRAAdapter):
    """A: (rank, d_in), B: (d_out, rank), log_s: (rank,), log_a: (samples,)."""

    log_s: Tensor
    log_a: Tensor
    noise: float = 0.0

    def _draws(self) -> bool:
        return self.training and self.noise > 0

    def low_rank_term(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self._draws() else super().low_rank_term()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self._draws():
            return super().forward(x, base)
        return add_low_rank(x, base, self.drawn(), self.B, self.scaling, dropout=self.dropout)

    def drawn(self) -> Tensor:
        """Return a draw of A, (rank, d_in)."""
        rank = len(self.log_s)
        chi2 = torch.randn(rank, rank, dtype=self.A.dtype, device=self.A.device).square().sum(dim=1)
        v = ((2 * self.log_s).exp() * chi2).clamp_min(_LEAST)
        size: Tensor = torch.linalg.vector_norm(self.weights())
        deviation = self.noise * size * v.sqrt()
        return self.A + deviation[:, None] * torch.randn_like(self.A)

    def weights(self) -> Tensor:
        """Return a draw of the weights of the samples, (samples,), by Laplace's approximation of a Dirichlet's."""
        inverse, count = (-self.log_a).exp(), len(self.log_a)
        variance = inverse * (1 - 2 / count) + inverse.sum() / count**2
        return (self.log_a + variance.sqrt() * torch.randn_like(self.log_a)).softmax(dim=0)

    def divergence(self, prior: float) -> Tensor:
        """Return how far the distributions are from their priors: Dirichlet's of ``prior``, and s = v = 1."""
        log_variance, rank = 2 * self.log_s, len(self.log_s)
        variance = log_variance.exp()
        wishart = 0.5 * rank * (variance - log_variance - 1).sum()
        mean_log = log_variance + torch.digamma(torch.tensor(rank / 2)) + torch.log(torch.tensor(2.0))
        normal = 0.5 * len(self.log_a) * (rank * variance - mean_log - 1).sum()
        return wishart + normal + dirichlet_divergence(self.log_a.exp(), torch.full_like(self.log_a, prior))


def dirichlet_divergence(a: Tensor, b: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of Dirichlet's distribution of parameters ``b`` from that of ``a``.

    Example:
        >>> float(dirichlet_divergence(torch.ones(3), torch.ones(3)))
        0.0
    """
    sizes = torch.lgamma(a.sum()) - torch.lgamma(b.sum()) - (torch.lgamma(a) - torch.lgamma(b)).sum()
    return sizes + ((a - b) * (torch.digamma(a) - torch.digamma(a.sum()))).sum()
