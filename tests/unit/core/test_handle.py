from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.errors import MethodError


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False))


def stir(handle: addenda.Handle) -> None:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()


def test_unmerging_one_of_two_merged_adapters_leaves_the_other_exactly() -> None:
    model, x = pair(), torch.randn(4, 6)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    a = addenda.attach(model, addenda.LoRA(rank=2), "all-linear", name="a")
    b = addenda.attach(model, addenda.BitFit(), "all-linear", name="b")
    stir(a)
    stir(b)
    b.merge()
    only_b = {k: v.clone() for k, v in model.state_dict().items()}
    a.merge()
    a.unmerge()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in only_b.items())
    a.disable()
    b.unmerge()
    b.disable()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in base.items())
    assert model[2].bias is None
    assert x.shape == model(x).shape


def test_merging_bitfit_gives_a_bias_free_layer_a_bias_and_takes_it_away_again() -> None:
    model, x = pair(), torch.randn(4, 6)
    handle = addenda.attach(model, addenda.BitFit(), "2")
    stir(handle)
    adapted = model(x)
    handle.merge()
    assert model[2].bias is not None
    torch.testing.assert_close(model(x), adapted)
    handle.detach()
    assert model[2].bias is None
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight"]


def test_merging_into_a_tied_weight_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    model[1].weight = model[0].weight
    handle = addenda.attach(model, addenda.LoRA(rank=2), ["0"])
    stir(handle)
    before = model[0].weight.clone()
    with pytest.raises(MethodError, match="shares its weight: '0' with '1'"):
        handle.merge()
    assert torch.equal(model[0].weight, before)
    assert handle.active


def test_merging_a_non_finite_adapter_is_refused_and_changes_nothing() -> None:
    model = pair()
    handle = addenda.attach(model, addenda.LoRA(rank=2), "all-linear")
    stir(handle)
    handle.adapters["2"].B.data[0, 0] = float("inf")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MethodError, match="not finite"):
        handle.merge()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not handle.merged


@pytest.mark.parametrize("verb", ["enable", "disable", "merge"])
def test_a_merged_adapter_refuses_to_be_switched(verb: str) -> None:
    handle = addenda.attach(pair(), addenda.LoRA(rank=2), "all-linear")
    handle.merge()
    with pytest.raises(MethodError, match="is merged"):
        getattr(handle, verb)()
    handle.unmerge()
    with pytest.raises(MethodError, match="is not merged"):
        handle.unmerge()


def test_a_detached_handle_says_so() -> None:
    handle = addenda.attach(pair(), addenda.LoRA(rank=2), "all-linear")
    handle.detach()
    for verb in (handle.enable, handle.disable, handle.merge, handle.unmerge, handle.detach):
        with pytest.raises(MethodError, match="was detached"):
            verb()


def test_disabled_restores_the_former_state_even_after_an_error() -> None:
    model, x = pair(), torch.randn(4, 6)
    base = model(x)
    handle = addenda.attach(model, addenda.LoRA(rank=2), "all-linear")
    stir(handle)
    with handle.disabled():
        assert torch.equal(model(x), base)
    with pytest.raises(RuntimeError), handle.disabled():
        model(torch.randn(4, 5))
    assert handle.active
    handle.disable()
    with handle.disabled():
        pass
    assert not handle.active


def test_enabling_restores_the_order_of_attaching() -> None:
    model, x = pair(), torch.randn(4, 6)
    a = addenda.attach(model, addenda.LoRA(rank=2), "all-linear", name="a")
    b = addenda.attach(model, addenda.IA3(feed_forward=()), "all-linear", name="b")
    stir(a)
    stir(b)
    both = model(x)
    a.disable()
    a.enable()
    assert torch.equal(model(x), both)


def stacked(*methods: addenda.Method) -> tuple[nn.Sequential, list[addenda.Handle]]:
    model = pair()
    handles = [addenda.attach(model, m, "all-linear", name=f"n{i}") for i, m in enumerate(methods)]
    for handle in handles:
        stir(handle)
    return model, handles


def test_a_merge_that_would_change_the_order_of_effect_is_refused() -> None:
    model, (inner, outer) = stacked(addenda.LoRA(rank=2), addenda.IA3(feed_forward=()))
    x = torch.randn(4, 6)
    both = model(x)
    with pytest.raises(MethodError, match="'n1' would then act before 'n0'"):
        outer.merge()
    assert torch.equal(model(x), both)
    inner.merge()
    torch.testing.assert_close(model(x), both)
    outer.merge()
    torch.testing.assert_close(model(x), both)
    with pytest.raises(MethodError, match="cannot unmerge 'n0'"):
        inner.unmerge()
    torch.testing.assert_close(model(x), both)
    outer.unmerge()
    inner.unmerge()
    assert torch.equal(model(x), both)


def test_enabling_below_a_merged_adapter_is_refused_and_detaching_it_is_not() -> None:
    model, (inner, outer) = stacked(addenda.Bottleneck(size=2), addenda.LoRA(rank=2))
    inner.disable()
    outer.merge()
    with pytest.raises(MethodError, match="cannot enable 'n0'"):
        inner.enable()
    inner.detach()
    assert outer.merged
    outer.detach()
    assert type(model[0]) is nn.Linear


def test_adapters_that_only_add_merge_in_any_order() -> None:
    model, (inner, outer) = stacked(addenda.LoRA(rank=2), addenda.LoRA(rank=3))
    x = torch.randn(4, 6)
    both = model(x)
    outer.merge()
    torch.testing.assert_close(model(x), both)
    inner.merge()
    outer.unmerge()
    torch.testing.assert_close(model(x), both)


def test_merging_into_a_computed_weight_is_refused_and_changes_nothing() -> None:
    model, x = pair(), torch.randn(4, 6)
    nn.utils.parametrizations.weight_norm(model[0])
    handle = addenda.attach(model, addenda.LoRA(rank=2), "all-linear", probe=x)
    stir(handle)
    adapted = model(x)
    with pytest.raises(MethodError, match="'0' is computed"):
        handle.merge()
    assert torch.equal(model(x), adapted)


class Scaled(nn.Embedding):
    """An embedding that scales what it looks up, as Gemma's does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3.0


class Same(nn.Linear):
    """A linear layer with a forward of its own that computes the same."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.t() + self.bias


def test_merging_into_a_layer_that_does_more_than_apply_its_weight_is_refused() -> None:
    model = nn.Sequential(Scaled(9, 6), Same(6, 6))
    handle = addenda.attach(model, addenda.LoRA(rank=2), ["0", "1"])
    stir(handle)
    adapted = model(torch.arange(9))
    with pytest.raises(MethodError, match=r"'0' \(Scaled\) does more than apply its weight"):
        handle.merge()
    assert torch.equal(model(torch.arange(9)), adapted)
    handle.detach()
    handle = addenda.attach(model, addenda.LoRA(rank=2), "1")
    stir(handle)
    adapted = model(torch.arange(9))
    handle.merge()
    torch.testing.assert_close(model(torch.arange(9)), adapted, rtol=1e-4, atol=1e-4)


def test_merging_without_values_is_refused() -> None:
    handle = addenda.attach(pair().to("meta"), addenda.LoRA(rank=2), "all-linear")
    with pytest.raises(MethodError, match="no values"):
        handle.merge()


def test_a_detached_handle_leaves_the_next_adapter_of_its_name_alone() -> None:
    model = pair()
    old = addenda.attach(model, addenda.LoRA(rank=2), "all-linear")
    old.detach()
    new = addenda.attach(model, addenda.LoRA(rank=2), "all-linear")
    with pytest.raises(MethodError, match="was detached"):
        old.detach()
    assert addenda.core.handles(model) == {"default": new}
    assert not model[0].weight.requires_grad


def test_state_dict_keys_of_the_base_stay_and_the_adapters_are_beside_them() -> None:
    model = pair()
    base = list(model.state_dict())
    addenda.attach(model, addenda.LoRA(rank=2), "all-linear", name="note")
    added = set(model.state_dict()) - set(base)
    assert set(base) <= set(model.state_dict())
    assert added == {f"{i}.adapters.note.{p}" for i in (0, 2) for p in "AB"}
    assert isinstance(model[0], nn.Linear)
