"""WaveFT in PEFT's folder: one ``waveft_spectrum`` a layer, and the seed of its places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from addenda.core.contract import Method
from addenda.core.handle import Handle
from addenda.export.peft.form import form
from addenda.export.peft.spectra import SpectralForm
from addenda.methods.waveft import WaveFT

__all__ = ["WaveFTForm"]


@form
class WaveFTForm(SpectralForm):
    """PEFT's ``WaveFTConfig``."""

    peft_type = "WAVEFT"
    method = WaveFT
    reads: ClassVar[tuple[str, ...]] = (
        "n_frequency",
        "n_frequency_pattern",
        "proportional_parameters",
        "random_loc_seed",
        "scaling",
        "use_idwt",
        "wavelet_family",
    )
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)
    names: ClassVar[tuple[str, ...]] = ("waveft_spectrum",)

    def settings(self, handle: Handle) -> dict[str, Any]:
        wavelet = cast(WaveFT, handle.method).wavelet
        return {
            **super().settings(handle),
            "use_idwt": wavelet != "none",
            "wavelet_family": {"none": "db1", "haar": "db1"}.get(wavelet, wavelet),
        }

    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        return WaveFT(
            scaling=config.get("scaling", 25.0),
            wavelet=config.get("wavelet_family", "db1") if config.get("use_idwt", True) else "none",
            **self.common_settings(config, tensors, 2592),
        )
