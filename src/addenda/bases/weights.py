"""Dense or packed: which form of a base's weights suits the memory there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from addenda.bases.gguf_file import Form
from addenda.memory.available import available_memory

if TYPE_CHECKING:
    import torch

__all__ = ["Choice", "Weights", "choose"]

Weights = Literal["auto", "dense", "packed", "nf4", "int8"]
"""``nf4`` and ``int8`` pack dense weights when they are loaded."""

WORKING_SHARE = 0.5
"""Share of the available memory that a training step, an adapter and its optimizer are left."""


@dataclass(frozen=True)
class Choice:
    """A form, and why."""

    form: Form
    reason: str
    asked: bool
    """Whether the user named it; else another form may stand in."""


def choose(
    weights: Weights,
    *,
    parameters: int,
    itemsize: int,
    available: int | None = None,
    device: str | torch.device = "cpu",
) -> Choice:
    """Choose the form of a base that could be had in either.

    Args:
        weights: what was asked for; ``auto`` takes dense weights, which are somewhat faster, where they leave half of
            the available memory.
        parameters: numbers of the base.
        itemsize: bytes of a dense one.
        available: bytes of memory there are; None asks the machine and the container.
        device: where the model will run. Its memory counts, and the machine's too, which holds it on the way there.

    Example:
        >>> choose("auto", parameters=10**9, itemsize=4, available=6 * 10**9).form
        'packed'
        >>> choose("auto", parameters=10**8, itemsize=4, available=6 * 10**9).reason
        'dense weights take 0.40 GB of the 6.00 GB available, less than half'
    """
    if weights != "auto":
        return Choice("packed" if weights == "packed" else "dense", "asked for", asked=True)
    free = _available(device) if available is None else available
    dense = parameters * itemsize
    fits = dense <= WORKING_SHARE * free
    takes = "take" if fits else "would take"
    size = f"{dense / 1e9:.2f} GB of the {free / 1e9:.2f} GB available"
    reason = f"dense weights {takes} {size}, {'less' if fits else 'more'} than half"
    return Choice("dense" if fits else "packed", reason, asked=False)


def _available(device: str | torch.device) -> int:
    free = available_memory()
    if str(device).startswith("cuda"):
        import torch

        return min(free, torch.cuda.mem_get_info(device)[0])
    return free
