"""Training through a rounding: the layer computes with the weight that a low-bit file would hold."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import addenda
from addenda.bases import formats
from addenda.bases.packed import PackedModel
from addenda.bases.packed_layers import PackedLinear
from addenda.core import registry
from addenda.core.through import merged_rows
from addenda.errors import CheckpointError, ExportError, MethodError, NotFoundError
from addenda.export.format import format_of
from addenda.export.peft import write_peft

SIMPLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "NF4", "INT8", "F16", "BF16", "F32"]


class Net(nn.Module):
    """Two layers whose rows are whole blocks, with a bias on one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def filled(handle: addenda.Handle, size: float = 0.1) -> addenda.Handle:
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=size)
    return handle


def read_back(name: str, weight: Tensor) -> Tensor:
    entry = formats.get(name)
    return entry.dequantize(entry.quantize(weight), weight.shape[1])


@pytest.mark.parametrize("name", SIMPLE)
def test_the_answer_is_that_of_the_rounded_sum(name: str) -> None:
    model, x = Net(), torch.randn(7, 64)
    bare = copy.deepcopy(model)
    handle = filled(addenda.attach(model, addenda.LoRA(rank=4), through=name.lower()))
    assert handle.through == name
    for path in ("up", "down"):
        adapter, layer = handle.adapters[path], bare.get_submodule(path)
        with torch.no_grad():
            sum_ = layer.weight + adapter.scaling * (adapter.B @ adapter.A)
            layer.weight.copy_(read_back(name, sum_))
        rows = merged_rows(handle, path, name)
        assert torch.equal(formats.get(name).dequantize(rows, sum_.shape[1]), layer.weight)
    assert torch.allclose(model(x), bare(x), atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))  # the second time from what is kept


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "NF4"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_the_gradient_passes_the_rounding_by(name: str, method: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    plain = filled(addenda.attach(copy.deepcopy(model), registry.get(method)(rank=4), ["0"]))
    handle = addenda.attach(model, registry.get(method)(rank=4), ["0"], through=name)
    with torch.no_grad():
        for ours, theirs in zip(handle.parameters(), plain.parameters(), strict=True):
            ours.copy_(theirs)
    x, g = torch.randn(9, 64, requires_grad=True), torch.randn(9, 32)
    twin = x.detach().clone().requires_grad_()
    total, bias = plain.adapters["0"].fold(model[0].weight.detach(), model[0].bias.detach())
    rounded = total + (read_back(name, total.detach()) - total).detach()  # by its definition
    F.linear(twin, rounded, bias).backward(g)
    model(x).backward(g)
    assert torch.allclose(x.grad, twin.grad, atol=1e-4)
    for ours, theirs in zip(handle.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)


def test_over_a_packed_layer_the_sum_is_rounded_anew() -> None:
    entry = formats.get("Q4_1")
    layer = PackedLinear(entry.quantize(torch.randn(32, 64)), entry, 64, torch.randn(32))
    model, x = nn.Sequential(layer), torch.randn(5, 64)
    handle = filled(addenda.attach(model, addenda.LoRA(rank=4), through="q4_1"))
    adapter = handle.adapters["0"]
    total = layer.dequantized() + adapter.scaling * (adapter.B @ adapter.A).detach()
    assert torch.allclose(model(x), F.linear(x, read_back("Q4_1", total), layer.bias), atol=1e-5)
    assert torch.equal(merged_rows(handle, "0", "Q4_1"), entry.quantize(total))


def test_in_bfloat16_the_sum_is_made_and_rounded_in_float32() -> None:
    entry = formats.get("Q4_1")
    layer = PackedLinear(entry.quantize(torch.randn(32, 64)), entry, 64, dtype=torch.bfloat16)
    handle = filled(addenda.attach(nn.Sequential(layer), addenda.LoRA(rank=4), through="q4_1"))
    adapter = handle.adapters["0"]
    exact = entry.dequantize(layer.raw, 64) + adapter.scaling * (adapter.B @ adapter.A).detach()
    assert torch.equal(merged_rows(handle, "0", "Q4_1"), entry.quantize(exact))


def test_a_merge_writes_the_weight_that_was_trained_with() -> None:
    model, x = Net(), torch.randn(7, 64)
    handle = filled(addenda.attach(model, addenda.LoRA(rank=4), through="q4_0"))
    before = model(x)
    rows = merged_rows(handle, "up", "Q4_0")
    handle.merge()
    assert torch.equal(model.up.weight, formats.get("Q4_0").dequantize(rows, 64))
    assert torch.allclose(model(x), before, atol=1e-5)
    handle.unmerge()
    assert torch.equal(model(x), before)


def test_in_another_format_the_trained_weight_is_rounded_again() -> None:
    handle = filled(addenda.attach(Net(), addenda.LoRA(rank=4), through="q4_0"))
    trained = formats.get("Q4_0").dequantize(merged_rows(handle, "up", "Q4_0"), 64)
    assert torch.equal(merged_rows(handle, "up", "Q8_0"), formats.get("Q8_0").quantize(trained))


def test_a_saved_adapter_answers_through_the_format_again(tmp_path: Path) -> None:
    model, x = Net(), torch.randn(7, 64)
    handle = filled(addenda.attach(model, addenda.LoRA(rank=4), through="q4_1"))
    with torch.no_grad():
        answer = model(x)
    addenda.save(model, tmp_path / "adapter")
    handle.detach()
    loaded = addenda.load(model, tmp_path / "adapter")
    assert (loaded.through, str(loaded)) == (
        "Q4_1",
        "<Handle 'default': lora, 2 layers, 1,536 parameters, through Q4_1, active>",
    )
    with torch.no_grad():
        assert torch.equal(model(x), answer)


def test_a_manifest_says_what_an_older_reader_would_miss(tmp_path: Path) -> None:
    model = Net()
    addenda.attach(model, addenda.LoRA(rank=4), name="plain")
    addenda.attach(model, addenda.LoRA(rank=4), name="through", through="q8_0")
    manifests = []
    for name in ("plain", "through"):
        addenda.save(model, tmp_path / name, name=name)
        manifests.append((tmp_path / name / "adapter.json").read_text())
    assert '"format_version": 1' in manifests[0]
    assert "through" not in manifests[0].replace('"name"', "")
    assert '"format_version": 2' in manifests[1]
    assert '"through": "Q8_0"' in manifests[1]
    damaged = manifests[1].replace('"through": "Q8_0"', '"through": "Q9_9"')
    (tmp_path / "through/adapter.json").write_text(damaged)
    with pytest.raises(CheckpointError, match="Q9_9"):
        addenda.load(model, tmp_path / "through", name="again")


def test_what_was_written_to_an_adapter_is_seen() -> None:
    model, x = Net(), torch.randn(7, 64)
    handle = filled(addenda.attach(model, addenda.LoRA(rank=4), through="q4_1"))
    with torch.no_grad():
        before = model(x)
        for parameter in handle.parameters():
            parameter.mul_(2)
        after = model(x)
    assert not torch.equal(before, after)
    assert torch.allclose(model(x), after, atol=1e-6)  # anew, since a gradient is wanted


def test_beside_others_it_adds_what_it_changes_alone() -> None:
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(7, 64)
    base = model(x)
    filled(addenda.attach(model, addenda.LoRA(rank=4), ["0"], name="plain"))
    addenda.activate(model, ["plain"])
    plain = model(x)
    filled(addenda.attach(model, addenda.LoRA(rank=4), ["0"], name="rounded", through="q4_0"))
    addenda.activate(model, ["rounded"])
    rounded = model(x)
    for wanted in (["plain", "rounded"], addenda.parallel("plain", "rounded")):
        addenda.activate(model, wanted)
        assert torch.allclose(model(x), plain + rounded - base, atol=1e-5)
    addenda.activate(model, addenda.Rows(("rounded", None, "plain", "rounded", "rounded", None, "plain")))
    expected = torch.stack([rounded[0], base[1], plain[2], rounded[3], rounded[4], base[5], plain[6]])
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_fused_paths_give_what_the_layers_give_one_by_one(targets: str | list[str]) -> None:
    settings = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**settings, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    handle = filled(addenda.attach(model, addenda.LoRA(rank=4), targets, through="q4_1"))
    ids, g = torch.randint(0, 96, (20,)), torch.randn(20, 96)
    packed = PackedModel(model)
    assert {"gated MLP", "self-attention"} <= dict(packed.fused).keys()
    answers, grads = [], []
    for run in (
        lambda: packed.logits(packed.hidden(ids, [20])),
        lambda: model(input_ids=ids[None]).logits[0],
    ):
        answers.append(run())
        answers[-1].backward(g)
        grads.append([p.grad for p in handle.parameters()])
        model.zero_grad(set_to_none=True)
    assert torch.allclose(*answers, atol=1e-4)
    for fused, plain in zip(*grads, strict=True):
        assert torch.allclose(fused, plain, atol=1e-4 * float(plain.abs().max() + 1))


def test_it_is_not_written_for_peft_which_would_answer_otherwise(tmp_path: Path) -> None:
    model = Net()
    handle = addenda.attach(model, addenda.LoRA(rank=4), through="q4_1")
    planned = addenda.plan(Net(), addenda.LoRA(rank=4), through="q4_1")
    assert not any(row.low_rank for row in planned.rows)
    assert "through Q4_1" in format_of("peft").problems(planned, model, None)[0]
    with pytest.raises(ExportError, match="trained through Q4_1"):
        write_peft(handle, tmp_path)


def test_what_cannot_be_folded_and_rounded_is_refused_at_once() -> None:
    model = nn.ModuleDict(
        {"narrow": nn.Linear(48, 32), "wide": nn.Linear(64, 32), "seen": nn.Conv1d(32, 8, 1)}
    )
    with pytest.raises(NotFoundError, match=r"did you mean 'Q4_"):
        addenda.plan(model, addenda.LoRA(rank=2), ["wide"], through="q4_2")
    with pytest.raises(
        MethodError, match=r"rows of 48 weights are not whole blocks of 32 at 1 of 2 layers"
    ) as caught:
        addenda.plan(model, addenda.LoRA(rank=2), ["wide", "narrow"], through="q4_1")
    assert "BF16, F16, F32, INT8" in str(caught.value)
    with pytest.raises(MethodError, match=r"dropout has no place.*'seen' is of kind 'conv'"):
        addenda.attach(model, addenda.LoRA(rank=2, dropout=0.1), ["wide", "seen"], through="q4_1")
    with pytest.raises(MethodError, match="no weight that could be folded in"):
        addenda.attach(model, addenda.Bottleneck(size=2), ["wide"], through="q4_1")
    with pytest.raises(MethodError, match="trained whole are not rounded"):
        addenda.attach(model, addenda.LoRA(rank=2, whole=("narrow",)), ["wide"], through="q4_1")
    assert not addenda.handles(model)
    assert addenda.plan(model, addenda.LoRA(rank=2), ["wide"], through="q4_1").through == "Q4_1"


@pytest.mark.parametrize("name", [name for name in registry.names() if registry.get(name).mergeable])
def test_every_mergeable_method_trains_through_a_rounding(name: str) -> None:
    method_type = registry.get(name)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    settings = dict(method_type.variants[0])
    try:
        plain = addenda.attach(copy.deepcopy(model), method_type(**settings), "all-linear")
    except (MethodError, addenda.TargetError):
        pytest.skip("it stands on no such layers, or has to observe them")
    x = torch.randn(11, 64)
    handle = filled(addenda.attach(model, method_type(**settings), "all-linear", through="q8_0"), 0.02)
    model(x).square().mean().backward()
    trained = {n for n, p in handle.named_parameters() if p.grad is not None and bool(p.grad.any())}
    filled(plain, 0.02)
    plain.model(x).square().mean().backward()
    wanted = {n for n, p in plain.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert trained == wanted
