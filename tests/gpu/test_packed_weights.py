"""Packed weights on the GPU: the bits of the CPU, and the products of dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from addenda.bases import formats
from addenda.bases.packed_layers import PackedLinear
from addenda.kernels.library import kernels_off

ROWS, BLOCKS = 40, 4


def random_bytes(name):
    entry = formats.get(name)
    d_in = BLOCKS * entry.block if entry.block else 512
    return entry, torch.randint(0, 256, (ROWS, entry.row_bytes(d_in)), dtype=torch.uint8), d_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", formats.names())
def test_every_format_is_unpacked_to_the_bits_of_the_cpu(name, dtype, device):
    entry, raw, d_in = random_bytes(name)
    with kernels_off():
        theirs = entry.dequantize(raw, d_in, torch.empty(ROWS, d_in, dtype=dtype))
    ours = entry.dequantize(raw.to(device), d_in, torch.empty(ROWS, d_in, dtype=dtype, device=device)).cpu()
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    assert bool(((ours.view(whole) == theirs.view(whole)) | (ours.isnan() & theirs.isnan())).all())


@pytest.mark.parametrize("name", ["NF4", "INT8", "Q4_K", "Q6_K"])
def test_forward_and_input_gradient_are_those_of_the_dense_weight(name, device):
    entry, raw, d_in = random_bytes(name)
    with kernels_off():
        if entry.quantize:
            raw = entry.quantize(torch.randn(ROWS, d_in))
        else:  # random codes under scales of one sixteenth
            blocks = raw.view(-1, entry.block_bytes)
            scales = {"Q4_K": slice(0, 4), "Q6_K": slice(208, 210)}[name]
            blocks[:, scales] = (
                torch.full((len(blocks), (scales.stop - scales.start) // 2), 0.0625).half().view(torch.uint8)
            )
        dense = nn.Linear(d_in, ROWS, bias=False)
        dense.weight.data = entry.dequantize(raw, d_in)
    layer = PackedLinear(raw, entry, d_in).to(device)
    x = torch.randn(33, d_in)
    theirs, ours = x.clone().requires_grad_(), x.to(device).requires_grad_()
    g = torch.randn(33, ROWS)
    expected, y = dense(theirs), layer(ours)
    expected.backward(g)
    y.backward(g.to(device))
    for a, b in ((y, expected), (ours.grad, theirs.grad)):
        assert (a.cpu() - b).norm() <= 1e-5 * b.norm()
