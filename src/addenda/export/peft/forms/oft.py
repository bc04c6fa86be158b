"""OFT in PEFT's folder: ``oft_R.weight`` (blocks, b * (b - 1) / 2), at an embedding ``oft_embedding_R.weight``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.errors import CheckpointError
from addenda.export.peft.form import Form, form
from addenda.export.peft.rotations import exact_and_terms, series_problems
from addenda.methods.oft import OFT, OFTAdapter

__all__ = ["OFTForm"]

# Since then the last term of PEFT's series counts once.
_SERIES_SINCE = (0, 18)


@form
class OFTForm(Form):
    """PEFT's ``OFTConfig``. Its exact rotation is the inverse of ours, its series is not."""

    peft_type = "OFT"
    method = OFT
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")
    reads: ClassVar[tuple[str, ...]] = (
        "r",
        "oft_block_size",
        "block_share",
        "coft",
        "eps",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
    )
    harmless: ClassVar[tuple[str, ...]] = ("init_weights", "module_dropout")
    names: ClassVar[tuple[str, ...]] = ("oft_R.weight", "oft_embedding_R.weight")

    def settings(self, handle: Handle) -> dict[str, Any]:
        method = cast(OFT, handle.method)
        return {
            "r": method.blocks or 0,
            "oft_block_size": 0 if method.blocks else method.block_size,
            "block_share": method.shared,
            "coft": method.freedom is not None,
            "eps": method.freedom or 6e-5,
            "use_cayley_neumann": not method.exact,
            "num_cayley_neumann_terms": method.terms,
            "module_dropout": 0.0,
            "bias": "none",
            "peft_version": ".".join(map(str, (*_SERIES_SINCE, 0))),
        }

    def problems(self, handle: Handle) -> list[str]:
        method = cast(OFT, handle.method)
        return series_problems(method.terms) if not method.exact else []

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        exact, terms = exact_and_terms(config)
        if not exact and _version(config.get("peft_version")) < _SERIES_SINCE:
            raise CheckpointError(
                "the rotation is a series of PEFT before 0.18, which is computed otherwise today",
                where={"peft_version": config.get("peft_version")},
                hint="train it anew; PEFT itself warns that it reads such a file wrongly",
            )
        return OFT(
            block_size=config.get("oft_block_size") or 32,
            blocks=config.get("r") or None,
            shared=bool(config.get("block_share")),
            exact=exact,
            terms=terms,
            freedom=config.get("eps", 6e-5) if config.get("coft") else None,
        )

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        ours = cast(OFTAdapter, adapter)
        name = "oft_embedding_R.weight" if layer.kind == "embedding" else "oft_R.weight"
        return {name: -ours.generator if ours.settings.exact else ours.generator}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        ours = cast(OFTAdapter, adapter)
        [theirs] = given.values()
        with torch.no_grad():
            ours.generator.copy_(-theirs if ours.settings.exact else theirs)


def _version(text: object) -> tuple[int, ...]:
    """The first two numbers of a version; (0, 0) where there is none."""
    found = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    return tuple(map(int, found.groups())) if found else (0, 0)
