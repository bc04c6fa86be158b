"""C3A, FourierFT and WaveFT: the matrices that they add, from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.core.contract import Method
from addenda.methods.c3a import C3A
from addenda.methods.fourierft import FourierFT
from addenda.methods.waveft import WaveFT, daubechies


def adapter_of(method: Method, layer: nn.Module) -> addenda.Adapter:
    handle = addenda.attach(nn.Sequential(layer), method, targets=["0"])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return handle.adapters["0"]


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_circular_convolution_is_a_block_circulant_matrix(block: int) -> None:
    layer = nn.Linear(12, 18).double()
    adapter = adapter_of(C3A(block_size=block), layer)
    C = torch.zeros(18, 12, dtype=torch.float64)
    for row in range(18):
        for column in range(12):
            (m, k), (n, i) = divmod(row, block), divmod(column, block)
            C[row, column] = adapter.kernel[m, n, (i - k) % block]
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (layer.weight + C / 12).t() + layer.bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.delta(), C / 12, rtol=1e-12, atol=1e-12)


def test_a_bfloat16_base_is_convolved_in_float32() -> None:
    layer = nn.Linear(16, 16, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.zero_()
    adapter = adapter_of(C3A(block_size=16), layer)
    x = torch.randn(5, 16).bfloat16()
    assert torch.equal(layer(x), (x.float() @ adapter.delta().t()).bfloat16())


@pytest.mark.parametrize("shape", [(7, 5), (8, 12)])
def test_a_spectrum_is_a_sum_of_cosines(shape: tuple[int, int]) -> None:
    d_out, d_in = shape
    adapter = adapter_of(FourierFT(coefficients=9, scaling=3.0), nn.Linear(d_in, d_out).double())
    expected = torch.zeros(d_out, d_in, dtype=torch.float64)
    p, q = torch.arange(d_out).double()[:, None], torch.arange(d_in).double()[None, :]
    for place, c in zip(adapter.places.tolist(), adapter.spectrum.tolist(), strict=True):
        u, v = divmod(place, d_in)
        expected += 3.0 * c * torch.cos(2 * math.pi * (u * p / d_out + v * q / d_in)) / (d_out * d_in)
    torch.testing.assert_close(adapter.delta(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [FourierFT(coefficients=40, seed=4), WaveFT(coefficients=40, seed=4)])
def test_places_differ_and_are_saved_and_the_same_for_layers_of_a_size(
    method: Method, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 10))
    handle = addenda.attach(model, method)
    places = [adapter.places for adapter in handle.adapters.values()]
    assert all(len(set(each.tolist())) == 40 and int(each.max()) < 120 for each in places)
    assert torch.equal(places[0], places[2])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter))
    kept, expected, x = [each.clone() for each in places], None, torch.randn(3, 12)
    expected = model(x)
    addenda.save(model, f"{tmp_path}/adapter")
    handle.detach()
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: pytest.fail("drawn again"))
    loaded = addenda.load(model, f"{tmp_path}/adapter")
    assert all(torch.equal(a.places, b) for a, b in zip(loaded.adapters.values(), kept, strict=True))
    assert loaded.tensors()["0.places"].dtype == torch.int64
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("order", range(1, 11))
def test_daubechies_filters_are_orthonormal_with_vanishing_moments(order: int) -> None:
    taps = torch.tensor(daubechies(order), dtype=torch.float64)
    assert len(taps) == 2 * order
    assert math.isclose(float(taps.sum()), math.sqrt(2), rel_tol=1e-12)
    for shift in range(order):
        product = float(taps[: len(taps) - 2 * shift] @ taps[2 * shift :])
        assert math.isclose(product, float(shift == 0), abs_tol=1e-9)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(order)
    places = torch.linspace(0, 1, 2 * order, dtype=torch.float64)
    for moment in range(order):
        assert abs(float((signs * places**moment) @ taps)) < 1e-6
    energy = taps.square().cumsum(0)
    assert float(energy[order - 1]) > 0.5, "the energy comes first"


def inverse_transform(S: Tensor, taps: Tensor) -> Tensor:
    """One level of the inverse transform, a pattern for each coefficient, from the definition."""
    signs = [(-1) ** k * float(taps[len(taps) - 1 - k]) for k in range(len(taps))]
    high = torch.tensor(signs, dtype=torch.float64)
    half = [size // 2 for size in S.shape]
    made = torch.zeros(*(size + len(taps) - 2 for size in S.shape), dtype=torch.float64)
    for i in range(S.shape[0]):
        for j in range(S.shape[1]):
            # What is above and to the left is the approximation, the rest details across rows, columns, or both.
            across = high if j >= half[1] else taps
            along = high if i >= half[0] else taps
            row, column = 2 * (i % half[0]), 2 * (j % half[1])
            made[row : row + len(taps), column : column + len(taps)] += S[i, j] * torch.outer(across, along)
    return made


@pytest.mark.parametrize(("wavelet", "order"), [("haar", 1), ("db1", 1), ("db2", 2), ("db3", 3)])
@pytest.mark.parametrize("shape", [(8, 12), (7, 9)])
def test_coefficients_become_patterns_of_the_wavelet(
    wavelet: str, order: int, shape: tuple[int, int]
) -> None:
    d_out, d_in = shape
    adapter = adapter_of(
        WaveFT(coefficients=20, scaling=2.0, wavelet=wavelet), nn.Linear(d_in, d_out).double()
    )
    taps = torch.tensor(daubechies(order), dtype=torch.float64)
    sizes = [size + len(taps) - 2 for size in shape]
    S = torch.zeros(*(size + size % 2 for size in sizes), dtype=torch.float64)
    before = [(S.shape[axis] - shape[axis]) // 2 for axis in (0, 1)]
    for place, c in zip(adapter.places.tolist(), adapter.spectrum.tolist(), strict=True):
        row, column = divmod(place, d_in)
        S[before[0] + row, before[1] + column] = 2.0 * c
    cut = len(taps) - 2
    expected = inverse_transform(S, taps)[cut : cut + d_out, cut : cut + d_in]
    torch.testing.assert_close(adapter.delta(), expected, rtol=1e-12, atol=1e-12)


def test_haar_keeps_the_energy_of_the_coefficients_in_layers_of_even_size() -> None:
    adapter = adapter_of(WaveFT(coefficients=30, scaling=1.0), nn.Linear(12, 8).double())
    torch.testing.assert_close(adapter.delta().norm(), adapter.spectrum.norm(), rtol=1e-12, atol=0)


def test_without_a_wavelet_single_weights_are_trained() -> None:
    adapter = adapter_of(WaveFT(coefficients=30, wavelet="none"), nn.Linear(12, 8))
    assert int((adapter.delta() != 0).sum()) == 30


@pytest.mark.parametrize(
    ("method", "word"),
    [
        (lambda: WaveFT(wavelet="sym4"), "wavelet must be one of none, haar, db1"),
        (lambda: FourierFT(seed=-1), "seed"),
        (lambda: FourierFT(counts={"a": 0}), r"counts\['a'\]"),
        (lambda: C3A(block_sizes={"": 2}), "keys of block_sizes"),
    ],
)
def test_wrong_settings_are_named(method: object, word: str) -> None:
    with pytest.raises(addenda.errors.ConfigError, match=word):
        method()


def test_more_coefficients_than_weights_and_names_without_a_layer_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(addenda.errors.MethodError, match="17 coefficients are more than its 16 weights"):
        addenda.plan(model, FourierFT(coefficients=17), ["0"])
    with pytest.raises(addenda.errors.MethodError, match="counts names no target by 'q_proj'"):
        addenda.plan(model, FourierFT(coefficients=4, counts={"q_proj": 2}), ["0"])
    with pytest.raises(addenda.errors.MethodError, match="block_sizes names no target by 'q_proj'"):
        addenda.plan(model, C3A(block_sizes={"q_proj": 2}), ["0"])
