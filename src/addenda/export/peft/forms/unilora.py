"""Uni-LoRA in PEFT's folder: ``unilora_theta_d`` once, and of each layer the indices, which PEFT may also draw anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.errors import CheckpointError
from addenda.export.peft.form import PREFIX, Form, form, layers_of
from addenda.methods.unilora import OneVector, UniLoRA, UniLoRAAdapter

__all__ = ["UniLoRAForm"]


@form
class UniLoRAForm(Form):
    """PEFT's ``UniLoraConfig``."""

    peft_type = "UNILORA"
    method = UniLoRA
    reads: ClassVar[tuple[str, ...]] = ("r", "theta_d_length", "proj_seed", "save_indices")
    harmless: ClassVar[tuple[str, ...]] = ("init_theta_d_bound", "init_weights", "unilora_dropout")
    names: ClassVar[tuple[str, ...]] = (
        "unilora_indices_A",
        "unilora_indices_B",
        "unilora_scales_A",
        "unilora_scales_B",
    )
    shared_names: ClassVar[tuple[str, ...]] = ("unilora_theta_d",)
    integers: ClassVar[tuple[str, ...]] = names[:2]

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(UniLoRA, handle.method)
        return {
            "r": method.rank,
            "theta_d_length": method.size,
            "save_indices": True,
            "unilora_dropout": 0.0,
            "bias": "none",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return UniLoRA(rank=config.get("r", 4), size=config.get("theta_d_length", 256))

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Draw the indices as PEFT does where it has not saved them."""
        if config.get("save_indices"):
            return dict(config), dict(tensors)
        rank, size = config.get("r", 4), config.get("theta_d_length", 256)
        shapes = {}
        for path, layer in layers_of(model, config).items():
            shapes[f"{PREFIX}{path}.unilora_%s_A"] = (rank, layer.d_in)
            shapes[f"{PREFIX}{path}.unilora_%s_B"] = (layer.d_out, rank)
        drawn = _drawn(sum(m * n for m, n in shapes.values()), size, config.get("proj_seed", 42))
        scales = drawn.bincount(minlength=size).clamp_min(1).float().rsqrt()
        found = dict(tensors)
        parts = drawn.split([m * n for m, n in shapes.values()])
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            found[name % "indices"] = part.view(shape)
            found[name % "scales"] = scales[part].view(shape)
        return dict(config), found

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(UniLoRAAdapter, adapter)
        of_A, of_B = ours.indices()
        scales = ours.common.scales
        return dict(zip(self.names, (of_A, of_B, scales[of_A], scales[of_B]), strict=True))

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        """Write the indices; the scale of an entry of the vector is the same wherever it is used."""
        ours = cast(UniLoRAAdapter, adapter)
        scales = ours.common.scales
        for place, side in zip(ours.indices(), "AB", strict=True):
            indices, wanted = (
                given[f"unilora_indices_{side}"].long(),
                given[f"unilora_scales_{side}"].to(scales),
            )
            if not bool(((indices >= 0) & (indices < len(scales))).all()):
                raise _unfit(f"unilora_indices_{side} of '{layer.path}' points beyond the vector")
            place.copy_(indices)
            scales[indices.flatten()] = wanted.flatten()
            if not torch.equal(scales[indices], wanted):
                raise _unfit(f"unilora_scales_{side} of '{layer.path}' gives one number several scales")

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        return {"unilora_theta_d": cast(OneVector, common).theta}


def _drawn(count: int, size: int, seed: int) -> Tensor:
    """Return ``count`` indices below ``size``, each as often as any other or once more, as PEFT shuffles them."""
    draws = np.random.default_rng(seed)
    often, more = divmod(count, size)
    indices = np.repeat(np.arange(size), often)
    if more:
        indices = np.concatenate([indices, draws.choice(size, size=more, replace=False)])
    draws.shuffle(indices)
    return torch.from_numpy(indices)


def _unfit(problem: str) -> CheckpointError:
    return CheckpointError(
        problem, hint="save it again with PEFT, with save_indices=False or unchanged indices"
    )
