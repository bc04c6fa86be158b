"""The gate tells a good export from a wrong one, and both from one that proves nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.export.job import Job
from addenda.export.parity import EXACT_LIMIT, Parity, gate
from addenda.export.probes import Kind, Probes, Row, answer
from addenda.export.runtime import Runtime

Change = Callable[[Tensor], Tensor]


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


class Altered(Runtime):
    """The model itself, its answers altered."""

    name = "a test"

    def __init__(self, job: Job, change: Change, *, bare: bool = False) -> None:
        self.job, self.change, self.bare = job, change, bare

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        if self.bare:
            with self.job.handle.disabled():
                return self.change(answer(self.job.model, row, kind))
        return self.change(answer(self.job.model, row, kind))


def job_of(kind: Kind = "classes", *, size: float = 0.5) -> Job:
    model = Scores()
    handle = addenda.attach(model, addenda.LoRA(rank=3))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=size)
    rows = tuple({"x": torch.randn(4, 6)} for _ in range(12))
    return Job(model.eval(), handle, Probes(rows, kind))


def judged(job: Job, change: Change = lambda found: found, **options: bool) -> Parity:
    drifts = options.pop("drifts", False)
    return gate(
        job,
        lambda exact: Altered(job, (lambda f: f) if drifts and exact else change, **options),
        drifts=drifts,
    )


@pytest.mark.parametrize("kind", ["classes", "features"])
def test_equal_answers_pass_with_their_figures(kind: Kind) -> None:
    parity = judged(job_of(kind))
    assert parity.verdict == "passed"
    assert parity.real is parity.twin
    assert parity.real.positions == 48
    assert parity.real.largest_difference == 0
    assert parity.real.effect_size.value == pytest.approx(1)
    assert parity.real.effect_cosine.value == pytest.approx(1)
    assert (parity.real.kl is None) == (parity.real.top1_agreement is None) == (kind == "features")


def test_one_answer_past_the_limit_fails() -> None:
    def one(found: Tensor) -> Tensor:
        found = found.clone()
        found[2, 3] += 3 * EXACT_LIMIT
        return found

    assert judged(job_of(), one).verdict == "failed"
    assert judged(job_of(), lambda found: found + 0.3 * EXACT_LIMIT).verdict == "passed"


@contextmanager
def coarse(model: nn.Module) -> Iterator[None]:
    hook = model.get_submodule("inner").register_forward_hook(
        lambda _module, _inputs, output: output.bfloat16().float()
    )
    yield
    hook.remove()


class Coarse(Altered):
    """A runtime that rounds by itself, whatever is written in the file, and errs some times as much."""

    def __init__(self, job: Job, times: float) -> None:
        super().__init__(job, lambda found: found)
        self.times = times

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        exact = super().answer(row, kind)
        with coarse(self.job.model):
            return exact + self.times * (super().answer(row, kind) - exact)


def test_what_a_runtime_rounds_by_itself_is_left_open_and_no_more() -> None:
    job = job_of(size=2.0)
    before = [answer(job.model, row, "classes") for row in job.probes.rows]
    right = gate(job, lambda exact: Coarse(job, 1.0), drifts=False, rounding=coarse)
    assert right.twin.exact
    assert right.twin.limit > 2 * EXACT_LIMIT
    assert gate(job, lambda exact: Coarse(job, 1.0), drifts=False).verdict == "failed"
    assert gate(job, lambda exact: Coarse(job, 4.0), drifts=False, rounding=coarse).verdict == "failed"
    after = [answer(job.model, row, "classes") for row in job.probes.rows]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # the model rounds no more


class Brittle(nn.Module):
    """A small difference of large numbers for inputs of which the first is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.far, self.outer = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 9)
        nn.init.eye_(self.far.weight)
        nn.init.constant_(self.far.bias, 2e4)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        back = self.far(inner) - self.far.bias
        return self.outer(torch.tanh(torch.where(x[:, :1] > 0, back, inner)))


def test_a_position_where_last_bits_matter_is_left_open_and_no_other() -> None:
    model = Brittle()
    handle = addenda.attach(model, addenda.LoRA(rank=3), ["inner", "outer"])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.5)
    x = torch.randn(40, 6)
    job = Job(model.eval(), handle, Probes(({"x": x},), "classes"))
    brittle = x[:, 0] > 0

    def moved(where: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda found: torch.where(where[:, None], found + 2 * EXACT_LIMIT, found)

    assert judged(job, moved(~brittle)).verdict == "failed"
    with torch.no_grad():
        right = model.double()(x.double()).log_softmax(-1).float()
    apart = (right - answer(model.float(), {"x": x}, "classes")).abs().amax(-1)
    assert apart[brittle].max() > EXACT_LIMIT > 10 * apart[~brittle].max()
    assert judged(job, lambda found: right).twin.exact


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_fails(wrong: float) -> None:
    assert judged(job_of(), lambda found: torch.full_like(found, wrong)).verdict == "failed"


def test_another_shape_fails() -> None:
    assert judged(job_of(), lambda found: found[:, :-1]).verdict == "failed"


def test_an_export_without_the_adapter_fails() -> None:
    parity = judged(job_of(), bare=True)
    assert parity.verdict == "failed"
    assert parity.real.effect_size.value == pytest.approx(0, abs=1e-9)


def test_a_weak_adapter_proves_nothing_even_where_all_is_equal() -> None:
    parity = judged(job_of(size=1e-3))
    assert parity.verdict == "unproven"
    assert "too little" in parity.words


def test_what_reading_back_found_fails_whatever_the_answers_are() -> None:
    job = job_of()
    parity = gate(
        job, lambda exact: Altered(job, lambda f: f), drifts=False, findings=["rows of q are not permuted"]
    )
    assert parity.verdict == "failed"
    assert "rows of q are not permuted" in parity.words


def test_a_rounded_file_is_judged_by_what_it_keeps_of_the_change() -> None:
    job = job_of()
    slight = judged(job, lambda found: (found + 0.01 * torch.randn_like(found)).log_softmax(-1), drifts=True)
    assert slight.verdict == "passed"
    assert slight.twin.exact
    assert not slight.real.exact
    assert 0 < slight.real.kl.value < 1e-3
    lost = judged(job, drifts=True, bare=True)
    assert lost.twin is not lost.real


def test_a_file_that_lost_the_change_has_drifted() -> None:
    job = job_of()

    def opened(exact: bool) -> Runtime:
        return Altered(job, lambda found: found, bare=not exact)

    parity = gate(job, opened, drifts=True)
    assert parity.verdict == "drifted"
    assert parity.words == "nothing of the adapter's change is left"
    assert parity.twin.exact


def test_positions_that_a_runtime_does_not_tell_are_none_of_those_counted() -> None:
    def last_two(found: Tensor) -> Tensor:
        told = torch.full_like(found, math.nan)
        told[2:] = found[2:]
        return told

    parity = judged(job_of(), last_two)
    assert parity.verdict == "passed"
    assert parity.real.positions == 24
    assert parity.real.top1_agreement == 1


def test_what_a_runtime_does_not_tell_is_left_out() -> None:
    job = job_of()

    def partly(found: Tensor) -> Tensor:
        likely = found.topk(4).indices
        return torch.full_like(found, math.nan).scatter(-1, likely, found.gather(-1, likely))

    parity = judged(job, partly)
    assert parity.verdict == "passed"
    assert parity.real.kl.value == pytest.approx(0, abs=1e-6)
    assert (
        judged(job, lambda found: torch.where(partly(found).isnan(), math.nan, found + 0.1)).verdict
        == "failed"
    )
