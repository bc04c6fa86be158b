"""ggml's own rounding, where it searches for a block's scales.

The functions come out of the llama.cpp that the package xllamacpp carries. Two plain C functions are called, and no
structure of ggml's is known here; whether its blocks have the size that they should have is asked first. A kernel that
does the same search faster stands in for it where both give the same bytes for a sample of blocks: that depends on how
that ggml was compiled.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from addenda.errors import MissingDependencyError
from addenda.kernels import calls

__all__ = ["encoder", "library"]

_HINT = "pip install 'addenda[llamacpp]', or take Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, which need nothing"
_LEAST = 2**16
"""Weights for which another thread is worth starting."""


@functools.cache
def library() -> ctypes.CDLL:
    """Return the shared library that holds ggml.

    Raises:
        MissingDependencyError: it is not installed, or does not offer what is needed.
    """
    spec = importlib.util.find_spec("xllamacpp")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise MissingDependencyError(
            "ggml's K and IQ formats are rounded by llama.cpp, which is not installed", hint=_HINT
        )
    found = [
        file
        for folder in folders
        for file in Path(folder).glob("xllamacpp*")
        if file.suffix in {".so", ".pyd"}
    ]
    try:
        loaded = ctypes.CDLL(str(found[0]))
        loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
        loaded.ggml_row_size.restype = ctypes.c_size_t
    except (IndexError, OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"the installed xllamacpp does not offer ggml's rounding: {error}",
            where={"folder": folders[0]},
            hint=_HINT,
        ) from error
    return loaded


def encoder(name: str) -> Callable[[Tensor], Tensor]:
    """Return what packs ``(blocks, weights)`` float32 into a format as ggml does, without an importance matrix."""
    return functools.partial(_encode, name)


def _encode(name: str, blocks: Tensor) -> Tensor:
    source = blocks.cpu().contiguous()
    if calls.searches(name) and _same(name):
        packed = calls.search(name, source, _size(name))
    else:
        packed = _searched(name, source)
    return packed.to(blocks.device)


@functools.cache
def _same(name: str) -> bool:
    """Whether the kernel gives the bytes of the installed ggml, for blocks of all sizes and with all kinds of gaps."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(512, 256, generator=generator) * torch.logspace(-30, 30, 512)[:, None]
    drawn = torch.randint(8, (512, 8), generator=generator)
    sizes = torch.logspace(-6, 2, 8)[drawn].repeat_interleave(32, dim=1)
    coarse = torch.randint(-3, 4, (512, 256), generator=generator) / 8
    blocks = torch.cat([normal, torch.randn(512, 256, generator=generator) * sizes, coarse, coarse * sizes])
    return torch.equal(calls.search(name, blocks, _size(name)), _searched(name, blocks))


def _size(name: str) -> int:
    """Bytes of a block.

    Raises:
        MissingDependencyError: ggml is not installed, or says otherwise.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    if library().ggml_row_size(ctypes.c_int(kind), ctypes.c_int64(weights)) != size:
        raise MissingDependencyError(f"the installed llama.cpp has another layout of {name}", hint=_HINT)
    return size


def _searched(name: str, source: Tensor) -> Tensor:
    """``(n, weights)`` float32, contiguous -> ``(n, bytes)``, by ggml itself."""
    import gguf

    kind, weights = int(gguf.GGMLQuantizationType[name]), source.shape[1]
    packed = torch.empty(len(source), _size(name), dtype=torch.uint8)

    def pack(start: int, stop: int) -> None:
        library().ggml_quantize_chunk(
            ctypes.c_int(kind),
            ctypes.c_void_p(source[start:stop].data_ptr()),
            ctypes.c_void_p(packed[start:stop].data_ptr()),
            ctypes.c_int64(0),
            ctypes.c_int64(stop - start),
            ctypes.c_int64(weights),
            ctypes.c_void_p(None),
        )

    each = max(_LEAST // weights, -(-len(source) // torch.get_num_threads()))
    starts = range(0, len(source), each)
    if len(starts) <= 1:
        pack(0, len(source))
    else:  # a call into C lets the other threads run
        with ThreadPoolExecutor(len(starts)) as pool:
            list(pool.map(lambda start: pack(start, min(start + each, len(source))), starts))
    return packed
