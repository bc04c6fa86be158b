"""AdaLoRA in PEFT's folder: ``lora_A`` (rank, d_in), ``lora_E`` (rank, 1) and ``lora_B`` (d_out, rank) of what is left.

``rank_pattern`` says for each layer, by the path of its ``lora_E``, which of the first ``init_r`` entries these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.export.peft.form import PREFIX, Form, form
from addenda.export.peft.forms.lora import layer_problems
from addenda.methods.adalora import AdaLoRA, AdaLoRAAdapter

__all__ = ["AdaLoRAForm"]

_GUARD = 1e-5
"""What PEFT adds to the rank that it divides alpha by."""


@form
class AdaLoRAForm(Form):
    """PEFT's ``AdaLoraConfig``."""

    peft_type = "ADALORA"
    method = AdaLoRA
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "conv")
    reads: ClassVar[tuple[str, ...]] = (
        "init_r",
        "target_r",
        "lora_alpha",
        "lora_dropout",
        "rank_pattern",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
    )
    # PEFT heeds neither r nor use_rslora here.
    harmless: ClassVar[tuple[str, ...]] = (
        "init_lora_weights",
        "megatron_core",
        "qalora_group_size",
        "r",
        "total_step",
        "use_rslora",
    )
    names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(AdaLoRA, handle.method)
        begin, end = method.t_init or 0, method.t_final or 0
        kept = {path: _kept(adapter).tolist() for path, adapter in handle.adapters.items()}
        whole = all(all(flags) and len(flags) == method.rank for flags in kept.values())
        pattern = {
            f"{path}.lora_E": flags + [False] * (method.rank - len(flags)) for path, flags in kept.items()
        }
        return {
            "init_r": method.rank,
            "target_r": method.target_rank,
            "lora_alpha": float(f"{method.scaling * (method.rank + _GUARD):.12g}"),
            "lora_dropout": method.dropout,
            "tinit": begin,
            "tfinal": end,
            "deltaT": method.delta_t or 1,
            "total_step": begin + end + 1,
            "beta1": method.beta1,
            "beta2": method.beta2,
            "orth_reg_weight": method.orthogonality,
            "rank_pattern": None if whole else pattern,
            "bias": "none",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> AdaLoRA:
        rank, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
        left = {path: tensors.get(f"{PREFIX}{path}.lora_E", torch.empty(rank)).shape[0] for path in paths}
        return AdaLoRA(
            rank=rank,
            target_rank=min(rank, config.get("target_r", 8)),
            alpha=(alpha if alpha > 0 else rank) * rank / (rank + _GUARD),
            dropout=config.get("lora_dropout", 0.0),
            t_init=config.get("tinit"),
            t_final=config.get("tfinal"),
            delta_t=config.get("deltaT"),
            beta1=config.get("beta1", 0.85),
            beta2=config.get("beta2", 0.85),
            orthogonality=config.get("orth_reg_weight", 0.5),
            ranks={path: count for path, count in left.items() if count != rank},
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours, kept = cast(AdaLoRAAdapter, adapter), _kept(adapter)
        return {
            "lora_A": ours.Q[kept],
            "lora_B": ours.P[:, kept],
            "lora_E": ours.values[kept][:, None],
        }

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        ours = cast(AdaLoRAAdapter, adapter)
        with torch.no_grad():
            ours.Q.copy_(given["lora_A"])
            ours.P.copy_(given["lora_B"])
            ours.values.copy_(given["lora_E"][:, 0])

    def problems(self, handle: Handle) -> list[str]:
        other = [
            f"PEFT has AdaLoRA on no {type(module).__name__} ('{path}')"
            for path in handle.paths
            if isinstance(module := handle.model.get_submodule(path), nn.Conv1d | nn.Conv3d)
        ]
        return other + layer_problems(handle, dilation=True)


def _kept(adapter: Adapter) -> Tensor:
    return cast(AdaLoRAAdapter, adapter).pruned == 0
