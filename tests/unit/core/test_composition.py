"""Several adapters on one model: which run, how they act together, how they become one, how all are saved."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.core.activating import active_composition, from_settings
from addenda.core.composition import Rows, Stack, Sum, average, parallel
from addenda.errors import AddendaError, CheckpointError, ConfigError, MethodError, NotFoundError, TargetError

METHODS = {
    "lora": addenda.LoRA(rank=2),
    "ia3": addenda.IA3(),
    "bottleneck": addenda.Bottleneck(size=3),
    "bitfit": addenda.BitFit(),
}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def attach(model: nn.Module, method: addenda.Method, name: str) -> addenda.Handle:
    handle = addenda.attach(model, method, name=name)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return handle


@pytest.fixture
def model() -> nn.Sequential:
    """A model with one adapter of each method; all are active."""
    made = make_model()
    for name, method in METHODS.items():
        attach(made, method, name)
    return made


def under(model: nn.Module, wanted: object, x: Tensor) -> Tensor:
    with addenda.activated(model, wanted), torch.no_grad():
        return model(x)


def test_attaching_stacks_in_the_order_of_attaching(model: nn.Module) -> None:
    assert active_composition(model) == Stack(tuple(METHODS))


def test_any_set_may_be_active_and_what_was_active_comes_back(model: nn.Module) -> None:
    x = torch.randn(5, 6)
    before, plain = model(x), under(make_model_with(model), None, x)
    assert torch.equal(under(model, None, x), plain)
    outputs = [under(model, list(names), x) for names in itertools.permutations(METHODS, 2)]
    assert all(not torch.allclose(a, plain) for a in outputs)
    assert torch.equal(model(x), before)
    addenda.activate(model, "ia3")
    assert [name for name, handle in addenda.handles(model).items() if handle.active] == ["ia3"]


def make_model_with(model: nn.Module) -> nn.Module:
    """The base of ``model`` under an adapter that does nothing, so that it can be asked for its bare output."""
    plain = make_model()
    addenda.attach(plain, addenda.BitFit())
    return plain


def test_a_stack_in_another_order_gives_what_that_order_of_attaching_gives(model: nn.Module) -> None:
    x, other = torch.randn(5, 6), make_model()
    for name in ("bottleneck", "ia3"):
        attach(other, METHODS[name], name)
    assert torch.equal(under(model, ["bottleneck", "ia3"], x), other(x))


def test_parallel_and_average_are_sums() -> None:
    assert parallel("a", "b") == Sum({"a": 1.0, "b": 1.0})
    assert average("a", "b", "c", "d") == Sum(dict.fromkeys("abcd", 0.25))


def test_two_adapters_of_low_rank_run_as_one_term_and_equal_their_sum() -> None:
    model, x = make_model().double(), torch.randn(5, 6).double()
    for name in "ab":
        attach(model, addenda.LoRA(rank=2), name)
    layer = model[0]
    terms = [layer.adapters[name].low_rank_term() for name in "ab"]
    expected = layer.original_class.forward(layer, x) + sum(s * (x @ A.t()) @ B.t() for A, B, s in terms)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [None, (2, 1, 3)])
def test_rows_of_a_batch_and_of_a_packed_sequence_are_routed(
    model: nn.Module, lengths: tuple[int, ...] | None
) -> None:
    of = ("bottleneck", None, "lora")
    count = 3 if lengths is None else 6
    x = torch.randn(count, 6) if lengths is None else torch.randn(1, count, 6)
    found = under(model, Rows(of, lengths), x).reshape(count, 6)
    owners = of if lengths is None else [n for n, k in zip(of, lengths, strict=True) for _ in range(k)]
    for place, name in enumerate(owners):
        expected = under(model, name, x).reshape(count, 6)[place]
        torch.testing.assert_close(found[place], expected, rtol=1e-5, atol=1e-6)


def test_a_batch_of_another_size_is_refused_and_names_the_layer(model: nn.Module) -> None:
    with pytest.raises(
        TargetError, match=r"3 rows are routed, and layer '0' is given an input of shape \(4, 6\)"
    ):
        under(model, Rows(("lora", None, "ia3")), torch.randn(4, 6))


def test_disabling_takes_an_adapter_out_of_any_composition(model: nn.Module) -> None:
    handles, x = addenda.handles(model), torch.randn(2, 6)
    for composition, rest in [
        (Stack(("lora", "ia3")), Stack(("lora",))),
        (Sum({"lora": 0.5, "ia3": 2.0}), Sum({"lora": 0.5})),
        (Rows(("ia3", "lora")), Rows((None, "lora"))),
    ]:
        addenda.activate(model, composition)
        before = model(x)
        with handles["ia3"].disabled():
            assert active_composition(model) == rest
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("error", "text", "wanted"),
    [
        (NotFoundError, "'laws'", "laws"),
        (NotFoundError, "'x', 'y'", ["x", "lora", "y"]),
        (ConfigError, "each once", ["lora", "lora"]),
    ],
)
def test_what_cannot_be_activated_is_refused_and_nothing_changes(
    model: nn.Module, error: type[AddendaError], text: str, wanted: object
) -> None:
    before = active_composition(model)
    with pytest.raises(error, match=text):
        addenda.activate(model, wanted)
    assert active_composition(model) == before


@pytest.mark.parametrize("weights", [{"a": float("nan")}, {"a": "much"}])
def test_weights_are_finite_numbers(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="finite"):
        Sum(weights)


def test_what_changes_the_weights_or_the_stack_asks_for_a_stack(model: nn.Module) -> None:
    handles = addenda.handles(model)
    addenda.activate(model, Sum({"lora": 0.5}))
    for call in (handles["lora"].merge, handles["ia3"].enable):
        with pytest.raises(MethodError, match="while Sum"):
            call()
    with pytest.raises(TargetError, match="cannot attach"):
        addenda.attach(model, addenda.LoRA(rank=2), name="more")
    addenda.activate(model, [])
    addenda.attach(model, addenda.LoRA(rank=2), name="more")
    assert active_composition(model) == Stack(("more",))


def test_a_merged_adapter_is_not_activated(model: nn.Module) -> None:
    addenda.activate(model, "lora")
    addenda.handles(model)["lora"].merge()
    with pytest.raises(MethodError, match="is merged"):
        addenda.activate(model, "lora")


@pytest.mark.parametrize(
    "composition",
    [Stack(("a",)), Sum({"a": 0.5, "b": 1.0}), Rows(("a", None), (3, 4)), addenda.Arrow(("a",), top_k=2)],
)
def test_a_composition_survives_being_written_down(composition: addenda.core.Composition) -> None:
    assert from_settings(composition.settings()) == composition


def test_switching_costs_the_same_whatever_is_loaded(model: nn.Module) -> None:
    """Nothing on any layer is touched: the model's one selection is."""
    states = [module._addenda for module in model.modules() if hasattr(module, "_addenda")]
    before = [dict(vars(state)) for state in states]
    addenda.activate(model, "ia3")
    assert [dict(vars(state)) for state in states] == before
    assert len({id(selection) for state in states for selection in state.selections}) == 1


# -------------------------------------------------------------------------------------------------- all in one folder


@pytest.mark.parametrize(
    "wanted", [["lora", "bottleneck"], Sum({"ia3": 0.3, "lora": -1.0}), Rows(("bitfit", None))]
)
def test_all_adapters_and_what_is_active_come_back_bit_for_bit(
    model: nn.Module, wanted: object, tmp_path: Path
) -> None:
    addenda.activate(model, wanted)
    x = torch.randn(2, 6)
    expected = model(x)
    addenda.save_all(model, tmp_path / "all")
    again = make_model()
    loaded = addenda.load_all(again, tmp_path / "all")
    assert torch.equal(again(x), expected)
    assert list(loaded) == list(METHODS)
    assert active_composition(again) == active_composition(model)
    addenda.save_all(model, tmp_path / "all")


def test_a_damaged_folder_leaves_the_model_as_it_was(model: nn.Module, tmp_path: Path) -> None:
    addenda.save_all(model, tmp_path / "all")
    file = tmp_path / "all" / "bitfit" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    again = make_model()
    with pytest.raises(CheckpointError):
        addenda.load_all(again, tmp_path / "all")
    assert not addenda.handles(again)
    assert type(again[0]) is nn.Linear


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1, "adapters": ["../x"], "active": {}}'])
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapters.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapters\.json"):
        addenda.load_all(make_model(), tmp_path)


def test_a_folder_of_something_else_is_not_replaced(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not written by save_all"):
        addenda.save_all(model, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


# ------------------------------------------------------------------------------------------------------- made into one


@pytest.fixture
def three() -> nn.Sequential:
    """Three LoRA adapters, two of one rank, one on a single layer."""
    model = make_model()
    attach(model, addenda.LoRA(rank=2), "a")
    attach(model, addenda.LoRA(rank=2, alpha=3.0), "b")
    handle = addenda.attach(model, addenda.LoRA(rank=1), targets=["2"], name="c")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    return model


def delta(model: nn.Module, name: str, place: int) -> Tensor:
    A, B, scaling = model[place].adapters[name].low_rank_term()
    return scaling * (B @ A).detach()


def test_side_by_side_is_the_weighted_sum_exactly(three: nn.Sequential) -> None:
    x, weights = torch.randn(5, 6), {"a": 0.5, "b": -2.0, "c": 1.5}
    before = active_composition(three)
    addenda.combine(three, weights, name="one")
    assert active_composition(three) == before
    torch.testing.assert_close(under(three, "one", x), under(three, Sum(weights), x), rtol=1e-5, atol=1e-5)
    assert [len(three[place].adapters["one"].A) for place in (0, 2)] == [4, 5]


def test_a_decomposition_of_full_rank_is_the_sum_and_a_smaller_one_the_best_of_its_rank(
    three: nn.Sequential,
) -> None:
    weights = {"a": 0.5, "b": -2.0, "c": 1.5}
    addenda.combine(three, weights, name="whole", how="svd", rank=6)
    addenda.combine(three, weights, name="small", how="svd", rank=2)
    total = sum(weight * delta(three, name, 2) for name, weight in weights.items())
    torch.testing.assert_close(delta(three, "whole", 2), total, rtol=1e-4, atol=1e-5)
    lost = torch.linalg.svdvals(total)[2:].square().sum().sqrt()
    torch.testing.assert_close((delta(three, "small", 2) - total).norm(), lost, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_ways_on_factors_need_one_rank(three: nn.Sequential, how: str) -> None:
    with pytest.raises(MethodError, match="different ranks"):
        addenda.combine(three, {"a": 1.0, "c": 1.0}, name="one", how=how, density=0.5)
    assert "one" not in addenda.handles(three)
    assert addenda.combine(three, {"a": 1.0, "b": -1.0}, name="one", how=how, density=0.5).method.rank == 2


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("how must be one of", {"how": "mix"}),
        ("how must be one of", {"how": "cat_svd"}),
        ("needs a density", {"how": "ties"}),
        ("density must be", {"how": "ties", "density": 1.5}),
        ("density must be", {"how": "ties", "density": 0.0}),
        ("sign must be one of", {"how": "ties", "density": 0.5, "sign": "loudest"}),
        ("rank must be", {"how": "svd", "rank": 0}),
        ("sign must be one of.*rank must be|rank must be.*sign must", {"sign": "x", "rank": -1}),
    ],
)
def test_wrong_settings_are_named_together(three: nn.Sequential, text: str, options: dict) -> None:
    with pytest.raises(ConfigError, match=text):
        addenda.combine(three, {"a": 1.0, "b": 1.0}, name="one", **options)


def test_only_low_rank_adapters_are_combined(model: nn.Module) -> None:
    with pytest.raises(MethodError, match="is not low-rank"):
        addenda.combine(model, {"lora": 1.0, "ia3": 1.0}, name="one")


def test_dare_keeps_the_share_and_the_expected_sum(three: nn.Sequential) -> None:
    made = [
        addenda.combine(
            three, {"a": 1.0}, name=f"d{seed}", how="dare_linear_svd", density=0.5, rank=6, seed=seed
        )
        for seed in range(200)
    ]
    deltas = torch.stack([delta(three, handle.name, 0) for handle in made])
    wanted = delta(three, "a", 0)
    kept = (deltas.abs() > 1e-4 * wanted.abs()).float().mean()
    assert abs(float(kept) - 0.5) < 0.03
    assert float((deltas.mean(0) - wanted).norm() / wanted.norm()) < 0.2
