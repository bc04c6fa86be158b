"""Adapters go to PEFT and come back: the same logits to 1e-5 in float32, on random tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from addenda import IA3, LoRA, attach
from addenda.core import Handle
from addenda.export.peft import import_peft, write_peft

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT 0.21 asks transformers 5.23 for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLERANCE = 1e-5
SIZES = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_fc")}


def tiny(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 25).reshape(2, 12)).logits


def randomize(parameters: Iterator[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))


def written(handle: Handle, folder: Path) -> Path:
    folder.mkdir()
    write_peft(handle, folder)
    return folder


PER_LAYER = {
    "llama": {"ranks": {"0.mlp.down_proj": 2, "v_proj": 7}, "alphas": {"q_proj": 3.5}},
    "gpt2": {"ranks": {"c_fc": 3}, "alphas": {"c_attn": 11.0}},
}
METHODS = {
    "plain": lambda _: LoRA(rank=4),
    "rank-stabilized": lambda _: LoRA(rank=6, alpha=5.0, rank_stabilized=True),
    "per-layer": lambda kind: LoRA(rank=4, **PER_LAYER[kind]),
    "per-layer-stabilized": lambda kind: LoRA(rank=4, **PER_LAYER[kind], rank_stabilized=True, dropout=0.1),
    "ia3": lambda kind: IA3(feed_forward=(SIZES[kind][-1],)),
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("settings", METHODS)
def test_our_adapter_answers_the_same_under_peft(
    kind: str, settings: str, tmp_path: Path, seeded: int
) -> None:
    method = METHODS[settings](kind)
    ours = tiny(kind, seeded)
    before = logits(ours)
    handle = attach(ours, method, targets=list(SIZES[kind]))
    randomize(handle.parameters())
    wanted = logits(ours)
    folder = written(handle, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(tiny(kind, seeded), folder)
    assert (logits(theirs) - wanted).abs().max() <= TOLERANCE
    assert (wanted - before).abs().max() > 1e-2
    again = tiny(kind, seeded)
    import_peft(again, folder)
    assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 9},
        {"r": 4, "lora_alpha": 9, "use_rslora": True, "init_lora_weights": "gaussian"},
        {
            "r": 4,
            "rank_pattern": {"down_proj": 2, "v_proj": 5, "c_fc": 7},
            "alpha_pattern": {"q_proj": 3, "c_attn": 2},
        },
    ],
    ids=["plain", "rank-stabilized", "per-layer"],
)
def test_their_lora_answers_the_same_here(kind: str, settings: dict, tmp_path: Path, seeded: int) -> None:
    model = tiny(kind, seeded)
    tables = {key: dict(value) for key, value in settings.items() if isinstance(value, dict)}
    for table in tables.values():
        for name in [name for name in table if name not in SIZES[kind]]:
            del table[name]
    config = peft.LoraConfig(
        target_modules=list(SIZES[kind]), fan_in_fan_out=kind == "gpt2", **{**settings, **tables}
    )
    theirs = peft.get_peft_model(model, config).eval()
    randomize(p for name, p in theirs.named_parameters() if "lora_" in name)
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path / "out")
    ours = tiny(kind, seeded)
    before = logits(ours)
    handle = import_peft(ours, tmp_path / "out")
    assert (logits(ours) - wanted).abs().max() <= TOLERANCE
    assert (wanted - before).abs().max() > 1e-2
    assert not any(p.requires_grad for p in handle.parameters())


def test_their_ia3_answers_the_same_here(tmp_path: Path, seeded: int) -> None:
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs = peft.get_peft_model(tiny("llama", seeded), config).eval()
    randomize(p for name, p in theirs.named_parameters() if "ia3_" in name)
    theirs.save_pretrained(tmp_path / "out")
    ours = tiny("llama", seeded)
    import_peft(ours, tmp_path / "out")
    assert (logits(ours) - logits(theirs)).abs().max() <= TOLERANCE


def test_targets_are_short_names_only_where_they_name_exactly_the_adapted_layers(tmp_path: Path) -> None:
    whole = attach(tiny("llama", 0), LoRA(rank=2), targets=["q_proj", "v_proj"])
    part = attach(tiny("llama", 0), LoRA(rank=2), targets=["layers.1.self_attn.q_proj"])
    targets = [
        json.loads((written(handle, tmp_path / name) / "adapter_config.json").read_text())["target_modules"]
        for name, handle in (("whole", whole), ("part", part))
    ]
    assert targets == [["q_proj", "v_proj"], ["model.layers.1.self_attn.q_proj"]]
