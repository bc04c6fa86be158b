"""ShadowPEFT in PEFT's folder: the mirror under ``shadow_backbone``, and tensors of their own on each block.

PEFT has an update behind the last block as well, where nothing reads the shadow, and in some models an embedding in the
mirror that it never looks tokens up in: what is written there is zero, and what is read is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.layers import layer_at
from addenda.core.mirror import blocks_of
from addenda.core.targets import adaptable
from addenda.errors import CheckpointError
from addenda.export.peft.form import PREFIX, SHARED_PREFIX, Form, form
from addenda.methods.shadow import Shadow, ShadowAdapter

__all__ = ["ShadowForm"]

_MIRROR = f"{SHARED_PREFIX}shadow_backbone.default."
_OF_BLOCK = {"down": "shadow_down.default.weight", "up": "shadow_up.default.weight"}
_BETWEEN = {
    f"{ours}_{part}": f"shadow_update_{ours}.default.{theirs}"
    for ours in ("transform", "gate")
    for part, theirs in {
        "in": "0.weight",
        "in_bias": "0.bias",
        "out": "2.weight",
        "out_bias": "2.bias",
    }.items()
}


@form
class ShadowForm(Form):
    """PEFT's ``ShadowConfig`` with a mirror of the base's own sizes."""

    peft_type = "SHADOW"
    method = Shadow
    kinds: ClassVar[tuple[str, ...]] = ("transformer",)
    of_model = True
    why_unasked = "peft makes its mirror of a model's own class"
    reads: ClassVar[tuple[str, ...]] = (
        "r",
        "shadow_alpha",
        "shadow_dropout",
        "shadow_num_hidden_layers",
        "update_hidden_size",
        "shadow_model",
        "share_embeddings",
    )
    harmless: ClassVar[tuple[str, ...]] = ("auxiliary_loss_weight", "init_weights")
    unknown: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)
    names: ClassVar[tuple[str, ...]] = (*_OF_BLOCK, *_BETWEEN, "mirror")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(Shadow, handle.method)
        return {
            "r": method.rank,
            "shadow_alpha": method.alpha,
            "shadow_dropout": method.dropout,
            "shadow_num_hidden_layers": method.layers,
            "update_hidden_size": method.inner,
            "shadow_model": "mirror",
            "share_embeddings": True,
            "auxiliary_loss_weight": 0.0,
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return Shadow(
            rank=config.get("r", 8),
            layers=config.get("shadow_num_hidden_layers") or 1,
            alpha=config.get("shadow_alpha", 0.1),
            inner=config.get("update_hidden_size"),
            dropout=config.get("shadow_dropout", 0.2),
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(ShadowAdapter, adapter)
        own = {name: cast(Tensor, getattr(ours, name)) for name in (*_OF_BLOCK, *_BETWEEN)}
        return {**own, "mirror": torch.cat([parameter.flatten() for _, parameter in _of_mirror(ours)])}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        ours = cast(ShadowAdapter, adapter)
        with torch.no_grad():
            for name in (*_OF_BLOCK, *_BETWEEN):
                cast(Tensor, getattr(ours, name)).copy_(given[name])
            parameters = [parameter for _, parameter in _of_mirror(ours)]
            pieces = given["mirror"].split([parameter.numel() for parameter in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.copy_(piece.view_as(parameter))

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        blocks = _blocks(model)
        problems = []
        if config.get("share_embeddings") is False or config.get("shadow_model", "mirror") != "mirror":
            problems.append("its mirror is no plain one that is given the base's embeddings")
        if set(config.get("target_modules") or blocks) != set(blocks):
            problems.append("it stands on some of the blocks only")
        wanted = {
            f"{PREFIX}{path}.{name}" for path in blocks for name in (*_OF_BLOCK.values(), *_BETWEEN.values())
        }
        own = {key: value for key, value in tensors.items() if not key.startswith(_MIRROR)}
        if own.keys() != wanted:
            problems.append(f"{len(own.keys() ^ wanted)} of its tensors are missing or belong to nothing")
        if problems:
            raise CheckpointError(
                f"the shadow cannot be read: {'; '.join(problems)}", hint="copy the folder anew"
            )
        mirror = {
            key.removeprefix(_MIRROR): value for key, value in tensors.items() if key.startswith(_MIRROR)
        }
        mirror.pop(_unused(_transformer(model)), None)
        used = [mirror[name].flatten() for name in sorted(mirror)]
        found = {
            ours: torch.stack([own[f"{PREFIX}{path}.{theirs}"] for path in blocks])
            for ours, theirs in _OF_BLOCK.items()
        }
        for ours, theirs in _BETWEEN.items():
            every = [own[f"{PREFIX}{path}.{theirs}"] for path in blocks]
            found[ours] = torch.stack(every)[:-1]
        found["mirror"] = torch.cat(used) if used else torch.empty(0)
        return {**config, "target_modules": None}, found

    def together(
        self, handle: Handle, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        [(path, adapter)] = handle.adapters.items()
        blocks, found = _blocks(handle.model), {}
        for place, block in enumerate(blocks):
            for ours, theirs in {**_OF_BLOCK, **_BETWEEN}.items():
                stacked = tensors[ours]
                last = place == len(stacked)  # behind it nothing reads the shadow
                value = torch.zeros(stacked.shape[1:]) if last else stacked[place].clone()
                found[f"{PREFIX}{block}.{theirs}"] = value
        for name, parameter in _of_mirror(cast(ShadowAdapter, adapter)):
            found[_MIRROR + name] = parameter.detach().float().cpu().contiguous()
        transformer = cast(Any, layer_at(handle.model, path))
        if unused := _unused(transformer):
            found[_MIRROR + unused] = torch.zeros(transformer.get_input_embeddings().weight.shape)
        return {**config, "target_modules": blocks}, found


def _of_mirror(adapter: ShadowAdapter) -> list[tuple[str, nn.Parameter]]:
    """The mirror's parameters in the order of their names."""
    return sorted(adapter.mirror.named_parameters())


def _transformer(model: nn.Module) -> nn.Module:
    """The transformer in a model."""
    return next(module for module, kind in adaptable(model).values() if kind.name == "transformer")


def _blocks(model: nn.Module) -> list[str]:
    """Paths of its blocks."""
    names = {id(module): path for path, module in model.named_modules()}
    return [names[id(block)] for block in blocks_of(_transformer(model))]


def _unused(transformer: Any) -> str:
    """Name of the embedding that PEFT leaves in a mirror though it looks nothing up there; empty where it does not."""
    embedding = transformer.get_input_embeddings()
    name = next(path for path, module in transformer.named_modules() if module is embedding)
    return "" if name == "embed_tokens" else f"{name}.weight"
