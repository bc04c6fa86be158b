"""The conversion itself: ``python -m addenda.bases.gguf_convert FILE FOLDER FORM``, run as a child by `gguf_file`.

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
_EXPERT_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Sizes that transformers leaves as the first model of the family had them."""


def main(arguments: list[str]) -> None:
    """Convert file ``arguments[0]`` into the existing folder ``arguments[1]``, ``dense`` or ``packed``."""
    import gguf

    path, folder, packed = Path(arguments[0]), Path(arguments[1]), arguments[2] == "packed"
    header = read_header(path)
    # transformers reads the file anew for the config, the tokenizer and the weights, several seconds each time.
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(gguf.GGUFReader)
    _say(task="tokenizer", done=0, total=_STEPS)
    note = _write_tokenizer(path, folder, header)
    _say(task="weights", done=1, total=_STEPS)
    model = _empty_model(path, header)
    stored = (
        _convert_packed(path, folder, header, model)
        if packed
        else _convert_dense(path, folder, header, model)
    )
    _say(task="done", done=_STEPS, total=_STEPS)
    _say(facts={"stored": stored, "tokenizer_note": note})


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


def _empty_model(path: Path, header: GGUFHeader) -> PreTrainedModel:
    """Return the model without weights, its config without a word of GGUF."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    for key, setting in _EXPERT_SIZES.items():
        size = header.metadata.get(f"{header.architecture}.{key}")
        if size and hasattr(config, setting):
            setattr(config, setting, size)
    for foreign in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, foreign):
            delattr(config, foreign)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config.name_or_path = ""
    model.config.architectures = [type(model).__name__]
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def _convert_dense(path: Path, folder: Path, header: GGUFHeader, model: PreTrainedModel) -> str:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # from_pretrained(gguf_file=...) does the same and then marks the model as quantised, and looks for downloadable
    # kernels on the way.
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    _require_all(header, sum(tensor.numel() for tensor in weights.values()))
    _say(task="write", done=2, total=_STEPS)
    return str(_write_model(model, weights, folder)).removeprefix("torch.")


def _convert_packed(path: Path, folder: Path, header: GGUFHeader, model: PreTrainedModel) -> str:
    import torch

    from addenda.bases.gguf_pack import read_packed
    from addenda.bases.packed_folder import write_packed

    tensors, packed = read_packed(path, header, model)
    width = {name: model.get_parameter(name).shape[1] for name in packed}
    _require_all(
        header, sum(len(t) * width[name] if name in packed else t.numel() for name, t in tensors.items())
    )
    _say(task="write", done=2, total=_STEPS)
    model.config.dtype = torch.float32  # to compute in; the weights have none
    model.config.save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))
    write_packed(folder, tensors, packed)
    return "they are packed"


def _require_all(header: GGUFHeader, values: int) -> None:
    if values != header.elements:
        raise ValueError(f"the file holds {header.elements:,} values but the model takes {values:,}")


def _write_model(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> torch.dtype:
    """Write the weights in their storage dtype beside the config."""
    stored = storage_dtype(list(weights.values()))
    model.config.dtype = stored
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
