"""A stack of encoder blocks without the padding of its batch: real tokens end to end, each sample by itself.

All of a block but its attention looks at one token at a time, so a token that nobody attends to and nobody reads is
work for nothing. Where a stack has such tokens it is given one row of the others, whose states are put back in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from addenda.bases.fast.attention import packed_attention_on
from addenda.bases.fast.flex import BLOCK
from addenda.bases.fast.fusion import Fusion, near, probe, quietly
from addenda.bases.fast.segments import Segments

__all__ = ["fill_of", "unpadded"]

TOKEN_MULTIPLE = 64
"""On a CPU rows are filled up to it with tokens of no sample: every new length costs PyTorch's matrix kernels a
set-up of several milliseconds for each layer size. Elsewhere they are filled up to whole blocks of attention."""


def fill_of(tokens: int, device: torch.device) -> int:
    """Return how many tokens of no sample to put behind so many of a row.

    Example:
        >>> fill_of(70, torch.device("cpu"))
        58
    """
    return -tokens % (TOKEN_MULTIPLE if device.type == "cpu" else BLOCK)


def unpadded(module: nn.Module, like: Tensor) -> Fusion | None:
    """Recognise a stack that takes hidden states and a mask, and gives every real token the same without the others."""
    named = list(inspect.signature(type(module).forward).parameters)
    width = next((layer.in_features for layer in module.modules() if hasattr(layer, "in_features")), 0)
    stack = any(isinstance(child, nn.ModuleList) and len(child) for child in module.children())
    causal = any(getattr(part, "is_causal", False) for part in module.modules())
    if not stack or causal or named[1:2] != ["hidden_states"] or "attention_mask" not in named or not width:
        return None
    hidden = probe(like, 3, 7, int(width))  # type: ignore[arg-type]
    seen = torch.ones(3, 7, dtype=torch.bool, device=like.device)
    seen[1, 3:], seen[2, :2] = False, False
    alone = [
        quietly(module, x[real][None], attention_mask=None) for x, real in zip(hidden, seen, strict=True)
    ]
    ours = quietly(_packed, module, {"hidden_states": hidden}, seen)
    if ours is None or None in alone:
        return None
    same = near(ours[0][seen], torch.cat([own[0][0] for own in alone]), units=1024)
    return Fusion("stack without padding", module, type(module), _lean(module)) if same else None


def _lean(module: nn.Module) -> Callable[..., Any]:
    own, signature = type(module).forward, inspect.signature(type(module).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = dict(signature.bind(module, *args, **kwargs).arguments)
        del named["self"]
        named.update(named.pop("kwargs", {}))
        seen = _seen(named.pop("attention_mask", None))
        again = module.training and any(getattr(m, "gradient_checkpointing", False) for m in module.modules())
        if seen is None or again or _watched(module) or _more_is_asked(module, named):
            return own(module, *args, **kwargs)
        return _packed(module, named, seen)

    return forward


def _seen(mask: Any) -> Tensor | None:
    """(B, T): which tokens the others attend to; None without padding, or where it is not the same for every query."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
        return None
    if not bool((mask == mask[:, :, :1]).all()):
        return None
    shown = mask[:, 0, 0]
    if shown.is_floating_point():  # what is added to the scores: nothing, or the least number there is
        if not bool(((shown == 0) | (shown <= torch.finfo(shown.dtype).min / 2)).all()):
            return None
        shown = shown == 0
    shown = shown.bool()
    return None if bool(shown.all()) or not bool(shown.any(1).all()) else shown


def _watched(module: nn.Module) -> bool:
    """Whether a hook stands on one of the blocks, which would see rows of another shape than it sees outside."""
    blocks = [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]
    return any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def _more_is_asked(module: Any, named: dict[str, Any]) -> bool:
    """Whether the call has to do with more than states: other tensors, caches, or what the blocks give inside."""
    others = [value for name, value in named.items() if name not in ("hidden_states", "return_dict")]
    config = getattr(module, "config", None)
    recorded = [getattr(config, f"output_{what}", False) for what in ("attentions", "hidden_states")]
    return any(value is not None and value is not False for value in (*others, *filter(None, recorded)))


def _packed(module: nn.Module, named: dict[str, Any], seen: Tensor) -> Any:
    hidden: Tensor = named["hidden_states"]
    (places,) = seen.flatten().nonzero(as_tuple=True)
    fill = fill_of(len(places), hidden.device)
    rows = hidden.flatten(0, 1)[torch.cat([places, places[:1].expand(fill)])]
    # In the place of the mask: were a block run again outside this call, its own attention would refuse them.
    samples = Segments(tuple(seen.sum(1).tolist()))
    with packed_attention_on(module):
        out = type(module).forward(
            module, **{**named, "hidden_states": rows[None], "attention_mask": samples}
        )
    states = hidden.new_zeros(seen.numel(), rows.shape[-1]).index_copy(0, places, out[0][0, : len(places)])
    return type(out)(last_hidden_state=states.view(hidden.shape))
