"""Load a model folder in Hugging Face layout: checked settings, safetensors only, nothing newly initialised."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from addenda.bases.guard import check_settings, weight_files
from addenda.bases.loaded import LoadedBase
from addenda.bases.template import NO_TEMPLATE, check_template, template_sha256, tokenizer_sha256
from addenda.errors import BaseModelError, NotFoundError, OutOfMemory, UnsafeError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["load_config", "load_tokenizer", "open_directory", "quiet_transformers"]

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx")
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def open_directory(
    folder: Path,
    *,
    name: str,
    source: str,
    dtype: torch.dtype | None = None,
    license_name: str | None = None,
    notes: tuple[str, ...] = (),
) -> LoadedBase:
    """Load the model, tokenizer and template in ``folder``.

    Args:
        folder: holds config.json, safetensors weights and tokenizer.json.
        name: for `LoadedBase.name`.
        source: for `LoadedBase.source`.
        dtype: of the parameters; None keeps the stored one, but widens float16 to float32, which CPUs compute well.
        license_name: for `LoadedBase.license`; None reads it from the folder's README.
        notes: added before the loader's own.

    Raises:
        UnsafeError: the folder could run code.
        BaseModelError: a file is damaged, or weights and config do not fit each other exactly.
        NotFoundError: a needed file is missing.
    """
    weights = weight_files(folder)
    config, kind = load_config(folder, tensors=_tensor_count(weights))
    tokenizer = load_tokenizer(folder, config)
    dtype = dtype or _compute_dtype(weights)
    model = _load_model(folder, config, kind, dtype)
    context, context_notes = _context_length(config, tokenizer)
    template = _template(tokenizer) if kind == "causal-lm" else None
    template_notes = (
        () if template or kind == "encoder" else (f"{NO_TEMPLATE}: not trained on conversations",)
    )
    return LoadedBase(
        name=name,
        source=source,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        kind=kind,
        chat_template=template,
        template_sha256=template_sha256(template),
        tokenizer_sha256=tokenizer_sha256(folder),
        context_length=context,
        license=license_name or _license(folder),
        notes=(*notes, *context_notes, *template_notes),
    )


def load_config(
    folder: Path, *, tensors: int | None = None
) -> tuple[PreTrainedConfig, Literal["causal-lm", "encoder"]]:
    """Return the folder's config object and what the model does, after every check on its settings.

    ``tensors`` is the number of tensors in the weight files: a config with more layers than that is refused before
    it could allocate anything.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise BaseModelError("this folder holds an adapter, not a base", where={"folder": folder})
    settings = check_settings(path)
    for other in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / other).is_file():
            check_settings(folder / other)
    if (folder / "adapter_config.json").is_file():
        # transformers would attach it without a word
        raise BaseModelError(
            "this folder holds an adapter beside the base",
            where={"file": folder / "adapter_config.json"},
            hint="move the adapter elsewhere, load the base, then load the adapter on it",
        )
    if (packing := settings.get("quantization_config")) is not None:
        packing = packing.get("quant_method") if isinstance(packing, dict) else packing
        raise BaseModelError(
            f"these weights are packed by '{packing}', which is not read here",
            where={"file": path},
            hint="take the model's unpacked weights, or a GGUF file of it",
        )
    for key in _DEPTH_KEYS:
        depth = settings.get(key)
        if tensors is not None and isinstance(depth, int) and depth > tensors:
            raise BaseModelError(
                f"'{key}' is {depth:,} but the files hold {tensors} tensors", where={"file": path}
            )
    return _config_object(settings, path), _kind(settings, path)


def _config_object(settings: dict[str, Any], path: Path) -> PreTrainedConfig:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = settings.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        near = nearest(str(family), list(CONFIG_MAPPING.keys()))
        raise BaseModelError(
            f"model type {family!r} is not one transformers knows",
            where={"file": path},
            hint=f"nearest: {', '.join(near)}" if near else "a newer transformers may know it",
        )
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[family].from_dict(settings)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise BaseModelError(
            f"'config.json' is not a valid {family} config: {error}", where={"file": path}
        ) from error
    except Exception as error:
        # The config classes raise their own validation errors, which derive from Exception alone.
        if type(error).__module__.startswith("huggingface_hub"):
            message = f"'config.json' is not a valid {family} config: {error}"
            raise BaseModelError(message, where={"file": path}) from error
        raise


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


def load_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Return the folder's tokenizer, which must come as tokenizer.json."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
        raise NotFoundError(
            "no 'tokenizer.json', so text cannot be turned into tokens",
            where={"folder": folder, "tokenizer files found": ", ".join(present) or "none"},
            hint="AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes one",
        )
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), config=config, local_files_only=True)
        except MemoryError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise BaseModelError(
                f"the tokenizer cannot be read: {error}", where={"folder": folder}
            ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise BaseModelError(
            f"'{type(tokenizer).__name__}' is not backed by 'tokenizer.json'", where={"folder": folder}
        )
    return tokenizer


def _load_model(folder: Path, config: PreTrainedConfig, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForCausalLM

    loader = AutoModelForCausalLM if kind == "causal-lm" else AutoModel
    with quiet_transformers():
        try:
            model, info = loader.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, all at once
            )
        except MemoryError as error:
            raise OutOfMemory("the model does not fit into memory", where={"folder": folder}) from error
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise BaseModelError(
                f"the weights cannot be loaded: {error}", where={"folder": folder}
            ) from error
    _require_exact(info, folder)
    return model.eval()


def _require_exact(info: dict[str, Any], folder: Path) -> None:
    """Raise unless every parameter came from the files and every tensor of the files was used."""
    kinds = {
        "missing from the files": sorted(info["missing_keys"]),
        "in the files but not in the model": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
        "not readable": sorted(map(str, info["error_msgs"])),
    }
    problems = {what: keys for what, keys in kinds.items() if keys}
    if problems:
        raise BaseModelError(
            "the weights do not fit 'config.json'",
            where={
                "folder": folder,
                **{what: f"{len(keys)}: {', '.join(keys[:3])}" for what, keys in problems.items()},
            },
            hint="take config.json and weights from the same model",
        )


def _headers(weights: list[Path]) -> Iterator[tuple[str, str, int]]:
    """Yield name, stored dtype and number of values of every tensor, from the headers alone."""
    from safetensors import SafetensorError, safe_open

    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    piece = file.get_slice(name)
                    count = 1
                    for side in piece.get_shape():
                        count *= side
                    yield name, piece.get_dtype(), count
        except (SafetensorError, OSError) as error:
            raise BaseModelError(
                f"'{path.name}' is not a whole safetensors file: {error}", where={"file": path}
            ) from error


def _tensor_count(weights: list[Path]) -> int:
    return sum(1 for _ in _headers(weights))


def _compute_dtype(weights: list[Path]) -> torch.dtype:
    """The dtype most values are stored in, with float16 widened to float32."""
    import torch

    stored: Counter[str] = Counter()
    for _, dtype, count in _headers(weights):
        stored[dtype] += count
    name = _STORED.get(stored.most_common(1)[0][0])
    if name is None:
        raise BaseModelError(
            f"the weights are stored as '{stored.most_common(1)[0][0]}', which is not read here",
            where={"file": weights[0]},
        )
    return torch.float32 if name == "float16" else getattr(torch, name)


def _context_length(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[int, tuple[str, ...]]:
    for key in _CONTEXT_KEYS:
        length = getattr(config, key, None)
        if isinstance(length, int) and length > 0:
            return length, ()
    if tokenizer.model_max_length < 2**31:
        return tokenizer.model_max_length, (
            "context length as the tokenizer states it; the config states none",
        )
    return 2048, ("context length 2048 assumed; neither config nor tokenizer states one",)


def _template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        return None
    if not isinstance(template, str):
        raise UnsafeError(f"the chat template is a {type(template).__name__}, not text")
    check_template(template)
    tokenizer.chat_template = template
    return template


def _license(folder: Path) -> str:
    """The licence the README's front matter states, or 'unknown'."""
    readme = folder / "README.md"
    if not readme.is_file():
        return "unknown"
    with readme.open(encoding="utf-8", errors="replace") as file:
        head = file.read(8192)
    block = re.match(r"---\s*\n(.*?)\n---", head, re.DOTALL)
    found = re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", block[1], re.MULTILINE) if block else None
    return found[1] if found else "unknown"


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
