"""The fingerprint of a base: which weights an adapter was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from addenda.core.host import adapter_prefixes, host_of
from addenda.core.packed_layers import PackedLinear

__all__ = ["fingerprint"]

_SAMPLES = 2048


def fingerprint(model: nn.Module) -> str:
    """Return a digest of the base's tensor names, shapes and values; adapters on it do not change it.

    Values are sampled, at most 2,048 evenly spaced ones of each tensor, and rounded to bfloat16, so that a base
    loaded in float32 and the same one loaded in bfloat16 have the same fingerprint. On the meta device, where there
    are no values, it covers names and shapes alone and starts with ``meta``.

    Example:
        >>> fingerprint(nn.Linear(2, 2, device="meta"))[:5]
        'meta-'
    """
    digest = hashlib.sha256()
    prefix = "sha256-"
    for name, tensor in _base_tensors(model):
        if isinstance(tensor, PackedLinear):
            digest.update(f"{name}{(tensor.out_features, tensor.in_features)}".encode())
            digest.update(_sampled_packed(tensor))
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            prefix = "meta-"
        else:
            digest.update(_sampled(tensor))
    return prefix + digest.hexdigest()[:40]


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor | PackedLinear]]:
    """Yield the base's tensors in the order of their names; where weights are merged, the kept originals."""
    prefixes: dict[nn.Module, list[str]] = {}
    packed: dict[str, PackedLinear] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        prefixes.setdefault(module, []).append(prefix)
        if isinstance(module, PackedLinear):
            packed[prefix] = module
    skip = adapter_prefixes(model)
    state = dict(model.state_dict())
    kept = _kept(prefixes)
    for prefix in packed:
        own = [name for name in state if name.startswith(prefix) and "." not in name[len(prefix) :]]
        for name in own:
            if name != f"{prefix}bias":
                del state[name]
        state[f"{prefix}weight"] = None
    for name, tensor in sorted(state.items()):
        original = kept.get(name, packed[name.removesuffix("weight")] if tensor is None else tensor)
        # None is a bias that merging made; what is no tensor is a module's extra state.
        if isinstance(original, Tensor | PackedLinear) and not name.startswith(skip):
            yield name, original


def _kept(prefixes: Mapping[nn.Module, list[str]]) -> dict[str, Tensor | None]:
    """Return what the parameters that merging has changed were before, by name; None for a bias that was not there."""
    kept: dict[str, Tensor | None] = {}
    for module in prefixes:
        host = host_of(module)
        if host is None or host._addenda.kept is None:
            continue
        view = host._addenda.view
        for place, original in zip((view.weight_place(), view.bias_place()), host._addenda.kept, strict=True):
            if place is None:
                continue
            for prefix in prefixes[place.module]:
                name = f"{prefix}{place.name}"
                kept[name] = None if original is None else place.into(kept.get(name), original)
    return kept


def _sampled(tensor: Tensor) -> bytes:
    if is_traceable_wrapper_subclass(tensor):  # torchao: the codes and the scales are what there is
        names, _ = tensor.__tensor_flatten__()
        inner = [getattr(tensor, name) for name in names]
        return b"".join(_sampled(part) for part in inner if isinstance(part, Tensor))
    flat = tensor.detach().flatten()
    return _bytes(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES])


def _sampled_packed(layer: PackedLinear) -> bytes:
    """Sample the weight as if it were dense, unpacking only the rows that samples lie in."""
    numel = layer.out_features * layer.in_features
    picked = torch.arange(0, numel, max(1, numel // _SAMPLES))[:_SAMPLES]
    rows, place = torch.unique(picked // layer.in_features, return_inverse=True)
    return _bytes(layer.dequantized(rows)[place, picked % layer.in_features])


def _bytes(picked: Tensor) -> bytes:
    if picked.dtype.is_floating_point:
        picked = picked.to(torch.bfloat16).view(torch.int16)
    return picked.cpu().contiguous().view(torch.uint8).numpy().tobytes()
