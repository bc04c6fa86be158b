"""One contestant in a process of its own: an encoder with LoRA, as it is or in lean forms, a few training steps.

Prints one JSON object: the seconds of each step by the clock and of the processor, the bytes a step keeps for its
backward, and the peak of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import addenda
from addenda import kernels
from addenda.train.memory import peak_memory_bytes

SHAPE = {"hidden_size": 384, "intermediate_size": 1536}
FORMS = ("own", "lean", "unpadded")
MODELS = ("minilm", "minilm-dropout", "vit-small")
ROWS = {"minilm": 32, "minilm-dropout": 32, "vit-small": 16}
LENGTH = 128


def model_of(name: str) -> nn.Module:
    """Return a classifier of random weights: 6 layers of 12 heads for text, 12 layers of 6 for images."""
    dropout = 0.1 if name == "minilm-dropout" else 0.0
    chances = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if name == "vit-small":
        image = transformers.ViTConfig(**SHAPE, **chances, num_hidden_layers=12, num_attention_heads=6)
        return transformers.ViTForImageClassification(image)
    text = transformers.BertConfig(**SHAPE, **chances, num_hidden_layers=6, num_attention_heads=12)
    return transformers.BertForSequenceClassification(text)


def batch_of(name: str) -> dict[str, Tensor]:
    """Return images of 224 x 224, or texts of a quarter to all of 128 tokens, the same on every call."""
    rows, make = ROWS[name], torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (rows,), generator=make)
    if name == "vit-small":
        return {"pixel_values": torch.randn(rows, 3, 224, 224, generator=make), "labels": labels}
    lengths = torch.randint(LENGTH // 4, LENGTH + 1, (rows, 1), generator=make)
    lengths[0] = LENGTH
    mask = (torch.arange(LENGTH) < lengths).long()
    ids = torch.randint(1000, 30000, mask.shape, generator=make) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bytes_kept(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Return how much a forward keeps for its backward, parameters aside; memory that two share counts once."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = model(**batch)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del out
    return sum(kept.values())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build, attach and step."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernels.enable()
    model, batch = model_of(options.model).train(), batch_of(options.model)
    inside = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".layer" in name
    ]
    handle = addenda.attach(model, addenda.LoRA(rank=16), inside)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-4)
    form = addenda.lean(model, skip_padding=options.form == "unpadded") if options.form != "own" else None
    seconds, cpu_seconds = [], []
    with form or contextlib.nullcontext():
        kept = bytes_kept(model, batch)
        for _ in range(1 + options.steps):
            started, busy = time.perf_counter(), time.process_time()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - busy)
    return {
        "seconds": seconds[1:],
        "cpu_seconds": cpu_seconds[1:],
        "kept_bytes": kept,
        "peak_bytes": peak_memory_bytes()["rss"],
        "parts": form.describe() if form else "",
        "real_tokens": int(batch["attention_mask"].sum()) if "attention_mask" in batch else None,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
