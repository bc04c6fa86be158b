"""ReFT: edits of hidden representations at the first and last tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Initializer, Method
from addenda.core.ranges import integer
from addenda.core.registry import register

__all__ = ["ReFT", "ReFTAdapter"]

_FORMS = ("loreft", "noreft", "direft")


@register("reft")
@dataclass(frozen=True)
class ReFT(Method):
    """Edit what a transformer block returns in a low-rank subspace, at some tokens of the prompt, and no weight.

    loreft:  y = h + R' (W h + b - R h)      R R' = I
    noreft:  y = h + R' (W h + b - R h)
    direft:  y = h + R' (W h + b)            h = base(x),  R, W: (rank, d),  b: (rank,)

    R' is R transposed. The edit is made at the ``first`` and the ``last`` tokens of each prompt and reaches all
    others through attention. W starts at R, for direft at zero, b at zero and R with orthonormal rows, so the adapted
    block starts equal to its base. Not mergeable: it depends on the position. Parameters: rank * (2 * d + 1) per
    block.

    What the prompt is: in training by this package, the tokens of a row before the first trained one; where a whole
    conversation answers to one prompt only the first counts. In generation, all that is there before the first new
    token. Anywhere else, all of a row's tokens but the padding, unless the call names ``prompt_lengths``, (rows,),
    which models of transformers hand on to their blocks.

    Args:
        rank: dimension of the subspace, 1 <= rank <= d.
        first: how many tokens at the start of a prompt are edited, >= 0.
        last: how many at its end, >= 0; together at least 1. In a short prompt each token is edited once.
        form: ``loreft``, with R orthonormal; ``noreft``, without; ``direft``, without the difference either.

    Cost: 4 * rank * d FLOP per token and block, less than LoRA on one layer; LoReFT's R takes a QR factorization of
    (d, rank) in each forward. The edit is made at all positions and kept at those meant. What is generated after the
    prompt costs nothing more.

    Use it when: a few thousand parameters per block have to do, and answers are short.

    Learning rate: 9e-4, as in the authors' published commands for LLaMA on commonsense, arithmetic and instructions,
    with rank 8 and seven tokens at either end.

    Differs from: the authors' code gives the two ends separate edits unless told to share them; here they share one.
    It starts W at random, so that training does not begin at the base; here it does. R is orthonormalized by QR,
    there by PyTorch's parametrization. The paper states direft without a constraint on R, which is followed here.

    Example:
        >>> import addenda
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
        >>> addenda.attach(model, ReFT(rank=2)).trainable_parameters
        68

    References: Wu et al. 2024, arXiv:2404.03592, section 3.
    """

    learning_rate: ClassVar[float] = 9e-4
    kinds: ClassVar[tuple[str, ...]] = ("transformer-block",)
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 3, "first": 1, "last": 2},
        {"form": "noreft", "rank": 2},
        {"form": "direft", "rank": 2, "first": 0},
    )

    rank: int = 8
    """Dimension of the subspace."""
    first: int = 7
    """Tokens edited at the start of a prompt."""
    last: int = 7
    """Tokens edited at the end of a prompt."""
    form: str = "loreft"
    """loreft, noreft or direft."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + integer("first", self.first, least=0)
        found += integer("last", self.last, least=0)
        if not found and self.first + self.last == 0:
            found.append("first and last are both 0: no token is edited")
        if self.form not in _FORMS:
            found.append(f"form must be one of {', '.join(_FORMS)}, got {self.form!r}")
        return found

    def problems_at(self, base: Base) -> list[str]:
        return [f"rank {self.rank} exceeds its width {base.d_out}"] if self.rank > base.d_out else []

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        return "all-blocks"

    def build(self, base: Base) -> ReFTAdapter:
        R = base.parameter(self.rank, base.d_out, init=_orthonormal)
        start: Initializer | float = (
            0.0 if self.form == "direft" else lambda tensor, _: tensor.copy_(R.detach())
        )
        W = base.parameter(self.rank, base.d_out, init=start)
        return ReFTAdapter(R, W, base.parameter(self.rank), settings=self)


def _orthonormal(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.copy_(_orthonormalized(torch.randn(tensor.shape, generator=generator)))


def _orthonormalized(R: Tensor) -> Tensor:
    """(rank, d) -> the same with orthonormal rows that span the same space; orthonormal ones stay as they are."""
    Q, upper = torch.linalg.qr(R.double().t())
    signed: Tensor = Q * upper.diagonal().sign()
    return signed.t().to(R.dtype)


class ReFTAdapter(Adapter):
    """R: (rank, d), W: (rank, d), b: (rank,)."""

    def __init__(self, R: nn.Parameter, W: nn.Parameter, b: nn.Parameter, *, settings: ReFT) -> None:
        super().__init__()
        self.R, self.W, self.b = R, W, b
        self.first, self.last, self.form = settings.first, settings.last, settings.form

    def directions(self) -> Tensor:
        """Return R as it is used, (rank, d)."""
        return _orthonormalized(self.R) if self.form == "loreft" else self.R

    def forward(self, x: Tensor, base: Base) -> Tensor:
        h, R = base(x), self.directions()
        into = self.W if self.form == "direft" else self.W - R
        edit = (h @ into.to(h.dtype).t() + self.b.to(h.dtype)) @ R.to(h.dtype)
        meant = base.prompts(h).ends(self.first, self.last)[..., None]
        return h + torch.where(meant, edit, torch.zeros_like(edit))
