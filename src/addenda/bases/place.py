"""Move a loaded model onto another device, or to wider numbers."""

from __future__ import annotations

import torch
from torch import nn

from addenda.bases.packed_layers import packed_layers
from addenda.errors import BaseModelError, OutOfMemory

__all__ = ["in_float32", "move", "widen"]


def move(model: nn.Module, device: str | torch.device) -> None:
    """Move a model in place; packed layers that share their bytes, as a tied output head does, go on sharing them.

    Raises:
        OutOfMemory: it does not fit; what is left of it can only be dropped.
        BaseModelError: another library's layers in it stay where they are.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> move(layer, "meta")
        >>> layer.weight.device
        device(type='meta')
    """
    try:
        moved: dict[int, torch.Tensor] = {}
        for layer in packed_layers(model).values():
            place = layer.raw.data_ptr()
            moved[place] = moved[place] if place in moved else layer.raw.to(device)
            layer.raw = moved[place]
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the base does not fit into the memory of '{device}'",
            where={"reason": str(error).splitlines()[0]},
            hint="set base.dtype=bfloat16 or base.weights=nf4, or take a smaller base: 'addenda models'",
        ) from error
    except ValueError as error:  # transformers refuses to move some quantized models
        raise BaseModelError(
            f"the base cannot be moved to '{device}': {error}", hint="set base.device=cpu"
        ) from error


def widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Widen the floating parameters of a model in place; what another library keeps in a class of its own stays."""
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
        if plain and parameter.is_floating_point() and parameter.dtype.itemsize < dtype.itemsize:
            parameter.data = parameter.data.to(dtype)


def in_float32(model: nn.Module) -> None:
    """Let a model compute in float32, in place: what is compared then shows no error of the arithmetic."""
    if not getattr(model, "is_quantized", False):
        model.float()
        return
    widen(model, torch.float32)
    for module in model.modules():
        if getattr(module, "compute_dtype", None) is not None:  # bitsandbytes, of four bits
            setattr(module, "compute_dtype", torch.float32)  # noqa: B010  (no module of ours)
