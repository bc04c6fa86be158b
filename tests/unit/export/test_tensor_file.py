"""A safetensors file written a tensor at a time is read by safetensors as what was added."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from addenda.errors import ExportError
from addenda.export.tensor_file import TensorFile

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float64,
]


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 50).to(dtype)


def test_every_tensor_comes_back_whatever_lies_before_it(tmp_path: Path) -> None:
    shapes = [(), (0, 3), (1,), (3,), (5, 7), (8, 8)]
    made = {f"{dtype}.{shape}": drawn(dtype, *shape) for shape in shapes for dtype in DTYPES}
    made['a name with "signs" and ä'] = torch.randn(4, 6).T  # not contiguous
    path = tmp_path / "all.safetensors"
    with TensorFile(path, names=sum(2 * len(name.encode()) for name in made), count=len(made)) as file:
        for name, tensor in made.items():
            file.add(name, tensor)
    found = load_file(path)
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert torch.equal(opened.get_slice("torch.bfloat16.(5, 7)")[1:3], made["torch.bfloat16.(5, 7)"][1:3])


def test_a_file_whose_writing_failed_is_none(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    with pytest.raises(RuntimeError, match="in between"), TensorFile(path, names=10, count=2) as file:
        file.add("a", torch.ones(4))
        raise RuntimeError("in between")
    with pytest.raises(SafetensorError):
        load_file(path)


def test_numbers_that_it_has_no_name_for_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match=r"no torch\.complex64 as 'a' is"),
        TensorFile(tmp_path / "x.safetensors", names=10, count=2) as file,
    ):
        file.add("a", torch.ones(4, dtype=torch.complex64))


def test_room_that_was_too_little_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="the header of"),
        TensorFile(tmp_path / "x.safetensors", names=1, count=1) as file,
    ):
        for number in range(20):
            file.add(f"tensor {number}", torch.ones(2))
