"""AdaLoRA: singular values and vectors of an update, and a budget of them that goes where they matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base
from addenda.core.ranges import integer, number
from addenda.core.ranked import Ranked
from addenda.core.registry import register
from addenda.errors import ConfigError
from addenda.methods.lora import add_low_rank

__all__ = ["AdaLoRA"]

_TRAINED = ("P", "values", "Q")


@register("adalora")
@dataclass(frozen=True)
class AdaLoRA(Ranked):
    """Low-rank update whose rank each layer gets by what it is worth: train P diag(l) Q, set the least of l to zero.

    y = base(x) + scaling * P (l * (Q x)),   Q: (rank, d_in),  l: (rank,),  P: (d_out, rank)

    scaling = alpha / rank, the same on every layer. P and Q start Gaussian with deviation 0.02 and l zero, so the
    adapted layer starts equal to its base. A penalty draws the columns of P and the rows of Q towards orthonormal
    ones. While the run prunes, the number of entries of l over all layers falls from their ranks to ``target_rank`` a
    layer along a cubic, and those with the lowest scores are set to zero; until the last allocation they may come
    back. A score is smoothed |parameter * gradient| times its own smoothed change, of l's entry and, on average, of its
    two vectors. Mergeable exactly into an unquantized weight. Parameters: rank * (d_in + d_out + 1) per layer.

    Args:
        rank: entries of l on each layer at the start, 1 <= rank <= min(d_in, d_out).
        target_rank: entries a layer that are left on average, 1 <= target_rank <= rank.
        alpha: numerator of the scaling, dimensionless, > 0. None means rank, a scaling of 1.
        dropout: probability of zeroing an input feature of Q during training, in [0, 1).
        t_init: optimizer steps before the first allocation, >= 0. None means a tenth of the run.
        t_final: optimizer steps after the last one, >= 0. None means three tenths of the run.
        delta_t: steps between two allocations, >= 1. None means a hundredth of the run.
        beta1: smoothing of the sensitivity, in (0, 1).
        beta2: smoothing of its change, in (0, 1).
        orthogonality: weight of the penalty, >= 0.
        ranks: another initial rank for the layers a literal suffix names; the last that matches counts. 0 is for a
            layer of which nothing was left, when PEFT's folder is read.

    **Cost**: LoRA's forward at the initial rank, which pruned entries go on costing until the adapter is merged or
    written for PEFT; in training two more numbers for each trained one, kept in checkpoints and not in the saved
    adapter.
    **Use it when** layers are worth very different ranks and one run has to find out which.
    **Learning rate**: 5e-3. Of half decades 1e-2 was best on Banking77 with MiniLM (benchmarks/methods_quality), and
    1e-3, LoRA's default, hardly trained there and on GSM8K with SmolLM2: P and Q start small and l at zero, so all
    get little gradient at first. The shares of the run are not tuned.

    Differs from: the paper squares the norm of the penalty and sums it over layers; its official code, PEFT and this
    take the mean of the plain norms. Exactly as many entries are set to zero as the budget says, ties or not. A run
    that ends early, or keeps an adapter from before the last allocation, is above its budget.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, AdaLoRA(rank=2, target_rank=1), targets=["0"]).trainable_parameters
        26

    References: Zhang et al. 2023, arXiv:2303.10512, section 3 (equations 3 and 8 to 12, algorithm 1).
    """

    mergeable: ClassVar[bool] = True
    least_rank: ClassVar[int] = 0
    learning_rate: ClassVar[float] = 5e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 4, "target_rank": 2},
        {"rank": 3, "target_rank": 2, "alpha": 6.0},
    )

    rank: int = 12
    """Entries of l on each layer at the start."""
    target_rank: int = 8
    """Entries a layer that are left on average."""
    alpha: float | None = None
    """Numerator of the scaling; None means rank."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of Q during training."""
    t_init: int | None = None
    """Optimizer steps before the first allocation; None means a tenth of the run."""
    t_final: int | None = None
    """Optimizer steps after the last allocation; None means three tenths of the run."""
    delta_t: int | None = None
    """Steps between two allocations; None means a hundredth of the run."""
    beta1: float = 0.85
    """Smoothing of the sensitivity."""
    beta2: float = 0.85
    """Smoothing of the sensitivity's change."""
    orthogonality: float = 0.5
    """Weight of the penalty on P and Q that are not orthonormal."""

    def problems(self) -> list[str]:
        found = super().problems() + integer("target_rank", self.target_rank)
        found += number("dropout", self.dropout, least=0.0, below=1.0)
        found += number("orthogonality", self.orthogonality, least=0.0)
        for name, least in (("t_init", 0), ("t_final", 0), ("delta_t", 1)):
            if getattr(self, name) is not None:
                found += integer(name, getattr(self, name), least=least)
        for name in ("beta1", "beta2"):
            found += number(name, getattr(self, name), above=0.0, below=1.0)
        if self.alpha is not None:
            found += number("alpha", self.alpha, above=0.0)
        if not found and self.target_rank > self.rank:
            found.append(f"target_rank {self.target_rank} exceeds rank {self.rank}")
        return found

    @property
    def scaling(self) -> float:
        """Factor of the update; it does not follow a layer's rank, so that pruning changes nothing else."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def build(self, base: Base) -> AdaLoRAAdapter:
        rank = self.rank_at(base.path)
        shapes = {"P": (base.d_out, rank), "values": (rank,), "Q": (rank, base.d_in)}
        trained = {
            name: base.parameter(*shape, init=0.0 if name == "values" else _gaussian)
            for name, shape in shapes.items()
        }
        buffers = {"pruned": base.constant(rank)}
        for name, shape in shapes.items():
            buffers |= {f"sensitivity_{name}": base.constant(*shape), f"change_{name}": base.constant(*shape)}
        return AdaLoRAAdapter(trained, buffers, scaling=self.scaling, dropout=self.dropout)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        grams = [gram for a in adapters.values() for gram in cast(AdaLoRAAdapter, a).grams() if len(gram)]
        if not self.orthogonality or not grams:
            return None
        far = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return self.orthogonality * torch.stack(far).mean()

    def after_update(self, adapters: Mapping[str, Adapter], *, step: int, of_steps: int) -> None:
        begin, end, every = self.phases(of_steps)
        ours = [cast(AdaLoRAAdapter, adapter) for adapter in adapters.values()]
        if step < end:
            for adapter in ours:
                adapter.observe(self.beta1, self.beta2)
        if step == end or (begin < step < end and step % every == 0):
            started = sum(len(adapter.values) for adapter in ours)
            target = min(started, self.target_rank * len(ours))
            share = 1 - (step - begin) / (end - begin)
            allocate(ours, int((started - target) * share**3 + target), for_good=step == end)
        if step > end:
            for adapter in ours:
                adapter.values.mul_(1 - adapter.pruned)

    def phases(self, of_steps: int) -> tuple[int, int, int]:
        """Return the step after which the budget falls, the one of the last allocation, and the steps between two.

        Raises:
            ConfigError: a run of so many steps leaves none for the budget to fall in.
        """
        begin = of_steps // 10 if self.t_init is None else self.t_init
        end = of_steps - (3 * of_steps // 10 if self.t_final is None else self.t_final)
        if begin >= end:
            raise ConfigError(
                f"t_init {begin} and t_final {of_steps - end} leave none of {of_steps} steps to prune in",
                where={"method": self.name},
                hint="lower them, leave them out, or train for more steps",
            )
        return begin, end, max(1, of_steps // 100) if self.delta_t is None else self.delta_t


def _gaussian(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0.0, 0.02, generator=generator)


def allocate(adapters: Sequence[AdaLoRAAdapter], budget: int, *, for_good: bool) -> None:
    """Set all but the ``budget`` entries of the highest scores to zero; for good, remember which."""
    scores = torch.cat([adapter.scores().cpu() for adapter in adapters])
    pruned = torch.zeros_like(scores)
    pruned[scores.argsort(stable=True)[: len(scores) - budget]] = 1
    for adapter, part in zip(adapters, torch.split(pruned, [len(a.values) for a in adapters]), strict=True):
        here = part.to(adapter.values)
        adapter.values.mul_(1 - here)
        if for_good:
            adapter.pruned.copy_(here)


class AdaLoRAAdapter(Adapter):
    """P: (d_out, rank), values: (rank,), Q: (rank, d_in); pruned: (rank,), 1 where an entry is gone for good."""

    additive = True
    training_only = tuple(f"{kind}_{name}" for name in _TRAINED for kind in ("sensitivity", "change"))
    P: Tensor
    values: Tensor
    Q: Tensor
    pruned: Tensor

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        *,
        scaling: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.hold(**trained, **buffers)
        self.scaling, self.dropout = scaling, dropout

    def low_rank_term(self) -> tuple[Tensor, Tensor, float] | None:
        if self.training and self.dropout:
            return None
        return self.values[:, None] * self.Q, self.P, self.scaling

    def forward(self, x: Tensor, base: Base) -> Tensor:
        A = self.values[:, None] * self.Q
        return add_low_rank(x, base, A, self.P, self.scaling, dropout=self.dropout * self.training)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        P, values, Q = (getattr(self, name).to(weight.dtype) for name in _TRAINED)
        return weight + self.scaling * ((P * values) @ Q), bias

    def grams(self) -> tuple[Tensor, Tensor]:
        """Return P^T P and Q Q^T, (rank, rank) each."""
        return self.P.t() @ self.P, self.Q @ self.Q.t()

    def observe(self, beta1: float, beta2: float) -> None:
        """Take the gradients of the step into the smoothed sensitivities and their smoothed change."""
        for name in _TRAINED:
            parameter = getattr(self, name)
            mean, change = self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"change_{name}")
            now = (
                torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
            )
            mean.lerp_(now, 1 - beta1)
            change.lerp_((now - mean).abs(), 1 - beta2)

    def scores(self) -> Tensor:
        """Return the score of each entry of l, (rank,)."""
        P, values, Q = (
            self.get_buffer(f"sensitivity_{n}") * self.get_buffer(f"change_{n}") for n in _TRAINED
        )
        return values + P.mean(dim=0) + Q.mean(dim=1)
