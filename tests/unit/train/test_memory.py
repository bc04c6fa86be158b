from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from addenda.errors import OutOfMemory
from addenda.train.memory import out_of_memory_named, peak_memory_bytes

SETTINGS = {"train.tokens_per_micro_batch": (1024, 512), "method.rank": (16, 8)}


def test_the_peak_grows_by_what_was_held():
    code = """
from addenda.train.memory import peak_memory_bytes
before = peak_memory_bytes()["rss"]
block = bytearray(200_000_000)
block[::4096] = b"x" * len(block[::4096])
del block
print(peak_memory_bytes()["rss"] - before)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(answer.stdout) >= 150_000_000
    assert peak_memory_bytes()["rss"] > 10_000_000


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
            "4,096 bytes",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has"),
            "1,610,612,736 bytes",
        ),
        (MemoryError(), "unknown"),
        (RuntimeError("std::bad_alloc"), "unknown"),
    ],
)
def test_a_failed_allocation_names_bytes_and_settings(error, asked):
    with pytest.raises(OutOfMemory) as caught, out_of_memory_named(SETTINGS):
        raise error
    assert caught.value.exit_code == 5
    assert asked in str(caught.value)
    assert "bytes" in caught.value.where["free"]
    assert "set train.tokens_per_micro_batch=512 (now 1024)" in caught.value.hint
    assert "set method.rank=8 (now 16)" in caught.value.hint


def test_an_allocation_that_cannot_be_is_named():
    with pytest.raises(OutOfMemory, match="400,000,000,000,000 bytes"), out_of_memory_named(SETTINGS):
        torch.zeros(10**14)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_named(SETTINGS):
        raise RuntimeError("shape mismatch")
    with pytest.raises(OutOfMemory, match="already named"), out_of_memory_named(SETTINGS):
        raise OutOfMemory("already named")
