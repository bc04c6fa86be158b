"""Load a model folder in Hugging Face layout: checked settings, safetensors only, nothing newly initialised."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.bases.guard import weight_files
from addenda.bases.loaded import LoadedBase, vocabulary_of
from addenda.bases.model_config import load_config, quiet_transformers
from addenda.bases.template import NO_TEMPLATE, check_template, template_sha256, tokenizer_sha256
from addenda.errors import BaseModelError, NotFoundError, OutOfMemory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["PACKED", "open_directory"]

PACKED = "packed.safetensors"
"""The weight file of a folder whose weights stay packed, in place of model.safetensors."""
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx")
_LARGER = 2
"""A config may describe so many times what the files hold; what then does not fit is named tensor by tensor."""
_CODES = {"U8": 2, "I8": 2, "I32": 8}
"""How many values an integer of quantized weights may hold, at four bits each."""
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
    weightless: bool = False,
) -> LoadedBase:
    """Load the model, tokenizer and template in ``folder``.

    Args:
        folder: holds config.json, safetensors weights (dense, or packed rows) and tokenizer.json.
        name: for `LoadedBase.name`.
        source: for `LoadedBase.source`.
        dtype: of the parameters; None keeps the stored one, but widens float16 to float32, which CPUs compute well.
        license_name: for `LoadedBase.license`; None reads it from the folder's README.
        notes: added before the loader's own.
        weightless: leave dense weights out: the parameters lie on the meta device. Packed weights are mapped, and
            those of other libraries' quantizers loaded, all the same.

    Raises:
        UnsafeError: the folder could run code.
        BaseModelError: a file is damaged, or weights and config do not fit each other exactly.
        NotFoundError: a needed file is missing.
    """
    packed = (folder / PACKED).is_file()
    weights = [folder / PACKED] if packed else weight_files(folder)
    stored, values = _stored(weights)
    config, kind = load_config(folder, tensors=stored.total())
    tokenizer = _load_tokenizer(folder, config)
    if packed:
        model = _load_packed(folder, config, dtype)
    else:
        quantized = hasattr(config, "quantization_config")
        dtype = dtype or _compute_dtype(stored, folder, quantized=quantized)
        model = _load_model(
            folder, config, kind, dtype, values=values, weightless=weightless and not quantized
        )
    context, context_notes = _context_length(config, tokenizer)
    template = _template(tokenizer) if kind == "causal-lm" else None
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
        weights="packed" if packed else "dense",
        notes=(*notes, *context_notes, *_shortcomings(model, tokenizer, kind)),
    )


def _load_packed(folder: Path, config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    import torch

    from addenda.bases.packed_folder import load_packed

    with quiet_transformers():
        return load_packed(folder, config, dtype or torch.float32).eval()


def _load_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Return the folder's tokenizer, which must come as tokenizer.json."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
        raise NotFoundError(
            "no 'tokenizer.json', so text cannot be turned into tokens",
            where={"folder": folder, "tokenizer files found": ", ".join(present) or "none"},
            hint="AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes one",
        )
    where = {"folder": folder}
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), config=config, local_files_only=True)
        except MemoryError as error:
            hint = "free memory, or take a smaller model"
            raise OutOfMemory("the tokenizer does not fit into memory", where=where, hint=hint) from error
        except Exception as error:  # the tokenizers library raises nothing narrower
            hint = "fetch 'tokenizer.json' and 'tokenizer_config.json' again"
            raise BaseModelError(f"the tokenizer cannot be read: {error}", where=where, hint=hint) from error
    if not getattr(tokenizer, "is_fast", False):
        found = type(tokenizer).__name__
        hint = "name 'PreTrainedTokenizerFast' as 'tokenizer_class' in tokenizer_config.json"
        raise BaseModelError(f"'{found}' is not backed by 'tokenizer.json'", where=where, hint=hint)
    return tokenizer


def _load_model(
    folder: Path, config: PreTrainedConfig, kind: str, dtype: torch.dtype, *, values: int, weightless: bool
) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForCausalLM

    from addenda.bases.empty import empty_model
    from addenda.bases.place import widen

    where = {"folder": folder}
    loader = AutoModelForCausalLM if kind == "causal-lm" else AutoModel
    with quiet_transformers():
        try:
            _require_size(loader, config, values=values, folder=folder)
            if weightless:
                return empty_model(loader, config, dtype)
            model, info = loader.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, all at once
            )
        except BaseModelError:
            raise
        except MemoryError as error:
            hint = "free memory, ask for dtype=torch.bfloat16, or take a smaller model"
            raise OutOfMemory("the model does not fit into memory", where=where, hint=hint) from error
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            hint = "fetch the weights again; config.json and weights must be of the same model"
            raise BaseModelError(f"the weights cannot be loaded: {error}", where=where, hint=hint) from error
    _require_exact(info, folder)
    if hasattr(config, "quantization_config"):  # transformers leaves what is not packed as it is stored
        widen(model, dtype)
    return model.eval()


def _require_size(loader: Any, config: PreTrainedConfig, *, values: int, folder: Path) -> None:
    """Raise if the config describes a model far larger than its files, before memory is taken for it."""
    import torch

    with torch.device("meta"):
        described = sum(parameter.numel() for parameter in loader.from_config(config).parameters())
    if described > _LARGER * values:
        raise BaseModelError(
            f"'config.json' describes {described:,} parameters, the files hold {values:,}",
            where={"folder": folder},
            hint="take config.json and weights from the same model",
        )


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


def _stored(weights: list[Path]) -> tuple[Counter[str], int]:
    """Return the number of tensors by stored dtype, and of all values, from the headers alone."""
    from safetensors import SafetensorError, safe_open

    found, values = Counter[str](), 0
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    tensor = file.get_slice(name)
                    found[tensor.get_dtype()] += 1
                    values += math.prod(tensor.get_shape()) * _CODES.get(tensor.get_dtype(), 1)
        except (SafetensorError, OSError) as error:
            raise BaseModelError(
                f"'{path.name}' is not a whole safetensors file: {error}",
                where={"file": path},
                hint="fetch the file again",
            ) from error
    if not found:
        raise BaseModelError(
            "the weight files hold no tensor", where={"file": weights[0]}, hint="fetch the file again"
        )
    return found, values


def _compute_dtype(stored: Counter[str], folder: Path, *, quantized: bool) -> torch.dtype:
    """The dtype most tensors are stored in, with float16 widened to float32; codes and their scales aside."""
    import torch

    if quantized:
        stored = Counter({name: count for name, count in stored.items() if name not in _CODES}) or stored
    most = stored.most_common(1)[0][0]
    if most not in _STORED:
        raise BaseModelError(
            f"the weights are stored as '{most}', which is not read here",
            where={"folder": folder, "read": ", ".join(_STORED)},
            hint="take the model in bfloat16, float16 or float32",
        )
    return torch.float32 if most == "F16" else getattr(torch, _STORED[most])


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
    """Return the chat template, the default one of several; the tokenizer then holds that one alone."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None:
        if not isinstance(template, str):
            raise BaseModelError(
                f"the chat template is no text but of type '{type(template).__name__}'",
                where={"tokenizer": tokenizer.name_or_path},
                hint="correct 'chat_template' in tokenizer_config.json",
            )
        check_template(template)
    tokenizer.chat_template = template
    return template


def _shortcomings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, kind: str) -> Iterator[str]:
    if kind == "causal-lm" and tokenizer.chat_template is None:
        yield f"{NO_TEMPLATE}: conversations need one to be chosen, e.g. 'plain'"
    known, rows = len(tokenizer), vocabulary_of(model)
    if known > rows:
        yield f"the tokenizer has {known:,} ids but the model {rows:,}: text with the {known - rows:,} last ones fails"


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
