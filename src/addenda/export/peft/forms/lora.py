"""LoRA in PEFT's folder: ``lora_A.weight`` (rank, d_in) and ``lora_B.weight`` (d_out, rank) of each layer.

A convolution's have its kernel's shape, (rank, channels_in, *kernel) and (d_out, rank, 1, ...); an embedding's are
called ``lora_embedding_A`` (rank, rows) and ``lora_embedding_B`` (features, rank).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.views import LayerView
from addenda.errors import CheckpointError
from addenda.export.peft import stacked
from addenda.export.peft.form import Form, form
from addenda.methods.lora import LoRA, LoRAAdapter, LowRank

__all__ = ["LoRAForm", "LowRankForm", "factors", "layer_problems", "low_rank_settings", "read_low_rank"]

# Initializations that also change the base's weights, so that the tensors alone do not say what was trained.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")

READS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
)
HARMLESS = ("eva_config", "loftq_config", "megatron_core", "qalora_group_size")
NAMES = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
KINDS = ("linear", "conv1d-transposed", "conv", "embedding")


MICA = "mica"
"""PEFT's word for a start that goes with a frozen B."""
_MARKS = (
    "use_dora",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Keys each of which makes another method of a ``LoraConfig``; what else is set beside the first is refused by name."""


class LowRankForm(Form):
    """What the forms of methods that train a pair A, B have in common."""

    peft_type = "LORA"
    kinds: ClassVar[tuple[str, ...]] = KINDS
    reads: ClassVar[tuple[str, ...]] = READS
    harmless: ClassVar[tuple[str, ...]] = HARMLESS
    names: ClassVar[tuple[str, ...]] = NAMES
    mark: ClassVar[str] = ""
    """The key whose being set makes this method of a ``LoraConfig``; none for plain LoRA."""

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        plain = MICA if config.get("init_lora_weights") == MICA else ""
        return next((mark for mark in _MARKS if config.get(mark)), plain) == cls.mark

    def settings(self, handle: Handle) -> dict[str, Any]:
        return low_rank_settings(handle)

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return self.method(**read_low_rank(config))

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        return factors(cast(Tensor, adapter.A), cast(Tensor, adapter.B), layer)

    def problems(self, handle: Handle) -> list[str]:
        return layer_problems(handle)


@form
class LoRAForm(LowRankForm):
    """PEFT's ``LoraConfig``."""

    method = LoRA
    kinds: ClassVar[tuple[str, ...]] = (*KINDS, "projection", "expert")
    reads: ClassVar[tuple[str, ...]] = (*READS, "lora_bias")
    names: ClassVar[tuple[str, ...]] = (*NAMES, "lora_B.bias")

    def settings(self, handle: Handle) -> dict[str, Any]:
        return {**low_rank_settings(handle), "lora_bias": cast(LoRA, handle.method).bias}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> LoRA:
        return LoRA(**read_low_rank(config), bias=bool(config.get("lora_bias")))

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
        found = factors(*ours.factors(), layer)
        return found if ours.bias is None else {**found, "lora_B.bias": ours.bias}

    def problems(self, handle: Handle) -> list[str]:
        return layer_problems(handle) + stacked.problems(handle)


def low_rank_settings(handle: Handle) -> dict[str, Any]:
    """Return the settings of a pair A, B under PEFT's keys."""
    method = cast(LowRank, handle.method)
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


def read_low_rank(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a pair A, B from PEFT's keys."""
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"init_lora_weights = '{init}' changes the base's weights, which the folder does not hold",
            hint="convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    # PEFT takes the first pattern that matches, a low-rank method here the last suffix.
    ranks, alphas = (
        dict(reversed((config.get(key) or {}).items())) for key in ("rank_pattern", "alpha_pattern")
    )
    return {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "dropout": config.get("lora_dropout", 0.0),
        "rank_stabilized": bool(config.get("use_rslora")),
        "ranks": ranks,
        "alphas": alphas,
    }


def factors(
    A: Tensor, B: Tensor, layer: Base, *, prefix: str = "lora", suffix: str = ".weight"
) -> dict[str, Tensor]:
    """Return A and B under PEFT's names and in its shapes, as views."""
    if layer.kind == "embedding":
        return {f"{prefix}_embedding_A": A, f"{prefix}_embedding_B": B}
    if layer.kind == "conv":
        kernel = cast(LayerView, layer).module.kernel_size
        A, B = A.view(len(A), -1, *kernel), B.view(*B.shape, *[1] * len(kernel))
    return {f"{prefix}_A{suffix}": A, f"{prefix}_B{suffix}": B}


def layer_problems(handle: Handle, *, dilation: bool = False) -> list[str]:
    """Return the layers on which PEFT's low-rank update computes otherwise than ours does.

    Args:
        handle: an adapter with factors A and B.
        dilation: whether PEFT follows a convolution's dilation.
    """
    found = []
    for path in handle.paths:
        view = handle._host(path)._addenda.view
        module = view.module
        if view.kind == "conv":
            odd = {
                "groups": module.groups > 1,
                "dilation": not dilation and set(module.dilation) != {1},
                "padding mode": module.padding_mode != "zeros",
            }
            found += [
                f"PEFT does not follow the {name} of the convolution '{path}'" for name in odd if odd[name]
            ]
        if isinstance(module, nn.Embedding) and not view.is_plain():
            found.append(f"'{path}' does more than look up its weight, which PEFT scales")
    return found


def _rank(method: LowRank, path: str) -> int:
    """PEFT's rank of a layer: twice ours where the adapter also takes off what it began with."""
    return method.rank_at(path) * (2 if isinstance(method, LoRA) and method.begins().moved else 1)


def _alpha(method: LowRank, path: str) -> int | float:
    rank = _rank(method, path)
    alpha = method.scaling_at(path) * (math.sqrt(rank) if method.rank_stabilized else rank)
    # The way through the scaling costs the last bit; 12 digits give back the number that was set.
    alpha = float(f"{alpha:.12g}")
    return int(alpha) if alpha.is_integer() else alpha
