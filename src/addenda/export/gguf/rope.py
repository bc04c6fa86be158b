"""Rotary positions as a GGUF file holds them: the base of the frequencies, and how they are stretched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from addenda.export.gguf.architectures import Value

__all__ = ["rope_factors", "rope_keys", "rope_problems"]

_CARRIED = ("default", "linear", "llama3", "yarn")


def _settings(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of layers that see everything, and of those with a window; {} where there are none."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        return rope["full_attention"], rope.get("sliding_attention") or {}
    return rope, {}


def rope_problems(config: Any) -> list[str]:
    """Return what of a config's rotary positions a GGUF file cannot hold."""
    far, near = _settings(config)
    kind = far.get("rope_type", "default")
    found = []
    if kind not in _CARRIED:
        found.append(f"its positions are stretched by '{kind}'; carried are {', '.join(_CARRIED)}")
    if kind == "llama3" and config.model_type not in ("llama", "mistral"):
        found.append(
            f"positions stretched by 'llama3' are carried for llama only, not for {config.model_type}"
        )
    if near.get("rope_type", "default") != "default":
        found.append(
            f"the positions of its windows are stretched by '{near['rope_type']}', which no key holds"
        )
    return found


def rope_keys(config: Any) -> dict[str, Value]:
    """Return the keys, without the architecture's name before them; {} for a model without rotary positions."""
    far, near = _settings(config)
    if not far:
        return {}
    keys: dict[str, Value] = {"rope.freq_base": float(far["rope_theta"])}
    if near:
        keys["rope.freq_base_swa"] = float(near["rope_theta"])
    kind = far.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(far["factor"])}
    if kind == "yarn":
        original = far.get("original_max_position_embeddings") or config.max_position_embeddings
        keys["rope.scaling.original_context_length"] = int(original)
        keys |= {
            f"rope.scaling.yarn_{name}": float(far[name])
            for name in ("beta_fast", "beta_slow")
            if far.get(name)
        }
    return keys


def rope_factors(config: Any) -> dict[str, Tensor]:
    """Return by what each frequency is divided, (rotated width / 2,) float32, where that is not the same for all.

    Llama 3.1 leaves waves that are short against the context it was first trained on as they are, divides long ones
    by a factor, and goes over from one to the other between (https://arxiv.org/abs/2407.21783).
    """
    far, _ = _settings(config)
    if far.get("rope_type") != "llama3":
        return {}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1 / far["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    waves = far["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the first context
    low, high, factor = far["low_freq_factor"], far["high_freq_factor"], far["factor"]
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / (kept + (1 - kept) / factor)).float()}
