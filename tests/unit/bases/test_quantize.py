"""Packing weights: GGUF's formats byte for byte as the reference packs them, in plain PyTorch and in the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from addenda.bases import formats, ggml
from addenda.errors import BaseModelError, MissingDependencyError
from addenda.kernels import calls
from addenda.kernels.library import enable, kernels_off

SIMPLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.fixture(params=["kernel", "plain"])
def either_form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with the kernels and without."""
    if request.param == "plain":
        with kernels_off():
            yield
    elif enable():
        yield
    else:
        pytest.skip("no compiler on this machine")


def awkward_rows() -> Tensor:
    """Blocks of 32 on which a rounding can go wrong, two in a row: (rows, 64)."""
    ramp = torch.arange(32.0)
    sign = torch.where(ramp % 2 == 0, 1.0, -1.0)
    blocks = [
        torch.zeros(32),
        -torch.zeros(32),
        torch.full((32,), 0.3),
        torch.full((32,), -0.3),
        sign * 1.5,  # the largest magnitude with either sign
        -sign * 1.5,
        ramp - 16,  # every code, and numbers half way between two
        ramp / 2 - 8,
        (ramp - 15.5) * 8 / 127,
        ramp * 127 / 31,
        torch.cat([torch.tensor([-127.0]), torch.arange(31) + 0.5]),  # Q8_0's halves, away from zero
        -torch.cat([torch.tensor([-127.0]), torch.arange(31) + 0.5]),
        sign * 3e38,  # the range overflows
        ramp * 1e37,
        ramp * 4000,  # the scale is infinite in half precision
        ramp * 1e-8,  # the scale is subnormal there
        sign * ramp * 1e-5,
        ramp * 1e-39,  # the weights themselves are subnormal
        ramp * 1e-45,
        torch.nn.functional.one_hot(torch.tensor(7), 32) * -1e-41,
    ]
    return torch.stack(blocks + [torch.randn(32) * 10.0**power for power in range(-9, 9)]).view(-1, 64)


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("name", SIMPLE)
def test_the_bytes_are_those_of_the_reference(name: str) -> None:
    weight = torch.cat([awkward_rows(), torch.randn(200, 64), torch.randint(-9, 9, (50, 64)) / 8])
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(formats.get(name).quantize(weight), torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["NF4", *SIMPLE])
def test_a_kernel_gives_the_bytes_of_its_plain_form(name: str) -> None:
    if not enable():
        pytest.skip("no compiler on this machine")
    weight = torch.cat([awkward_rows(), torch.randn(300, 64) * torch.logspace(-20, 20, 300)[:, None]])
    raw = formats.get(name).quantize(weight)
    with kernels_off():
        assert torch.equal(formats.get(name).quantize(weight), raw)


@pytest.mark.parametrize("name", SIMPLE)
def test_bfloat16_is_packed_as_the_float32_of_its_numbers(name: str) -> None:
    weight = torch.randn(5, 96, dtype=torch.bfloat16)
    assert torch.equal(formats.get(name).quantize(weight), formats.get(name).quantize(weight.float()))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_numbers_are_those_of_the_reference(name: str) -> None:
    weight = torch.randn(5, 7) * torch.logspace(-6, 4, 7)
    kind = gguf.GGMLQuantizationType[name]
    expected = gguf.quants.quantize(weight.numpy(), kind)
    raw = formats.get(name).quantize(weight)
    assert torch.equal(raw, torch.from_numpy(expected.view(np.uint8)))
    back = torch.from_numpy(gguf.quants.dequantize(expected, kind).copy())
    assert torch.equal(formats.get(name).dequantize(raw, 7), back)


@pytest.mark.parametrize("name", [*SIMPLE, "NF4", "INT8"])
def test_what_was_read_back_is_packed_to_the_same_numbers_again(name: str) -> None:
    entry = formats.get(name)
    once = entry.dequantize(entry.quantize(torch.randn(16, 128)), 128)
    again = entry.dequantize(entry.quantize(once), 128)
    # The scale is rounded to half precision after the codes were chosen, so the second rounding may move it once more.
    assert (again - once).abs().max() < 2e-3 * once.abs().max()


@pytest.mark.parametrize("name", SEARCHED)
def test_ggml_packs_what_is_read_back_near_the_weights(name: str) -> None:
    pytest.importorskip("xllamacpp")
    weight = torch.randn(64, 2048)
    entry = formats.get(name)
    raw = entry.quantize(weight)
    error = (entry.dequantize(raw, 2048) - weight).norm() / weight.norm()
    bits = 8 * entry.block_bytes / (entry.block or 1)
    assert error < 2.2 * 2.0**-bits * 1.6
    # A row is packed by itself, and by as many threads as there are.
    assert torch.equal(entry.quantize(weight[3:5]), raw[3:5])


@pytest.mark.parametrize("name", SIMPLE)
def test_ggml_itself_gives_the_same_bytes(name: str) -> None:
    pytest.importorskip("xllamacpp")
    # In the first row is a block of negative zeros, whose scale ggml writes as -0 and the gguf package as 0.
    weight = torch.cat([awkward_rows()[1:], torch.randn(200, 64)])
    packed = ggml.encoder(name)(weight.view(-1, 32))
    assert torch.equal(packed.view(len(weight), -1), formats.get(name).quantize(weight))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_a_kernel_searches_as_ggml_does(name: str) -> None:
    pytest.importorskip("xllamacpp")
    if not enable():
        pytest.skip("no compiler on this machine")
    groups = awkward_rows().view(-1, 32)
    mixed = groups[torch.randint(len(groups), (8 * 500,))].view(-1, 256)
    sizes = torch.logspace(-6, 2, 8)[torch.randint(8, (500, 8))].repeat_interleave(32, dim=1)
    weight = torch.cat([
        mixed,
        torch.randn(500, 256) * torch.logspace(-44, 38, 500)[:, None],
        torch.randn(500, 256) * sizes,
        torch.randint(-9, 9, (501, 256)) / 8,
    ])  # fmt: skip
    weight = weight[weight.isfinite().all(dim=1)]
    weight = weight[1 - len(weight) % 2 :]  # an odd number: some machines take blocks by two
    raw = formats.get(name).quantize(weight)
    with kernels_off():
        assert torch.equal(formats.get(name).quantize(weight), raw)


def test_where_the_installed_ggml_rounds_otherwise_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    if not enable():
        pytest.skip("no compiler on this machine")
    entry, weight = formats.get("Q5_K"), torch.randn(3, 256)
    expected = entry.quantize(weight)
    monkeypatch.setattr(
        calls, "search", lambda name, blocks, size: torch.zeros(len(blocks), size, dtype=torch.uint8)
    )
    ggml._same.cache_clear()
    assert torch.equal(entry.quantize(weight), expected)
    ggml._same.cache_clear()


def test_without_llama_cpp_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ggml.library.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"addenda\[llamacpp\]"):
        formats.get("Q4_K").quantize(torch.randn(2, 256))
    ggml.library.cache_clear()


def test_a_library_without_ggml_is_told_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    ggml.library.cache_clear()
    with pytest.raises(MissingDependencyError, match="does not offer ggml's rounding"):
        ggml.library()
    ggml.library.cache_clear()


@pytest.mark.parametrize("name", [*SIMPLE, "NF4", "INT8"])
def test_numbers_that_are_not_finite_are_refused(name: str) -> None:
    weight = torch.ones(2, 64)
    weight[1, 5] = float("nan")
    with pytest.raises(BaseModelError, match="not finite"):
        formats.get(name).quantize(weight)


@pytest.mark.parametrize("name", [*SIMPLE, "NF4"])
def test_a_weight_that_is_not_there_has_as_many_bytes(name: str) -> None:
    entry = formats.get(name)
    raw = entry.quantize(torch.empty(4, 64, device="meta"))
    assert (raw.shape, raw.dtype, raw.is_meta) == ((4, entry.row_bytes(64)), torch.uint8, True)
