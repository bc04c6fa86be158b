"""What the forms of FourierFT and WaveFT share: PEFT keeps a seed where the coefficients' places are kept here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.core.spectral import SpectralAdapter, SpectralMethod, drawn_places
from addenda.export.peft.form import Form
from addenda.export.peft.layers import common_and_others, sizes_at

__all__ = ["SpectralForm"]


class SpectralForm(Form):
    """A spectrum a layer, (coefficients,); its places are drawn again when it is read."""

    def settings(self, handle: Handle) -> dict[str, Any]:
        """Return the numbers of coefficients, the scaling and the seed under PEFT's keys."""
        method = cast(SpectralMethod, handle.method)
        common, others = common_and_others({path: method.count_at(path) for path in handle.paths})
        return {
            "n_frequency": common,
            "n_frequency_pattern": others,
            "scaling": method.scaling,
            "random_loc_seed": method.seed,
            "init_weights": True,
            "bias": "none",
        }

    def problems(self, handle: Handle) -> list[str]:
        """Return whose places another generator has drawn."""
        seed = cast(SpectralMethod, handle.method).seed
        drawn = {path: cast(SpectralAdapter, adapter) for path, adapter in handle.adapters.items()}
        other = [path for path, ours in drawn.items() if not torch.equal(_drawn(ours), ours.places.cpu())]
        return [f"the places at '{other[0]}' are not those that seed {seed} draws here"] if other else []

    def common_settings(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], count: int
    ) -> dict[str, Any]:
        """Return our settings, with PEFT's default ``count`` of coefficients."""
        count = config.get("n_frequency", count)
        others = {path: size for path, size in sizes_at(tensors, self.names[0]).items() if size != count}
        return {"coefficients": count, "counts": others, "seed": config.get("random_loc_seed", 777)}

    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        """Return the spectrum under PEFT's name."""
        return {self.names[0]: cast(SpectralAdapter, adapter).spectrum}

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        """Write the spectrum, and draw its places again."""
        super().fill(adapter, layer, given)
        ours = cast(SpectralAdapter, adapter)
        ours.places.copy_(_drawn(ours))


def _drawn(adapter: SpectralAdapter) -> Tensor:
    return drawn_places(len(adapter.places), adapter.d_out, adapter.d_in, adapter.settings.seed)
