"""Which device and which number format suit this machine, and why.

Half the bytes for weights and activations is worth having everywhere, but only a processor that multiplies bfloat16
natively is also faster with it; another converts every number first and takes several times as long.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from addenda.errors import ConfigError

__all__ = ["Device", "Precision", "choose_device", "choose_precision"]


@dataclass(frozen=True)
class Device:
    """Where a base runs, and the reason in words."""

    device: torch.device
    reason: str


def choose_device(wish: str = "auto") -> Device:
    """Choose where a base runs.

    Args:
        wish: ``auto``, ``cpu``, ``cuda`` (of several processes on a machine each takes its own GPU) or ``cuda:N``.

    Raises:
        ConfigError: a GPU was asked for that PyTorch cannot use.

    Example:
        >>> choose_device("cpu")
        Device(device=device(type='cpu'), reason='as asked')
    """
    usable = torch.cuda.is_available()
    if wish == "auto":
        if usable:
            return Device(torch.device("cuda"), f"PyTorch can use '{torch.cuda.get_device_name()}'")
        return Device(torch.device("cpu"), "PyTorch finds no GPU it can use")
    device = torch.device(wish)
    if device.type != "cuda":
        return Device(device, "as asked")
    names = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if usable else []
    if not names or (device.index or 0) >= len(names):
        build = f"PyTorch {torch.__version__}, {'with' if torch.version.cuda else 'without'} CUDA"
        raise ConfigError(
            f"there is no '{wish}' on this machine",
            where={"devices": " ".join(["cpu", *names]), "build": build},
            hint="set base.device=auto"
            + ("" if torch.version.cuda else ", or install a build of PyTorch with CUDA"),
        )
    return Device(device, "as asked")


@dataclass(frozen=True)
class Precision:
    """The number format of the base, and the reason in words."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """``bfloat16``, ``float16`` or ``float32``."""
        return str(self.dtype).removeprefix("torch.")


def choose_precision(wish: str = "auto", *, device: str | torch.device = "cpu") -> Precision:
    """Choose the number format of the base; adapters are float32 whatever it is.

    Args:
        wish: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        device: where the base will run.

    Raises:
        ConfigError: ``wish`` is none of these.

    Example:
        >>> choose_precision("float32")
        Precision(dtype=torch.float32, reason='as asked')
    """
    if wish not in ("auto", "bfloat16", "float16", "float32"):
        raise ConfigError(f"unknown precision '{wish}'", hint="use auto, bfloat16, float16 or float32")
    kind = torch.device(device).type
    if wish != "auto":
        return Precision(getattr(torch, wish), "as asked")
    return _for_cuda(device) if kind == "cuda" else _for_cpu() if kind == "cpu" else _timed(kind)


def _for_cuda(device: str | torch.device) -> Precision:
    name = torch.cuda.get_device_name(device)
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if native:
        return Precision(torch.bfloat16, f"'{name}' multiplies bfloat16 natively")
    return Precision(torch.float32, f"'{name}' does not multiply bfloat16 natively")


def _for_cpu() -> Precision:
    flags = _bfloat16_flags()
    if flags:
        return Precision(torch.bfloat16, f"the processor multiplies bfloat16 natively ({', '.join(flags)})")
    return _timed("cpu")


def _bfloat16_flags() -> list[str]:
    # A missing flag does not prove a slow product: ARM processors and future PyTorch report through other functions.
    probes = (("_is_avx512_bf16_supported", "avx512_bf16"), ("_is_amx_tile_supported", "amx"))
    return [name for probe, name in probes if getattr(torch.cpu, probe, bool)()]


def _timed(device: str) -> Precision:
    wide = narrow = float("inf")
    for _ in range(4):  # in turns, so that what else runs here slows neither alone
        wide = min(wide, _seconds_per_product(torch.float32, device))
        narrow = min(narrow, _seconds_per_product(torch.bfloat16, device))
    measured = f"a bfloat16 product took {narrow / wide:.1f} times a float32 one here"
    return Precision(torch.bfloat16 if narrow <= wide else torch.float32, measured)


def _seconds_per_product(dtype: torch.dtype, device: str, *, repeats: int = 5) -> float:
    x, weight = (torch.ones(256, 512, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (x @ weight.T).sum().item()
        best = min(best, time.perf_counter() - start)
    return best
