"""GLoRA: scales and shifts of weight and bias, each as rich as asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.products import kaiming_uniform
from addenda.core.ranges import integer, one_of
from addenda.core.registry import register

__all__ = ["GLoRA"]

_WEIGHT = ("low-rank", "vector", "constant", "none")
_PROMPT = ("low-rank", "vector", "none")
_BIAS = ("vector", "constant", "none")


@register("glora")
@dataclass(frozen=True)
class GLoRA(Method):
    """Generalized LoRA: a scale and a shift of the weight, the same of the bias, and a shift seen through the weight.

    y = (W + W * A + B) x + b + b * D + E + W c

    * is elementwise. A and B have the shape of W and are low-rank products (d_out, rank) (rank, d_in), one number
    for each row, or one number; D and E likewise of the bias's shape; c: (d_in,). All start at zero, so the adapted
    layer starts equal to its base. A layer without a bias has A and B alone. Mergeable exactly into an unquantized
    weight. Parameters per layer: 2 * rank * (d_in + d_out) for A and B of low rank, rank * (d_in + 1) for c, 2 for D
    and E as constants; a vector counts d_out for each of A, B, D and E, and d_in for c.

    Args:
        rank: inner dimension of what is of low rank, >= 1.
        weight: what A and B are: ``low-rank``, ``vector``, ``constant`` or ``none``.
        prompt: what c is: ``low-rank``, ``vector`` or ``none``.
        bias: what D and E are: ``vector``, ``constant`` or ``none``.

    **Cost**: A of low rank reads the weight in each forward, forms an update of its size and multiplies by it, which is
    more than the layer itself takes. As vectors or constants A and B cost two operations on the output and a sum of
    the input. c reads the weight. **Use it when** LoRA lacks what a scale of features can say: GLoRA contains LoRA,
    (IA)3's scaling of outputs and BitFit.

    **Learning rate**: 1e-4, the rate under which PEFT's published comparison of methods (MetaMathQA, Llama 3.2 3B)
    runs the default; for vectors it has 5e-4.
    MiniLM, with 22 million parameters, wanted more on Banking77 (benchmarks/methods_quality): 3e-3.

    **Differs from**: the paper searches for the best of these choices layer by layer, by evolution in a network that
    holds all of them; here they are settings, the same for all layers. It writes W A; code and results are of the
    elementwise product, in PEFT as here.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, GLoRA(rank=2), targets=["0"]).trainable_parameters
        68

    References: Chavan et al. 2023, arXiv:2306.07967.
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        {"rank": 3},
        {"weight": "vector", "prompt": "vector", "bias": "vector"},
        {"weight": "constant", "prompt": "none", "bias": "none"},
    )

    rank: int = 8
    """Inner dimension of what is of low rank."""
    weight: str = "low-rank"
    """low-rank, vector, constant or none."""
    prompt: str = "low-rank"
    """low-rank, vector or none."""
    bias: str = "constant"
    """vector, constant or none."""

    def problems(self) -> list[str]:
        found = integer("rank", self.rank) + one_of("weight", self.weight, _WEIGHT)
        found += one_of("prompt", self.prompt, _PROMPT) + one_of("bias", self.bias, _BIAS)
        if not found and self.weight == self.prompt == self.bias == "none":
            found.append("weight, prompt and bias are all 'none': nothing would be trained")
        return found

    def problems_at(self, base: Base) -> list[str]:
        idle = self.weight == "none" and not base.has_bias
        return ["it has no bias, and of the weight nothing is trained (weight='none')"] if idle else []

    def build(self, base: Base) -> GLoRAAdapter:
        rows, columns = base.d_out, base.d_in
        found = self._part(base, "A", self.weight, rows, columns) | self._part(
            base, "B", self.weight, rows, columns
        )
        if base.has_bias:
            found |= self._part(base, "C", self.prompt, columns, 1)
            found |= self._part(base, "D", self.bias, rows, 1) | self._part(base, "E", self.bias, rows, 1)
        return GLoRAAdapter(found)

    def _part(self, base: Base, name: str, form: str, rows: int, columns: int) -> dict[str, nn.Parameter]:
        if form == "low-rank":
            down = base.parameter(self.rank, columns, init=kaiming_uniform)
            return {f"{name}_down": down, f"{name}_up": base.parameter(rows, self.rank)}
        # A vector keeps its column, so that it is not taken for a constant where it has one row.
        shapes = {"vector": (rows,) if name in "DE" else (rows, 1), "constant": (1,)}
        return {name: base.parameter(*shapes[form])} if form in shapes else {}


class GLoRAAdapter(Adapter):
    """A to E, those that are trained: X_up (rows, rank) and X_down (rank, columns), or X.

    X is (rows, 1), for D and E (rows,), as a vector and (1,) as a constant.

    Rows and columns are d_out and d_in for A and B, d_in and 1 for C, d_out and 1 for D and E.
    """

    reads_weight = True

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.hold(**parameters)
        self.additive = not self.has("A")  # as a factor of rows it scales what others add, too

    def has(self, name: str) -> bool:
        """Whether it has a parameter of this name."""
        return name in self._parameters

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, shift = base(x), self._bias_shift(base.weight, base.bias(), base.dtype)
        if self.has("A_up"):
            return y + base.apply(x, self._weight_shift(base.weight()), shift)
        features = base.outputs_last(y)
        if self.has("A"):
            bias = base.bias()
            product = features if bias is None else features - bias
            features = features + self._part("A", base.dtype)[:, 0] * product
        if shift is not None:
            features = features + shift
        y = base.outputs_back(features)
        if not self.has("B"):
            return y
        ones = torch.ones(1, base.d_in, dtype=base.dtype, device=y.device)
        return y + base.low_rank(x, ones, self._part("B", base.dtype).expand(base.d_out, 1))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shift = self._bias_shift(lambda: weight, bias, weight.dtype)
        if bias is not None and shift is not None:
            bias = bias + shift
        return weight + self._weight_shift(weight) if self.has("A") or self.has("A_up") else weight, bias

    def _weight_shift(self, weight: Tensor) -> Tensor:
        return weight * self._part("A", weight.dtype) + self._part("B", weight.dtype)

    def _bias_shift(
        self, weight: Callable[[], Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """What is added to the bias, (d_out,); None where nothing is."""
        terms = []
        if bias is not None and self.has("D"):
            terms.append(bias * self._part("D", dtype)[:, 0] + self._part("E", dtype)[:, 0])
        if self.has("C") or self.has("C_up"):
            terms.append((weight() @ self._part("C", dtype))[:, 0])
        return sum(terms[1:], terms[0]) if terms else None

    def _part(self, name: str, dtype: torch.dtype) -> Tensor:
        """A matrix (rows, columns), or a column (rows, 1) or (1, 1) that stands for it."""
        if self.has(name):
            return self.get_parameter(name).reshape(-1, 1).to(dtype)
        return (self.get_parameter(f"{name}_up") @ self.get_parameter(f"{name}_down")).to(dtype)
