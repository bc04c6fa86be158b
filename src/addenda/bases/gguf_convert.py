"""The conversion itself: ``python -m addenda.bases.gguf_convert FILE FOLDER``, run as a child by `gguf_file`.

Speaks one JSON object a line on standard output: ``{"task", "done", "total"}`` or ``{"facts": {...}}``.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.bases.gguf_header import GGUFHeader, read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["main", "storage_dtype"]

_STEPS = 4
_GPT2_SPLITS = {"default", "gpt-2", "gpt2"}
"""GGUF names of the splitting that a byte-level tokenizer does by itself."""
_DIGITS_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""GGUF names of: every digit alone, then the GPT-2 way."""


def main(arguments: list[str]) -> None:
    """Convert ``arguments[0]`` into the existing folder ``arguments[1]``."""
    import gguf

    path, folder = Path(arguments[0]), Path(arguments[1])
    header = read_header(path)
    # transformers reads the file anew for the config, the tokenizer and the weights, several seconds each time.
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(gguf.GGUFReader)
    _say(task="tokenizer", done=0, total=_STEPS)
    note = _write_tokenizer(path, folder, header)
    _say(task="weights", done=1, total=_STEPS)
    model, weights = _read_model(path, header)
    _say(task="write", done=2, total=_STEPS)
    stored = _write_model(model, weights, folder)
    _say(task="done", done=_STEPS, total=_STEPS)
    _say(facts={"stored": str(stored).removeprefix("torch."), "tokenizer_note": note})


def _say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _write_tokenizer(path: Path, folder: Path, header: GGUFHeader) -> str:
    """Write tokenizer.json, its config and the chat template; return a note if token ids may differ."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    note = _fix_splitting(tokenizer, header)
    tokenizer.model_max_length = header.metadata.get(f"{header.architecture}.context_length", 2**31)
    for passing in ("is_local", "local_files_only"):  # how it was loaded here, not what it is
        tokenizer.init_kwargs.pop(passing, None)
    tokenizer.save_pretrained(str(folder))
    return note


def _fix_splitting(tokenizer: PreTrainedTokenizerFast, header: GGUFHeader) -> str:
    """Split text before byte-pair merging as the model was trained to, where transformers leaves the GPT-2 way."""
    from tokenizers import pre_tokenizers

    name = header.metadata.get("tokenizer.ggml.pre", "default")
    backend = tokenizer.backend_tokenizer
    left_alone = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    if header.metadata.get("tokenizer.ggml.model") != "gpt2" or not left_alone or name in _GPT2_SPLITS:
        return ""
    if name in _DIGITS_SPLITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        return ""
    return f"text is split the GPT-2 way, not as the file's '{name}' splitting: some token ids may differ"


def _read_model(path: Path, header: GGUFHeader) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return the model without weights, and every weight by name, dequantised to float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    for foreign in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, foreign):
            delattr(config, foreign)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # from_pretrained(gguf_file=...) does the same and then marks the model as quantised, and looks for downloadable
    # kernels on the way.
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    values = sum(tensor.numel() for tensor in weights.values())
    if values != header.elements:
        raise ValueError(f"the file holds {header.elements:,} values but the model takes {values:,}")
    return model, weights


def _write_model(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> torch.dtype:
    """Write the weights in their storage dtype beside a config that does not know of GGUF."""
    from transformers import GenerationConfig

    stored = storage_dtype(list(weights.values()))
    model.config.dtype, model.config.name_or_path = stored, ""
    model.config.architectures = [type(model).__name__]
    model.generation_config = GenerationConfig.from_model_config(model.config)
    found = model.load_state_dict(
        {name: weights[name].to(stored) for name in weights}, strict=False, assign=True
    )
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty or found.unexpected_keys:
        raise ValueError(
            f"tensors do not fit the architecture: missing {empty}, extra {found.unexpected_keys}"
        )
    model.save_pretrained(str(folder))
    return stored


def storage_dtype(tensors: list[Tensor]) -> torch.dtype:
    """Return the dtype `gguf_file.convert` states for these float32 values.

    Example:
        >>> import torch
        >>> storage_dtype([torch.tensor([70000.1])]), storage_dtype([torch.tensor([1.0, 0.1])])
        (torch.float32, torch.float16)
    """
    import torch

    with torch.no_grad():
        for exact in (torch.bfloat16, torch.float16):
            if all(torch.equal(tensor.to(exact).to(tensor.dtype), tensor) for tensor in tensors):
                return exact
        largest = max((tensor.abs().max().item() for tensor in tensors), default=0.0)
    return torch.float16 if largest <= torch.finfo(torch.float16).max else torch.float32


if __name__ == "__main__":
    main(sys.argv[1:])
