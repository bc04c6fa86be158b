"""``addenda doctor``: whether this machine and installation can do the work."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from addenda.cli.console import Console, binary_size
from addenda.cli.verb import verb

__all__ = ["Check", "command"]

GIB = 2**30
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}
_EXTRAS = {
    "executorch": ("executorch", "proving exports for ExecuTorch"),
    "llamacpp": ("xllamacpp", "proving exports in llama.cpp, and rounding to its K and IQ types"),
    "mlx": ("mlx_lm", "proving exports in mlx-lm"),
    "onnx": ("onnxruntime", "exports as ONNX graphs, and proving them"),
    "parquet": ("pyarrow", "reading parquet files"),
    "peft": ("peft", "proving exports with PEFT itself"),
    "quantized": ("bitsandbytes", "training on quantized models, and optimizer states in 8 bits"),
}


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


@verb("doctor", examples=["addenda doctor", "addenda doctor --json"])
def command(console: Console) -> int:
    """Check this machine and installation: versions, processor, memory, disk, cache, optional packages.

    Ends with 1 if something will not work.
    """
    checks = list(_checks())
    failed = any(check.status == "fail" for check in checks)
    document = {"ok": not failed, "checks": [asdict(check) for check in checks]}
    console.result(document, lambda: "\n".join(_line(console, check) for check in checks))
    return int(failed)


def _line(console: Console, check: Check) -> str:
    status = console.paint(f"{check.status:<4}", fg=_COLORS[check.status])
    fix = f"\n{' ' * 21}fix: {check.fix}" if check.fix else ""
    return f"{status}  {check.name:<14} {check.found}{fix}"


def _checks() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield from _packages()
    yield _processor()
    yield _gpu()
    yield _threads()
    yield _memory()
    yield from _storage()
    yield from _extras()


def _packages() -> Iterator[Check]:
    for name in ("torch", "transformers", "safetensors", "tokenizers"):
        try:
            yield Check(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name, "fail", "not installed", f"pip install {name}, or run 'make setup'")


def _processor() -> Check:
    from addenda.train.precision import choose_precision

    chosen = choose_precision()
    found = f"{platform.machine()}, {os.cpu_count()} logical cores; trains in {chosen.name}: {chosen.reason}"
    if chosen.name == "bfloat16":
        return Check("processor", "ok", found)
    return Check(
        "processor",
        "warn",
        found,
        "nothing to fix: training works, and takes longer than with native bfloat16",
    )


def _gpu() -> Check:
    import torch

    from addenda.train.precision import choose_device

    device = choose_device().device
    if device.type == "cpu":
        build = "with" if torch.version.cuda else "without"
        return Check("gpu", "ok", f"none that PyTorch, a build {build} CUDA, can use: the processor trains")
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info()
    return Check("gpu", "ok", f"{', '.join(names)}; {binary_size(free)} free of {binary_size(total)}")


def _threads() -> Check:
    import psutil
    import torch

    threads, cores = torch.get_num_threads(), psutil.cpu_count(logical=False) or os.cpu_count() or 1
    found = f"{threads} used by torch, {cores} physical cores"
    if threads < cores:
        cause = "OMP_NUM_THREADS is set" if "OMP_NUM_THREADS" in os.environ else "torch chose so"
        return Check(
            "threads", "warn", f"{found} ({cause})", f"unset OMP_NUM_THREADS, or --set train.threads={cores}"
        )
    return Check("threads", "ok", found)


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{binary_size(memory.available)} free of {binary_size(memory.total)}"
    if memory.available < 2 * GIB:
        fix = "close other programs; the default model needs about 2 GiB to train"
        return Check("memory", "fail" if memory.available < GIB // 2 else "warn", found, fix)
    return Check("memory", "ok", found)


def _storage() -> Iterator[Check]:
    from addenda.bases import list_models
    from addenda.folders import cache_root

    root = cache_root()
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    yield _writable("cache", there, str(root), "set ADDENDA_HOME to a folder you may write to")
    free = shutil.disk_usage(there).free
    short = free < 2 * GIB
    fix = "free some space, or set ADDENDA_HOME to a folder on a larger disk" if short else ""
    yield Check("disk", "warn" if short else "ok", f"{binary_size(free)} free for the cache", fix)
    ready = [card.name for card in list_models() if card.cached]
    yield Check(
        "models",
        "ok",
        f"ready: {', '.join(ready)}" if ready else "none fetched yet; the first use fetches one",
    )
    yield _writable(
        "run folder", Path.cwd(), str(Path.cwd()), "start from a folder you may write to, or use --out"
    )


def _writable(name: str, folder: Path, shown: str, fix: str) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check(name, "ok", f"{shown}, writable")
    except OSError as problem:
        return Check(name, "fail", f"{shown}: {problem.strerror or problem}", fix)


def _extras() -> Iterator[Check]:
    for extra, (package, use) in _EXTRAS.items():
        try:
            yield Check(extra, "ok", f"{package} {metadata.version(package)}, for {use}")
        except metadata.PackageNotFoundError:
            yield Check(
                extra,
                "warn",
                f"{package} is not installed; it is for {use}",
                f"pip install 'addenda[{extra}]'",
            )
