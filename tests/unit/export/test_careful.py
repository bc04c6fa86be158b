"""A careful merge into few bits: errors that make up for each other, and layers that are kept wider."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.bases import formats
from addenda.errors import ConfigError
from addenda.export.careful import (
    MergedLayer,
    answering_as,
    careful_merge,
    compensated,
    kept_wide,
    mean_kl,
    plain_merge,
)

GRIDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "NF4", "INT8"]


def alike(count: int, d_in: int) -> Tensor:
    """Inputs that lie near a few directions, as those of a real layer do: (count, d_in)."""
    return torch.randn(count, 6) @ torch.randn(6, d_in) + 0.1 * torch.randn(count, d_in)


@pytest.mark.parametrize("name", GRIDS)
def test_the_outputs_change_less_than_by_plain_rounding(name: str) -> None:
    weight, x = torch.randn(24, 128), alike(400, 128)
    entry = formats.get(name)
    plain, careful = entry.quantize(weight), compensated(weight, x.t() @ x, entry)
    assert careful.shape == plain.shape
    lost = [((entry.dequantize(raw, 128) - weight) @ x.t()).norm() for raw in (plain, careful)]
    assert lost[1] < 0.5 * lost[0]
    if name not in {"NF4", "INT8"}:
        back = gguf.quants.dequantize(careful.numpy(), gguf.GGMLQuantizationType[name])
        assert torch.equal(torch.from_numpy(back), entry.dequantize(careful, 128))


@pytest.mark.parametrize("name", GRIDS)
def test_rows_of_zeros_and_inputs_never_seen_do_no_harm(name: str) -> None:
    weight, x, entry = torch.randn(6, 64), torch.randn(50, 64), formats.get(name)
    weight[2], x[:, 40:] = 0, 0
    back = entry.dequantize(compensated(weight, x.t() @ x, entry), 64)
    assert not back[2].any()
    assert (back - weight).norm() < 0.3 * weight.norm()


def test_a_change_smaller_than_half_a_step_is_not_rounded_away_from_a_weight_on_the_grid() -> None:
    entry, x = formats.get("Q4_1"), alike(300, 128)
    weight = entry.dequantize(entry.quantize(torch.randn(24, 128)), 128)
    change = torch.randn(24, 2) @ torch.randn(2, 128) * 0.03
    lost = []
    for raw in (entry.quantize(weight + change), compensated(weight + change, x.t() @ x, entry)):
        lost.append(float(((entry.dequantize(raw, 128) - weight - change) @ x.t()).norm()))
    assert lost[1] < 0.5 * lost[0]
    assert lost[1] < 0.5 * float((change @ x.t()).norm())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(**settings: object) -> addenda.Handle:
    handle = addenda.attach(Net(), addenda.LoRA(rank=4, **settings))
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.1)
    return handle


def test_a_model_answers_as_its_merge_inside_the_block_alone() -> None:
    handle = adapted(bias=True)
    x = torch.randn(9, 64)
    model = handle.model
    before = model(x)
    merged = plain_merge(handle, "q4_0")
    with answering_as(handle, merged) as use:
        inner = torch.tanh(x @ merged["up"].weight(64).t() + merged["up"].bias)
        assert torch.allclose(
            model(x), inner @ merged["down"].weight(128).t() + merged["down"].bias, atol=1e-4
        )
        use(plain_merge(handle, "f32"))
        assert torch.allclose(model(x), before, atol=1e-4)
    assert torch.equal(model(x), before)
    assert list(addenda.handles(model)) == ["default"]


def test_a_careful_merge_is_nearer_to_the_adapted_model() -> None:
    handle = adapted()
    model, x = handle.model, alike(300, 64)
    wanted = model(x).detach()
    seen = []
    careful = careful_merge(handle, "q4_0", [x], on_progress=seen.append)
    assert [layer.format for layer in careful.values()] == ["Q4_0", "Q4_0"]
    assert seen[-1].done == 2
    lost = []
    for merged in (plain_merge(handle, "q4_0"), careful):
        with answering_as(handle, merged):
            lost.append(float((model(x).detach() - wanted).norm()))
    assert lost[1] < 0.6 * lost[0]


def test_a_careful_merge_is_refused_where_it_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match="IQ4_NL cannot be chosen"):
        careful_merge(adapted(), "iq4_nl", [torch.randn(3, 64)])
    handle = addenda.attach(Net(), addenda.LoRA(rank=4), through="q4_1")
    with pytest.raises(ConfigError, match="exact as it is"):
        careful_merge(handle, "q4_1", [torch.randn(3, 64)])


def test_the_layers_that_lose_most_for_a_byte_are_kept_wide_within_the_budget() -> None:
    handle = adapted()
    model, x = handle.model, torch.randn(50, 64)
    wanted = model(x).detach()

    def cost() -> float:
        with torch.no_grad():
            return float((model(x) - wanted).square().mean())

    merged = plain_merge(handle, "q4_0")
    gains = {}
    for path in merged:
        with answering_as(handle, merged) as use:
            before = cost()
            use({path: plain_merge(handle, "q8_0")[path]})
            gains[path] = before - cost()
    more = {"up": 128 * 2 * 16, "down": 32 * 4 * 16}  # 16 bytes more for each 32 weights
    best = max(gains, key=lambda path: gains[path] / more[path])
    one = kept_wide(handle, merged, cost, more[best])
    assert {path: layer.format for path, layer in one.items()} == {
        path: "Q8_0" if path == best else "Q4_0" for path in merged
    }
    assert all(layer.format == "Q4_0" for layer in kept_wide(handle, merged, cost, 10).values())
    assert all(layer.format == "Q8_0" for layer in kept_wide(handle, merged, cost, 10**6).values())


def test_the_kl_of_the_same_is_zero_and_of_others_that_of_its_definition() -> None:
    a, b = torch.randn(7, 11), torch.randn(7, 11)
    assert mean_kl([a], [a]) == pytest.approx(0, abs=1e-6)
    by_torch = nn.functional.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")
    assert mean_kl([a[:3], a[3:]], [b[:3], b[3:]]) == pytest.approx(float(by_torch), rel=1e-4)


def test_a_merged_layer_is_read_back_by_its_format() -> None:
    weight = torch.randn(4, 64)
    entry = formats.get("Q5_1")
    layer = MergedLayer("Q5_1", entry.quantize(weight), None)
    assert torch.equal(layer.weight(64), entry.dequantize(layer.rows, 64))
