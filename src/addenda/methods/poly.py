"""Poly and MHR: an inventory of low-rank skills on each layer, and for each task a learned mixture of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method, ParameterSource
from addenda.core.handle import Handle
from addenda.core.ranges import integer
from addenda.core.registry import register
from addenda.errors import MethodError

__all__ = ["Poly", "on_tasks"]


@register("poly")
@dataclass(frozen=True)
class Poly(Method):
    """Low-rank update mixed from skills that all tasks share, in parts that each task chooses for itself.

    y = base(x) + B A x / rank,   A = sum over s of w_s A_s,   B = sum over s of w_s B_s,   w = g / sum(g)

    A_s: (rank, d_in),  B_s: (d_out, rank),  g = sigmoid(z[task]): (skills,),  z: (tasks, skills). With splits (MHR) the
    inputs and the outputs are cut into that many blocks, each mixed with weights of its own. In training, noise is
    added to z (a relaxed Bernoulli draw at temperature 1). A starts Kaiming-uniform, B zero and z within +-0.001, so
    the adapted layer starts equal to its base. Merging keeps one task, without noise, and is then exact.
    Parameters: skills * rank * (d_in + d_out) + tasks * splits * skills per layer.

    Which task a row of the batch belongs to is told by `on_tasks`; where it is not told, all are of `task`.

    Args:
        rank: inner dimension of a skill, >= 1.
        tasks: how many tasks there are, >= 1.
        skills: how many skills each layer has, >= 1.
        splits: blocks that are mixed apart, >= 1; has to divide d_in and d_out. 1 is Poly, more is MHR.
        task: the task that runs where none is told, 0 <= task < tasks; the one that is merged.
        noise: whether training draws.

    **Cost**: that of LoRA of the same rank, and skills * rank * (d_in + d_out) multiplications to mix the factors: in
    each call once, or once for each row of a batch whose tasks are told.

    **Use it when** many related tasks are trained together and later ones have little data.

    **Learning rate**: 3e-3. Of half decades 1e-2 was best on Banking77 with MiniLM (benchmarks/methods_quality), and
    3e-2 too much.

    **Differs from**: PEFT asks for the tasks in every call. Where they are not told, one draw of noise serves the
    whole batch; where they are, each row has its own, as in PEFT.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> addenda.attach(model, Poly(rank=2, tasks=3, skills=4), targets=["0"]).trainable_parameters
        108

    References: Ponti et al. 2022, arXiv:2202.13914 (Poly). Caccia et al. 2022, arXiv:2211.03831 (MHR).
    """

    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 3e-3
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    variants: ClassVar[tuple[Mapping[str, object], ...]] = (
        # The properties compare one run with another, so nothing may be drawn in between.
        {"rank": 4, "noise": False},
        {"rank": 3, "tasks": 3, "skills": 2, "splits": 2, "task": 1, "noise": False},
    )

    rank: int = 8
    """Inner dimension of a skill."""
    tasks: int = 1
    """How many tasks there are."""
    skills: int = 4
    """How many skills each layer has."""
    splits: int = 1
    """Blocks that are mixed apart; more than one is MHR."""
    task: int = 0
    """The task that runs where none is told."""
    noise: bool = True
    """Whether training draws the mixture."""

    def problems(self) -> list[str]:
        counts = {"rank": self.rank, "tasks": self.tasks, "skills": self.skills, "splits": self.splits}
        found = [problem for name, value in counts.items() for problem in integer(name, value)]
        found += integer("task", self.task, least=0)
        if not isinstance(self.noise, bool):
            found.append(f"noise must be True or False, got {self.noise!r}")
        if not found and self.task >= self.tasks:
            found.append(f"task {self.task} is none of the {self.tasks} tasks, which are counted from 0")
        return found

    def problems_at(self, base: Base) -> list[str]:
        if base.d_in % self.splits or base.d_out % self.splits:
            return [f"splits {self.splits} does not divide d_in {base.d_in} and d_out {base.d_out}"]
        return []

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module:
        return Told(self.tasks)

    def build(self, base: Base) -> PolyAdapter:
        inputs, outputs = base.d_in // self.splits, base.d_out // self.splits
        return PolyAdapter(
            base.parameter(self.splits, self.skills, inputs, self.rank, init=_kaiming_uniform),
            base.parameter(self.splits, self.skills, self.rank, outputs),
            base.parameter(self.tasks, self.splits * self.skills, init=_near_zero),
            self,
        )


@contextlib.contextmanager
def on_tasks(handle: Handle, tasks: Tensor | Sequence[int]) -> Iterator[None]:
    """Tell a Poly adapter which task each row of the batch belongs to; backward passes belong into the block too.

    Args:
        handle: an adapter of this method.
        tasks: whole numbers (rows,), each 0 <= task < tasks of the method.

    Raises:
        MethodError: the adapter is of another method, or a task is none of its tasks.

    Example:
        >>> import addenda, torch
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> handle = addenda.attach(model, Poly(rank=2, tasks=3), targets=["0"])
        >>> with on_tasks(handle, [0, 2, 2]):
        ...     tuple(model(torch.ones(3, 5, 8)).shape)
        (3, 5, 4)
    """
    common = next(iter(handle.adapters.values())).common
    if not isinstance(common, Told):
        raise MethodError(
            f"'{handle.name}' is of method '{handle.method.name}'", hint="only 'poly' has tasks"
        )
    told = torch.as_tensor(tasks)
    if told.dim() != 1 or told.is_floating_point() or bool(((told < 0) | (told >= common.tasks)).any()):
        raise MethodError(
            f"tasks must be whole numbers below {common.tasks}, one for each row",
            hint="count the tasks from 0, in the order in which they were trained",
        )
    before, common.told = common.told, told
    try:
        yield
    finally:
        common.told = before


def _kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(tensor.shape[2])
    tensor.uniform_(-bound, bound, generator=generator)


def _near_zero(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(-1e-3, 1e-3, generator=generator)


class Told(nn.Module):
    """told: the task of each row, (rows,), while it is told."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.told: Tensor | None = None


class PolyAdapter(Adapter):
    """A: (splits, skills, d_in / splits, rank), B: (splits, skills, rank, d_out / splits),
    z: (tasks, splits * skills)."""

    additive = True
    common: Told

    def __init__(self, A: nn.Parameter, B: nn.Parameter, z: nn.Parameter, settings: Poly) -> None:
        super().__init__()
        self.A, self.B, self.z = A, B, z
        self.task, self.noise, self.scaling = settings.task, settings.noise, 1 / settings.rank

    def _mixed(self, tasks: Tensor, *, noise: bool) -> tuple[Tensor, Tensor]:
        """tasks: (rows,) -> A: (rows, d_in, rank), B: (rows, rank, d_out)."""
        splits, skills, _, rank = self.A.shape
        z = self.z[tasks.to(self.z.device)].view(-1, splits, skills)
        if noise:
            u = torch.rand_like(z).clamp(1e-6, 1 - 1e-6)
            z = z + torch.logit(u)
        gates = z.sigmoid()
        weights = gates / (gates.sum(-1, keepdim=True) + 1e-12)
        A = torch.einsum("bqs,qsdr->bqdr", weights, self.A)
        B = torch.einsum("bqs,qsrd->brqd", weights, self.B)
        return A.reshape(len(tasks), -1, rank), B.reshape(len(tasks), rank, -1)

    def _one_term(self, *, noise: bool) -> tuple[Tensor, Tensor, float]:
        A, B = self._mixed(torch.tensor([self.task]), noise=noise)
        return A[0].t(), B[0].t(), self.scaling

    def low_rank_term(self) -> tuple[Tensor, Tensor, float] | None:
        return self._one_term(noise=False) if self.common.told is None and not self._draws() else None

    def _draws(self) -> bool:
        return self.noise and self.training

    def forward(self, x: Tensor, base: Base) -> Tensor:
        told = self.common.told
        if told is None:
            return base.add_low_rank(x, *self._one_term(noise=self._draws()))
        if len(told) != len(x):
            raise MethodError(
                f"{len(told)} tasks were told for a batch of {len(x)} rows",
                where={"layer": base.path},
                hint="tell one task for each row, and pack no rows together",
            )
        A, B = (factor.to(base.dtype) for factor in self._mixed(told, noise=self._draws()))
        added = x.reshape(len(x), -1, x.shape[-1]) @ A @ B
        return base(x) + self.scaling * added.view(*x.shape[:-1], -1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B, scaling = self._one_term(noise=False)
        return weight + scaling * (B.to(weight.dtype) @ A.to(weight.dtype)), bias
