"""Adapters go to PEFT and come back: the same logits to 1e-5 in float32, on random tiny models.

``peft_cases/`` has one file for each method: ``OURS`` makes methods of ours, ``THEIRS`` configurations of PEFT's. Where
they are there, ``TARGETS`` says which layers of each kind of model are adapted, and ``SLACK`` by how much the logits
may differ once our own reader has read what we wrote.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from addenda import LoRA, Method, attach
from addenda.core import Handle
from addenda.export.peft import import_peft, write_peft

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT 0.21 asks transformers 5.23 for a property that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It warns of every folder from which something has to be drawn anew, and that is what some cases are for.
    pytest.mark.filterwarnings("ignore:Specified to not:UserWarning"),
    # Its FRoD multiplies by a sparse tensor and says nothing of checks.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
    # PEFT's RandLoRA writes its shared bases once more for every layer, and misses these copies when they are left out.
    pytest.mark.filterwarnings(r"ignore:Found missing adapter keys.*randlora_A\.default:UserWarning"),
    # PEFT misses the layers that AdaLoRA's rank_pattern names by their values.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match.*lora_E:RuntimeWarning"),
    # PEFT takes the vector that its own lora_bias trains for a tensor that was cut off.
    pytest.mark.filterwarnings("ignore:.*have invalid shape:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type.*Norm:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]

TOLERANCE = 1e-5
SIZES = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_fc")}
Where = tuple[list[str], float]
Differing = Callable[[Handle, str, torch.Tensor, torch.Tensor], float]


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


def cases(table: str) -> list[Any]:
    """Every case of a table of ``peft_cases/``, one file a method, on both kinds of model."""
    found = []
    for path in sorted(Path(__file__).with_name("peft_cases").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"peft_cases_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kinds = getattr(module, "KINDS", tuple(SIZES))
        targets, slack = getattr(module, "TARGETS", SIZES), getattr(module, "SLACK", 0.0)
        found += [
            pytest.param(kind, make, (list(targets[kind]), slack), id=f"{path.stem}-{name}-{kind}")
            for name, make in getattr(module, table).items()
            for kind in kinds
        ]
    return found


@pytest.mark.parametrize(("kind", "make", "where"), cases("OURS"))
def test_our_adapter_answers_the_same_under_peft(
    kind: str, make: Callable[[str], Method], where: Where, tmp_path: Path, seeded: int, differing: Differing
) -> None:
    targets, slack = where
    ours = tiny(kind, seeded)
    before = logits(ours)
    handle = attach(ours, make(kind), targets=targets)
    randomize(handle.parameters())
    wanted = logits(ours)
    folder = written(handle, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(tiny(kind, seeded), folder)
    assert differing(handle, "written", logits(theirs), wanted) <= TOLERANCE
    assert (wanted - before).abs().max() > 1e-2
    again = tiny(kind, seeded)
    import_peft(again, folder)
    assert (logits(again) - wanted).abs().max() <= slack


@pytest.mark.parametrize(("kind", "make", "where"), cases("THEIRS"))
def test_their_adapter_answers_the_same_here(
    kind: str, make: Callable[..., Any], where: Where, tmp_path: Path, seeded: int, differing: Differing
) -> None:
    model = tiny(kind, seeded)
    before = logits(model)
    named = {"target_modules": where[0], "fan_in_fan_out": kind == "gpt2"}
    theirs = peft.get_peft_model(model, make(kind, **named)).eval()
    randomize(p for p in theirs.parameters() if p.requires_grad)
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path / "out")
    ours = tiny(kind, seeded)
    handle = import_peft(ours, tmp_path / "out")
    assert differing(handle, "read", logits(ours), wanted) <= TOLERANCE
    assert (wanted - before).abs().max() > 1e-2
    assert not any(p.requires_grad for p in handle.parameters())


def test_targets_are_short_names_only_where_they_name_exactly_the_adapted_layers(tmp_path: Path) -> None:
    whole = attach(tiny("llama", 0), LoRA(rank=2), targets=["q_proj", "v_proj"])
    part = attach(tiny("llama", 0), LoRA(rank=2), targets=["layers.1.self_attn.q_proj"])
    targets = [
        json.loads((written(handle, tmp_path / name) / "adapter_config.json").read_text())["target_modules"]
        for name, handle in (("whole", whole), ("part", part))
    ]
    assert targets == [["q_proj", "v_proj"], ["model.layers.1.self_attn.q_proj"]]


@pytest.mark.parametrize(
    ("left_out", "adapted"),
    [
        ({"layers_to_transform": [1]}, {"1.self_attn.q_proj", "1.mlp.down_proj"}),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, {"0.self_attn.q_proj", "0.mlp.down_proj"}),
        (
            {"exclude_modules": ["0.self_attn.q_proj"]},
            {"1.self_attn.q_proj", "0.mlp.down_proj", "1.mlp.down_proj"},
        ),
        ({"exclude_modules": r".*\.0\..*_proj"}, {"1.self_attn.q_proj", "1.mlp.down_proj"}),
    ],
)
def test_targets_that_peft_was_told_to_leave_out_are_left_out(
    left_out: dict[str, Any], adapted: set[str], tmp_path: Path, seeded: int
) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **left_out)
    theirs = peft.get_peft_model(tiny("llama", seeded), config).eval()
    randomize(p for p in theirs.parameters() if p.requires_grad)
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny("llama", seeded)
    handle = import_peft(ours, tmp_path)
    assert set(handle.paths) == {f"model.layers.{path}" for path in adapted}
    assert (logits(ours) - wanted).abs().max() <= TOLERANCE
