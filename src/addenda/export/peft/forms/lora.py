"""LoRA in PEFT's folder: ``lora_A.weight`` (rank, d_in) and ``lora_B.weight`` (d_out, rank) of each layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.errors import CheckpointError
from addenda.export.peft import stacked
from addenda.export.peft.form import Form, form
from addenda.methods.lora import LoRA, LoRAAdapter

__all__ = ["LoRAForm"]

# Initializations that also change the base's weights, so that the tensors alone do not say what was trained.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@form
class LoRAForm(Form):
    """PEFT's ``LoraConfig``."""

    peft_type = "LORA"
    method = LoRA
    reads: ClassVar[tuple[str, ...]] = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
    )
    harmless: ClassVar[tuple[str, ...]] = ("eva_config", "loftq_config", "megatron_core", "qalora_group_size")
    kinds: ClassVar[tuple[str, ...]] = (*Form.kinds, "projection", "expert")
    names: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(LoRA, handle.method)
        ranks = {path: _rank(method, path) for path in handle.paths}
        alphas = {path: _alpha(method, path) for path in handle.paths}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return {
            "bias": "none",
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": method.dropout,
            "use_rslora": method.rank_stabilized,
            "use_dora": False,
            "init_lora_weights": True,
            "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
            "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        init = str(config.get("init_lora_weights", "")).lower()
        if init.startswith(_CHANGES_BASE):
            raise CheckpointError(
                f"init_lora_weights = '{init}' changes the base's weights, which the folder does not hold",
                hint="convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )
        # PEFT takes the first pattern that matches, LoRA here the last suffix.
        ranks, alphas = (
            dict(reversed((config.get(key) or {}).items())) for key in ("rank_pattern", "alpha_pattern")
        )
        return LoRA(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            rank_stabilized=bool(config.get("use_rslora")),
            ranks=ranks,
            alphas=alphas,
        )

    def problems(self, handle: Handle) -> list[str]:
        return stacked.problems(handle)

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return stacked.apart(model, config, tensors)

    def together(
        self, handle: Handle, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return stacked.together(handle, config, tensors)

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(LoRAAdapter, adapter)
        A, B = ours.factors()
        return {"lora_A.weight": A, "lora_B.weight": B}


def _rank(method: LoRA, path: str) -> int:
    """PEFT's rank of a layer: twice ours where the adapter also takes off what it began with."""
    return method.rank_at(path) * (2 if method.begins().moved else 1)


def _alpha(method: LoRA, path: str) -> int | float:
    rank = _rank(method, path)
    alpha = method.scaling_at(path) * (math.sqrt(rank) if method.rank_stabilized else rank)
    # The way through the scaling costs the last bit; 12 digits give back the number that was set.
    alpha = float(f"{alpha:.12g}")
    return int(alpha) if alpha.is_integer() else alpha
