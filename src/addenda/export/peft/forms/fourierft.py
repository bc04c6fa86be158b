"""FourierFT in PEFT's folder: one ``fourierft_spectrum`` a layer, and the seed of its places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from addenda.core.contract import Method
from addenda.export.peft.form import form
from addenda.export.peft.spectra import SpectralForm
from addenda.methods.fourierft import FourierFT

__all__ = ["FourierFTForm"]


@form
class FourierFTForm(SpectralForm):
    """PEFT's ``FourierFTConfig``."""

    peft_type = "FOURIERFT"
    method = FourierFT
    reads: ClassVar[tuple[str, ...]] = ("n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling")
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    names: ClassVar[tuple[str, ...]] = ("fourierft_spectrum",)

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return FourierFT(scaling=config.get("scaling", 150.0), **self.common_settings(config, tensors, 1000))
