"""``modules_to_save``: layers saved whole beside any method's adapter, written for PEFT and read from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from addenda import LoRA, Method, attach
from addenda.core import handles
from addenda.errors import CheckpointError, ExportError
from addenda.export.peft import import_peft, write_peft
from addenda.methods.ia3 import IA3
from addenda.methods.shira import SHiRA
from addenda.methods.supertuning import SuperTuning
from addenda.methods.trainable_tokens import TrainableTokens

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

TOLERANCE = 1e-5
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(seed: int, *, tied: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


def roberta(seed: int) -> nn.Module:
    """A model whose head is a module of two layers."""
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=40, num_labels=3)
    return transformers.RobertaForSequenceClassification(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 26).reshape(2, 12)).logits


def stir(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


CASES = {
    "head": (llama, LoRA(rank=2, whole=("lm_head",)), ["q_proj"]),
    "embedding-and-norm": (
        llama,
        LoRA(rank=2, whole=("embed_tokens", "model.norm")),
        ["q_proj", "down_proj"],
    ),
    "tied": (lambda seed: llama(seed, tied=True), LoRA(rank=2, whole=("lm_head",)), ["v_proj"]),
    "tied-both": (
        lambda seed: llama(seed, tied=True),
        LoRA(rank=2, whole=("lm_head", "embed_tokens")),
        ["v_proj"],
    ),
    "container": (roberta, LoRA(rank=2, whole=("classifier",)), ["query"]),
    "ia3": (roberta, IA3(whole=("classifier",)), ["key", "value"]),
}


@pytest.mark.parametrize("name", CASES)
def test_ours_answers_the_same_under_peft(name: str, tmp_path: Path, seeded: int) -> None:
    make, method, targets = CASES[name]
    ours = make(seeded)
    handle = attach(ours, method, targets)
    stir(ours)
    wanted = logits(ours)
    write_peft(handle, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(seeded), tmp_path)
    assert (logits(theirs) - wanted).abs().max() <= TOLERANCE
    again = make(seeded)
    read = import_peft(again, tmp_path)
    assert read.paths == handle.paths
    assert (logits(again) - wanted).abs().max() <= 1e-6
    theirs.unload()


@pytest.mark.parametrize("name", [name for name in CASES if name != "ia3"])
def test_theirs_answers_the_same_here(name: str, tmp_path: Path, seeded: int) -> None:
    make, method, targets = CASES[name]
    saved = [*method.whole, "score"] if name == "container" else list(method.whole)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, modules_to_save=saved)
    theirs = peft.get_peft_model(make(seeded), config).eval()
    stir(theirs)
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path)
    ours = make(seeded)
    import_peft(ours, tmp_path)
    assert (logits(ours) - wanted).abs().max() <= TOLERANCE


def test_a_saved_module_without_all_its_tensors_is_refused(tmp_path: Path) -> None:
    handle = attach(roberta(0), LoRA(rank=2, whole=("classifier.dense",)), ["query"])
    write_peft(handle, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["classifier"]}))
    with pytest.raises(CheckpointError, match="classifier, of which tensors are missing"):
        import_peft(roberta(0), tmp_path)


def test_ties_that_peft_would_make_are_refused(tmp_path: Path) -> None:
    handle = attach(llama(0, tied=True), TrainableTokens(tokens=(3, 4)), ["embed_tokens"])
    with pytest.raises(ExportError, match="PEFT trains 'lm_head' along"):
        write_peft(handle, tmp_path)


def test_tied_rows_go_to_peft_and_back(tmp_path: Path, seeded: int) -> None:
    ours = llama(seeded, tied=True)
    handle = attach(ours, TrainableTokens(tokens=(9, 3, 24)))
    stir(ours)
    wanted = logits(ours)
    write_peft(handle, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(seeded, tied=True), tmp_path)
    assert (logits(theirs) - wanted).abs().max() <= TOLERANCE
    again = llama(seeded, tied=True)
    assert import_peft(again, tmp_path).paths == handle.paths
    assert (logits(again) - wanted).abs().max() <= 1e-6


@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning")
@pytest.mark.parametrize("top", [True, False])
def test_places_that_peft_did_not_keep_are_found_again(top: bool, tmp_path: Path, seeded: int) -> None:
    config = peft.SupertuningConfig(
        target_modules=["q_proj"], sparsity=0.9, select_top=top, save_precomputed_indices=False
    )
    theirs = peft.get_peft_model(llama(seeded), config).eval()
    stir(theirs)
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "indices" in key]
    ours = llama(seeded)
    import_peft(ours, tmp_path)
    assert (logits(ours) - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("method", "name"),
    [(SHiRA(rank=1), "shira_indices"), (SuperTuning(sparsity=0.9), "supertuning_indices")],
)
@pytest.mark.parametrize("place", [-1, 10**6])
def test_places_outside_of_the_weight_are_refused(
    method: Method, name: str, place: int, tmp_path: Path
) -> None:
    write_peft(attach(llama(0), method, ["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key].view(-1)[3] = place
    save_file(tensors, file)
    model = llama(0)
    with pytest.raises(CheckpointError, match="lie outside its weight"):
        import_peft(model, tmp_path)
    assert not handles(model)
