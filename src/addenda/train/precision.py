"""Which number format suits this machine, and why.

Half the bytes for weights and activations is worth having everywhere, but only a processor that multiplies bfloat16
natively is also faster with it; another converts every number first and takes several times as long.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from addenda.errors import ConfigError

__all__ = ["Precision", "choose_precision"]


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
    return _for_cuda() if kind == "cuda" else _for_cpu() if kind == "cpu" else _timed(kind)


def _for_cuda() -> Precision:
    name = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
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
