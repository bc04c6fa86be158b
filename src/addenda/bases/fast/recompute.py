"""Blocks that keep only their input and are run again in the backward: memory for time (arXiv:1604.06174).

How many blocks do so is a number, not a switch. The first ones do: when the backward comes to them, what the later ones
kept is free again, so that running one again never adds to the peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from addenda.bases.fast.fusion import forward_replaced

__all__ = ["find_blocks", "learning_blocks", "recomputed"]


def find_blocks(decoder: nn.Module) -> tuple[nn.Module, ...]:
    """Return the repeated blocks of a decoder, in order: the list of modules that holds most of its parameters.

    Example:
        >>> len(find_blocks(nn.Sequential(nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), nn.Linear(4, 8))))
        3
    """
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)]
    largest = max(lists, key=_size, default=nn.ModuleList())
    return tuple(largest)


def learning_blocks(decoder: nn.Module, blocks: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """Return the blocks that keep something for the backward: those from the first trained parameter on.

    Example:
        >>> blocks = nn.ModuleList([nn.Linear(2, 2).requires_grad_(n > 0) for n in range(3)])
        >>> len(learning_blocks(blocks, tuple(blocks)))
        2
    """
    inside = {parameter for block in blocks for parameter in block.parameters()}
    if any(parameter.requires_grad for parameter in decoder.parameters() if parameter not in inside):
        return tuple(blocks)
    learns = (n for n, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))
    return tuple(blocks[next(learns, 0) :])


def _size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@contextmanager
def recomputed(
    blocks: Sequence[nn.Module], around: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Let `blocks` keep only their input within the block.

    Args:
        blocks: modules of the model.
        around: makes what has to surround a block when it is run again, long after this context was left.
    """
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(forward_replaced(block, _kept_small(block, around)))
        yield


def _kept_small(block: nn.Module, around: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    former = vars(block).get("forward", block.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            former, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), around()), **kwargs
        )

    return forward
