"""BD-LoRA in PEFT's folder: LoRA's tensors, the factor in blocks narrower; parts of paths say which that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.handle import Handle
from addenda.export.peft.form import Form, form
from addenda.export.peft.forms.lora import READS, LowRankForm, read_low_rank
from addenda.methods.bd_lora import BDLoRA

__all__ = ["BDLoRAForm"]

_KEYS = {"A": "target_modules_bd_a", "B": "target_modules_bd_b"}


@form
class BDLoRAForm(LowRankForm):
    """PEFT's ``LoraConfig(use_bdlora=...)``."""

    method = BDLoRA
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[tuple[str, ...]] = (*READS, "use_bdlora")
    names: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")
    mark = "use_bdlora"

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(BDLoRA, handle.method)
        blocks: dict[str, Any] = {"nblocks": method.blocks, "match_strict": False}
        for factor, key in _KEYS.items():
            blocks[key] = [path for path in handle.paths if method.in_blocks(path) == factor]
        return {**super().settings(handle), "use_bdlora": blocks}

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> BDLoRA:
        given = config["use_bdlora"]
        chosen = {path: _in_blocks(path, given) for path in paths}
        return BDLoRA(
            **read_low_rank(config),
            blocks=given.get("nblocks", 1),
            divided_inputs=tuple(path for path, factor in chosen.items() if factor == "A"),
            undivided=tuple(path for path, factor in chosen.items() if factor is None),
        )

    def problems(self, handle: Handle) -> list[str]:
        method, written = cast(BDLoRA, handle.method), self.settings(handle)["use_bdlora"]
        return Form.problems(self, handle) + [
            f"PEFT looks for names within names, and takes '{path}' for another layer"
            for path in handle.paths
            if _in_blocks(path, written) != method.in_blocks(path)
        ]


def _in_blocks(path: str, given: Mapping[str, Any]) -> str | None:
    """Which factor PEFT has in blocks: it looks for each name anywhere in the path."""
    found = (f for f, key in _KEYS.items() if any(part in path for part in given.get(key) or ()))
    return next(found, None)
