"""Modules that hold several weights: attention, recurrent modules, stacked experts. And weights that modules share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import addenda
from addenda.conformance.layers import LAYERS
from addenda.core.layers import layer_at, parts_of
from addenda.errors import MethodError, TargetError

LORA = addenda.LoRA(rank=2)


def stirred(handle: addenda.Handle) -> addenda.Handle:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return handle


def effective(module: nn.Module, handle: addenda.Handle) -> dict[str, Tensor]:
    """The module's parameters in float64 with W + s B A in the place of W, written from the formula, by their names.

    The factors are float64 leaves as well, found under ``"<path>.A"`` and ``"<path>.B"``.
    """
    found = {name: p.detach().double() for name, p in module.named_parameters() if "adapters" not in name}
    for path, adapter in handle.adapters.items():
        A, B = (t.detach().double().requires_grad_() for t in (adapter.A, adapter.B))
        place = layer_at(module, path).weight_at
        owner = "" if place.module is layer_at(module, path).owner else "out_proj."
        whole, delta = found[owner + place.name], 2.0 * B @ A
        if place.transposed:
            delta = delta.t()
        if place.rows is not None:
            spread = torch.zeros_like(whole)
            spread[place.rows] = delta
            delta = spread
        found[owner + place.name] = whole + delta
        found |= {f"{path}.A": A, f"{path}.B": B}
    return found


def factors_of(found: dict[str, Tensor], handle: addenda.Handle) -> dict[str, Tensor]:
    return {name: found[name] for name, _ in handle.named_parameters()}


def parameters_of(found: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if name in dict(module.named_parameters())}


def agree(output: Tensor, handle: addenda.Handle, wanted: Tensor, factors: dict[str, Tensor]) -> None:
    """The output is the wanted one, and the gradient of a random projection of it is the same for every factor."""
    torch.testing.assert_close(output.double(), wanted, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(wanted)
    (output.double() * direction).sum().backward()
    grads = torch.autograd.grad((wanted * direction).sum(), list(factors.values()))
    for (name, parameter), grad in zip(handle.named_parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad.double(), grad, rtol=1e-3, atol=1e-4, msg=name)
        assert grad.abs().sum() > 0, name


# ---------------------------------------------------------------------------------------------------- attention

ATTENTIONS = {
    "packed": {},
    "no-bias": {"bias": False},
    "separate": {"kdim": 12, "vdim": 8},
    "extra-keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


@pytest.mark.parametrize("settings", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_one_with_the_sum_as_its_weights(settings: dict[str, object], masked: bool) -> None:
    attention = nn.MultiheadAttention(16, 4, **settings)
    handle = stirred(addenda.attach(attention, LORA, ["q_proj", "k_proj", "v_proj", "out_proj"]))
    query, key, value = (torch.randn(5, 5, width) for width in (16, attention.kdim, attention.vdim))
    masks = {"attn_mask": torch.ones(5, 5).triu(1).bool()} if masked else {}
    bare, found = copy.deepcopy(attention), effective(attention, handle)
    addenda.detach(bare)
    wanted, weights = functional_call(
        bare.double(), parameters_of(found, bare), (query.double(), key.double(), value.double()), masks
    )
    output, own_weights = attention(query, key, value, **masks)
    torch.testing.assert_close(own_weights.double(), weights, rtol=1e-4, atol=1e-5)
    agree(output, handle, wanted, factors_of(found, handle))


def test_attention_is_named_as_a_whole_or_by_projection_and_keeps_the_names_of_its_parameters() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    before = list(model.state_dict())
    whole = addenda.attach(model, LORA, "self_attn")
    assert whole.paths == [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    keys = list(model.state_dict())
    assert [key for key in keys if ".adapters." not in key] == before
    with pytest.raises(TargetError, match="already carries an adapter"):
        addenda.attach(model, LORA, "q_proj")
    one = addenda.attach(model, addenda.BitFit(), "out_proj", name="one")
    assert one.paths == ["self_attn.out_proj"]
    whole.detach()
    assert isinstance(model.self_attn, nn.MultiheadAttention)
    assert type(model.self_attn) is not nn.MultiheadAttention
    one.detach()
    assert type(model.self_attn) is nn.MultiheadAttention
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("targets", ["all-linear", "self_attn", "linear1"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_encoder_runs_its_adapters_in_inference_on_padded_batches_too(targets: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 6, 16)
    padded = torch.arange(6).expand(3, 6) >= torch.tensor([6, 4, 2])[:, None]
    handle = stirred(addenda.attach(encoder, LORA, targets, probe=x))
    trained = encoder.train()(x, src_key_padding_mask=padded)
    expected = torch.autograd.grad(trained[~padded].square().sum(), list(handle.parameters()))
    answered = encoder.eval()(x, src_key_padding_mask=padded)
    torch.testing.assert_close(answered[~padded], trained[~padded])
    found = torch.autograd.grad(answered[~padded].square().sum(), list(handle.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    trained = trained.detach()
    with torch.no_grad():
        answered = encoder.eval()(x, src_key_padding_mask=padded)
        torch.testing.assert_close(answered[~padded], trained[~padded])
        handle.disable()
        assert not torch.allclose(encoder(x, src_key_padding_mask=padded)[~padded], trained[~padded])
    handle.detach()
    assert type(encoder) is nn.TransformerEncoder


def test_what_is_only_read_takes_methods_that_merge_and_no_dropout() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(TargetError, match="kind 'projection' is read, not called: only a method that merges"):
        addenda.plan(model, addenda.Bottleneck(size=2), "q_proj")
    planned = addenda.plan(model, addenda.Bottleneck(size=2), "all-linear")
    assert [row.path for row in planned.rows] == ["linear1", "linear2"]
    assert "4 left out, such as 'self_attn.q_proj'" in str(planned)
    with pytest.raises(MethodError, match="dropout needs the layer's input"):
        addenda.plan(model, addenda.LoRA(rank=2, dropout=0.1), "self_attn")
    bare = nn.TransformerEncoderLayer(16, 2, 32, bias=False)
    with pytest.raises(MethodError, match="no bias and no place for one"):
        addenda.plan(bare, addenda.BitFit(), "self_attn")


def test_compositions_act_on_what_is_only_read() -> None:
    model, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0).eval(), torch.randn(5, 3, 16)
    base = model(x)
    for name, method in (("law", LORA), ("style", addenda.IA3()), ("shift", addenda.BitFit())):
        stirred(addenda.attach(model, method, ["v_proj"], name=name))

    def at(composition: object) -> Tensor:
        with addenda.core.activated(model, composition):
            return model(x).detach()

    assert torch.equal(at(None), base)
    torch.testing.assert_close(at(addenda.core.Sum({"law": 1.0})), at("law"))
    torch.testing.assert_close(at(addenda.core.Sum({"law": 0.0, "shift": 0.0})), base)
    weight = dict.fromkeys(("law", "style", "shift"), 0.5)
    view = layer_at(model, "self_attn.v_proj")._addenda.view
    values = torch.randn(4, 16)
    with addenda.core.activated(model, addenda.core.Sum(weight)):
        called = layer_at(model, "self_attn.v_proj")(values)
        folded = addenda.core.Sum(weight).fold(
            view.weight(), view.bias(), layer_at(model, "self_attn.v_proj").adapters
        )
    torch.testing.assert_close(view.apply(values, *folded), called)
    with pytest.raises(MethodError, match="rows cannot have adapters of their own"):
        at(addenda.core.Rows(("law", None, "law")))
    torch.testing.assert_close(at(addenda.core.Rows(("law",) * 3)), at("law"))


# ----------------------------------------------------------------------------------------------------- recurrent

RECURRENT = {
    "lstm": lambda: nn.LSTM(6, 5, num_layers=2, bidirectional=True),
    "lstm-projected": lambda: nn.LSTM(6, 5, proj_size=3),
    "gru": lambda: nn.GRU(6, 5, batch_first=True),
    "rnn-no-bias": lambda: nn.RNN(6, 5, bias=False),
}


@pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_modules_equal_ones_with_the_sum_as_their_weights(make: object) -> None:
    module = make()
    names = list(parts_of(module))
    assert names == [name for name, _ in module.named_parameters() if name.startswith("weight")]
    handle = stirred(addenda.attach(module, LORA, names))
    x = torch.randn(4, 4, 6)
    bare, found = copy.deepcopy(module), effective(module, handle)
    addenda.detach(bare)
    wanted, _ = functional_call(bare.double(), parameters_of(found, bare), (x.double(),))
    agree(module(x)[0], handle, wanted, factors_of(found, handle))
    copy.deepcopy(module)  # would fail if it still held what it has computed


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_are_adapted_too(cell: type[nn.Module]) -> None:
    module, x = cell(6, 5), torch.randn(3, 6)
    handle = stirred(addenda.attach(module, LORA, ["weight_ih", "weight_hh"]))
    adapted = module(x)
    handle.merge()
    torch.testing.assert_close(module(x), adapted)


def test_a_packed_sequence_and_a_given_state_pass_through() -> None:
    module = nn.LSTM(6, 5)
    model = nn.ModuleDict({"lstm": module})
    handle = stirred(addenda.attach(model, LORA, "lstm"))
    assert handle.paths == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    packed = pack_padded_sequence(torch.randn(4, 2, 6), [4, 2])
    state = (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    adapted = module(packed, state)[0].data
    handle.merge()
    torch.testing.assert_close(module(packed, state)[0].data, adapted)


def test_all_linear_leaves_recurrent_weights_to_be_named() -> None:
    model = nn.Sequential(nn.LSTM(6, 5), nn.Linear(5, 5))
    assert [row.path for row in addenda.plan(model, LORA, "all-linear").rows] == ["1"]


# ------------------------------------------------------------------------------------------------------- experts

SIZES = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 12, "head_dim": 12}


def test_rounding_in_sixteen_bits_is_not_taken_for_another_form() -> None:
    torch.manual_seed(929794504)  # one draw in some thousands, of which little is left to compare by
    model = LAYERS["expert-transposed"]()[0].bfloat16()
    assert addenda.plan(model, addenda.LoRA(rank=2), "layer.2.down_proj").parameters > 0


def mixtral(experts: int = 4) -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=experts, num_experts_per_tok=2)).eval()


def qwen3() -> nn.Module:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    ).eval()


def gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()


def tokens(rows: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(40, (rows, 12))}


@pytest.mark.parametrize("make", [mixtral, qwen3, gpt_oss])
def test_no_expert_of_a_mixture_is_left_out(make: object) -> None:
    model = make()
    planned = addenda.plan(model, LORA, "all-linear")
    experts = [row for row in planned.rows if row.kind == "expert"]
    assert len(experts) == 2 * 4 * 2  # layers, experts, projections
    assert not [note for note in planned.notes if "stacked" in note]
    named = addenda.plan(model, LORA, "experts").rows
    assert [row.path for row in named] == [row.path for row in experts]
    of_one = addenda.plan(model, LORA, ["layers.1.mlp.experts.3"]).rows
    assert [row.path.rpartition(".")[2] for row in of_one] == ["gate_up_proj", "down_proj"]
    of_stack = addenda.plan(model, LORA, ["experts.down_proj"]).rows
    assert len(of_stack) == 8


@pytest.mark.parametrize("make", [mixtral, qwen3, gpt_oss])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_a_fresh_adapter_on_the_experts_answers_as_the_model_does(make: object, implementation: str) -> None:
    model, batch = make(), tokens()
    model.set_experts_implementation(implementation)
    before = model(**batch).logits
    handle = addenda.attach(model, LORA, "experts", probe=batch)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
    handle.disable()
    assert torch.equal(model(**batch).logits, before)
    stirred(handle).enable()
    adapted = model(**batch).logits
    assert not torch.allclose(adapted, before, atol=1e-3)
    handle.merge()
    torch.testing.assert_close(model(**batch).logits, adapted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("hit", [(0, 1, 2, 3), (0, 3)])
def test_gradients_of_experts_equal_those_of_a_loop_in_float64(hit: tuple[int, ...]) -> None:
    config = MixtralConfig(hidden_size=10, intermediate_size=6, num_local_experts=4)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.4)
    handle = stirred(addenda.attach(experts, LORA, list(parts_of(experts))))
    x, found = torch.randn(7, 10), effective(experts, handle)
    chosen = torch.tensor(hit)[torch.stack([torch.randperm(len(hit))[:2] for _ in range(7)])]
    chosen[: len(hit), 0] = torch.tensor(hit)
    gates = torch.rand(7, 2)
    wanted = []
    for row in range(7):
        total = torch.zeros(10, dtype=torch.float64)
        for place in range(2):
            expert = int(chosen[row, place])
            gate, up = (found["gate_up_proj"][expert] @ x[row].double()).chunk(2)
            inner = nn.functional.silu(gate) * up
            total = total + float(gates[row, place]) * (found["down_proj"][expert] @ inner)
        wanted.append(total)
    output = experts(x, chosen, gates)
    torch.testing.assert_close(output.double(), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    direction = torch.randn(7, 10, dtype=torch.float64)
    (output.double() * direction).sum().backward()
    factors = factors_of(found, handle)
    grads = torch.autograd.grad(
        (torch.stack(wanted) * direction).sum(), list(factors.values()), allow_unused=True
    )
    asked = [int(name.partition(".")[0]) in hit for name in factors]
    for (name, parameter), grad, was_hit in zip(handle.named_parameters(), grads, asked, strict=True):
        if was_hit:
            torch.testing.assert_close(parameter.grad.double(), grad, rtol=1e-3, atol=1e-4, msg=name)
            assert parameter.grad.abs().sum() > 0
        else:
            assert parameter.grad is None
            assert grad is None or not grad.any()


def test_the_probe_says_which_experts_got_no_rows() -> None:
    model = mixtral(experts=8)
    one_token = {"input_ids": torch.full((1, 4), 5)}
    handle = addenda.attach(model, LORA, "experts", probe=one_token)
    assert "the router sent nothing to the" in handle.probed
    assert "of 32 adapters were called and received a gradient" in handle.probed
    many = addenda.attach(mixtral(experts=2), LORA, "experts", probe=tokens())
    assert many.probed == "all 8 adapters were called and received a gradient"
    with pytest.raises(TargetError, match="was never called"):
        addenda.attach(
            mixtral(), LORA, "experts", probe=lambda m: m.model.embed_tokens(torch.ones(1, 2).long())
        )


def test_a_few_experts_can_be_adapted_and_the_others_stay() -> None:
    model, batch = mixtral(), tokens()
    before = model(**batch).logits
    handle = addenda.attach(model, LORA, ["experts.2.down_proj"], probe=batch)
    assert len(handle.paths) == 2
    stirred(handle)
    assert not torch.allclose(model(**batch).logits, before, atol=1e-4)
    handle.detach()
    assert torch.equal(model(**batch).logits, before)
    assert type(model.model.layers[0].mlp.experts) is MixtralExperts


def test_any_method_acts_on_the_rows_of_an_expert_with_dropout_too() -> None:
    model, batch = mixtral(), tokens()
    for method in (
        addenda.Bottleneck(size=2),
        addenda.BitFit(),
        addenda.IA3(),
        addenda.LoRA(rank=2, dropout=0.5),
    ):
        handle = stirred(addenda.attach(model, method, ["down_proj"], probe=batch))
        assert len(handle.paths) == 8
        handle.detach()
    handle = stirred(addenda.attach(model, addenda.BitFit(), ["down_proj"]))
    with pytest.raises(MethodError, match="its module has no place"):
        handle.merge()


def test_starts_that_observe_do_so_on_experts_and_say_where_nothing_is_seen() -> None:
    model, batch = mixtral(), tokens(4)
    before = model(**batch).logits
    eva = addenda.LoRA(rank=2, start="eva")
    observed = addenda.observe(model, eva, ["experts.gate_up_proj"], [batch])
    handle = addenda.attach(model, observed.method, ["experts.gate_up_proj"], observed=observed)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
    assert len(handle.paths) == 8
    layer, x = nn.TransformerEncoderLayer(16, 2, 32).eval(), torch.randn(5, 3, 16)
    with pytest.raises(MethodError, match="no input of it can be observed"):
        addenda.observe(layer, eva, "self_attn", [x])
    start = layer(x)
    addenda.attach(layer, addenda.LoRA(rank=2, start="pissa"), "self_attn")
    torch.testing.assert_close(layer(x), start, rtol=1e-4, atol=1e-5)


def test_rows_that_a_router_has_ordered_are_not_routed_to_adapters() -> None:
    model, batch = mixtral(), tokens(2)
    addenda.attach(model, LORA, "experts", name="law")
    with (
        addenda.core.activated(model, addenda.core.Rows(("law", None))),
        pytest.raises(TargetError, match="cannot be routed to adapters"),
    ):
        model(**batch)


def test_experts_without_a_gate_are_adapted() -> None:
    config = NemotronHConfig(
        hidden_size=10, moe_intermediate_size=6, n_routed_experts=3, mlp_hidden_act="relu2"
    )
    config._experts_implementation = "eager"
    experts = NemotronHExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    assert list(parts_of(experts))[:2] == ["0.up_proj", "0.down_proj"]
    x, chosen, gates = torch.randn(6, 10), torch.arange(12).view(6, 2) % 3, torch.rand(6, 2)
    before = experts(x, chosen, gates)
    addenda.attach(experts, LORA, list(parts_of(experts)))
    torch.testing.assert_close(experts(x, chosen, gates), before)


def test_experts_that_compute_otherwise_are_refused_when_planned() -> None:
    class Odd(MixtralExperts):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)

    config = MixtralConfig(hidden_size=10, intermediate_size=6, num_local_experts=4)
    config._experts_implementation = "eager"
    model = nn.ModuleDict({"experts": Odd(config)})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with pytest.raises(MethodError, match="Odd computes otherwise than a mixture of a known form"):
        addenda.plan(model, LORA, "experts")


def test_experts_of_an_unknown_form_are_said_to_be_left_out() -> None:
    config = Llama4TextConfig(
        **SIZES, num_local_experts=2, intermediate_size_mlp=12, moe_layers=[0, 1], num_experts_per_tok=1
    )
    with torch.device("meta"):
        model = Llama4ForCausalLM(config)
    assert "4 stacked 3-D weights" in str(addenda.plan(model, LORA, "all-linear"))


# --------------------------------------------------------------------------------------------- merging and saving


@pytest.mark.parametrize("kind", ["attention", "experts", "lstm"])
def test_parts_merge_independently_and_the_base_keeps_its_fingerprint(kind: str) -> None:
    if kind == "attention":
        model, batch, names = (
            nn.TransformerEncoderLayer(16, 2, 32).eval(),
            torch.randn(3, 2, 16),
            ["q_proj", "v_proj"],
        )
    elif kind == "experts":
        model, batch, names = mixtral(), torch.randint(40, (2, 8)), ["experts.0", "experts.3"]
    else:
        model, batch, names = nn.LSTM(6, 5), torch.randn(3, 2, 6), ["weight_ih_l0", "weight_hh_l0"]
    before, mark = {k: v.clone() for k, v in model.state_dict().items()}, addenda.core.fingerprint(model)
    handles = [stirred(addenda.attach(model, LORA, name, name=f"at{i}")) for i, name in enumerate(names)]

    def answer() -> Tensor:
        y = model(batch)
        return y.logits if kind == "experts" else y[0] if kind == "lstm" else y

    adapted = answer()
    for handle in handles:
        handle.merge()
    torch.testing.assert_close(answer(), adapted, rtol=1e-4, atol=1e-5)
    assert addenda.core.fingerprint(model) == mark
    handles[0].unmerge()
    torch.testing.assert_close(answer(), adapted, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.detach()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


# ------------------------------------------------------------------------------- shared weights, odd layers


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


@pytest.mark.parametrize(("here", "there"), [("embed", "head"), ("head", "embed")])
def test_an_adapter_on_one_of_two_tied_layers_leaves_the_other_as_it_is(here: str, there: str) -> None:
    model, x = Tied(), torch.randint(9, (2, 5))
    inputs = {"embed": x, "head": torch.randn(2, 6)}
    before = {name: model.get_submodule(name)(value) for name, value in inputs.items()}
    assert f"'{here}' shares its weight with '{there}', which goes on" in str(addenda.plan(model, LORA, here))
    handle = stirred(addenda.attach(model, LORA, here, probe=x))
    assert torch.equal(model.get_submodule(there)(inputs[there]), before[there])
    assert not torch.allclose(model.get_submodule(here)(inputs[here]), before[here])
    with pytest.raises(MethodError, match=f"shares its weight: '{here}' with '{there}'"):
        handle.merge()
    handle.detach()
    assert model.head.weight is model.embed.weight


def test_the_padding_of_an_embedding_gives_no_gradient() -> None:
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=3))
    handle = stirred(addenda.attach(model, LORA, "0"))
    model(torch.tensor([[1, 3, 3, 5]])).sum().backward()
    grad = handle.adapters["0"].A.grad
    assert grad[:, [1, 5]].abs().sum() > 0
    assert not grad[:, 3].any()


def test_a_transposed_convolution_takes_the_size_of_its_output() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    x = torch.randn(1, 4, 5, 5)
    handle = stirred(addenda.attach(nn.Sequential(layer), LORA, "0"))
    outputs = [layer(x, output_size=size) for size in ([11, 12], [12, 11])]
    assert [tuple(y.shape[2:]) for y in outputs] == [(11, 12), (12, 11)]
    handle.merge()
    for size, y in zip(([11, 12], [12, 11]), outputs, strict=True):
        torch.testing.assert_close(layer(x, output_size=size), y)


class SelfPadding(nn.Conv2d):
    """Pads its input itself, more on one side, as convolutions taken over from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Standardizing(nn.Conv2d):
    """Computes with the weight less its mean: nothing that is linear in a change of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm()
        return nn.functional.conv2d(x, weight, self.bias, self.stride)


def test_a_convolution_with_a_forward_of_its_own_is_adapted_as_it_computes() -> None:
    x = torch.randn(2, 4, 7, 7)
    model = nn.Sequential(SelfPadding(4, 6, 2, stride=2, groups=2))
    handle = stirred(addenda.attach(model, LORA, "0"))
    adapted = model(x)
    bare = nn.Conv2d(4, 6, 2, stride=2, groups=2)
    weight, bias = handle.folded("0")
    padded = nn.functional.pad(x, (0, 1, 0, 1))
    torch.testing.assert_close(adapted, nn.functional.conv2d(padded, weight, bias, bare.stride, groups=2))
    handle.merge()
    torch.testing.assert_close(model(x), adapted)
    odd = nn.Sequential(Standardizing(4, 6, 2))
    handle = stirred(addenda.attach(odd, LORA, "0"))
    assert odd(x).shape == (2, 6, 6, 6)
    with pytest.raises(MethodError, match="does more than apply its weight"):
        handle.merge()


def test_what_cannot_be_adapted_is_refused_with_the_reason_and_counted() -> None:
    model = nn.ModuleDict(
        {"pair": nn.Bilinear(4, 5, 6), "bag": nn.EmbeddingBag(9, 6), "linear": nn.Linear(4, 5)}
    )
    for name, why in (("pair", "multiplies two inputs"), ("bag", "adds up what it looks up")):
        with pytest.raises(TargetError, match=why):
            addenda.plan(model, LORA, name)
    notes = addenda.plan(model, LORA, "all-linear").notes
    assert any("1 left out, such as 'pair'" in note for note in notes)
    assert not any("stacked" in note for note in notes)
