"""Models quantised by other libraries: adapted as PEFT adapts them, or refused by the plan with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.bases import load_base
from addenda.core.fingerprints import fingerprint
from addenda.core.layers import kind_of, view_of
from addenda.errors import MethodError

transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")


def torchao_quantization():
    """torchao is no part of the set-up: every import of transformers takes seconds longer where it is installed."""
    return pytest.importorskip("torchao.quantization", reason="pip install -e '.[torchao]' for these")


pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

METHODS = [
    addenda.LoRA(rank=3, alpha=5),
    addenda.LoRA(rank=3, alpha=6, dropout=0.3),
    addenda.Bottleneck(),
    addenda.IA3(),
    addenda.BitFit(),
]


def tiny() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def with_layers(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Put what ``make`` returns in the place of every linear layer but the head, then quantise by moving."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            model.set_submodule(path, make(module))
    return model.to("cpu").eval()  # on a CPU int8 of bitsandbytes rounds its input in this mode only


def four_bit(layer: nn.Linear, **settings: object) -> nn.Module:
    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        **{"quant_type": "nf4", "compute_dtype": torch.float32, **settings},
    )
    made.load_state_dict(layer.state_dict())
    return made


def eight_bit(layer: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
    )
    made.load_state_dict(layer.state_dict())
    return made


def by_torchao(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        quantization = torchao_quantization()
        model = tiny()
        config = getattr(quantization, name)()
        quantization.quantize_(
            model, config, filter_fn=lambda m, path: type(m) is nn.Linear and path != "lm_head"
        )
        return model

    return make


class Codes(nn.Module):
    """The shape of a GPTQ or AWQ module, as their libraries lay it out: codes, zeros and scales of groups of rows.

    A stand-in: those libraries ask for another PyTorch. ``differentiable`` is False where a kernel has no backward.
    """

    def __init__(self, layer: nn.Linear, *, differentiable: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.differentiable = (
            layer.in_features,
            layer.out_features,
            differentiable,
        )
        weight = layer.weight.detach().t()
        scales = (weight.amax(0) - weight.amin(0)) / 15
        zeros = (-weight.amin(0) / scales).round()
        codes = (weight / scales + zeros).round().clamp(0, 15).to(torch.int32).unflatten(0, (-1, 8))
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
        self.register_buffer("qweight", (codes << shifts).sum(1, dtype=torch.int32))
        self.register_buffer("qzeros", zeros)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", layer.bias.detach() if layer.bias is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
        codes = ((self.qweight[:, None] >> shifts) & 15).flatten(0, 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            y = x @ ((codes - self.qzeros) * self.scales)
            return y if self.bias is None else y + self.bias


WORKING: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes-nf4": lambda: with_layers(tiny(), four_bit),
    "bitsandbytes-nf4-single": lambda: with_layers(tiny(), lambda m: four_bit(m, compress_statistics=False)),
    "bitsandbytes-fp4": lambda: with_layers(tiny(), lambda m: four_bit(m, quant_type="fp4")),
    "bitsandbytes-int8": lambda: with_layers(tiny(), eight_bit),
    "torchao-int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao-float8": by_torchao("Float8WeightOnlyConfig"),
    "torchao-intx": by_torchao("IntxWeightOnlyConfig"),
    "gptq-shaped": lambda: with_layers(tiny(), lambda m: Codes(m, differentiable=True)),
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "torchao-int8-dynamic": by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "gptq-without-backward": lambda: with_layers(tiny(), lambda m: Codes(m, differentiable=False)),
}
IDS = torch.arange(1, 25).reshape(2, 12)
Q = "model.layers.1.self_attn.q_proj"


def stirred(handle: addenda.Handle, size: float = 0.1) -> addenda.Handle:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return handle


@pytest.mark.parametrize("form", WORKING)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'dropout', '')}")
def test_every_method_trains_and_leaves_the_base_as_it_was(
    form: str, method: addenda.core.Method, tmp_path: Path
) -> None:
    model = WORKING[form]()
    assert kind_of(model.get_submodule(Q)).name == "quantized-linear"
    before, mark = model(IDS).logits, fingerprint(model)
    handle = addenda.attach(model, method, "all-linear")
    assert len(handle.paths) == 14
    assert handle.probed.startswith("all ")
    if "identity" not in method.exceptions:
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    stirred(handle)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in handle.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)
    model.eval()
    trained = model(IDS).logits
    addenda.save(model, tmp_path / "adapter")
    handle.detach()
    assert fingerprint(model) == mark
    assert torch.equal(model(IDS).logits, before)
    addenda.load(model, tmp_path / "adapter")
    torch.testing.assert_close(model(IDS).logits, trained, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", WORKING)
def test_the_plan_counts_weights_and_not_codes(form: str) -> None:
    found = addenda.plan(WORKING[form](), addenda.LoRA(rank=2), "all-linear").base_parameters
    buffers = sum(
        m.bias.numel() for m in WORKING[form]().modules() if isinstance(m, Codes) and m.bias is not None
    )
    assert found + buffers == sum(p.numel() for p in tiny().parameters())


@pytest.mark.parametrize("form", REFUSED)
def test_a_layer_without_an_input_gradient_is_refused_by_the_plan(form: str) -> None:
    model = REFUSED[form]()
    with pytest.raises(MethodError, match="gives no gradient of its input") as caught:
        addenda.plan(model, addenda.LoRA(), "all-linear")
    assert caught.value.hint
    assert type(model.get_submodule(Q)).__name__ in ("Linear", "Codes")


def test_a_model_that_is_not_quantized_yet_is_refused_by_the_plan() -> None:
    model = nn.Sequential(four_bit(nn.Linear(64, 64)))
    with pytest.raises(MethodError, match="not quantized yet"):
        addenda.plan(model, addenda.LoRA(), "all-linear")
    addenda.attach(model.to("cpu"), addenda.LoRA(), "all-linear")


@pytest.mark.parametrize("form", [name for name in WORKING if name != "bitsandbytes-int8"])
def test_the_weight_seen_is_the_one_that_the_layer_applies(form: str) -> None:
    layer = WORKING[form]().get_submodule(Q)
    view = view_of(layer, Q)
    assert view.weight().shape == (64, 64)
    x = torch.randn(5, 64)
    torch.testing.assert_close(view.apply(x, view.weight(), view.bias()), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", WORKING)
def test_the_fingerprint_tells_weights_apart_and_outlasts_moves_and_use(form: str) -> None:
    model = WORKING[form]()
    mark = fingerprint(model)
    model(IDS)
    assert fingerprint(model.to("cpu").train().eval()) == mark
    assert fingerprint(copy.deepcopy(model)) == mark
    assert fingerprint(WORKING[form]()) != mark, "other weights, another fingerprint"


def test_bitsandbytes_is_kept_from_packing_for_inference_what_is_to_be_trained() -> None:
    model = nn.Sequential(four_bit(nn.Linear(64, 64)), four_bit(nn.Linear(64, 64))).to("cpu")
    for layer in model:
        layer.support_avx512bf16_for_cpu = True  # as on a machine that multiplies bfloat16
    addenda.attach(model, addenda.LoRA(rank=2), ["0"])
    assert not any(layer.support_avx512bf16_for_cpu for layer in model)
    with torch.no_grad():
        model.eval()(torch.randn(3, 64))
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert bool(x.grad.any())


def test_merging_into_a_quantized_weight_is_refused() -> None:
    model = WORKING["bitsandbytes-nf4"]()
    handle = stirred(addenda.attach(model, addenda.LoRA(rank=2), ["q_proj"]))
    mark = fingerprint(model)
    with pytest.raises(MethodError, match="keeps a quantized weight") as caught:
        handle.merge()
    assert caught.value.hint
    assert fingerprint(model) == mark


@pytest.mark.parametrize("form", ["bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8"])
def test_lora_equals_pefts_on_the_same_model(form: str) -> None:
    peft = pytest.importorskip("peft")
    ours = WORKING[form]()
    theirs = copy.deepcopy(ours)
    handle = stirred(addenda.attach(ours, addenda.LoRA(rank=4, alpha=8), ["q_proj", "v_proj", "down_proj"]))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped = peft.get_peft_model(theirs, config).eval()
    factors = dict(wrapped.named_parameters())
    pairs = []
    for name, parameter in handle.named_parameters():
        path, _, letter = name.rpartition(".")
        other = factors[f"base_model.model.{path}.lora_{letter}.default.weight"]
        other.data.copy_(parameter.data)
        pairs.append((parameter, other))
    found, expected = ours(IDS, labels=IDS), wrapped(IDS, labels=IDS)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    for parameter, other in pairs:
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # torchao and transformers deprecate names of their own while they load
def test_a_folder_that_torchao_quantized_is_a_base(tiny_folder: Path) -> None:
    base = load_base(tiny_folder)
    assert kind_of(base.model.get_submodule("model.layers.0.self_attn.q_proj")).name == "quantized-linear"
    handle = addenda.attach(base.model, addenda.LoRA(rank=2), "all-linear")
    assert handle.probed.startswith("all ")
    assert fingerprint(load_base(tiny_folder).model) == fingerprint(base.model)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A Llama of random weights that transformers quantised by torchao, with a tokenizer of single letters."""
    from tokenizers import Tokenizer, models

    quantization = torchao_quantization()
    tiny().save_pretrained(tmp_path / "dense")
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, quantization_config=config
    )
    folder = tmp_path / "quantized"
    model.save_pretrained(folder)
    letters = Tokenizer(models.BPE({chr(97 + at): at for at in range(26)}, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    return folder
