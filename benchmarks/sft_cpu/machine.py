"""What the figures were measured on, without naming the machine, and whether it was quiet."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["busy_seconds", "describe", "multiplies_bfloat16", "versions", "wait_until_quiet"]

FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_tile",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)
PACKAGES = ("addenda", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def describe() -> dict[str, Any]:
    """Return the processor, its number formats, cores and memory."""
    cpu = _cpuinfo()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_features": [name for name in FEATURES if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16 products; without them they are emulated, slowly."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(describe()["cpu_features"]))


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of all packages the contestants stand on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def busy_seconds() -> float | None:
    """Return the processor seconds that all programs of the machine have used; None where it does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, interrupts, soft, stolen = (int(field) for field in fields[:8])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(share: float, *, seconds: float = 3.0) -> None:
    """Return when other programs use less than ``share`` of the processors."""
    cores = describe()["cores"]
    said = False
    while (before := busy_seconds()) is not None:
        time.sleep(seconds)
        busy = ((busy_seconds() or 0.0) - before) / seconds / cores
        if busy < share:
            return
        if not said:
            print(f"waiting: other programs use {busy:.0%} of the processors", file=sys.stderr, flush=True)
        said = True


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
