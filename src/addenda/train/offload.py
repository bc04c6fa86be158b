"""Activations wait in the machine's memory until the backward needs them; for GPUs, whose own memory is scarce.

A copy travels while the GPU goes on computing, on a stream of its own; the backward asks for them in reverse order, so
that with each the one before it is called for. Weights stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from addenda.errors import ConfigError
from addenda.train.config import TrainConfig

__all__ = ["Offload", "require_offloadable"]

LEAST_BYTES = 2**20
"""Smaller tensors stay: starting their copy would cost more than their place."""


def require_offloadable(config: TrainConfig, device: torch.device) -> None:
    """Check that what the settings ask for makes sense on the device.

    Raises:
        ConfigError: activations cannot be offloaded from there.
    """
    if config.offload != "activations":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"train.offload = activations makes no sense on '{device}': they would be copied within the same memory",
            hint="leave train.offload unset; where memory is scarce, blocks run again in the backward",
        )
    if config.sharding != "none":
        raise ConfigError(
            "train.offload = activations cannot be had with train.sharding = full, which moves weights too",
            hint="leave one of them unset",
        )


class Offload:
    """Keeps what a forward pass saves in pinned memory of the machine.

    Args:
        model: its parameters and buffers are never copied.
        device: tensors of this device are.

    Example:
        >>> layer = nn.Linear(512, 512)
        >>> x = torch.randn(2048, 512, requires_grad=True)
        >>> offload = Offload(layer, torch.device("cpu"))
        >>> with offload.on():
        ...     y = layer(x).square().sum()
        >>> y.backward()
        >>> offload.copied == 2 * x.nbytes  # the input of the layer, and that of the square
        True
    """

    copied: int = 0
    """Bytes that went out so far."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._there: dict[tuple[Any, ...], tuple[StorageWeakRef, _Kept]] = {}
        self._last: _Kept | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Offload what autograd saves within the block."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._there.clear()
            self._last = None

    def _pack(self, tensor: Tensor) -> Tensor | _Kept:
        storage = tensor.untyped_storage()
        stays = tensor.nbytes < LEAST_BYTES or tensor.device.type != self.device.type
        if stays or storage.data_ptr() in self._weights:
            return tensor
        # Held weakly, a storage that is gone is never taken for a new one in its place.
        weak = StorageWeakRef(storage)
        place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        there = self._there.get((weak.cdata, *place))
        if there is None or there[0].expired():
            self._last = _Kept(tensor, self.side, self._last)
            there = self._there[weak.cdata, *place] = (weak, self._last)
            self.copied += tensor.nbytes
        there[1].users += 1
        return there[1]


class _Kept:
    """One tensor in the machine's memory, and the one that went there before it."""

    def __init__(self, tensor: Tensor, side: torch.cuda.Stream | None, before: _Kept | None) -> None:
        self.device, self.side, self.before = tensor.device, side, before
        self.users = 0
        self.back: tuple[Tensor, torch.cuda.Event | None] | None = None
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=side is not None)
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(self.device))
            tensor.record_stream(side)
        with torch.cuda.stream(side) if side is not None else nullcontext():
            self.host.copy_(tensor, non_blocking=True)

    def call_for(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """Let the tensor come back; it is there when the event has passed."""
        if self.back is None:
            if self.side is None:
                self.back = self.host.to(self.device), None
            else:
                with torch.cuda.stream(self.side):
                    self.back = self.host.to(self.device, non_blocking=True), self.side.record_event()
        return self.back


def _unpack(kept: Tensor | _Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    tensor, arrived = kept.call_for()
    if arrived is not None:
        stream = torch.cuda.current_stream(kept.device)
        stream.wait_event(arrived)
        tensor.record_stream(stream)
    kept.users -= 1
    if kept.users <= 0:
        kept.back = None
    if kept.before is not None and kept.before.users > 0:
        kept.before.call_for()
    return tensor
