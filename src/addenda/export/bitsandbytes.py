"""How bitsandbytes keeps a linear layer's weight in a model folder, and what tells transformers so.

A weight of four bits is six or so tensors: the codes, each block's largest magnitude, the sixteen levels, and a short
JSON text; under double quantisation the magnitudes are codes too. One of eight bits is its codes and a magnitude for
each row. They are named after the layer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from addenda.bases import formats
from addenda.bases.formats import WeightFormat
from addenda.bases.formats.bits import singles
from addenda.bases.formats.normal import LEVELS, to_bitsandbytes

__all__ = ["exact_weight", "packed_again", "quantizer_of", "settings_for", "tensors_of"]


def tensors_of(raw: Tensor, entry: WeightFormat, d_in: int) -> dict[str, Tensor]:
    """Return raw rows of NF4 or INT8 as bitsandbytes keeps them, by what follows the layer's name.

    Args:
        raw: ``(d_out, bytes of a row)`` uint8.
        entry: their format.
        d_in: features of the input.

    Returns:
        For NF4 the codes ``(d_out * d_in / 2, 1)`` uint8, each 64 weights' magnitude in float32, levels and facts; for
        INT8 the codes ``(d_out, d_in)`` int8 and each row's magnitude in float32.
    """
    if entry.name == "INT8":
        return _eight_bits(raw)
    codes, absmax = to_bitsandbytes(raw)
    facts = {"quant_type": "nf4", "blocksize": entry.block, "dtype": "float32", "shape": [len(raw), d_in]}
    text = json.dumps(facts).encode()
    return {
        ".weight": codes,
        ".weight.absmax": absmax,
        ".weight.quant_map": torch.tensor(LEVELS),
        ".weight.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(text), dtype=torch.uint8),
    }


def _eight_bits(raw: Tensor) -> dict[str, Tensor]:
    return {
        ".weight": raw[:, 4:].contiguous().view(torch.int8),
        ".SCB": singles(raw[:, :4])[:, 0],
        ".weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def settings_for(entry: WeightFormat, dense: Sequence[str], computed: str) -> dict[str, Any]:
    """Return what ``config.json`` says of a model whose linear layers are in NF4 or INT8.

    Args:
        entry: the format.
        dense: paths of the linear layers that are not.
        computed: the dtype in which weights of four bits are multiplied.
    """
    four = entry.name == "NF4"
    made: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "llm_int8_skip_modules": list(dense),
    }
    if four:
        made |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": computed,
        }
    return made


# ------------------------------------------------------------------------------------------- layers of its own


def quantizer_of(model: nn.Module) -> str | None:
    """Return the library that quantized a model of transformers, as its configuration names it; None for none."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is None:
        return None
    named = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(named, "value", named))


def exact_weight(layer: Any) -> Tensor:
    """Return what a layer of bitsandbytes multiplies with where it computes in float32, ``(d_out, d_in)``."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        scale = _row_magnitudes(layer) * (1 / 127)
        return weight.data.float() * scale[:, None]
    from bitsandbytes.functional import dequantize_4bit

    wide = copy.copy(state)
    wide.dtype = torch.float32
    found: Tensor = dequantize_4bit(weight.data, wide)
    return found


def _row_magnitudes(layer: Any) -> Tensor:
    held = layer.state.SCB  # there from the first forward on
    found: Tensor = layer.weight.SCB if held is None else held
    return found.float()


def packed_again(layer: Any, weight: Tensor) -> dict[str, Tensor]:
    """Round another weight to the layout that a layer of bitsandbytes has its own in.

    Args:
        layer: of four bits, in whatever type, blocks and statistics; or of eight.
        weight: ``(d_out, d_in)`` float32.

    Returns:
        Its tensors by what follows the layer's name.
    """
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return _eight_bits(formats.get("INT8").quantize(weight))
    from bitsandbytes.functional import quantize_4bit

    codes, made = quantize_4bit(
        weight,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=layer.weight.dtype,
    )
    made.dtype = state.dtype
    parts = {f".weight.{part}": tensor for part, tensor in made.as_dict(packed=True).items()}
    return {".weight": codes, **parts}
