"""How an exported program is run, as code for its card."""

from __future__ import annotations

from collections.abc import Mapping

from addenda.export.executorch.decoding import PART
from addenda.export.job import Job

__all__ = ["usage_of_decoder", "usage_of_whole"]

_WHOLE = """```python
import torch
from executorch.runtime import Runtime

forward = Runtime.get().load_program("model.pte").load_method("forward")
output, *_ = forward.execute([{inputs}])
```

Inputs, in this order: {told}. Larger sizes are refused."""


_RUNNER = """```python
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder")
{prompt}
runner = TextLLMRunner("this folder/model.pte", "this folder/tokenizer.json")
runner.generate(text, GenerationConfig(echo=False, temperature=0.0), print)
```

The same runner is there for C++, Android (`LlmModule`) and iOS; the program tells it all that it asks for.
"""
_CHAT = """messages = [{"role": "user", "content": "Where is my parcel?"}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"""
_TEXT = """text = "Water boils at\""""
_STEPS = """```python
import torch
from executorch.runtime import Runtime

forward = Runtime.get().load_program("model.pte").load_method("forward")
ids, read = [1, 2, 3], 0  # of your tokenizer
for _ in range(64):
    places = torch.arange(read, read + len(ids))
    [logits] = forward.execute([torch.tensor([ids]), places])
    read += len(ids)
    ids = [int(logits[0, -1].argmax())]
```
"""
_SIZES = """
`forward` takes `input_ids` (1, n) and their places `cache_position` (n,), n ≤ {part}, and gives the logits after the
last of them; its key-value cache has room for {context} tokens. Place 0 begins anew."""


def usage_of_whole(job: Job, bounds: Mapping[str, Mapping[int, tuple[str, int]]]) -> str:
    """Return Markdown with Python that runs a program of any other kind.

    Args:
        job: as exported.
        bounds: of its inputs' sizes.
    """
    row, told = job.probes.rows[0], []
    for name, value in row.items():
        sizes = [
            f"{bounds[name][dim][0]} ≤ {bounds[name][dim][1]}" if dim in bounds[name] else str(size)
            for dim, size in enumerate(value.shape)
        ]
        told.append(f"`{name}` ({', '.join(sizes)}) {str(value.dtype).removeprefix('torch.')}")
    return _WHOLE.format(inputs=", ".join(row), told="; ".join(told))


def usage_of_decoder(job: Job, context: int) -> str:
    """Return Markdown with Python that lets a decoder answer.

    Args:
        job: as exported.
        context: tokens for which its cache has room.
    """
    prompt = _CHAT if job.base and job.base.chat_template else _TEXT
    code = _RUNNER.replace("{prompt}", prompt) if job.base else _STEPS
    return code + _SIZES.format(part=min(PART, context), context=context)
