"""Hold the frozen weights of a model once among all processes (FSDP2) while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from addenda.bases.fast.recompute import find_blocks
from addenda.core.host import host_of
from addenda.errors import ConfigError
from addenda.train.parallel import Parallel

__all__ = ["sharded"]


@contextlib.contextmanager
def sharded(model: nn.Module, parallel: Parallel, *, device: torch.device) -> Iterator[None]:
    """Within the block each process keeps its share of every transformer block, and gathers one block at a time.

    Weights may be of any dtype, and held as parameters or as buffers, as packed codes are. Adapters stay whole in every
    process; so do parameters of another library's class, which carry more than their numbers, and what lies outside the
    blocks: embeddings, last norm, output head. At the end every weight is whole again, with the same bits, in the same
    tensor. Where the block is left by an error, the model stays in shares and can only be dropped: the other processes
    may be gone.

    Args:
        model: with the adapters on it.
        parallel: with one process, nothing is done.
        device: where the model is; decides how weights travel.

    Raises:
        ConfigError: the model has no list of blocks, or its blocks share weights.
    """
    if parallel.alone:
        yield
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = _blocks(model)
    before = [(module, type(module), _state_of(module)) for block in blocks for module in block.modules()]
    shared, whole = _weights(model, blocks, parallel.size)
    mesh = init_device_mesh(device.type, (parallel.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    for _, _, weight in shared:
        weight.data = weight.data.new_empty(0)  # its bits are in the shares now
    yield
    for module, name, weight in shared:
        weight.data = _gathered(getattr(module, name))
    for module, kind, state in before:
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(state)


def _weights(
    model: nn.Module, blocks: list[nn.Module], size: int
) -> tuple[list[tuple[nn.Module, str, Tensor]], set[nn.Parameter]]:
    """Find what is shared out, each with its module and name, and the parameters that stay whole.

    A buffer that is shared out becomes a parameter of its module, which is all that FSDP2 looks at.
    """
    own = _adapter_modules(model)
    whole = {p for module in own for p in module.parameters(recurse=False)}
    whole |= {p for block in blocks for p in block.parameters() if type(p) is not nn.Parameter}
    shared: list[tuple[nn.Module, str, Tensor]] = []
    for module in (module for block in blocks for module in block.modules()):
        if module in own:
            continue
        shared += [(module, n, p) for n, p in module._parameters.items() if p is not None and p not in whole]
        for name, buffer in list(module._buffers.items()):
            if (
                type(buffer) is Tensor
                and buffer.ndim > 1
                and len(buffer) >= size
                and buffer.dtype != torch.bool
            ):
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
                shared.append((module, name, buffer))
    return shared, whole


def _adapter_modules(model: nn.Module) -> set[nn.Module]:
    """Every module of an adapter: what they hold, frozen tensors too, stays whole in every process."""
    return {inner for m in model.modules() if (host := host_of(m)) for inner in host.adapters.modules()}


def _state_of(module: nn.Module) -> dict[str, Any]:
    """What a module is, with its tables of parameters and hooks as they are now."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()}


def _gathered(shares: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    tensor: Tensor = shares.full_tensor() if isinstance(shares, DTensor) else shares
    return tensor.detach()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, none of which shares a weight with anything outside it."""
    blocks = list(find_blocks(model))
    if not blocks:
        raise ConfigError(
            f"'{type(model).__name__}' has no list of blocks to deal out", hint="set train.sharding=none"
        )
    owners: dict[nn.Parameter, int] = {}
    outside, adapters = _outside(model, blocks), _adapter_modules(model)
    for index, block in enumerate(blocks):
        frozen = [p for m in block.modules() if m not in adapters for p in m.parameters(recurse=False)]
        shared = any(p in outside or owners.setdefault(p, index) != index for p in frozen)
        if shared:
            raise ConfigError(
                f"block {index} of '{type(model).__name__}' shares a weight with another part of the model",
                hint="set train.sharding=none",
            )
    return blocks


def _outside(model: nn.Module, blocks: list[nn.Module]) -> set[nn.Parameter]:
    inside = {module for block in blocks for module in block.modules()}
    return {
        p
        for module in model.modules()
        if module not in inside
        for p in module._parameters.values()
        if p is not None
    }
