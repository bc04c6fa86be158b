"""VB-LoRA in PEFT's folder: ``vblora_vector_bank`` once, and of each layer the logits or the chosen vectors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.export.peft.form import SHARED_PREFIX, Form, form
from addenda.methods.vblora import VBLoRA, VBLoRAAdapter, VectorBank

__all__ = ["VBLoRAForm"]

_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_NEVER = -1e4
"""Logit of a vector that was not among the chosen ones: below the logarithm of every number."""


@form
class VBLoRAForm(Form):
    """PEFT's ``VBLoRAConfig``."""

    peft_type = "VBLORA"
    method = VBLoRA
    reads: ClassVar[tuple[str, ...]] = ("r", "num_vectors", "vector_length", "topk", "save_only_topk_weights")
    harmless: ClassVar[tuple[str, ...]] = ("init_logits_std", "init_vector_bank_bound", "vblora_dropout")
    names: ClassVar[tuple[str, ...]] = ("vblora_logits_A", "vblora_logits_B")
    shared_names: ClassVar[tuple[str, ...]] = ("vblora_vector_bank",)
    integers: ClassVar[tuple[str, ...]] = tuple(name + _INDICES for name in names)

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(VBLoRA, handle.method)
        bank = cast(VectorBank, next(iter(handle.adapters.values())).common).bank
        return {
            "r": method.rank,
            "num_vectors": method.vectors,
            "vector_length": bank.shape[1],
            "topk": method.top,
            "save_only_topk_weights": False,
            "vblora_dropout": 0.0,
            "bias": "none",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return VBLoRA(
            rank=config.get("r", 4),
            vectors=config.get("num_vectors", 256),
            length=config.get("vector_length", 256),
            top=config.get("topk", 2),
        )

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Turn the chosen vectors and their weights back into logits that choose and weigh the same."""
        bank = tensors.get(f"{SHARED_PREFIX}vblora_vector_bank", torch.zeros(0))
        found = {k: t for k, t in tensors.items() if not k.endswith((_INDICES, _WEIGHTS))}
        for key, indices in tensors.items():
            name = key.removesuffix(_INDICES)
            weights = tensors.get(name + _WEIGHTS)
            if name == key or weights is None or indices.shape[:-1] != weights.shape[:-1]:
                continue
            last = 1 - weights.sum(-1, keepdim=True)
            logits = torch.cat([weights, last], -1).clamp_min(torch.finfo(weights.dtype).tiny).log()
            places = indices.long().clamp(0, max(0, len(bank) - 1))
            empty = logits.new_full((*places.shape[:-1], len(bank)), _NEVER)
            found[name] = empty.scatter(-1, places, logits)
        return dict(config), found

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(VBLoRAAdapter, adapter)
        return {"vblora_logits_A": ours.logits_A, "vblora_logits_B": ours.logits_B}

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        return {"vblora_vector_bank": cast(VectorBank, common).bank}
