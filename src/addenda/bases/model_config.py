"""Read a model folder's config.json into a config object, after refusing what could run code or cannot be true."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from addenda.bases.guard import check_settings
from addenda.errors import BaseModelError, MissingDependencyError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["load_config", "quiet_transformers"]

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_QUANTIZERS = ("bitsandbytes", "torchao")
_SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def load_config(folder: Path, *, tensors: int) -> tuple[PreTrainedConfig, Literal["causal-lm", "encoder"]]:
    """Return the folder's config object and what the model does.

    Args:
        folder: a model folder.
        tensors: number of tensors in its weight files: a config with more layers than that is refused before it
            could allocate anything.

    Raises:
        UnsafeError: a settings file could bring code along.
        BaseModelError: the config is damaged, unknown, or of a kind that is not loaded here.
        MissingDependencyError: the weights are quantized by a library that is not installed.
        NotFoundError: there is no config.
    """
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.is_file():  # transformers would attach it without a word
        raise BaseModelError(
            f"this folder holds an adapter{' beside the base' if path.is_file() else ', not a base'}",
            where={"file": adapter},
            hint="load a base from a folder of its own, then load the adapter on it",
        )
    settings = check_settings(path)
    for other in _SETTINGS:
        if (folder / other).is_file():
            check_settings(folder / other)
    _require_readable(settings, path)
    for key in _DEPTH_KEYS:
        depth = settings.get(key)
        if isinstance(depth, int) and depth > tensors:
            raise BaseModelError(
                f"'{key}' is {depth:,} but the files hold {tensors} tensors",
                where={"file": path},
                hint="take config.json and weights from the same model",
            )
    return _config_object(settings, path), _kind(settings, path)


def _require_readable(settings: dict[str, Any], path: Path) -> None:
    """Refuse quantized weights unless they are of a library whose layers can be adapted, and it is installed."""
    packing = settings.get("quantization_config")
    if packing is None:
        return
    library = packing.get("quant_method") if isinstance(packing, dict) else packing
    if library not in _QUANTIZERS:
        raise BaseModelError(
            f"these weights are packed by '{library}', which is not read here",
            where={"file": path, "read": ", ".join(_QUANTIZERS)},
            hint="take the model's unpacked weights, or a GGUF file of it",
        )
    missing = [name for name in (library, "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"weights quantized by {library} need '{missing[0]}', which is not installed",
            hint="pip install 'addenda[quantized]'",
        )


def _config_object(settings: dict[str, Any], path: Path) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = settings.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        near = nearest(str(family), list(CONFIG_MAPPING.keys()))
        raise BaseModelError(
            f"model type {family!r} is not one transformers knows",
            where={"file": path},
            hint=f"nearest: {', '.join(near)}" if near else "a newer transformers may know it",
        )
    damage = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError)
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[family].from_dict(settings)
    except damage as error:
        raise BaseModelError(
            f"'config.json' is not a valid {family} config: {error}",
            where={"file": path},
            hint="fetch the file again, or take the one of the model it was made from",
        ) from error


def _kind(settings: dict[str, Any], path: Path) -> Literal["causal-lm", "encoder"]:
    from transformers.models.auto import modeling_auto

    heads = settings.get("architectures") or [
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(settings["model_type"], "none")
    ]
    head = heads[0] if isinstance(heads, list) else heads
    if head in _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return "causal-lm"
    if head in _names(modeling_auto.MODEL_MAPPING_NAMES):
        return "encoder"
    raise BaseModelError(
        f"architecture '{head}' is neither a causal language model nor a plain encoder",
        where={"file": path, "model type": settings["model_type"]},
        hint="in Python any nn.Module is a base: load it yourself and pass it to addenda.attach",
    )


def _names(mapping: Any) -> set[str]:
    names: set[str] = set()
    for value in mapping.values():
        names |= set(value) if isinstance(value, tuple | list) else {value}
    return names


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing progress bars and printing reports: callers get errors and events instead."""
    from transformers.utils import logging as transformers_logging

    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
