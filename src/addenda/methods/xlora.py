"""X-LoRA: gates over several frozen adapters, read from the hidden states of a first pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from addenda.core.contract import Base, ParameterSource
from addenda.core.gated import add_gated
from addenda.core.mixing import Mixture, MixtureAdapter
from addenda.core.ranges import flag, integer, number
from addenda.core.registry import register
from addenda.errors import MethodError

__all__ = ["XLoRA"]


@register("xlora")
@dataclass(frozen=True)
class XLoRA(Mixture):
    """Mix frozen adapters token by token, by gates that a small network reads off what the model makes of the text.

    y = base(x) + weight * sum_n g_n D_n,   D_n = adapter_n(x) - base(x),   g = softmax(network(s) / temperature)

    s: (hidden_size,), the token's last hidden state in a first pass through the model, in which every gate is
    ``first_value`` and which no gradient goes through. The network has ``depth`` linear layers with ReLU between them,
    one for the whole model; it gives n gates to a token, or ``layerwise`` n to each adapted layer. Its weights are
    drawn (Kaiming-uniform), its biases zero: it starts near the mean of the adapters. Not mergeable: gates differ from
    token to token. Parameters at depth 1: (hidden_size + 1) * n, times the adapted layers where ``layerwise``.

    Args:
        of: names of the adapters, which are on the model already. The targets are by default all layers on which any
            of them stands; each mixes those that it has.
        hidden_size: features of the model's hidden states, ``model.config.hidden_size``.
        layerwise: whether each adapted layer gets gates of its own.
        depth: linear layers of the network, >= 1.
        size: width between them, >= 1; of no effect at depth 1.
        dropout: probability, 0 <= dropout < 1, with which a feature between them is dropped in training; one mask a
            pass, for all adapted layers.
        softmax: whether the gates of a token add up to 1.
        temperature: of that softmax, > 0.
        top_k: how many adapters a token may use, >= 0, the others' gates being zero; 0 for all.
        softmax_of_top: whether a softmax is put on the gates that ``top_k`` leaves.
        first_value: every gate in the first pass; 0 makes that the bare base's.
        weight: factor on all that is added.

    **Cost**: two passes through the model in place of one, the first without gradients; the adapters themselves.

    **Use it when** adapters of several fields exist, and a text or a token may need some of each.

    **Learning rate**: 1e-3, not tuned.

    Differs from: PEFT draws biases too and takes a cache away; here the first passes of a text that is generated have a
    cache of their own, so that it goes on a token at a time. Any adapters are mixed, not LoRA alone.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> for name in ("law", "style"):
        ...     _ = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"], name=name)
        >>> addenda.attach(model, XLoRA(of=("law", "style"), hidden_size=4), name="mix").trainable_parameters
        10

    References: Buehler and Buehler 2024, arXiv:2402.07148.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "embedding")
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"of": ["law", "style"], "hidden_size": 3, "temperature": 0.5, "weight": 2.0},
        {"of": ["law", "style"], "hidden_size": 3, "layerwise": True, "depth": 3, "size": 8, "softmax": False}
        | {"dropout": 0.0},
    )
    exceptions: ClassVar[Mapping[str, str]] = {"identity": "it starts near the mean of the adapters it mixes"}

    hidden_size: int = 0
    """Features of the model's hidden states."""
    layerwise: bool = False
    """Whether each layer gets gates of its own."""
    depth: int = 1
    """Linear layers of the network."""
    size: int = 2048
    """Width between them."""
    dropout: float = 0.2
    """Share of the features between them that training drops."""
    softmax: bool = True
    """Whether the gates of a token add up to 1."""
    temperature: float = 1.0
    """Temperature of that softmax."""
    top_k: int = 0
    """How many adapters a token may use; 0 for all."""
    softmax_of_top: bool = False
    """Whether the gates that are left get a softmax."""
    first_value: float = 0.0
    """Every gate in the first pass."""
    weight: float = 1.0
    """Factor on all that is added."""

    def problems(self) -> list[str]:
        found = super().problems() + integer("hidden_size", self.hidden_size, least=0)
        found += integer("depth", self.depth) + integer("size", self.size)
        found += number("dropout", self.dropout, least=0.0, below=1.0)
        found += number("temperature", self.temperature, above=0.0) + integer("top_k", self.top_k, least=0)
        found += number("first_value", self.first_value) + number("weight", self.weight)
        for name in ("layerwise", "softmax", "softmax_of_top"):
            found += flag(name, getattr(self, name))
        return found

    def problems_at(self, base: Base) -> list[str]:
        found = (
            []
            if self.hidden_size
            else ["hidden_size has to be the model's: hidden_size=model.config.hidden_size"]
        )
        if base.routed:
            found.append(
                "its input comes in an order of a router's, and gates are those of the text's tokens"
            )
        if self.top_k > len(self.of) > 0:
            found.append(f"top_k is {self.top_k}, of {len(self.of)} adapters")
        return found + ([] if any(name in base.others for name in self.of) else super().problems_at(base))

    def looks_ahead(self) -> bool:
        return True

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        gates = len(self.of) * (len(bases) if self.layerwise else 1)
        return GateNetwork([base.path for base in bases], self, [*self._widths(), gates], source)

    def _widths(self) -> list[int]:
        return [self.hidden_size, *[self.size] * (self.depth - 1)]

    def build(self, base: Base) -> XLoRAAdapter:
        return XLoRAAdapter(self, base)


class GateNetwork(nn.Module):
    """weights: (width after, width before) of each linear layer, biases: (width after,)."""

    def __init__(self, paths: list[str], method: XLoRA, widths: list[int], source: ParameterSource) -> None:
        super().__init__()
        self.places = {path: place for place, path in enumerate(paths)}
        self.method = method
        shapes = [(after, before) for before, after in itertools.pairwise(widths)]
        self.weights = nn.ParameterList(source.parameter(*shape, init=_kaiming_uniform) for shape in shapes)
        self.biases = nn.ParameterList(source.parameter(after) for after, _ in shapes)

    def forward(self, states: Tensor, path: str, masks: Sequence[Tensor]) -> Tensor:
        """Return the gates (..., n) of the layer at ``path`` from hidden states (..., hidden_size).

        Args:
            states: of the first pass.
            path: an adapted layer's.
            masks: factors on the features between two layers, (..., size) each; none where nothing is dropped.
        """
        method, inner = self.method, states.to(self.weights[0].dtype)
        for place, (weight, bias) in enumerate(zip(self.weights[:-1], self.biases[:-1], strict=True)):
            inner = F.linear(inner, weight, bias).relu()
            inner = inner * masks[place] if masks else inner
        own = slice(None)
        if method.layerwise:  # of the last layer's rows those of this layer's gates
            first = self.places[path] * len(method.of)
            own = slice(first, first + len(method.of))
        gates = F.linear(inner, self.weights[-1][own], self.biases[-1][own])
        return (gates / method.temperature).softmax(-1) if method.softmax else gates

    def masks(self, states: Tensor) -> list[Tensor]:
        """Draw what is dropped between two layers in one pass."""
        if not self.training or not self.method.dropout:
            return []
        shape = (*states.shape[:-1], self.method.size)
        ones = states.new_ones(shape, dtype=self.weights[0].dtype)
        return [F.dropout(ones, self.method.dropout) for _ in self.weights[:-1]]


def _kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


class XLoRAAdapter(MixtureAdapter):
    """Nothing of its own: what is trained is the network that all layers share."""

    by_place = True
    common: GateNetwork

    def __init__(self, method: XLoRA, base: Base) -> None:
        super().__init__(method.of, base)
        self.method = method
        self.present = [place for place, name in enumerate(method.of) if name in base.others]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        method, tokens = self.method, x.shape if base.channels_in is None else x.shape[:-1]
        if base.preview is not None and base.preview.first and not method.first_value:
            return base(x)
        gates = method.weight * self._left(self._gates(tokens, base))[..., self.present]
        terms = [term for name in self.of if (term := base.others[name].low_rank_term()) is not None]
        if base.pointwise and len(terms) == len(self.of):
            return add_gated(x, base, terms, gates)
        h, changes = self.changes(x, base)
        return h + (gates.to(base.dtype)[..., None, :] @ torch.stack(changes, dim=-2)).squeeze(-2)

    def _gates(self, tokens: torch.Size, base: Base) -> Tensor:
        """The gates (tokens, n) before some are left out."""
        preview = base.preview
        if preview is not None and preview.first:
            shape = (*tokens, len(self.method.of))
            return torch.full(shape, self.method.first_value, device=self.common.weights[0].device)
        states = None if preview is None else preview.states
        if preview is None or states is None or states.shape[:-1].numel() != tokens.numel():
            raise MethodError(
                f"layer '{base.path}' is given {tokens.numel()} tokens, and the first pass was not about those",
                hint="call the model as a whole; leave layers out of the targets that do not see each token once",
            )
        if self.common not in preview.findings:  # the same for all layers, and where one runs again
            preview.findings[self.common] = self.common.masks(states)
        # Each layer reads the network anew: a block that runs again must find no graph that another one has used.
        gates: Tensor = self.common(states, base.path, preview.findings[self.common])
        return gates.view(*tokens, -1)

    def _left(self, gates: Tensor) -> Tensor:
        method = self.method
        if method.top_k:
            kept = torch.zeros_like(gates, dtype=torch.bool).scatter(
                -1, gates.topk(method.top_k, -1).indices, True
            )
            gates = gates * kept
        if method.softmax_of_top:
            used = gates != 0
            gates = gates.masked_fill(~used, -math.inf).softmax(-1).masked_fill(~used, 0.0)
        return gates
