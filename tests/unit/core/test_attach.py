from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

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
        (
            addenda.LoRA(rank=2),
            "norm",
            "new",
            "cannot adapt (LayerNorm: method 'lora' adapts no layer of kind 'norm')",
        ),
        (addenda.LoRA(rank=9), "q_proj", "new", "rank 9 exceeds min(d_in, d_out) = 8 at 'q_proj'"),
        (addenda.LoRA(rank=2, ranks={"v_proj": 99}), "all-linear", "new", "rank 99 exceeds"),
        (addenda.LoRA(rank=2), "q_proj", "taken", "already carries an adapter 'taken'"),
        (addenda.LoRA(rank=2), "q_proj", "a.b", "cannot be an adapter's name"),
        (addenda.LoRA(rank=2), "q_proj", "keys", "cannot be an adapter's name"),
        (addenda.LoRA(rank=2), "q_proj", "training", "cannot be an adapter's name"),
        (addenda.LoRA(rank=2), "q_proj", None, "cannot be an adapter's name"),
        (addenda.LoRA(rank=2), {"q_proj": 4}, "new", "a text or a list of texts"),
        (addenda.LoRA(rank=2), 5, "new", "a text or a list of texts"),
        (addenda.LoRA(rank=2), [None], "new", "a text or a list of texts"),
        (addenda.LoRA(rank=2, ranks={"v_prj": 1}), "all-linear", "new", "ranks names no target by 'v_prj'"),
        (addenda.LoRA(rank=9, alphas={"norm": 1}), "q_proj", "new", "alphas names no target by 'norm'"),
        (addenda.IA3(feed_forward=("fc",)), "q_proj", "new", "feed_forward names no target by 'fc'"),
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
        {"ranks": {3: 4}},
        {"ranks": {"": 4}},
        {"alpha": 10**400},
        {"alpha": "8"},
        {"rank_stabilized": "no"},
    ],
)
def test_settings_out_of_range_are_refused_when_made(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        addenda.LoRA(**settings)
    assert next(iter(settings)) in caught.value.message


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (addenda.BitFit, {"create": "no"}),
        (addenda.IA3, {"feed_forward": "down_proj"}),
        (addenda.IA3, {"feed_forward": 3}),
        (addenda.Bottleneck, {"activation": {}}),
        (addenda.Bottleneck, {"placement": []}),
    ],
)
def test_settings_of_a_wrong_type_are_refused_when_made(
    method: type[addenda.Method], settings: dict[str, object]
) -> None:
    with pytest.raises(ConfigError) as caught:
        method(**settings)
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


def test_the_probe_moves_no_statistic_and_draws_nothing_where_the_model_drops() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 4)).train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    addenda.attach(model, addenda.LoRA(rank=2, dropout=0.5), "all-linear", probe=torch.ones(4, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(module.training for module in model.modules())


def test_a_batch_that_the_base_cannot_run_proves_nothing_and_says_so() -> None:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    model = ViTModel(config).train()
    handle = addenda.attach(model, addenda.LoRA(rank=2))
    assert handle.probed.startswith("not run: the model's own batch does not fit")
    assert handle.active
    handle.detach()
    images = {"pixel_values": torch.randn(1, 3, 32, 32)}
    assert "were called" in addenda.attach(model, addenda.LoRA(rank=2), "q_proj", probe=images).probed


def test_a_vocabulary_smaller_than_the_models_own_batch_is_probed_too() -> None:
    model = tiny_llama()
    model.resize_token_embeddings(3)
    assert "were called" in addenda.attach(model, addenda.LoRA(rank=2)).probed


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


def test_all_linear_leaves_out_the_head_and_takes_what_an_attention_reads() -> None:
    paths = [row.path for row in addenda.plan(tiny_llama(), addenda.LoRA(rank=2)).rows]
    assert len(paths) == 14
    assert not any("lm_head" in path or "embed" in path for path in paths)
    encoder = nn.TransformerEncoderLayer(16, 2, 32)
    planned = addenda.plan(encoder, addenda.LoRA(rank=2), "all-linear")
    read = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    assert [row.path for row in planned.rows] == [*read, "linear1", "linear2"]


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


def test_an_adapter_on_a_part_is_neither_overwritten_nor_frozen_by_one_on_the_whole() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 6))
    part = addenda.attach(model[0], addenda.LoRA(rank=2), "all-linear")
    with pytest.raises(TargetError, match=r"'0.0' already carries an adapter 'default', attached through"):
        addenda.attach(model, addenda.LoRA(rank=3), "all-linear")
    assert part.trainable_parameters == 24
    assert model[1].weight.requires_grad
    addenda.attach(model, addenda.LoRA(rank=3), "all-linear", name="whole")
    assert all(p.requires_grad for p in part.parameters())
    assert not model[1].weight.requires_grad


def test_a_layer_at_two_places_goes_by_both_names() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model.add_module("again", model[0])
    assert addenda.attach(model, addenda.LoRA(rank=2), "again").paths == ["0"]


def test_the_plan_of_a_single_layer_counts_its_base_once_more_is_attached() -> None:
    model = nn.Linear(6, 6)
    addenda.attach(model, addenda.LoRA(rank=2), "all-linear")
    assert addenda.plan(model, addenda.LoRA(rank=2), "all-linear").base_parameters == 42


def test_an_embedding_that_changes_itself_is_refused_with_the_reason() -> None:
    with pytest.raises(TargetError, match="max_norm"):
        addenda.plan(nn.Sequential(nn.Embedding(9, 6, max_norm=1.0)), addenda.LoRA(rank=2), "0")


def bert() -> BertModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertModel(BertConfig(**sizes))


@pytest.mark.parametrize(
    "method", [addenda.IA3(), addenda.Bottleneck(placement="pfeiffer")], ids=["ia3", "pfeiffer"]
)
def test_a_methods_own_targets_tell_the_feed_forward_from_the_attention(method: addenda.Method) -> None:
    paths = [row.path for row in addenda.plan(bert(), method).rows]
    assert "encoder.layer.0.output.dense" in paths
    assert "encoder.layer.0.attention.output.dense" not in paths


def test_the_plan_says_when_a_method_finds_none_of_the_names_it_goes_by() -> None:
    assert "all linear layers instead" in str(addenda.plan(bert(), addenda.Bottleneck(placement="parallel")))
    assert "instead" not in str(addenda.plan(bert(), addenda.Bottleneck()))
    assert "instead" not in str(addenda.plan(bert(), addenda.LoRA()))


def test_what_all_linear_leaves_out_is_said_in_a_list_too() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    alone, listed = (addenda.plan(layer, addenda.Bottleneck(), t) for t in ("all-linear", ["all-linear"]))
    assert alone.notes == listed.notes
    assert "self_attn" in alone.notes[0]


@pytest.mark.parametrize("method", ["lora", addenda.LoRA, None])
def test_what_is_no_method_is_refused_in_words(method: object) -> None:
    with pytest.raises(MethodError, match=r"a method is an object such as LoRA\(rank=16\)"):
        addenda.attach(TwoLayers(), method, "q_proj")


def test_what_is_no_module_is_refused_and_one_that_holds_it_is_pointed_at() -> None:
    class Holder:
        model = TwoLayers()

    verbs = [
        lambda m: addenda.attach(m, addenda.LoRA(rank=2)),
        lambda m: addenda.plan(m, addenda.LoRA(rank=2)),
        lambda m: addenda.save(m, "nowhere"),
        lambda m: addenda.load(m, "nowhere"),
        addenda.detach,
    ]
    for verb in verbs:
        with pytest.raises(TargetError, match="not a Holder") as caught:
            verb(Holder())
        assert "'model'" in caught.value.hint
        with pytest.raises(TargetError, match="not a dict"):
            verb({})
