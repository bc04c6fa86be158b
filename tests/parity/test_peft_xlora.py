"""X-LoRA's folder with the adapters it mixes answers under PEFT as here, and the other way round."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import addenda
import addenda.errors
from addenda.export.peft import import_peft, write_peft
from addenda.methods.xlora import XLoRA

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(1))
TARGETS = (["q_proj", "down_proj"], ["q_proj", "v_proj"], ["down_proj"])
OURS = [
    {},
    {"layerwise": True, "temperature": 0.3, "weight": 1.7},
    {"depth": 3, "size": 5, "layerwise": True, "softmax": False, "top_k": 2},
    {
        "depth": 2,
        "size": 6,
        "dropout": 0.0,
        "top_k": 2,
        "softmax": False,
        "softmax_of_top": True,
        "first_value": 0.4,
    },
]
THEIRS = [
    {},
    {"layerwise_scalings": True, "softmax_temperature": 0.3, "global_scaling_weight": 1.7},
    {"layerwise_scalings": True, "enable_softmax": False, "top_k_lora": 2, "scaling_pass_value": 0.4},
]


def make() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted() -> nn.Module:
    """Ours with three adapters of different ranks and scalings, each on layers of its own choice."""
    model = make()
    for place, targets in enumerate(TARGETS):
        method = addenda.LoRA(rank=2 + place, alpha=4.0 + place, rank_stabilized=place == 1)
        stir(addenda.attach(model, method, targets, name="abc"[place]).parameters())
    return model


def stir(parameters: object) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))


def under_peft(folder: Path) -> nn.Module:
    config = peft.XLoraConfig.from_pretrained(folder)
    config.adapters = {name: str(folder / name) for name in config.adapters}
    return peft.PeftModel.from_pretrained(make(), folder, config=config).eval()


def saved(theirs: nn.Module, folder: Path) -> None:
    """Write what PEFT's ``save_pretrained`` means to: 0.21.2 leaves out what has an adapter's name in its path."""
    folder.mkdir()
    state = theirs.state_dict()
    theirs.peft_config["default"].save_pretrained(folder)
    network = {key: value for key, value in state.items() if "xlora_classifier" in key}
    save_file(network, folder / "adapter_model.safetensors")
    for name in theirs.peft_config["default"].adapters:
        own = {
            key: value for key, value in state.items() if f"lora_A.{name}." in key or f"lora_B.{name}." in key
        }
        theirs.peft_config[name].save_pretrained(folder / name)
        tensors = {key.replace(f".{name}.weight", ".weight"): value for key, value in own.items()}
        save_file(tensors, folder / name / "adapter_model.safetensors")


@pytest.mark.parametrize("settings", OURS)
def test_our_folder_answers_the_same_under_peft(
    settings: Mapping[str, object], tmp_path: Path, differing: Callable[..., float]
) -> None:
    model = adapted()
    handle = addenda.attach(model, XLoRA(of=("a", "b", "c"), hidden_size=32, **settings), name="mix")
    stir(handle.parameters())
    write_peft(handle, tmp_path)
    wanted = model(IDS).logits
    assert differing(handle, "written", under_peft(tmp_path)(IDS).logits, wanted) <= 1e-5
    again = make()
    import_peft(again, tmp_path)
    assert torch.equal(again(IDS).logits, wanted)
    assert (wanted - make()(IDS).logits).abs().max() > 1e-2


@pytest.mark.parametrize("settings", THEIRS)
def test_their_folder_answers_the_same_here(
    settings: Mapping[str, object], tmp_path: Path, differing: Callable[..., float]
) -> None:
    source = adapted()
    for name in "abc":
        (tmp_path / name).mkdir()
        write_peft(addenda.handles(source)[name], tmp_path / name)
    paths = {str(place): str(tmp_path / name) for place, name in enumerate("abc")}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=paths, **settings)
    theirs = peft.get_peft_model(make(), config).eval()
    stir(p for name, p in theirs.named_parameters() if "xlora_classifier" in name)
    saved(theirs, tmp_path / "theirs")
    model = make()
    handle = import_peft(model, tmp_path / "theirs", name="x")
    assert list(addenda.handles(model)) == ["x-0", "x-1", "x-2", "x"]
    assert differing(handle, "read", theirs(IDS).logits, model(IDS).logits) <= 1e-5


def test_a_folder_that_lacks_tensors_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """PEFT 0.21.2 leaves them out where an adapter has the name of a layer's place; here it is the network's first."""
    model = adapted()
    handle = addenda.attach(model, XLoRA(of=("a", "b"), hidden_size=32, depth=2, size=4), name="mix")
    write_peft(handle, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.internal_xlora_classifier.layers.0.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    bare = make()
    with pytest.raises(addenda.errors.CheckpointError, match=r"layers\.0\.weight' is missing"):
        import_peft(bare, tmp_path)
    assert addenda.handles(bare) == {}
    paths = {"0": str(tmp_path / "0"), "1": str(tmp_path / "1")}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=paths)
    peft.get_peft_model(make(), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(addenda.errors.CheckpointError):
        import_peft(bare, tmp_path / "theirs")
    assert addenda.handles(bare) == {}


def test_what_peft_does_not_mix_is_not_written(tmp_path: Path) -> None:
    model = adapted()
    addenda.attach(model, addenda.Bottleneck(size=2), ["q_proj"], name="d")
    handle = addenda.attach(model, XLoRA(of=("a", "d"), hidden_size=32), ["q_proj"], name="mix")
    with pytest.raises(addenda.errors.ExportError) as refused:
        write_peft(handle, tmp_path)
    assert "'d' is not plain LoRA" in str(refused.value)
    assert "'a' stands on layers that the mixture does not" in str(refused.value)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "XLORA", "adapters": {"../a": "a"}, "hidden_size": 32})
    )
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(addenda.errors.CheckpointError, match=r"not 0, 1, \.\.\."):
        import_peft(make(), tmp_path)
