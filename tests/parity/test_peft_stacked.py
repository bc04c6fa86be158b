"""LoRA on attention modules and stacked experts goes to PEFT and comes back: the same outputs to 1e-5 in float32."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from addenda import LoRA, attach
from addenda.core import Handle
from addenda.errors import CheckpointError, ExportError, TargetError
from addenda.export.peft import import_peft, write_peft

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT 0.21 asks transformers 5.23 for a property that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It looks for modules only, and honours the patterns that name parameters all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

TOLERANCE = 1e-5


class Layer(nn.Module):
    """Attention and one linear layer; PyTorch's own encoder layer would pass PEFT's adapters by in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear1 = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear1(x + self.self_attn(x, x, x)[0]))


class Encoder(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def mixture(kind: str) -> nn.Module:
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 12, "head_dim": 12}
    if kind == "mixtral":
        config = transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
        return transformers.MixtralForCausalLM(config).eval()
    config = transformers.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config).eval()


def answer(model: nn.Module) -> Tensor:
    """The model's output for a fixed input, whatever wraps it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
            return model(torch.randint(40, (2, 12), generator=generator)).logits
        return model(torch.randn(2, 7, 16, generator=generator))


def randomized(handle: Handle) -> Handle:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return handle


def there_and_back(base: nn.Module, handle: Handle, folder: Path) -> float:
    """How far the answers of what is written are from the handle's, under PEFT and when it is read here again."""
    bare, wanted = copy.deepcopy(base), answer(handle.model)
    folder.mkdir()
    write_peft(handle, folder)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), folder)
    assert (wanted - answer(bare)).abs().max() > 1e-2
    import_peft(bare, folder)
    return max(float((answer(read) - wanted).abs().max()) for read in (theirs, bare))


OURS = {
    "whole": (["self_attn"], LoRA(rank=3)),
    "some": (["q_proj", "layers.1.self_attn.v_proj"], LoRA(rank=2, alpha=5.0)),
    "with-linear": (
        ["self_attn", "linear1"],
        LoRA(rank=2, alphas={"q_proj": 3.0, "linear1": 7.0}, ranks={"v_proj": 4}),
    ),
    "output": (["out_proj"], LoRA(rank=4, rank_stabilized=True)),
}


@pytest.mark.parametrize(("targets", "method"), OURS.values(), ids=OURS)
def test_our_adapter_on_an_attention_answers_the_same_under_peft(
    targets: list[str], method: LoRA, tmp_path: Path
) -> None:
    base = Encoder().eval()
    handle = randomized(attach(copy.deepcopy(base), method, targets))
    assert there_and_back(base, handle, tmp_path / "out") <= TOLERANCE


EXPERTS = {
    "all": (["experts"], LoRA(rank=3)),
    "one-stack": (["experts.down_proj"], LoRA(rank=2, alpha=5.0)),
    "uneven": (
        ["experts", "q_proj"],
        LoRA(rank=2, ranks={"1.gate_up_proj": 3, "q_proj": 5}, alphas={"3.down_proj": 9.0}),
    ),
    "some": (
        ["0.gate_up_proj", "2.gate_up_proj", "layers.1.mlp.experts.3.down_proj"],
        LoRA(rank=2, rank_stabilized=True),
    ),
}


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize(("targets", "method"), EXPERTS.values(), ids=EXPERTS)
def test_our_adapter_on_experts_answers_the_same_under_peft(
    kind: str, targets: list[str], method: LoRA, tmp_path: Path
) -> None:
    base = mixture(kind)
    handle = randomized(attach(copy.deepcopy(base), method, targets))
    assert there_and_back(base, handle, tmp_path / "out") <= TOLERANCE


def from_peft(base: nn.Module, config: object, folder: Path) -> tuple[Handle, Tensor]:
    """Make PEFT's adapter, with random values, and read it here; returns the handle and what PEFT answers."""
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wanted = answer(theirs)
    theirs.save_pretrained(folder)
    return import_peft(copy.deepcopy(base), folder), wanted


THEIRS = {
    "plain": {"target_modules": ["self_attn"]},
    "patterns": {
        "target_modules": ["self_attn", "linear1"],
        "rank_pattern": {"layers.1.self_attn": 5, "linear1": 3},
        "alpha_pattern": {"self_attn": 3},
    },
    "rank-stabilized": {"target_modules": ["layers.0.self_attn", "linear1"], "use_rslora": True},
}


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
def test_their_adapter_on_an_attention_answers_the_same_here(
    settings: dict[str, object], tmp_path: Path
) -> None:
    base = Encoder().eval()
    handle, wanted = from_peft(base, peft.LoraConfig(r=4, lora_alpha=6, **settings), tmp_path / "out")
    assert (answer(handle.model) - wanted).abs().max() <= TOLERANCE
    assert (wanted - answer(base)).abs().max() > 1e-2


THEIR_EXPERTS = {
    "both": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "one": {"target_modules": ["q_proj"], "target_parameters": ["layers.1.mlp.experts.down_proj"]},
    "patterns": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        "rank_pattern": {"gate_up_proj": 3, "layers.0.mlp.experts.down_proj": 5},
        "alpha_pattern": {"experts.down_proj": 2},
    },
}


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("settings", THEIR_EXPERTS.values(), ids=THEIR_EXPERTS)
def test_their_adapter_on_experts_answers_the_same_here(
    kind: str, settings: dict[str, object], tmp_path: Path
) -> None:
    base = mixture(kind)
    handle, wanted = from_peft(base, peft.LoraConfig(r=4, lora_alpha=6, **settings), tmp_path / "out")
    assert (answer(handle.model) - wanted).abs().max() <= TOLERANCE
    assert (wanted - answer(base)).abs().max() > 1e-2


def test_their_adapter_stays_as_small_when_it_is_written_again(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["self_attn"])
    handle, wanted = from_peft(Encoder().eval(), config, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write_peft(handle, tmp_path / "ours")
    sizes = [(tmp_path / who / "adapter_model.safetensors").stat().st_size for who in ("theirs", "ours")]
    assert abs(sizes[0] - sizes[1]) < 200
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (4, 6, ["self_attn"])
    assert (answer(import_peft(Encoder().eval(), tmp_path / "ours").model) - wanted).shape == wanted.shape


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    separate = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, kdim=8)})
    with pytest.raises(ExportError, match="separate projection"):
        write_peft(attach(separate, LoRA(rank=2), "attn"), tmp_path)
    recurrent = nn.ModuleDict({"lstm": nn.LSTM(6, 5)})
    with pytest.raises(ExportError, match="PEFT has no form for 2 of the adapted layers"):
        write_peft(attach(recurrent, LoRA(rank=2), "lstm"), tmp_path)


def test_factors_for_another_number_of_experts_are_refused(tmp_path: Path) -> None:
    base = mixture("mixtral")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"])
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "out")
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    other = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, intermediate_size=12, num_key_value_heads=2, num_local_experts=3)
    )
    with pytest.raises((CheckpointError, TargetError)):
        import_peft(other, tmp_path / "out")
    assert not [name for name, _ in other.named_parameters() if "adapters" in name]
