"""Whisper from the file of CTranslate2, in which a package carries it, as the transformers model."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy
import torch
import transformers
from torch import Tensor

_DTYPES = {0: numpy.float32, 1: numpy.int8, 2: numpy.int16, 3: numpy.int32, 4: numpy.float16}
_NORMS = {"gamma": "weight", "beta": "bias"}


def read_variables(path: Path) -> dict[str, Tensor]:
    """Return every variable of a CTranslate2 file of version 6."""

    def number(code: str) -> int:
        return struct.unpack(code, file.read(struct.calcsize(code)))[0]

    def text() -> str:
        return file.read(number("<H"))[:-1].decode()

    file: BinaryIO
    with path.open("rb") as file:
        assert number("<I") == 6
        text(), number("<I")
        found = {}
        for _ in range(number("<I")):
            name = text()
            shape = [number("<I") for _ in range(number("<B"))]
            dtype, size = _DTYPES[number("<B")], number("<I")
            values = numpy.frombuffer(file.read(size), dtype).reshape(shape)
            found[name] = torch.from_numpy(values.copy())
    return found


def whisper(path: Path) -> transformers.WhisperForConditionalGeneration:
    """Return the model; queries, keys and values lie under one another in the file, and keys have no bias."""
    variables = read_variables(path)
    width = variables["encoder/conv1/weight"].shape[0]
    layers = len(
        {
            name.split("/")[1]
            for name in variables
            if name.startswith("encoder/layer_") and "norm" not in name.split("/")[1]
        }
    )
    heads, inner = width // 64, variables["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", inner))
    }
    vocabulary = len(variables["decoder/embeddings/weight"])
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(vocab_size=vocabulary, d_model=width, **sides)
    )
    state: dict[str, Tensor] = {}
    for name, value in variables.items():
        if value.dim():
            _place(state, name.split("/"), value.float())
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def _place(state: dict[str, Tensor], names: list[str], value: Tensor) -> None:
    side, kind, *rest = names
    prefix = f"model.{side}."
    if kind in ("conv1", "conv2"):
        state[f"{prefix}{kind}.{rest[0]}"] = value
    elif kind == "embeddings":
        state[f"{prefix}embed_tokens.weight"] = value
    elif kind == "position_encodings":
        state[f"{prefix}embed_positions.weight"] = value
    elif kind == "layer_norm":
        state[f"{prefix}layer_norm.{_NORMS[rest[0]]}"] = value
    else:
        _place_in_layer(state, f"{prefix}layers.{kind.removeprefix('layer_')}.", rest, value)


def _place_in_layer(state: dict[str, Tensor], prefix: str, names: list[str], value: Tensor) -> None:
    block, part, what = names
    attention = {"self_attention": "self_attn", "attention": "encoder_attn"}.get(block)
    if part == "layer_norm":
        norm = f"{attention}_layer_norm" if attention else "final_layer_norm"
        state[f"{prefix}{norm}.{_NORMS[what]}"] = value
    elif attention is None:
        state[f"{prefix}fc{int(part[-1]) + 1}.{what}"] = value
    else:
        inputs = ("q", "k", "v") if block == "self_attention" else ()
        rows = {"linear_0": inputs or ("q",), "linear_1": () if inputs else ("k", "v"), "linear_2": ("out",)}
        targets = rows[part] or ("out",)
        for name, piece in zip(targets, value.chunk(len(targets)), strict=True):
            if (name, what) != ("k", "bias"):
                state[f"{prefix}{attention}.{name}_proj.{what}"] = piece.clone()
