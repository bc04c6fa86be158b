"""How bitsandbytes keeps a linear layer's weight in a model folder, and what tells transformers so.

A weight of four bits is six or so tensors: the codes, each block's largest magnitude, the sixteen levels, and a short
JSON text; under double quantisation the magnitudes are codes too. One of eight bits is its codes and a magnitude for
each row. They are named after the layer.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from addenda.bases import formats
from addenda.bases.formats import WeightFormat
from addenda.bases.formats.bits import singles
from addenda.bases.formats.normal import LEVELS, to_bitsandbytes

__all__ = ["own_format", "packed_again", "packed_as", "quantizer_of", "settings_for", "tensors_of"]


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


def own_format(layer: Any) -> str | None:
    """Return which of INT8 and NF4 a layer of bitsandbytes is in, its blocks of four bits ours; or None."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return "INT8"
    block = formats.get("NF4").block
    alike = (state.quant_type, state.blocksize, layer.in_features % block) == ("nf4", block, 0)
    return "NF4" if alike else None


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
    codes, made = _functional().quantize_4bit(
        weight,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=layer.weight.dtype,
    )
    made.dtype = state.dtype
    return _parts(codes, made)


def packed_as(layer: Any, raw: Tensor) -> dict[str, Tensor]:
    """Return raw rows of a layer's `own_format` in its layout."""
    if getattr(layer.weight, "quant_state", None) is None:
        return _eight_bits(raw)
    codes, absmax = to_bitsandbytes(raw)
    made = copy.copy(layer.weight.quant_state)
    if made.nested:
        made.offset = absmax.mean()
        made.absmax, made.state2 = _functional().quantize_blockwise(
            absmax - made.offset, blocksize=made.state2.blocksize
        )
    else:
        made.absmax = absmax
    return _parts(codes.view(layer.weight.dtype), made)


def _parts(codes: Tensor, state: Any) -> dict[str, Tensor]:
    parts = {f".weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {".weight": codes, **parts}


def _functional() -> Any:
    return importlib.import_module("bitsandbytes.functional")
