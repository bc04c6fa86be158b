"""MonteCLoRA in PEFT's folder: LoRA's tensors, and its sampler's; of these the last draw is of no use afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.export.peft.form import form
from addenda.export.peft.forms.lora import READS, LowRankForm, read_low_rank
from addenda.methods.monteclora import MonteCLoRA, MonteCLoRAAdapter

__all__ = ["MonteCLoRAForm"]

_KEYS = {
    "samples": "num_samples",
    "noise": "sample_scaler",
    "prior": "dirichlet_prior",
    "kl": "kl_loss_weight",
}
_SAMPLER = "lora_monteclora_sampler"


@form
class MonteCLoRAForm(LowRankForm):
    """PEFT's ``LoraConfig(monteclora_config=...)``."""

    method = MonteCLoRA
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    reads: ClassVar[tuple[str, ...]] = (*READS, "monteclora_config")
    names: ClassVar[tuple[str, ...]] = (
        "lora_A.weight",
        "lora_B.weight",
        f"{_SAMPLER}.std_prior",
        f"{_SAMPLER}.expert_weights_prior",
        f"{_SAMPLER}.gaussian_var_prior",
        f"{_SAMPLER}.expert_weights",
    )
    mark = "monteclora_config"

    def settings(self, handle: Handle) -> dict[str, Any]:
        sampler = {theirs: getattr(handle.method, ours) for ours, theirs in _KEYS.items()}
        return {**super().settings(handle), "monteclora_config": sampler}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> MonteCLoRA:
        given = config["monteclora_config"]
        found = {ours: given[theirs] for ours, theirs in _KEYS.items() if theirs in given}
        return MonteCLoRA(**read_low_rank(config), **found)

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(MonteCLoRAAdapter, adapter)
        rank, samples = len(ours.log_s), len(ours.log_a)
        return {
            **super().tensors(adapter, layer),
            f"{_SAMPLER}.std_prior": ours.log_s,
            f"{_SAMPLER}.expert_weights_prior": ours.log_a,
            f"{_SAMPLER}.gaussian_var_prior": torch.eye(rank),
            f"{_SAMPLER}.expert_weights": torch.full((samples,), 1 / samples),
        }
