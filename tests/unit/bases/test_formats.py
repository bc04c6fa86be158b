"""Weight formats: their numbers are the reference's bit for bit, in plain PyTorch and in the kernels."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from addenda.bases import formats
from addenda.bases.formats import normal
from addenda.bases.formats.bits import table
from addenda.errors import BaseModelError, NotFoundError
from addenda.kernels.library import enable, kernels_off

GGUF = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
OURS = ["NF4", "INT8"]
PLAIN = ["F32", "F16", "BF16"]
BLOCKS = 3


def random_rows(name: str, rows: int = 24) -> tuple[Tensor, int]:
    """Random bytes as rows of three blocks: every code, and scales of every size, subnormal, infinite or no number."""
    entry = formats.get(name)
    d_in = BLOCKS * entry.block if entry.block else 75
    return torch.randint(0, 256, (rows, entry.row_bytes(d_in)), dtype=torch.uint8), d_in


def same(x: Tensor, y: Tensor) -> bool:
    """Equal bits, but for the sign and payload of what is no number."""
    whole = torch.int32 if x.dtype == torch.float32 else torch.int16
    odd = x.isnan()
    return bool(((x.view(whole) == y.view(whole)) | (odd & y.isnan())).all())


def test_the_formats_are_those_that_are_named() -> None:
    assert formats.names() == sorted(GGUF + OURS + PLAIN)
    with pytest.raises(NotFoundError, match=r"did you mean 'Q4_"):
        formats.get("Q4_2")


@pytest.mark.parametrize("name", GGUF)
def test_sizes_and_numbers_are_those_of_the_gguf_package(name: str) -> None:
    entry, kind = formats.get(name), gguf.GGMLQuantizationType[name]
    assert (entry.block, entry.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    raw, d_in = random_rows(name, 1000)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind).copy())
    with kernels_off():
        assert same(entry.dequantize(raw, d_in), expected)


@pytest.mark.parametrize("name", GGUF[:5])  # those that the gguf package can write
def test_real_weights_survive_packing_to_the_width_of_the_format(name: str) -> None:
    kind, weight = gguf.GGMLQuantizationType[name], torch.randn(8, 512)
    raw = gguf.quants.quantize(weight.numpy(), kind)
    back = formats.get(name).dequantize(torch.from_numpy(raw), 512)
    assert (back - weight).norm() < 0.15 * weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GGUF + OURS)
def test_a_kernel_gives_the_bits_of_its_plain_form(name: str, dtype: torch.dtype) -> None:
    if not enable():
        pytest.skip("no compiler on this machine")
    raw, d_in = random_rows(name)
    outs = [torch.full((len(raw), d_in), 7, dtype=dtype) for _ in range(2)]
    formats.get(name).dequantize(raw, d_in, outs[0])
    with kernels_off():
        formats.get(name).dequantize(raw, d_in, outs[1])
    assert same(*outs)


def test_a_kernel_keeps_the_smallest_scales_where_threads_flush_them() -> None:
    if not enable():
        pytest.skip("no compiler on this machine")
    raw = torch.zeros(1, 34, dtype=torch.uint8)
    raw[0, 0], raw[0, 2:] = 3, 5  # the half-precision number 3 * 2^-24
    torch.set_flush_denormal(True)
    try:
        assert formats.get("Q8_0").dequantize(raw, 32).unique().tolist() == [15 * 2**-24]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", GGUF + OURS)
def test_rows_decode_alone_as_they_do_together(name: str) -> None:
    raw, d_in = random_rows(name)
    together = formats.get(name).dequantize(raw, d_in)
    chosen = torch.tensor([5, 0, 5, 17])
    assert same(formats.get(name).dequantize(raw[chosen], d_in), together[chosen])


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(BaseModelError, match="rows of 100 weights are not whole blocks of 32"):
        formats.get("Q4_1").row_bytes(100)


def nearest_levels(weight: np.ndarray) -> np.ndarray:
    """NF4 by its definition: of the sixteen levels times the block's largest magnitude, the nearest to each weight."""
    quantiles = [float(x) for x in normal.LEVELS]
    blocks = weight.reshape(-1, 64)
    absmax = np.abs(blocks).max(1, keepdims=True)
    table = np.float32(quantiles)[None, None] * absmax[:, :, None]
    best = np.abs(table - blocks[:, :, None]).argmin(-1)
    return np.take_along_axis(np.broadcast_to(table, (*blocks.shape, 16)), best[..., None], -1).reshape(
        weight.shape
    )


def test_nf4_is_the_nearest_level_of_each_block() -> None:
    weight = torch.randn(16, 192) * torch.logspace(-3, 3, 16)[:, None]
    weight[3] = 0
    raw = formats.get("NF4").quantize(weight)
    assert raw.shape == (16, 3 * 36)
    assert torch.equal(
        formats.get("NF4").dequantize(raw, 192), torch.from_numpy(nearest_levels(weight.numpy()))
    )


def test_nf4_goes_to_the_layout_of_bitsandbytes_and_back() -> None:
    raw = formats.get("NF4").quantize(torch.randn(8, 128))
    codes, absmax = normal.to_bitsandbytes(raw)
    assert (codes.shape, absmax.shape, absmax.dtype) == ((512, 1), (16,), torch.float32)
    assert torch.equal(normal.from_bitsandbytes(codes, absmax, (8, 128)), raw)
    with pytest.raises(BaseModelError, match="does not fit its shape"):
        normal.from_bitsandbytes(codes, absmax, (4, 128))


def test_nf4_reads_double_quantised_magnitudes() -> None:
    blocks = 300  # more than one group of 256
    codes = torch.randint(0, 256, (blocks * 32, 1), dtype=torch.uint8)
    second = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    levels, magnitudes, offset = torch.linspace(-1, 1, 256), torch.rand(2), 0.37
    raw = normal.from_bitsandbytes(codes, second, (100, 192), nested=(levels, magnitudes, offset))
    expected = [
        float(levels[int(q)]) * float(magnitudes[i // 256]) + offset for i, q in enumerate(second.tolist())
    ]
    assert torch.allclose(normal.to_bitsandbytes(raw)[1], torch.tensor(expected), rtol=1e-6)


def test_int8_is_within_half_a_step_of_each_row() -> None:
    weight = torch.randn(16, 75) * torch.logspace(-3, 3, 16)[:, None]
    weight[3] = 0
    entry = formats.get("INT8")
    back = entry.dequantize(entry.quantize(weight), 75)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((back - weight).abs() <= step * 0.50001).all())


@pytest.mark.parametrize("name", GGUF + OURS)
def test_every_format_is_unpacked_on_the_device_of_its_bytes(name: str) -> None:
    raw, d_in = random_rows(name)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(len(raw), d_in, dtype=dtype, device="meta")
        assert formats.get(name).dequantize(raw.to("meta"), d_in, out) is out


def test_a_table_is_made_once_for_a_device_and_not_while_a_compiler_looks_on() -> None:
    numbers = (torch.rand(()).item(), 2.0)
    with FakeTensorMode():
        assert isinstance(table(numbers, torch.device("cpu")), FakeTensor)
    first = table(numbers, torch.device("cpu"))
    assert first.tolist() == torch.tensor(numbers).tolist()
    assert table(numbers, torch.device("cpu")) is first
    assert table(numbers, torch.device("meta")).device.type == "meta"
