"""RandLoRA in PEFT's folder: two matrices of scales a layer, and the bases, which PEFT repeats at every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.products import FrozenPair
from addenda.export.peft.form import PREFIX, SHARED_PREFIX, Form, agreed, form, layers_of, seeded
from addenda.methods.randlora import RandLoRA, RandLoRAAdapter

__all__ = ["RandLoRAForm"]

_BASES = ("randlora_A", "randlora_B")


@form
class RandLoRAForm(Form):
    """PEFT's ``RandLoraConfig``."""

    peft_type = "RANDLORA"
    method = RandLoRA
    reads: ClassVar[tuple[str, ...]] = (
        "r",
        "randlora_alpha",
        "sparse",
        "very_sparse",
        "projection_prng_key",
        "save_projection",
    )
    harmless: ClassVar[tuple[str, ...]] = ("init_weights", "randlora_dropout")
    names: ClassVar[tuple[str, ...]] = ("randlora_lambda", "randlora_gamma")
    shared_names: ClassVar[tuple[str, ...]] = _BASES

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(RandLoRA, handle.method)
        alpha = method.scaling * method.rank
        return {
            "r": method.rank,
            "randlora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "sparse": method.bases == "sparse",
            "very_sparse": method.bases == "very-sparse",
            "save_projection": True,
            "randlora_dropout": 0.0,
            "bias": "none",
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        sparse = "very-sparse" if config.get("very_sparse") else "sparse" if config.get("sparse") else "dense"
        return RandLoRA(rank=config.get("r", 32), alpha=config.get("randlora_alpha", 640), bases=sparse)

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Drop the copies of the bases, and draw them as PEFT does where it has not saved them."""
        copies = tuple(f".{name}" for name in _BASES)
        found = {k: t for k, t in tensors.items() if not (k.startswith(PREFIX) and k.endswith(copies))}
        if not config.get("save_projection", True) and not any(
            SHARED_PREFIX + name in found for name in _BASES
        ):
            agreed(config, "r", 32, (len(t) for k, t in found.items() if k.endswith(".randlora_lambda")))
            method = cast(RandLoRA, self.read_settings(config, (), found))
            layers = layers_of(model, config).values()
            sides = max(layer.d_in for layer in layers), max(layer.d_out for layer in layers)
            generator = seeded(config, "projection_prng_key", 0)
            found[f"{SHARED_PREFIX}randlora_A"] = method.draw_smaller(min(sides), generator)
            found[f"{SHARED_PREFIX}randlora_B"] = method.draw_larger(min(sides), max(sides), generator)
        return dict(config), found

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(RandLoRAAdapter, adapter)
        return {"randlora_lambda": ours.rows, "randlora_gamma": ours.columns}

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        bases = cast(FrozenPair, common)
        return {"randlora_A": bases.A, "randlora_B": bases.B}
