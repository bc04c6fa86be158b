"""X-LoRA in PEFT's folder: the network's tensors, and a folder ``0``, ``1``, ... for each of the adapters it mixes.

PEFT looks for these where the configuration's ``adapters`` says, from its working directory; who loads the folder says
where they lie. Its own ``save_pretrained`` (0.21.2) leaves out every tensor with an adapter's name in its path, such as
the network's ``layers.0``; a folder that lacks some is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle, handles
from addenda.errors import CheckpointError
from addenda.export.peft.form import Form, form
from addenda.methods.lora import LoRA
from addenda.methods.xlora import GateNetwork, XLoRA

__all__ = ["XLoRAForm"]

_NETWORK = "internal_xlora_classifier"
_MOST = 10
"""More adapters than this, and PEFT's sorted names no longer are in their order."""


@form
class XLoRAForm(Form):
    """PEFT's ``XLoraConfig``."""

    peft_type = "XLORA"
    method = XLoRA
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "embedding")
    reads: ClassVar[tuple[str, ...]] = (
        "adapters",
        "enable_softmax",
        "enable_softmax_topk",
        "global_scaling_weight",
        "hidden_size",
        "layerwise_scalings",
        "scaling_pass_value",
        "softmax_temperature",
        "top_k_lora",
        "xlora_depth",
        "xlora_dropout_p",
        "xlora_size",
    )
    harmless: ClassVar[tuple[str, ...]] = ("use_trainable_adapters",)
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "modules_to_save", "target_modules")
    names: ClassVar[tuple[str, ...]] = ()
    shared_names: ClassVar[tuple[str, ...]] = (_NETWORK,)
    why_unasked = "peft has to be told where the mixed adapters lie"

    def mixed(self, config: Mapping[str, Any]) -> list[str]:
        found = config.get("adapters")
        wanted = [str(place) for place in range(len(found))] if isinstance(found, dict) else []
        if not wanted or list(cast(dict[str, str], found)) != wanted:
            raise CheckpointError(
                f"the mixed adapters are called {list(found or ())}, and not 0, 1, ... in this order",
                hint="name them so, as PEFT asks, and save it again",
            )
        return wanted

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(XLoRA, handle.method)
        return {
            "adapters": {str(place): str(place) for place in range(len(method.of))},
            "enable_softmax": method.softmax,
            "enable_softmax_topk": method.softmax_of_top,
            "global_scaling_weight": method.weight,
            "hidden_size": method.hidden_size,
            "layerwise_scalings": method.layerwise,
            "scaling_pass_value": method.first_value,
            "softmax_temperature": method.temperature,
            "top_k_lora": method.top_k or None,
            "xlora_depth": method.depth,
            "xlora_dropout_p": method.dropout,
            "xlora_size": method.size,
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return XLoRA(
            of=tuple(config["adapters"]),
            softmax=config.get("enable_softmax", True),
            softmax_of_top=config.get("enable_softmax_topk", False),
            weight=config.get("global_scaling_weight", 1.0),
            hidden_size=config.get("hidden_size", 4096),
            layerwise=config.get("layerwise_scalings", False),
            first_value=config.get("scaling_pass_value", 0.0),
            temperature=config.get("softmax_temperature", 1.0),
            top_k=config.get("top_k_lora") or 0,
            depth=config.get("xlora_depth", 1),
            dropout=config.get("xlora_dropout_p", 0.2),
            size=config.get("xlora_size", 2048),
        )

    def problems(self, handle: Handle) -> list[str]:
        on_model = handles(handle.model)
        mixed = {name: on_model[name].method for name in handle.method.mixes()}
        odd = [name for name, method in mixed.items() if not isinstance(method, LoRA) or method.bias]
        found = [f"'{name}' is not plain LoRA without a bias, which is all that PEFT mixes" for name in odd]
        more = [name for name in mixed if set(on_model[name].paths) - set(handle.paths)]
        found += [
            f"'{name}' stands on layers that the mixture does not, and PEFT mixes it there too"
            for name in more
        ]
        if len(mixed) > _MOST:
            found.append(f"PEFT does not keep more than {_MOST} adapters in their order")
        return found

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        return {}

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        network = cast(GateNetwork, common)
        step = (
            3 if network.method.dropout else 2
        )  # between two linear layers lies a ReLU, and dropout if there is any
        pairs = enumerate(zip(network.weights, network.biases, strict=True))
        return {
            f"{_NETWORK}.layers.{step * place}.{name}": tensor
            for place, pair in pairs
            for name, tensor in zip(("weight", "bias"), pair, strict=True)
        }
