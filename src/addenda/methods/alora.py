"""aLoRA: LoRA that begins to act where a sequence of tokens calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from addenda.core.contract import Adapter, Base
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.core.tokens import Tokens
from addenda.errors import MethodError
from addenda.methods.lora import LoRAAdapter, LowRank

__all__ = ["ALoRA"]


@register("alora")
@dataclass(frozen=True)
class ALoRA(LowRank):
    """Low-rank update that is off until the tokens that invoke it: what was read before stays the base's.

    y = base(x) + a * scaling * B (A x),   A: (rank, d_in),  B: (d_out, rank),  a: 0 or 1 for each token

    a is 1 from the first token of the last occurrence of ``invocation`` in a sample to the sample's end, and 0 where
    there is none. A starts Kaiming-uniform and B zero, so the adapted layer starts equal to its base. Not mergeable: a
    weight acts on every token. Parameters: rank * (d_in + d_out) per layer.

    Args:
        invocation: token ids, such as those of the words that open an answer. Where it is empty, a is 1 everywhere.
        rank: inner dimension, 1 <= rank <= min(d_in, d_out).
        alpha: numerator of the scaling, dimensionless, > 0. None means 2 * rank.
        dropout: probability of zeroing an input feature of A during training, in [0, 1).
        rank_stabilized: divide alpha by sqrt(rank) instead of rank.
        ranks: another rank for the layers a literal suffix names; the last that matches counts.
        alphas: another alpha likewise.

    **Cost**: LoRA's, plus a pass over the output; tokens that are off cost as much as the others.
    **Use it when** several adapters take turns over one long conversation: keys and values that the base has cached
    before the invocation serve all of them. Its paper takes higher ranks than for LoRA.
    **Learning rate**: LoRA's default; not tuned.

    The ids come from what the model's decoder is called with: rows of ids, packed rows whose positions begin anew with
    each sample, and passes over a cache. An invocation that is cut between two passes acts from the second one on. A
    pass that is given embeddings instead is refused. Blocks that run again in a
    backward must do so before the next forward. What a cache holds from before the adapter was attached counts as no
    invocation, and so do a cache's rows after they were chosen anew. Beams of one prompt are right if the invocation
    lies in the prompt.

    Differs from: nothing in the formula. PEFT looks at a prompt once and takes all that is generated as called;
    here an invocation that the model itself writes begins to act there.

    Example:
        >>> import addenda
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
        >>> handle = addenda.attach(model, ALoRA(invocation=(5, 6), rank=2), targets=["1"])
        >>> nn.init.ones_(handle.adapters["1"].B).shape
        torch.Size([4, 2])
        >>> ids = torch.tensor([[1, 5, 6, 2]])
        >>> on = model(ids)
        >>> handle.disable()
        >>> (on != model(ids)).any(dim=-1).tolist()
        [[False, True, True, True]]

    References: Greenewald et al. 2025, arXiv:2504.12397, section 3.
    """

    learning_rate: ClassVar[float] = 1e-3
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({"rank": 4},)

    invocation: tuple[int, ...] = ()
    """Token ids that call the adapter; none means that it always acts."""

    def problems(self) -> list[str]:
        if not isinstance(self.invocation, tuple):
            return [*super().problems(), f"invocation must be a list of token ids, got {self.invocation!r}"]
        wrong = [
            each for i, t in enumerate(self.invocation) for each in integer(f"invocation[{i}]", t, least=0)
        ]
        return super().problems() + wrong

    def reads_tokens(self) -> bool:
        return bool(self.invocation)

    def build(self, base: Base) -> ALoRAAdapter:
        adapter = ALoRAAdapter(*self.pair_for(base), self.scaling_at(base.path), dropout=self.dropout)
        adapter.invocation = self.invocation
        return adapter


class ALoRAAdapter(LoRAAdapter):
    """A: (rank, d_in), B: (d_out, rank)."""

    invocation: tuple[int, ...] = ()

    def low_rank_term(self) -> None:
        return None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        active = self._active(x, base)
        if active is None:
            return super().forward(x, base)
        A, B, dropout = self.A.to(base.dtype), self.B.to(base.dtype), self.dropout * self.training
        y = base(x)
        return y + active.to(y.dtype) * self.scaling * base.low_rank(F.dropout(x, dropout), A, B)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return Adapter.fold(self, weight, bias)

    def _active(self, x: Tensor, base: Base) -> Tensor | None:
        """1 for each token (..., 1) that is called, or None where all are."""
        if not self.invocation or (base.watch is not None and base.watch.probing):
            return None
        tokens = base.watch.current if base.watch is not None else None
        if tokens is None:
            raise MethodError(
                "an adapter that waits for an invocation was given no token ids",
                where={"layer": base.path},
                hint="call the model with input_ids of shape (rows, tokens)",
            )
        if self.invocation not in tokens.findings:
            active = from_the_last(tokens, self.invocation)
            tokens.findings[self.invocation] = None if bool(active.all()) else active
        found: Tensor | None = tokens.findings[self.invocation]
        if found is None or found.numel() == x.shape[:-1].numel():
            return None if found is None else found.reshape(*x.shape[:-1], 1)
        raise MethodError(
            f"the input {tuple(x.shape)} of '{base.path}' is not one row for each of {found.numel()} tokens",
            where={"layer": base.path},
            hint="leave such layers out of the targets",
        )


def from_the_last(tokens: Tokens, invocation: tuple[int, ...]) -> Tensor:
    """Return for each new token (rows, new) whether the last invocation of its sample begins there or before."""
    ids, samples = tokens.ids, tokens.samples
    starts = torch.zeros_like(ids)
    places = ids.shape[1] - len(invocation) + 1
    if places > 0:
        wanted = torch.tensor(invocation, device=ids.device)
        whole = (ids.unfold(1, len(invocation), 1) == wanted).all(dim=-1)
        starts[:, :places] = whole & (samples[:, :places] == samples[:, -places:])
    of_sample = torch.zeros_like(ids).scatter_add_(1, samples, starts)
    up_to_end = of_sample.cumsum(dim=1).gather(1, samples)
    active = (starts.cumsum(dim=1) == up_to_end) & (of_sample.gather(1, samples) > 0)
    return active[:, ids.shape[1] - tokens.new :]
