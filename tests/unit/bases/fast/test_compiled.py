"""What a GPU would run compiled, compiled on the CPU: whole, and with the numbers of the plain form."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from addenda.bases import scores
from addenda.bases.fast import compiled, gated_mlp, rms_norm, segments
from addenda.bases.fast.compiled import SETTINGS, compiled_on_gpu

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def norm(rows):
    return numbers(rows, 32), numbers(32), 1e-6


def norm_backward(rows):
    return numbers(rows, 32), numbers(rows, 32), numbers(rows, 1).exp(), numbers(32)


def gate(count):
    return lambda rows: (*(numbers(rows, 48) for _ in range(count)), "gelu-tanh")


def positions(rows):
    return numbers(4, rows, 16).requires_grad_(), (numbers(rows, 8), numbers(rows, 8))


def targets(rows):
    return numbers(rows, 97) * 5, torch.randint(0, 97, (rows,))


CASES = {
    "norm": (rms_norm._plain, norm, {"plus_one": True}),
    "norm, back": (rms_norm._plain_backward, norm_backward, {"plus_one": False}),
    "gate": (gated_mlp._plain, gate(2), {}),
    "gate, back": (gated_mlp._plain_backward, gate(3), {}),
    "positions": (segments.turned, positions, {}),
    "cross-entropy": (scores._by_log_sum, targets, {}),
}


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # traced and differentiated; and turned into machine code
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_compiled_form_is_one_graph_and_gives_the_same(case, backend):
    function, arguments, named = case
    torch._dynamo.reset()
    form = torch.compile(function.__wrapped__, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(SETTINGS):
        for rows in (6, 9, 12):  # the second length makes it one for any length
            given = arguments(rows)
            ours, theirs = form(*given, **named), function(*given, **named)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            first = ours[0] if isinstance(ours, tuple) else ours
            if first.requires_grad:
                weight = torch.randn_like(first)
                torch.testing.assert_close(
                    torch.autograd.grad((ours * weight).sum(), given[0]),
                    torch.autograd.grad((theirs * weight).sum(), given[0]),
                )
        torch._dynamo.config.patch(error_on_recompile=True)(form)(*arguments(15), **named)


def test_tensors_of_the_cpu_are_left_to_the_plain_form(monkeypatch):
    monkeypatch.setattr(compiled, "compiled", lambda _: pytest.fail("it was compiled"))
    assert torch.equal(compiled_on_gpu(torch.square)(torch.full((2,), 3.0)), torch.full((2,), 9.0))


def test_without_a_gpu_the_reason_is_pytorchs_own(monkeypatch):
    def cannot(*_, **__):
        raise AssertionError("Torch not compiled with CUDA enabled\nand more")

    monkeypatch.setattr(torch, "ones", cannot)
    compiled.why_not_compiled.cache_clear()
    try:
        assert compiled.why_not_compiled() == "Torch not compiled with CUDA enabled"
    finally:
        compiled.why_not_compiled.cache_clear()


@pytest.mark.parametrize("variable", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_a_compiler_that_the_user_turned_off_is_not_used(variable):
    code = "from addenda.bases.fast.compiled import why_not_compiled; print(why_not_compiled())"
    command = [sys.executable, "-c", code]
    said = subprocess.run(
        command, env={**os.environ, variable: "1"}, capture_output=True, text=True, check=True
    )
    assert "turned off" in said.stdout
