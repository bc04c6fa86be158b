"""FRoD: a full-rank update through a diagonal and a sparse matrix, in a basis that layers of one role share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base, Method, ParameterSource
from addenda.core.ranges import number
from addenda.core.registry import register
from addenda.core.starts import jointly

__all__ = ["FRoD"]


@register("frod")
@dataclass(frozen=True)
class FRoD(Method):
    """Full-rank update: in a basis that layers of one role share, rescale each direction and mix in a few others.

    W = U diag(l0) V^T,   y = base(x) + U ((diag(l - l0) + S) (V^T x))

    V: (d_in, d_in), frozen, from a joint decomposition of the weights of all layers of a role (the last two parts of
    their paths, such as ``self_attn.q_proj``);  U: (d_out, d_in), columns of length one, and l0: (d_in,), from W and V;
    l: (d_in,) and the non-zero numbers of S: (d_in, d_in) are trained. l starts at l0 and S at zero, so the adapted
    layer starts equal to its base. Mergeable exactly into an unquantized weight.
    Parameters: d_in + share * d_in * d_in per layer.

    Args:
        share: part of S that is trained, in places off its diagonal drawn once for a role, in [0, 1].
        ridge: added to what is inverted in the decomposition, > 0; it keeps that stable where layers are alike.

    **Cost**: 2 * d_in * (2 * d_in + d_out) FLOP a row of input, more than the frozen layer's own product. In memory,
    and in the saved adapter, U for each layer, as large as its weight, and V for each role. Attaching decomposes all
    weights of a role together.

    **Use it when** a full-rank update is wanted with little optimiser memory, and time does not matter.

    **Learning rate**: 1e-4. On SmolLM2-135M ten steps of Adam on two sentences bring the loss from 6.6 to 0.004 at this
    rate, and at 1e-3 beyond 7 (``make test-models``); not tuned beyond that.

    **Differs from**: PEFT puts U (diag(l) + S) V^T in the place of W; this adds the difference, so that the start is
    the base exactly, and a quantized one may stand under it. PEFT makes U from a V that it decomposes anew when it
    loads a folder: there an adapter answers alike only on machines whose decompositions agree.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        >>> addenda.attach(model, FRoD(share=0.25)).trainable_parameters
        32

    References: FRoD, AAAI, doi:10.1609/aaai.v40i31.39813.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"share": 0.1},)

    share: float = 0.01
    """Part of the mixing matrix that is trained."""
    ridge: float = 1e-3
    """Keeps the decomposition stable."""

    def problems(self) -> list[str]:
        found = number("share", self.share, least=0.0) + number("ridge", self.ridge, above=0.0)
        if not found and self.share > 1:
            found.append(f"share must be at most 1, got {self.share!r}")
        return found

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        roles: dict[str, list[Base]] = {}
        for base in bases:
            roles.setdefault(f"{role_of(base.path)}-{base.d_in}", []).append(base)
        return Roles(
            {role: self._basis(members, source) for role, members in roles.items()},
            {base.path: role for role, members in roles.items() for base in members},
        )

    def _basis(self, members: Sequence[Base], source: ParameterSource) -> Basis:
        size = members[0].d_in
        return Basis(
            source.constant(
                size, size, init=lambda V, _: V.copy_(joint_basis([m.weight() for m in members], self.ridge))
            ),
            source.constant(
                2,
                self.count(size),
                dtype=torch.int64,
                init=lambda places, draws: places.copy_(off_diagonal(size, self.count(size), draws)),
            ),
        )

    def count(self, size: int) -> int:
        """Return how many numbers of S: (size, size) are trained."""
        off = size * size - size
        return max(min(int(size * size * self.share), off), 1 if self.share and off else 0)

    def build(self, base: Base) -> FRoDAdapter:
        assert isinstance(base.common, Roles)
        basis = base.common.basis_at(base.path)
        columns, lengths = jointly(lambda _: directions(base.weight(), basis.V), 2)
        adapter = FRoDAdapter()
        adapter.hold(
            lengths=base.parameter(base.d_in, init=lengths),
            mixing=base.parameter(basis.places.shape[1]),
            U=base.constant(base.d_out, base.d_in, init=columns),
            start=base.constant(base.d_in, init=lengths),
        )
        adapter.path = base.path
        return adapter


def role_of(path: str) -> str:
    """Return what a layer is in its block: the last two parts of its path, or the last where a number precedes it.

    Example:
        >>> role_of("model.layers.3.self_attn.q_proj"), role_of("encoder.layer.0.attention.output.dense")
        ('self_attn_q_proj', 'attention_output')
        >>> role_of("blocks.7.up"), role_of("head")
        ('up', 'head')
    """
    *rest, last = path.split(".")
    if not rest or rest[-1].isdigit():
        return last
    if last == "dense" and rest[-2:] == ["attention", "output"]:
        return "attention_output"  # else it would be one with the feed-forward's "output.dense"
    return f"{rest[-1]}_{last}"


def joint_basis(weights: Sequence[Tensor], ridge: float) -> Tensor:
    """Return V: (d_in, d_in) of weights (d_out, d_in): their joint higher-order generalized singular vectors."""
    stacked = torch.cat([weight.float().cpu() for weight in weights])
    rows, size = stacked.shape
    if rows < size:
        V: Tensor = torch.linalg.svd(stacked, full_matrices=True).Vh.t()
        return V
    Q, R = torch.linalg.qr(stacked)
    spread = torch.zeros(size, size)
    for part in Q.split([len(weight) for weight in weights]):
        spread += torch.linalg.inv(part.t() @ part + ridge * torch.eye(size))
    joint: Tensor = R.t() @ torch.linalg.eigh(spread / len(weights)).eigenvectors
    return joint


def directions(weight: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return U: (d_out, d_in), columns of length one or zero, and l0: (d_in,), so that W = U diag(l0) V^T."""
    wide, basis = weight.double().cpu(), V.double().cpu()
    try:
        columns = torch.linalg.solve(basis, wide.t()).t()
    except torch.linalg.LinAlgError:
        columns = wide @ torch.linalg.pinv(basis, rtol=1e-6).t()
    lengths = columns.norm(dim=0)
    return torch.where(lengths > 1e-12, columns / lengths.clamp_min(1e-12), 0.0), lengths


def off_diagonal(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw (2, count) rows and columns of a (size, size) matrix, no place twice and none on the diagonal."""
    if count == 0:
        return torch.empty(2, 0, dtype=torch.int64)
    drawn = torch.randperm(size * (size - 1), generator=generator)[:count]
    rows, columns = drawn // (size - 1), drawn % (size - 1)
    return torch.stack([rows, columns + (columns >= rows)])


class Basis(nn.Module):
    """V: (d_in, d_in), places: (2, count), rows and columns of S that are trained; frozen."""

    V: Tensor
    places: Tensor

    def __init__(self, V: Tensor, places: Tensor) -> None:
        super().__init__()
        self.register_buffer("V", V)
        self.register_buffer("places", places)


class Roles(nn.Module):
    """of: a basis for each role, roles: the role of each layer, by path."""

    def __init__(self, of: Mapping[str, Basis], roles: dict[str, str]) -> None:
        super().__init__()
        self.of, self.roles = nn.ModuleDict(of), roles

    def basis_at(self, path: str) -> Basis:
        """Return the basis of the layer at ``path``."""
        return cast(Basis, self.of[self.roles[path]])


class FRoDAdapter(Adapter):
    """lengths: (d_in,), mixing: (count,), trained;  U: (d_out, d_in), start: (d_in,), frozen."""

    additive = True
    common: Roles
    lengths: nn.Parameter
    mixing: nn.Parameter
    U: Tensor
    start: Tensor
    path: str

    @property
    def basis(self) -> Basis:
        """What layers of its role share."""
        return self.common.basis_at(self.path)

    def _middle(self) -> Tensor:
        """diag(l - l0) + S: (d_in, d_in)."""
        rows, columns = self.basis.places
        return torch.diag(self.lengths - self.start).index_put((rows, columns), self.mixing)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        U, middle, V = (tensor.to(base.dtype) for tensor in (self.U, self._middle(), self.basis.V))
        return base(x) + F.linear(F.linear(x @ V, middle), U)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        U, middle, V = (tensor.to(weight.dtype) for tensor in (self.U, self._middle(), self.basis.V))
        return weight + U @ middle @ V.t(), bias
