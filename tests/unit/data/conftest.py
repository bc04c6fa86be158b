"""A tiny tokenizer trained on the spot, chat templates in the styles of well-known models, and files of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
_TEXT = [
    "the quick brown fox jumps over the lazy dog and asks for a refund",
    "system user assistant model tool You are a helpful assistant. [INST] [/INST] <<SYS>> <</SYS>>",
    "Where is my order? It left our shop on Monday, and it should reach you by Thursday.",
    "1 + 1 = 2, 12 * 12 = 144. def f(x): return x\n\n    indented\tcode",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = {"chatml": "<|im_end|>", "default-system": "<|im_end|>", "llama2": " </s>", "llama3": "<|eot_id|>"}
END |= {"gemma": "<end_of_turn>"}
TEMPLATES = {
    "chatml": CHATML,
    "default-system": DEFAULT_SYSTEM,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "thinking": THINKING,
}


@cache
def tiny_tokenizer(kind: str = "byte-level") -> PreTrainedTokenizerFast:
    """A BPE tokenizer of some hundred tokens: ``byte-level`` as GPT-2's, or ``metaspace`` as Llama's."""
    backend = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", unk_token=None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    extra = list(SPECIAL)
    if kind == "byte-level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        # As GPT-2's: it trims white space from the offsets, which must not move the mask.
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = []
        extra += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=extra, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_TEXT, trainer)
    state = orjson.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    backend = Tokenizer.from_str(orjson.dumps(state).decode())  # the byte tokens are ordinary ones
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=[token for token in SPECIAL if token not in ("<s>", "</s>")],
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer("byte-level")


@pytest.fixture(scope="session", params=["byte-level", "metaspace"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(request.param)


@pytest.fixture(scope="session")
def templates() -> SimpleNamespace:
    """``source`` of each template by name, and what it ends an answer with (``end``)."""
    return SimpleNamespace(source=TEMPLATES, end=END, special=SPECIAL)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file, or a folder of files; rows given as objects become JSON lines."""

    def put(content: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        if isinstance(content, Mapping):
            path = tmp_path / "folder"
            path.mkdir()
            for part, data in content.items():
                (path / part).write_bytes(data)
        elif isinstance(content, list):
            path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in content))
        else:
            assert isinstance(content, bytes)
            path.write_bytes(content)
        return path

    return put
