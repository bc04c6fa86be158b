from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import addenda
from addenda.errors import ConfigError, MethodError, NotFoundError, TargetError


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.v_proj(self.q_proj(x)))


class ReadsTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.bypassed = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.called(x), self.bypassed.weight, self.bypassed.bias)


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            tie_word_embeddings=True,
        )
    )


@pytest.mark.parametrize(
    ("method", "targets", "name", "says"),
    [
        (addenda.LoRA(rank=2), ["q_proj", "v_prj"], "new", "'v_prj' matched no module"),
        (addenda.LoRA(rank=2), [], "new", "no target was given"),
        (addenda.LoRA(rank=2), "norm", "new", "names only modules that this method cannot adapt (LayerNorm)"),
        (addenda.LoRA(rank=9), "q_proj", "new", "rank 9 exceeds min(d_in, d_out) = 8 at 'q_proj'"),
        (addenda.LoRA(rank=2, ranks={"v_proj": 99}), "all-linear", "new", "rank 99 exceeds"),
        (addenda.LoRA(rank=2), "q_proj", "taken", "already carries an adapter 'taken'"),
        (addenda.LoRA(rank=2), "q_proj", "a.b", "cannot be an adapter's name"),
        (addenda.LoRA(rank=2), "q_proj", "keys", "cannot be an adapter's name"),
    ],
)
def test_a_failed_attach_says_what_exists_and_leaves_the_model_alone(
    method: addenda.Method, targets: list[str], name: str, says: str
) -> None:
    model = TwoLayers()
    addenda.attach(model, addenda.LoRA(rank=1), "v_proj", name="taken")
    before, classes = dict(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises((TargetError, MethodError)) as caught:
        addenda.attach(model, method, targets, name=name)
    assert says in str(caught.value)
    assert caught.value.hint
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(before)
    assert list(addenda.core.handles(model)) == ["taken"]


def test_all_target_problems_are_reported_at_once_with_the_nearest_names() -> None:
    with pytest.raises(TargetError) as caught:
        addenda.plan(TwoLayers(), addenda.LoRA(rank=2), ["q_prj", "v_prj", "norm"])
    text = str(caught.value)
    assert "'q_prj'" in text
    assert "'v_prj'" in text
    assert "LayerNorm" in text
    assert "did you mean 'q_proj' for 'q_prj', 'v_proj' for 'v_prj'?" in text


def test_a_suffix_matches_whole_names_only() -> None:
    with pytest.raises(TargetError, match="'proj' matched no module"):
        addenda.plan(TwoLayers(), addenda.LoRA(rank=2), "proj")


def test_a_target_is_no_regular_expression() -> None:
    with pytest.raises(TargetError, match=r"matched no module"):
        addenda.plan(TwoLayers(), addenda.LoRA(rank=2), ".*_proj")


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": -3},
        {"rank": 2.5},
        {"rank": True},
        {"alpha": -1.0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"ranks": {"q_proj": 0}},
        {"alphas": {"q_proj": float("nan")}},
        {"ranks": 3},
    ],
)
def test_settings_out_of_range_are_refused_when_made(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        addenda.LoRA(**settings)
    assert next(iter(settings)) in caught.value.message


def test_all_setting_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        addenda.LoRA(rank=-1, alpha=float("nan"), dropout=2.0)
    assert all(word in caught.value.message for word in ("rank", "alpha", "dropout"))


def test_the_probe_names_a_layer_whose_weight_is_read_and_takes_the_adapters_off() -> None:
    model = ReadsTheWeight()
    with pytest.raises(TargetError, match="adapter on 'bypassed' was never called"):
        addenda.attach(model, addenda.LoRA(rank=2), "all-linear", probe=torch.randn(2, 8))
    assert type(model.called) is nn.Linear
    assert not addenda.core.handles(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_probe_names_a_layer_that_gets_no_gradient() -> None:
    class Cut(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return self.v_proj(self.q_proj(x).detach())

    with pytest.raises(TargetError, match="adapter on 'q_proj' received no gradient"):
        addenda.attach(Cut(), addenda.LoRA(rank=2), "all-linear", probe=torch.randn(2, 8))


def test_the_probe_leaves_no_gradient_and_draws_no_random_number() -> None:
    model = TwoLayers()
    state = torch.get_rng_state()
    batch = torch.ones(2, 8)
    handle = addenda.attach(model, addenda.LoRA(rank=2), "all-linear", probe={"x": batch})
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert handle.probed == "all 2 adapters were called and received a gradient"


def test_a_transformers_model_is_probed_by_its_own_batch() -> None:
    assert "were called" in addenda.attach(tiny_llama(), addenda.LoRA(rank=2)).probed
    bert = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    )
    with pytest.raises(TargetError, match="never called"):
        addenda.attach(bert, addenda.LoRA(rank=2), probe=lambda m: m.embeddings(torch.ones(1, 3).long()))


def test_transformer_encoder_layer_runs_its_adapters_in_inference_too() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    handle = addenda.attach(layer, addenda.LoRA(rank=2), ["linear1", "linear2"], probe=x)
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    trained = layer.train()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), trained)
    handle.disable()
    with torch.no_grad():
        assert not torch.allclose(layer(x), trained)


def test_all_linear_leaves_out_the_head_and_the_layers_that_are_only_read() -> None:
    paths = [row.path for row in addenda.plan(tiny_llama(), addenda.LoRA(rank=2)).rows]
    assert len(paths) == 14
    assert not any("lm_head" in path or "embed" in path for path in paths)
    encoder = nn.TransformerEncoderLayer(16, 2, 32)
    planned = addenda.plan(encoder, addenda.LoRA(rank=2), "all-linear")
    assert [row.path for row in planned.rows] == ["linear1", "linear2"]
    assert "self_attn.out_proj" in str(planned)
    with pytest.raises(TargetError, match=r"nn\.MultiheadAttention without being called"):
        addenda.plan(encoder, addenda.LoRA(rank=2), "out_proj")


def test_planning_changes_nothing_and_works_without_values() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    before = [type(m) for m in model.modules()]
    planned = addenda.plan(model, addenda.LoRA(rank=4), ["q_proj", "v_proj"])
    assert [type(m) for m in model.modules()] == before
    assert planned.parameters == 2 * 4 * (32 + 32 + 32 + 16)
    assert (
        addenda.attach(model, addenda.LoRA(rank=4), ["q_proj", "v_proj"]).trainable_parameters
        == planned.parameters
    )


def test_the_plan_says_when_targets_are_found_in_different_numbers_of_layers() -> None:
    model = nn.ModuleDict({"a": TwoLayers(), "b": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})})
    assert "q_proj 2, v_proj 1" in str(addenda.plan(model, addenda.LoRA(rank=2), ["q_proj", "v_proj"]))


def test_stacked_expert_weights_left_out_are_said() -> None:
    model = TwoLayers()
    model.experts = nn.Module()
    model.experts.gate_up = nn.Parameter(torch.zeros(4, 8, 8))
    assert "'experts.gate_up'" in str(addenda.plan(model, addenda.LoRA(rank=2), "all-linear"))


def test_detaching_an_unknown_name_names_those_that_exist() -> None:
    model = TwoLayers()
    addenda.attach(model, addenda.LoRA(rank=2), "q_proj", name="one")
    with pytest.raises(NotFoundError, match="no adapter 'two'") as caught:
        addenda.detach(model, "two")
    assert "one" in str(caught.value)
    addenda.detach(model, "one")
    assert type(model.q_proj) is nn.Linear


def test_freezing_is_undone_with_the_last_adapter_only() -> None:
    model = TwoLayers()
    model.norm.bias.requires_grad_(False)
    first = addenda.attach(model, addenda.LoRA(rank=2), "q_proj", name="first")
    second = addenda.attach(model, addenda.BitFit(), "all-linear", name="second")
    first.detach()
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)
    second.detach()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["norm.bias"]


def test_a_module_with_an_attribute_called_adapters_is_refused() -> None:
    model = TwoLayers()
    model.q_proj.adapters = nn.Identity()
    with pytest.raises(TargetError, match="'adapters' of its own"):
        addenda.attach(model, addenda.LoRA(rank=2), "q_proj")
