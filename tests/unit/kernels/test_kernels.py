"""Each kernel against its formula in float64, forward and backward, in both of its dtypes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from addenda import kernels
from addenda.bases import formats
from addenda.bases.fast.attention import attend
from addenda.bases.fast.segments import Rule, Segments, turned
from addenda.kernels import build, calls, library

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler on this machine")

UNITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Relative error of a result of few operations."""


SETS = {"AVX512": ["native", "x86-64-v3", "x86-64"], "AVX2": ["native", "x86-64"]}.get(
    torch.backends.cpu.get_cpu_capability(), ["native"]
)
"""Registers of 64, 32 and 16 bytes, of which a machine has the smaller ones too."""


@pytest.fixture(params=SETS)
def instructions(request, monkeypatch):
    """Run a test with the kernels compiled for each instruction set."""
    monkeypatch.setattr(library._State, "library", ctypes.CDLL(str(build.build(request.param))))
    calls._function.cache_clear()
    yield request.param
    calls._function.cache_clear()


@pytest.fixture(autouse=True)
def enabled():
    assert kernels.enable(), kernels.state()


def assert_near(ours, exact, *, units=1.0):
    assert not ours.double().isnan().any()
    assert (ours.double() - exact).norm() <= units * UNITS[ours.dtype] * exact.norm()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype, offset):
    x, g = (torch.randn(7, 48).to(dtype) for _ in range(2))
    weight = torch.randn(48).to(dtype)
    exact_x = x.double().requires_grad_()
    scale = (exact_x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    exact = exact_x * scale * (weight.double() + offset)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, g.double())
    y, factors = calls.rms_norm_forward(x, weight, 1e-5, offset)
    assert_near(y, exact.detach())
    assert_near(calls.rms_norm_backward(x, weight, factors, g, offset), exact_grad)


FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu-tanh": lambda z: functional.gelu(z, approximate="tanh"),
}


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("name", calls.ACTIVATIONS)
def test_activation(dtype, name):
    x, g = (torch.randn(5, 32).mul(3).to(dtype) for _ in range(2))
    exact_x = x.double().requires_grad_()
    exact = FUNCTIONS[name](exact_x)
    (grad,) = torch.autograd.grad(exact, exact_x, g.double())
    assert_near(calls.activation(x, name), exact.detach())
    assert_near(calls.activation(x, name, g), grad, units=2)


@pytest.mark.usefixtures("instructions")
def test_gelu_is_right_to_its_own_last_digits_far_below_zero_and_near_it():
    x = torch.cat([torch.linspace(-9, 9, 1600), torch.randn(1600) * 1e-3])
    exact = x.double() * torch.special.erfc(x.double() / -(2**0.5)) / 2  # not 1 + erf, which cancels
    torch.testing.assert_close(calls.activation(x, "gelu").double(), exact, rtol=4e-6, atol=0)
    edges = torch.tensor([1e30, 200.0, 40.0, 14.0, 0.0, -0.0, -14.0, -1e30] * 2)
    torch.testing.assert_close(calls.activation(edges, "gelu"), functional.gelu(edges), rtol=1e-6, atol=1e-30)
    assert calls.activation(torch.full((16,), torch.nan), "gelu").isnan().all()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("activation", calls.ACTIVATIONS)
def test_gated(dtype, activation):
    function = FUNCTIONS[activation]
    gate, up, g = (torch.randn(5, 32).mul(3).to(dtype) for _ in range(3))
    exact_gate, exact_up = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = function(exact_gate) * exact_up
    grads = torch.autograd.grad(exact, [exact_gate, exact_up], g.double())
    assert_near(calls.gated_forward(gate, up, activation), exact.detach())
    grad_gate, grad_up, again = calls.gated_backward(gate, up, g, activation)
    assert_near(grad_gate, grads[0], units=2)
    assert_near(grad_up, grads[1])
    assert torch.equal(again, calls.gated_forward(gate, up, activation))


@pytest.mark.usefixtures("instructions")
def test_far_out_gates_give_no_infinity():
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, 1.0] * 2)
    y = calls.gated_forward(gate, torch.ones(16), "silu")
    torch.testing.assert_close(y, functional.silu(gate), rtol=1e-5, atol=1e-30)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("vocabulary", [5, 48, 1003])
def test_cross_entropy(dtype, vocabulary):
    scores, targets = torch.randn(9, vocabulary).mul(4).to(dtype), torch.randint(0, vocabulary, (9,))
    targets[0] = scores[0].argmax()
    exact = scores.double().requires_grad_()
    losses = functional.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    before = scores.clone()
    nll, first = calls.cross_entropy(scores, targets, gradient=False)
    assert torch.equal(scores, before)
    torch.testing.assert_close(nll.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(first, before.gather(1, targets[:, None])[:, 0] >= before.amax(1))
    again, _ = calls.cross_entropy(scores, targets, gradient=True)
    assert torch.equal(again, nll)
    assert_near(scores, gradient)


@pytest.mark.usefixtures("instructions")
def test_not_a_number_in_one_row_stays_in_it():
    scores = torch.randn(3, 40)
    scores[1, 7] = torch.nan
    nll, _ = calls.cross_entropy(scores, torch.tensor([1, 2, 3]), gradient=True)
    assert nll.isnan().tolist() == [False, True, False]
    assert scores[0].isfinite().all()
    assert scores[2].isfinite().all()


def exact_attention(query, key, value, rotary, lengths, rule):
    query, key = turned(query, rotary), turned(key, rotary)
    group = len(query) // len(key)
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(sample))
    seen = sample[:, None] == sample
    if rule.causal:
        seen &= place[None] <= place[:, None]
    if rule.window:
        seen &= place[None] > place[:, None] - rule.window
    scores = query @ key.transpose(1, 2) * rule.scaling
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value


RULES = {
    "causal": Rule(0.2),
    "window": Rule(0.2, window=37),
    "softcap": Rule(0.2, softcap=3.0),
    "both": Rule(0.2, window=70, softcap=3.0),
    "encoder": Rule(0.2, causal=False),
}


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads"), [((150, 1, 65, 7), 6, 2), ((64, 3), 4, 4), ((9,), 3, 1)]
)
def test_attention(dtype, rule, lengths, heads, key_heads):
    tokens, d, width = sum(lengths), 48, 32
    made = [torch.randn(tokens, n, d).to(dtype) for n in (heads, key_heads, key_heads)]
    angles = torch.randn(tokens, width // 2).repeat(1, 2)
    rotary = (angles.cos().to(dtype), angles.sin().to(dtype))
    g = torch.randn(heads, tokens, d).to(dtype)

    def run(function, tensors, grad):
        inputs = [t.transpose(0, 1).detach().requires_grad_() for t in tensors]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    exact_rotary = tuple(part.double() for part in rotary)
    exact = run(
        lambda q, k, v: exact_attention(q, k, v, exact_rotary, lengths, rule),
        [t.double() for t in made],
        g.double(),
    )
    ours = run(lambda q, k, v: attend(q, k, v, Segments(lengths), rule, rotary=rotary), made, g)
    with kernels.kernels_off():
        plain = run(lambda q, k, v: attend(q, k, v, Segments(lengths), rule, rotary=rotary), made, g)
    for a, b, e in zip(ours, plain, exact, strict=True):
        assert_near(a, e, units=3)
        assert_near(b, e, units=6)


@pytest.mark.usefixtures("instructions")
def test_tokens_of_no_segment_get_zeros_and_give_none():
    query, key, value = (torch.randn(2, 20, 16, requires_grad=True) for _ in range(3))
    out = attend(query, key, value, Segments((9, 4)), Rule(0.3))
    assert torch.equal(out[:, 13:], torch.zeros(2, 7, 16))
    for grad in torch.autograd.grad(out.sum(), [query, key, value]):
        assert torch.equal(grad[:, 13:], torch.zeros(2, 7, 16))
        assert grad[:, :13].abs().sum() > 0


@pytest.mark.usefixtures("instructions")
def test_one_thread_and_several_give_the_same_bits():
    query, key, value = (torch.randn(4, 200, 32) for _ in range(3))

    def run(threads):
        torch.set_num_threads(threads)
        inputs = [t.clone().requires_grad_() for t in (query, key, value)]
        out = attend(*inputs, Segments((120, 80)), Rule(0.3))
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    before = torch.get_num_threads()
    try:
        for a, b in zip(run(1), run(2), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", formats.names())
def test_packed_weights_do_not_depend_on_the_instruction_set(name, monkeypatch):
    entry, weight = formats.get(name), torch.randn(3, 512) * torch.logspace(-9, 5, 512)
    with kernels.kernels_off():
        raw = entry.quantize(weight)
        exact = entry.dequantize(raw, 512)
    for each in SETS:
        monkeypatch.setattr(library._State, "library", ctypes.CDLL(str(build.build(each))))
        calls._function.cache_clear()
        assert torch.equal(entry.quantize(weight), raw), each
        assert torch.equal(entry.dequantize(raw, 512), exact), each
        half = torch.empty(3, 512, dtype=torch.bfloat16)
        assert torch.equal(entry.dequantize(raw, 512, half), exact.bfloat16()), each
    calls._function.cache_clear()


@pytest.mark.parametrize("what", ["contiguous", "strided", "float64", "narrow"])
def test_tensors_that_no_kernel_takes_run_the_twin(what):
    x = {
        "contiguous": torch.randn(4, 32),
        "strided": torch.randn(32, 4).t(),
        "float64": torch.randn(4, 32, dtype=torch.float64),
        "narrow": torch.randn(4, 24),
    }[what]
    assert calls.usable(x, width=x.shape[-1]) == (what == "contiguous")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    ).stdout.strip()


ENABLE = "from addenda import kernels; print(kernels.enable(), '|', kernels.state())"


def test_a_machine_without_a_compiler_says_so(tmp_path):
    said = run_python(ENABLE, PATH=str(tmp_path), ADDENDA_HOME=str(tmp_path))
    assert said == "False | no C++ compiler found"


def test_a_compiler_that_fails_is_named_and_nothing_is_left_behind(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = run_python(ENABLE, CXX=str(broken), ADDENDA_HOME=str(tmp_path / "home"))
    assert said.startswith("False | the kernels cannot be compiled")
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_a_home_that_cannot_be_written_leaves_the_plain_forms(tmp_path):
    (tmp_path / "file").write_text("")
    said = run_python(ENABLE, ADDENDA_HOME=str(tmp_path / "file"))
    assert said.startswith("False | the compiled kernels cannot be kept")


def test_a_damaged_library_is_no_crash(tmp_path):
    code = (
        "from addenda.kernels import build, library\n"
        "path = build._library_path(); path.parent.mkdir(parents=True); path.write_bytes(b'no library')\n"
        + ENABLE
    )
    assert run_python(code, ADDENDA_HOME=str(tmp_path)).startswith("False | ")
