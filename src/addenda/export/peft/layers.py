"""How PEFT's layers differ from those they stand on, and what files say of single layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from addenda.core.handle import Handle
from addenda.core.layers import layer_at
from addenda.export.peft.form import PREFIX

__all__ = ["common_and_others", "sizes_at", "uneven_convolutions"]


def uneven_convolutions(handle: Handle) -> list[str]:
    """Return the adapted convolutions that PEFT runs otherwise than they are when it turns their kernel.

    It takes the first number of kernel, stride and padding for all directions, and no dilation, groups or padding mode.
    """
    layers = {path: layer_at(handle.model, path) for path in handle.paths}
    return [
        path for path, layer in layers.items() if hasattr(layer, "kernel_size") and not _is_even_conv2d(layer)
    ]


def _is_even_conv2d(layer: Any) -> bool:
    pairs = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    if not isinstance(layer, nn.Conv2d) or not all(isinstance(pair, tuple) for pair in pairs):
        return False
    even = all(first == second for first, second in pairs)
    return even and layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"


def common_and_others(sizes: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Return the number that most layers have, and the paths of the others with theirs.

    Example:
        >>> common_and_others({"a": 8, "b": 4, "c": 8})
        (8, {'b': 4})
    """
    common = Counter(sizes.values()).most_common(1)[0][0]
    return common, {path: size for path, size in sizes.items() if size != common}


def sizes_at(tensors: Mapping[str, Tensor], name: str) -> dict[str, int]:
    """Return the last dimension of each layer's tensor of this name, by path; a longer path comes after a shorter.

    PEFT's configuration says it by regular expressions, of which the tensors are what came of it.
    """
    end = f".{name}"
    found = {
        key.removeprefix(PREFIX).removesuffix(end): tensor.shape[-1]
        for key, tensor in tensors.items()
        if key.endswith(end) and tensor.dim()
    }
    return {path: found[path] for path in sorted(found, key=len)}
