"""What miniatures tell of the whole model; times by synthetic clocks, memory by the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import addenda
from addenda.bases.empty import empty_model
from addenda.bases.packed import PackedModel
from addenda.core import attach, plan
from addenda.train import TrainConfig
from addenda.train.calibration import Calibration, Cost, _solved, calibrate
from addenda.train.energy import EnergyMeter
from addenda.train.evaluation import training_mode
from addenda.train.forecast import RowSize, Workload, forecast
from addenda.train.memory import MemoryModel, measure_memory

SIZES = {"vocab_size": 96, "num_hidden_layers": 5, "hidden_size": 64, "intermediate_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, **HEADS),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, **HEADS, sliding_window=8, layer_types=["sliding_attention"] * 4 + ["full_attention"]
    ),
    "gpt2": transformers.GPT2Config(vocab_size=96, n_layer=5, n_embd=64, n_head=4),
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("method", "last"), [(addenda.LoRA(rank=4), 5), (addenda.LoRA(rank=4), 2), (addenda.IA3(), 5)]
)
def test_memory_counted_on_miniatures_is_that_of_the_whole_model(family: str, method, last: int) -> None:
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family])
    every = [row.path for row in plan(model, method, "all-linear").rows]
    targets = [path for path in every if any(f".{n}." in path for n in range(5 - last, 5))]
    empty = empty_model(transformers.AutoModelForCausalLM, CONFIGS[family], torch.float32)
    planned = plan(empty, method, targets)
    calibration = calibrate(empty, planned, TrainConfig(), tokens=256)

    handle = attach(model, method, targets)
    packed = PackedModel(model)
    with training_mode(model, handle):
        whole = measure_memory(handle, packed)
    ours = calibration.memory
    assert ours.trained == whole.trained
    assert ours.vocabulary == whole.vocabulary
    assert ours.kept_per_token == pytest.approx(whole.kept_per_token, rel=0.02)
    assert calibration.path == packed.path
    assert dict(calibration.fused) == dict(packed.fused)
    assert sum(count for count, _, _ in calibration.blocks) == 5
    assert ours.blocks == whole.blocks == last
    assert ours.least_per_token == pytest.approx(whole.least_per_token, rel=0.02)


def test_three_timings_give_the_three_costs_back() -> None:
    true = Cost(*torch.rand(3, dtype=torch.float64).tolist())
    plans = ([128] * 2, [128] * 8, [1024])
    found = _solved(plans, [true.seconds(lengths) for lengths in plans])
    for name in ("fixed", "per_token", "per_pair"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6, abs=1e-6)


def test_of_a_slow_model_few_tokens_stand_for_many() -> None:
    plans = ([128] * 2, [128] * 2, [256])
    found = _solved(plans, [2.0, 2.0, 3.0])
    assert found.seconds([256]) == pytest.approx(3.0)
    assert found.seconds([128] * 4) == pytest.approx(4.0)


def test_a_window_bounds_the_pairs() -> None:
    length, window = 37, 9
    seen = sum(min(i + 1, window) for i in range(length))
    pairs = Cost(per_pair=1.0, window=window).seconds([length])
    assert pairs == pytest.approx(2 * seen, abs=length)  # the diagonal is one wide, not two


def calibration_of(**changes) -> Calibration:
    values = {
        "blocks": ((4, Cost(per_token=1e-3), Cost(per_token=4e-4)),),
        "around": Cost(fixed=0.1),
        "scores": Cost(per_token=1e-2),
        "update": 0.5,
        "memory": MemoryModel(
            present=10**6,
            trained=0,
            kept_per_token=1e6,
            loose_per_token=0.0,
            least_per_token=1e5,
            vocabulary=100,
            blocks=4,
        ),
        "path": "packed",
        "reason": "",
        "fused": (),
        "unfused": (),
        "watts": None,
        "seconds": 1.0,
    }
    return Calibration(**(values | changes))


def test_a_forecast_adds_up_micro_batches_steps_and_evaluations() -> None:
    costs = calibration_of(watts=20.0)
    config = TrainConfig(epochs=2, batch_size=2, tokens_per_micro_batch=512, evals_per_epoch=1)
    rows, heldout = [RowSize(200, 50)] * 4, [RowSize(100, 10)]
    found = forecast(costs, costs.memory, 2**40, Workload(config, rows, heldout))
    assert found is not None
    # Four steps of one micro-batch of 400 tokens, 100 of them trained; an evaluation before, after each epoch.
    assert (found.steps, found.tokens, found.recompute) == (4, 1600, 0)
    assert found.step_seconds == pytest.approx(4 * (4 * 0.4 + 0.1 + 1.0 + 0.5))
    assert found.evaluation_seconds == pytest.approx(3 * (4 * 0.04 + (0.1 + 0.1) / 3))
    assert found.joules == pytest.approx(20.0 * found.seconds)
    assert found.document()["ledger"]["total"] == found.ledger.total


def test_processes_deal_the_micro_batches_out_among_them() -> None:
    costs = calibration_of(around=Cost(), scores=Cost(), update=0.0)
    rows = [RowSize(400, 10), RowSize(300, 10), RowSize(200, 10)]
    config = TrainConfig(epochs=1, batch_size=3, tokens_per_micro_batch=400)
    alone, together = (
        forecast(costs, costs.memory, 2**40, Workload(config, rows, processes=n)) for n in (1, 2)
    )
    assert alone is not None
    assert together is not None
    assert alone.step_seconds == pytest.approx(4 * 0.9)
    assert together.step_seconds == pytest.approx(4 * 0.5)
    assert together.tokens == alone.tokens == 900


def test_scarce_memory_is_answered_by_what_is_soonest_over() -> None:
    costs = calibration_of()
    memory = costs.memory
    rows = [RowSize(100, 10)] * 16
    plenty = forecast(costs, memory, 2**40, Workload(TrainConfig(), rows))
    assert plenty is not None
    assert plenty.tokens_per_micro_batch == 1024
    limit = memory.ledger(512, 0).total
    scarce = forecast(costs, memory, limit, Workload(TrainConfig(), rows))
    assert scarce is not None
    assert (scarce.tokens_per_micro_batch, scarce.recompute) == (512, 0)
    # A micro-batch that costs a minute for being one is better made again in parts than cut.
    slow = calibration_of(around=Cost(fixed=60.0))
    again = forecast(slow, memory, limit, Workload(TrainConfig(), rows))
    assert again is not None
    assert again.tokens_per_micro_batch == 1024
    assert 0 < again.recompute <= 4
    assert again.ledger.total <= limit
    assert forecast(costs, memory, 2**20, Workload(TrainConfig(), rows)) is None


def test_a_long_run_is_forecast_from_a_part_of_its_steps() -> None:
    costs = calibration_of()
    rows = [RowSize(10 + n % 90, 5) for n in range(1000)]
    config = TrainConfig(epochs=3, batch_size=2, tokens_per_micro_batch=128)
    found = forecast(costs, costs.memory, 2**40, Workload(config, rows))
    assert found is not None
    assert found.steps == 1500
    assert found.tokens == pytest.approx(3 * sum(row.tokens for row in rows), rel=0.1)


def test_power_is_read_from_the_packages_counters_and_their_overflow(tmp_path: Path) -> None:
    package, part = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0:0"
    for folder in (package, part):
        folder.mkdir()
        (folder / "energy_uj").write_text("4000000")
        (folder / "max_energy_range_uj").write_text("5000000")
    meter = EnergyMeter(tmp_path)
    meter._began -= 10.0  # ten seconds ago
    (package / "energy_uj").write_text("1000000")
    (part / "energy_uj").write_text("4900000")
    assert meter.watts() == pytest.approx(0.2, rel=0.01)  # two joules: the counter went round
    (package / "energy_uj").write_text("no number")
    assert meter.watts() is None
