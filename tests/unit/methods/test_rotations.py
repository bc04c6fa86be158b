"""OFT, BOFT, HRA, RoAd and PSOFT: what they turn keeps its length, and what the papers' formulas say comes out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.core.contract import Method
from addenda.core.rotation import FeatureMap, cayley, cayley_neumann, nearest_divisor, skew, times_blocks
from addenda.methods.boft import BOFT
from addenda.methods.hra import HRA
from addenda.methods.oft import OFT
from addenda.methods.psoft import PSOFT
from addenda.methods.road import RoAd

ORTHOGONAL = [
    OFT(block_size=8),
    OFT(block_size=6, shared=True),
    OFT(block_size=8, freedom=0.5),
    OFT(block_size=8, freedom=0.05, exact=False, terms=8),
    BOFT(block_size=8, factors=1),
    BOFT(block_size=4, factors=4),
    BOFT(blocks=12, factors=3),
    HRA(rank=8),
    HRA(rank=5),
    HRA(rank=6, orthonormal=True),
]


def stirred(method: Method, layer: nn.Module, scale: float = 0.3) -> addenda.Handle:
    handle = addenda.attach(nn.Sequential(layer), method, targets=["0"])
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return handle


def matrix(method: Method, size: int, scale: float = 0.3, dtype: torch.dtype = torch.float32) -> Tensor:
    """R of x R, on a layer of ``size`` features."""
    adapter = stirred(method, nn.Linear(size, 4).to(dtype), scale).adapters["0"]
    assert isinstance(adapter, FeatureMap)
    return adapter.map(torch.eye(size, dtype=dtype)).detach()


@pytest.mark.parametrize("method", ORTHOGONAL, ids=lambda method: repr(method)[:60])
def test_what_rotates_is_orthogonal(method: Method) -> None:
    R = matrix(method, 96)
    assert (R - torch.eye(96)).abs().max() > 1e-2
    torch.testing.assert_close(R @ R.t(), torch.eye(96), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ORTHOGONAL, ids=lambda method: repr(method)[:60])
def test_the_transposed_map_is_the_transposed_matrix(method: Method) -> None:
    adapter = stirred(method, nn.Linear(96, 4).double()).adapters["0"]
    eye = torch.eye(96, dtype=torch.float64)
    torch.testing.assert_close(adapter.map(eye, transposed=True), adapter.map(eye).t(), rtol=0, atol=1e-12)


def test_the_rows_of_the_weight_keep_their_lengths_and_angles() -> None:
    layer = nn.Linear(24, 10).double()
    weight = layer.weight.detach().clone()
    handle = stirred(OFT(block_size=8), layer)
    handle.merge()
    assert (layer.weight - weight).abs().max() > 1e-2
    torch.testing.assert_close(layer.weight @ layer.weight.t(), weight @ weight.t(), rtol=1e-10, atol=1e-10)


def test_cayley_maps_skew_matrices_to_rotations_and_its_series_comes_near() -> None:
    Q = skew(0.02 * torch.randn(3, 15, dtype=torch.float64), 6)
    assert torch.equal(Q, -Q.mT)
    R, eye = cayley(Q), torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(R @ (eye - Q), eye + Q, rtol=0, atol=1e-12)
    off = [float((cayley_neumann(Q, terms) - R).abs().max()) for terms in (2, 3, 5, 9)]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 1e-8 < off[0]


@pytest.mark.parametrize("blocks", [1, 4])
def test_blocks_multiply_like_the_matrix_that_is_never_formed(blocks: int) -> None:
    x, parts = torch.randn(5, 3, 20, dtype=torch.float64), torch.randn(blocks, 5, 5, dtype=torch.float64)
    whole = torch.block_diag(*parts.expand(4, 5, 5))
    torch.testing.assert_close(times_blocks(x, parts), x @ whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", [1, 7, 20, 48, 576, 1536])
@pytest.mark.parametrize("wanted", [1, 2, 5, 10, 32, 100, 5000])
def test_the_nearest_divisor_divides_and_none_is_nearer(number: int, wanted: int) -> None:
    found = nearest_divisor(number, wanted)
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    assert found == min(divisors, key=lambda d: (abs(d - wanted), d))


def test_the_nearest_divisor_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.tuners.oft.layer.OFTLayer.adjust_oft_parameters
    for number in (7, 20, 48, 96, 576):
        for wanted in (2, 5, 10, 32, 100):
            assert nearest_divisor(number, wanted) == theirs(None, number, wanted), (number, wanted)


def test_blocks_of_one_are_refused() -> None:
    for method in (OFT(blocks=13), OFT(block_size=2), BOFT(blocks=13, factors=1)):
        with pytest.raises(addenda.errors.MethodError, match="blocks of one"):
            addenda.plan(nn.Sequential(nn.Linear(13, 4)), method, ["0"])


def test_constrained_oft_stays_within_its_freedom_after_each_update() -> None:
    handle = stirred(OFT(block_size=8, freedom=0.1), nn.Linear(32, 4), scale=1.0)
    adapter = handle.adapters["0"]
    within = adapter.rotations().detach()
    handle.after_update(step=1, of_steps=1)
    norms = skew(adapter.generator.detach(), 8).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((4,), 0.1 / math.sqrt(4)))
    torch.testing.assert_close(adapter.rotations().detach(), within)


def test_butterfly_factors_reach_every_feature() -> None:
    """Block size 2 and five factors are a fast Fourier transform's structure over 32 features."""
    reach = [int((matrix(BOFT(block_size=2, factors=m), 32) != 0).sum(1).max()) for m in range(1, 6)]
    assert reach == [2, 4, 8, 16, 32]


def test_butterfly_factors_are_what_the_paper_draws() -> None:
    """Factor i rotates pairs of half blocks that lie 2^(i-1) half blocks apart; from nested loops over pairs."""
    size, half, factors = 24, 1, 3
    layer = nn.Linear(size, 5).double()
    adapter = stirred(BOFT(block_size=2 * half, factors=factors), layer).adapters["0"]
    expected = torch.eye(size, dtype=torch.float64)
    for i in range(factors):
        factor, gap = torch.zeros(size, size, dtype=torch.float64), 2**i
        pairs = [s + k for s in range(0, size, 2 * gap) for k in range(gap)]
        for block, first in enumerate(pairs):
            q = adapter.generator[i, block, 0].detach()
            cos, sin = (1 - q * q) / (1 + q * q), 2 * q / (1 + q * q)
            places = torch.tensor([first, first + gap])
            factor[places[:, None], places] = torch.stack((cos, sin, -sin, cos)).view(2, 2)
        expected = factor @ expected
    torch.testing.assert_close(adapter.map(torch.eye(size).double()), expected, rtol=0, atol=1e-12)
    x = torch.randn(7, size, dtype=torch.float64)
    product = adapter.scale * (x @ expected @ layer.weight.t()) + layer.bias
    torch.testing.assert_close(layer(x), product, rtol=1e-12, atol=1e-12)


def test_reflections_are_applied_one_after_the_other() -> None:
    layer = nn.Linear(20, 6).double()
    adapter = stirred(HRA(rank=7), layer).adapters["0"]
    H = torch.eye(20, dtype=torch.float64)
    for u in adapter.vectors.detach():
        H = H @ (torch.eye(20, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u))
    x = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (layer.weight @ H).t() + layer.bias, rtol=1e-10, atol=1e-10)


def test_the_penalty_of_reflections_is_zero_for_orthonormal_vectors_only() -> None:
    handle = stirred(HRA(rank=4, regularization=0.5), nn.Linear(20, 6))
    vectors = handle.adapters["0"].vectors
    unit = vectors.detach() / vectors.detach().norm(dim=1, keepdim=True)
    expected = 0.5 * (unit @ unit.t() - torch.eye(4)).square().sum()
    torch.testing.assert_close(handle.penalty().detach(), expected)
    with torch.no_grad():
        vectors.copy_(3 * torch.linalg.qr(vectors.t())[0].t())
    assert float(handle.penalty().detach()) < 1e-10
    assert stirred(HRA(rank=4), nn.Linear(20, 6)).penalty() is None


def test_orthonormal_reflections_start_at_one_and_not_at_the_base() -> None:
    R = matrix(HRA(rank=4, orthonormal=True), 20, scale=0.0)
    torch.testing.assert_close(R @ R, torch.eye(20), rtol=0, atol=1e-5)
    assert round(float(R.trace())) == 20 - 2 * 4


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_pairs_are_turned_as_written(variant: int) -> None:
    layer = nn.Linear(6, 8).double()
    adapter = stirred(RoAd(variant=variant, group_size=4), layer).adapters["0"]
    theta, alpha = adapter.theta.detach(), adapter.alpha.detach()
    x = torch.randn(6, dtype=torch.float64)
    z, y = layer.original_class.forward(layer, x).detach(), layer(x).detach()
    for group in range(2):
        for k in range(2):
            i, j = 4 * group + k, 4 * group + k + 2
            keep = {1: (k, k), 2: (k, k + 2), 4: (k, k + 2)}[variant]
            turn = {1: (k, k), 2: (k, k + 2), 4: (k + 4, k + 6)}[variant]
            cos = [alpha[group, c] * theta[group, c].cos() for c in keep]
            sin = [alpha[group, c] * theta[group, c].sin() for c in turn]
            torch.testing.assert_close(y[i], cos[0] * z[i] - sin[0] * z[j])
            torch.testing.assert_close(y[j], cos[1] * z[j] + sin[1] * z[i])


def test_roads_first_variant_without_factors_keeps_lengths() -> None:
    layer = nn.Linear(6, 8).double()
    adapter = stirred(RoAd(group_size=8), layer).adapters["0"]
    with torch.no_grad():
        adapter.alpha.fill_(1.0)
    z = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(adapter.turned(z).norm(dim=1), z.norm(dim=1), rtol=1e-12, atol=0)


def test_psoft_rotates_the_principal_part_of_the_weight_and_leaves_the_rest() -> None:
    layer = nn.Linear(20, 12).double()
    U, S, Vt = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    handle = stirred(PSOFT(rank=5, scale_input=False, scale_output=False), layer)
    R = handle.adapters["0"].rotation().detach()
    torch.testing.assert_close(R @ R.t(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    handle.merge()
    principal = U[:, :5] @ torch.diag(S[:5]) @ R @ Vt[:5]
    rest = U[:, 5:] @ torch.diag(S[5:]) @ Vt[5:]
    torch.testing.assert_close(layer.weight.detach(), principal + rest, rtol=1e-10, atol=1e-10)
    lengths = (layer.weight.detach() @ Vt.t()).norm(dim=1)
    torch.testing.assert_close(lengths, (U @ torch.diag(S)).norm(dim=1), rtol=1e-10, atol=1e-10)


def test_a_randomized_decomposition_leaves_the_global_generator_alone_and_repeats() -> None:
    weight = torch.randn(30, 4) @ torch.randn(4, 20) + 1e-3 * torch.randn(30, 20)
    method = PSOFT(rank=4, iterations=6, seed=3)
    state = torch.get_rng_state()
    first, second = method.subspace(weight), method.subspace(weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    A, B = PSOFT(rank=4).subspace(weight)
    torch.testing.assert_close(first[1] @ first[0], B @ A, rtol=0, atol=1e-2)
