"""The hot loops in machine code: C++ of this package, compiled once by the machine's own compiler.

Each kernel has a twin in plain PyTorch where it is used, equal to it within rounding. A machine without a compiler, and
a tensor that a kernel does not take, run the twin.
"""

from addenda.kernels.library import enable, kernels_off, pending, state

__all__ = ["enable", "kernels_off", "pending", "state"]
