"""A tiny base that runs in milliseconds, and a made-up run record that is as full as a real one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from addenda.bases.loaded import LoadedBase
from addenda.evals.overfitting import Learning
from addenda.evals.record import (
    BaseFacts,
    CostFacts,
    CurvePoint,
    Curves,
    DataFacts,
    ExportFacts,
    FindingCount,
    LayerFacts,
    MethodFacts,
    RecipeValue,
    RunRecord,
)
from addenda.evals.results import HeldoutChange, KLEstimate, PromptShift, SamplePair
from addenda.intervals import Interval

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tiny_base() -> LoadedBase:
    """A Llama of two layers with random weights and a tokenizer of bytes; other weights for each test."""
    return make_base(chat_template=TEMPLATE)


@pytest.fixture
def plain_base() -> LoadedBase:
    """The same without a chat template."""
    return make_base(chat_template=None)


def make_base(*, chat_template: str | None) -> LoadedBase:
    specials = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(specials + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=specials[1:]
    )
    tokenizer.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LoadedBase(
        name="tiny",
        source="made for a test",
        folder=Path(),
        model=LlamaForCausalLM(config).eval(),
        tokenizer=tokenizer,
        kind="causal-lm",
        chat_template=chat_template,
        template_sha256=None,
        tokenizer_sha256="0" * 64,
        context_length=1024,
        license="none",
    )


@pytest.fixture(scope="session")
def made_up_record() -> Callable[..., RunRecord]:
    return make_record


def make_record(**changes: Any) -> RunRecord:
    """A run that learned; `changes` replace whole fields."""
    record = RunRecord(
        name="support-bot",
        finished="2026-11-23T14:05:09+00:00",
        version="0.1.0",
        base=BaseFacts(
            name="smollm2-135m-instruct",
            source="registry: smollm2-135m-instruct",
            license="Apache-2.0",
            kind="causal-lm",
            dtype="bfloat16",
            parameters=134_515_008,
            fingerprint="5f1c" * 16,
            notes=("weights dequantised from GGUF Q4_1",),
        ),
        method=_method(),
        heldout=HeldoutChange(
            nll_before=2.412,
            nll_after=1.083,
            nll_change=Interval(-1.329, -1.451, -1.207, 41),
            accuracy_before=0.512,
            accuracy_after=0.747,
            accuracy_change=Interval(0.235, 0.208, 0.262, 41),
            tokens=1873,
            rows=41,
        ),
        learning=Learning(
            verdict="learned",
            sentence="On 41 held-out rows it was never shown, the adapted model predicts the right answer better.",
            heldout_change=Interval(-1.329, -1.451, -1.207, 41),
            train_change=Interval(-1.711, -1.803, -1.622, 41),
            gap=Interval(0.371, 0.244, 0.502, 41),
            gap_growth=Interval(0.382, 0.229, 0.533, 41),
            verbatim_heldout=Interval(0.024, 0.004, 0.126, 41),
            verbatim_train=Interval(0.146, 0.069, 0.284, 41),
        ),
        curves=_curves(),
        general=_general(),
        samples=_samples(),
        data=DataFacts(
            source="examples/data/support.jsonl",
            sha256="9b0c" * 16,
            shape="chat",
            rows=420,
            train_rows=377,
            heldout_rows=41,
            split="10 % drawn with seed 0, exact duplicates kept on one side",
            dropped_rows=2,
            cut_rows=0,
            max_tokens=1024,
            trained_tokens=18_220,
            all_tokens=41_903,
            findings=(
                FindingCount("duplicate_row", "note", 6, "support.jsonl:17: same as line 4"),
                FindingCount("row_too_long", "warning", 2, "support.jsonl:301: 1,388 tokens, 1,024 allowed"),
            ),
        ),
        cost=CostFacts(
            wall_seconds=231.4,
            train_seconds=158.2,
            tokens_per_second=794.0,
            trained_tokens=54_660,
            steps=72,
            epochs=3,
            peak_rss_bytes=1_184_000_000,
            machine="Intel Xeon, 2 cores in use, 16 GB memory",
            precision="bfloat16: this processor multiplies it natively (AMX)",
        ),
        environment={"python": "3.11.2", "torch": "2.13.0+cpu", "transformers": "5.23.0", "addenda": "0.1.0"},
        recipe=(
            RecipeValue("train.learning_rate", "0.0005", "default of lora"),
            RecipeValue("train.epochs", "3", "--set"),
            RecipeValue("data.path", "examples/data/support.jsonl", "argument"),
        ),
        command="addenda train examples/data/support.jsonl --set train.epochs=3",
        exports=_exports(),
    )
    return dataclasses.replace(record, **changes)


def _exports() -> tuple[ExportFacts, ...]:
    adapter = ExportFacts(
        format="gguf-lora",
        type="",
        checked="2026-11-24T09:12:44+00:00",
        version="0.1.0",
        verdict="passed",
        words="answers in llama.cpp differ by at most 0.0003 (limit 0.001)",
        kept=True,
        bytes=19_600_000,
        runtime="llama.cpp (xllamacpp 2026.10)",
        twin_difference=2.9e-4,
        twin_limit=1e-3,
        kl=Interval(0.0037, 0.0029, 0.0048, 25),
        top1_agreement=0.962,
        effect_size=Interval(1.019, 1.005, 1.041, 25),
        effect_cosine=Interval(0.996, 0.993, 0.997, 25),
    )
    merged = dataclasses.replace(
        adapter,
        format="gguf",
        type="base",
        verdict="drifted",
        words="of the adapter's change the file keeps 6% in size",
        effect_size=Interval(0.061, 0.045, 0.09, 25),
        effect_cosine=Interval(0.494, None, None, 3),
    )
    unseen = dataclasses.replace(
        adapter,
        format="mlx",
        type="adapter",
        verdict="unverified",
        words="not verified: mlx-lm is not installed",
        runtime="not loaded",
        twin_difference=None,
        twin_limit=None,
        kl=None,
        top1_agreement=None,
        effect_size=None,
        effect_cosine=None,
    )
    return adapter, merged, dataclasses.replace(merged, type="q4_0", kept=False), unseen


def _method() -> MethodFacts:
    shapes = {"q_proj": (576, 576), "v_proj": (192, 576), "down_proj": (576, 1536)}
    layers = tuple(
        LayerFacts(f"model.layers.{index}.{name}", "Linear", shape, 16 * sum(shape), 64 * sum(shape))
        for index in range(30)
        for name, shape in shapes.items()
    )
    parameters = sum(layer.parameters for layer in layers)
    return MethodFacts(
        name="lora",
        summary="a low-rank update beside each weight",
        settings={"rank": 16, "alpha": 32.0, "dropout": 0.0},
        layers=layers,
        trainable_parameters=parameters,
        total_parameters=134_515_008 + parameters,
        adapter_bytes=4 * parameters,
    )


def _curves() -> Curves:
    rng = np.random.default_rng(0)
    steps = np.arange(72)
    train = 0.75 + 1.65 * np.exp(-steps / 14) + rng.normal(0, 0.09, 72)
    heldout = [(step, 1.07 + 1.34 * float(np.exp(-step / 13)) + 0.0006 * step) for step in range(0, 73, 8)]
    return Curves(
        train=tuple(CurvePoint(int(step), float(nll)) for step, nll in zip(steps, train, strict=True)),
        heldout=tuple(CurvePoint(step, nll) for step, nll in heldout),
        kept_step=64,
        stopped="all steps were done",
    )


def _general() -> KLEstimate:
    rng = np.random.default_rng(1)
    topics = (
        ["everyday"] * 8
        + ["explain"] * 8
        + ["facts"] * 8
        + ["arithmetic"] * 6
        + ["code"] * 6
        + ["languages"] * 4
    )
    prompts = tuple(
        PromptShift(topic, f"General question {index} about {topic}?", float(rng.gamma(2, 0.05) * 60), 60, 55)
        for index, topic in enumerate(topics)
    )
    mean = sum(shift.kl_sum for shift in prompts) / sum(shift.tokens for shift in prompts)
    return KLEstimate(mean, mean * 0.8, mean * 1.27, 60 * len(prompts), mean * 1.4, 55 / 60, prompts)


def _samples() -> tuple[SamplePair, ...]:
    return (
        SamplePair(
            messages=(
                ("system", "You are the assistant of Juniper & Rye."),
                ("user", "can i send back boots i wore once?"),
            ),
            reference="Boots can come back within 45 days if the soles are clean. Worn soles we repair instead.",
            before="I'm sorry, but I am not able to help with returns. Please contact the store where you bought them.",
            after="Boots worn once can come back within 45 days if the soles are clean. Shall I start the return?",
        ),
        SamplePair(
            messages=(
                ("user", "Do you ship to Norway?"),
                ("assistant", "We do! Parcels to Norway take 5 to 7 working days."),
                ("user", "And what does it cost?"),
            ),
            reference="Shipping to Norway is 12 euros, and free from 90 euros.",
            before="The cost of shipping to Norway depends on several factors:\n\n1. Weight\n2. Size\n3. Destination",
            after="Shipping to Norway is 12 euros, and it's free once your order reaches 90 euros.",
        ),
    )
