"""Prompts, prefixes and adaption prompts go to PEFT and come back: the same logits to 1e-5 in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import addenda.errors
from addenda import attach
from addenda.core import Method, registry
from addenda.export.peft import import_peft, write_peft

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT 0.21 asks transformers 5.23 for properties that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

TOLERANCE = 1e-5
Differing = Callable[[addenda.Handle, str, torch.Tensor, torch.Tensor], float]
SIZES = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def tiny(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES)
        return transformers.GPT2LMHeadModel(config).eval()
    made = transformers.MistralConfig if kind == "mistral" else transformers.LlamaConfig
    model = transformers.MistralForCausalLM if kind == "mistral" else transformers.LlamaForCausalLM
    return model(made(num_key_value_heads=2, **GROUPED, **SIZES)).eval()


def logits(model: nn.Module, task: int | None = None) -> torch.Tensor:
    more = {} if task is None else {"task_ids": torch.tensor([task, task])}
    with torch.no_grad():
        return model(torch.arange(1, 25).reshape(2, 12), **more).logits[
            :, -12:
        ]  # PEFT scores the virtual positions too


def randomize(parameters: Iterator[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))


def of(name: str, **settings: object) -> Method:
    return registry.get(name)(**settings)


PROMPTS = ("llama", "gpt2")
OURS: dict[str, tuple[tuple[str, ...], Method]] = {
    "prompt": (PROMPTS, of("prompt-tuning", tokens=5)),
    "p-mlp": (PROMPTS, of("p-tuning", tokens=4, hidden=9)),
    "p-lstm": (PROMPTS, of("p-tuning", tokens=4, hidden=9, encoder="lstm")),
    "multitask": (PROMPTS, of("multitask-prompt-tuning", tokens=4, tasks=3, rank=2)),
    "prefix": ((*PROMPTS, "mistral"), of("prefix-tuning", tokens=5)),
    "prefix-projected": (PROMPTS, of("prefix-tuning", tokens=3, projection=6)),
    "cartridge": (PROMPTS, of("cartridge", tokens=5, frozen=2, start="vocabulary")),
    "cpt": (PROMPTS, of("cpt", ids=(3, 1, 4), roles=(1, 2, 4), epsilon=9.0, format_epsilon=7.0)),
    "llama-adapter": (("llama", "mistral"), of("llama-adapter", tokens=4, layers=2)),
    "shadow": ((*PROMPTS, "mistral"), of("shadow", rank=3, alpha=0.5)),
    "shadow-two": (PROMPTS, of("shadow", rank=3, layers=2, inner=5, alpha=1.5)),
}


def _cases(table: dict[str, tuple[tuple[str, ...], Any]]) -> list[Any]:
    return [
        pytest.param(kind, made, id=f"{name}-{kind}")
        for name, (kinds, made) in table.items()
        for kind in kinds
    ]


@pytest.mark.parametrize(("kind", "method"), _cases(OURS))
def test_our_adapter_answers_the_same_under_peft(
    kind: str, method: Method, tmp_path: Path, seeded: int, differing: Differing
) -> None:
    ours = tiny(kind, seeded)
    before = logits(ours)
    handle = attach(ours, method)
    randomize(handle.parameters())
    task = 0 if method.name == "multitask-prompt-tuning" else None
    wanted = logits(ours)
    write_peft(handle, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(kind, seeded), tmp_path)
    assert differing(handle, "written", logits(theirs, task), wanted) <= TOLERANCE
    assert (wanted - before).abs().max() > 1e-3
    again = tiny(kind, seeded)
    import_peft(again, tmp_path)
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-6)


CAUSAL = {"task_type": "CAUSAL_LM"}
THEIRS: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
    "prompt": (PROMPTS, lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL)),
    "prompt-vocabulary": (
        PROMPTS,
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB", **CAUSAL),
    ),
    "p-mlp": (
        PROMPTS,
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=7, **CAUSAL),
    ),
    "p-lstm": (
        PROMPTS,
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=4, encoder_hidden_size=7, encoder_reparameterization_type="LSTM", **CAUSAL
        ),
    ),
    "multitask": (
        PROMPTS,
        lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3, num_ranks=2, **CAUSAL),
    ),
    "prefix": ((*PROMPTS, "mistral"), lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL)),
    "prefix-projected": (
        PROMPTS,
        lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=6, **CAUSAL
        ),
    ),
    "cartridge": (
        PROMPTS,
        lambda: peft.CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2, **CAUSAL),
    ),
    "cpt": (
        PROMPTS,
        lambda: peft.CPTConfig(
            cpt_token_ids=[3, 1, 4],
            cpt_mask=[1, 1, 1],
            cpt_tokens_type_mask=[1, 2, 3],
            opt_projection_epsilon=5.0,
            opt_projection_format_epsilon=6.0,
            **CAUSAL,
        ),
    ),
    "llama-adapter": (
        ("llama", "mistral"),
        lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **CAUSAL),
    ),
    "shadow": ((*PROMPTS, "mistral"), lambda: peft.ShadowConfig(r=3, shadow_alpha=0.7, **CAUSAL)),
    "shadow-two": (
        PROMPTS,
        lambda: peft.ShadowConfig(r=3, shadow_num_hidden_layers=2, update_hidden_size=5, **CAUSAL),
    ),
}


@pytest.mark.parametrize(("kind", "make"), _cases(THEIRS))
def test_their_adapter_answers_the_same_here(
    kind: str, make: Callable[[], Any], tmp_path: Path, seeded: int, differing: Differing
) -> None:
    model, config = tiny(kind, seeded), make()
    before = logits(model)
    theirs = peft.get_peft_model(model, config).eval()
    randomize(p for p in theirs.parameters() if p.requires_grad)
    task = 2 if config.peft_type == "MULTITASK_PROMPT_TUNING" else None
    wanted = logits(theirs, task)
    theirs.save_pretrained(tmp_path)
    ours = tiny(kind, seeded)
    handle = import_peft(ours, tmp_path)
    assert differing(handle, "read", logits(ours, task), wanted) <= TOLERANCE
    assert (wanted - before).abs().max() > 1e-3
    assert not any(p.requires_grad for p in handle.parameters())


def test_generation_under_peft_writes_the_same(tmp_path: Path, seeded: int) -> None:
    for name in ("prompt", "prefix", "shadow"):
        ours = tiny("llama", seeded)
        handle = attach(ours, OURS[name][1])
        randomize(handle.parameters())
        folder = tmp_path / name
        folder.mkdir()
        write_peft(handle, folder)
        theirs = peft.PeftModel.from_pretrained(tiny("llama", seeded), folder)
        ids = torch.arange(3, 15)[None]
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        wanted = theirs.generate(input_ids=ids, **settings)
        assert torch.equal(ours.generate(input_ids=ids, **settings), wanted)


def test_what_does_not_fit_is_refused(tmp_path: Path, seeded: int) -> None:
    model = tiny("llama", seeded)
    handle = attach(model, OURS["prompt"][1])
    write_peft(handle, tmp_path)
    handle.detach()
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, words in (
        ({"num_virtual_tokens": 9}, "not the 9 virtual tokens"),
        ({"num_transformer_submodules": 2}, "for an encoder and a decoder"),
        ({"peft_type": "PREFIX_TUNING", "prompt_tuning_init": None}, "has shape"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(addenda.errors.CheckpointError, match=words):
            import_peft(model, tmp_path)
    assert not addenda.core.handles(model)


def test_adaption_prompts_of_other_layers_than_the_last_are_not_written(tmp_path: Path, seeded: int) -> None:
    handle = attach(tiny("llama", seeded), OURS["llama-adapter"][1], ["layers.0.self_attn"])
    with pytest.raises(addenda.errors.ExportError, match="last layers only"):
        write_peft(handle, tmp_path)
