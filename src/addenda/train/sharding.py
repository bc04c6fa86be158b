"""Hold the frozen weights of a model once among all processes (FSDP2) while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

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

    Adapters stay whole in every process; so do buffers, parameters of another library's class, which carry more than
    their numbers, and what lies outside the blocks: embeddings, last norm, output head. Weights may be of any dtype,
    integer codes too. At the end every weight is whole again, with the same bits, in
    the same ``Parameter``. Where the block is left by an error, the model stays in shares and can only be dropped: the
    other processes may be gone.

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
    adapters = {p for m in model.modules() if (host := host_of(m)) for p in host.adapters.parameters()}
    weights = {p for block in blocks for p in block.parameters()}
    whole = adapters | {p for p in weights if type(p) is not nn.Parameter}
    before = [(module, type(module), _state_of(module)) for block in blocks for module in block.modules()]
    mesh = init_device_mesh(device.type, (parallel.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    for weight in weights - whole:
        weight.data = weight.data.new_empty(0)  # its bits are in the shares now
    yield
    for module, kind, state in before:
        for name, parameter in list(module._parameters.items()):
            original = state["_parameters"][name]
            if original is not None and original is not parameter:
                original.data = _gathered(cast(Tensor, parameter))
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(state)


def _state_of(module: nn.Module) -> dict[str, Any]:
    """What a module is, with its tables of parameters and hooks as they are now."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()}


def _gathered(shares: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return shares.full_tensor().detach() if isinstance(shares, DTensor) else shares.detach()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, none of which shares a weight with anything outside it."""
    blocks = list(find_blocks(model))
    if not blocks:
        raise ConfigError(
            f"'{type(model).__name__}' has no list of blocks to deal out", hint="set train.sharding=none"
        )
    owners: dict[nn.Parameter, int] = {}
    outside = _outside(model, blocks)
    for index, block in enumerate(blocks):
        shared = any(p in outside or owners.setdefault(p, index) != index for p in block.parameters())
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
