"""Real runs on a tiny Llama: what is learned is what the mathematics says, and what is kept is the best."""

from __future__ import annotations

import math

import pytest
import torch
import train_tiny as tiny
from torch.nn import functional as F

from addenda import LoRA
from addenda.errors import ConfigError, DataError, OutOfMemory, TrainingError
from addenda.train.batches import RowOrder
from addenda.train.config import TrainConfig
from addenda.train.evaluation import heldout_nll
from addenda.train.events import EvalEvent, NoticeEvent, StartEvent, StepEvent
from addenda.train.loop import train
from addenda.train.session import Session
from addenda.train.state import adapter_tensors, digest_of_tensors


def go(folder, base, handle, rows, heldout=(), *, events=None, **settings):
    """Train with the given settings; ``events`` collects what happens."""
    options = {key: settings.pop(key) for key in ("evaluate", "resume", "identity") if key in settings}
    config = TrainConfig(**{"save_every_minutes": None, "threads": 1, **settings})
    tell = (lambda event: None) if events is None else events.append
    return train(base, handle, rows, list(heldout), config, run_dir=folder, on_event=tell, **options)


def base_digest(base):
    weights = {n: p for n, p in base.model.state_dict().items() if ".adapters." not in n}
    return digest_of_tensors(weights)


def test_eight_rows_are_learned_by_heart_and_the_base_is_untouched(tmp_path):
    base = tiny.make_base()
    before = base_digest(base)
    handle = tiny.attach(base, rank=16, dropout=0.0)
    rows, events = tiny.make_rows(8), []
    result = go(tmp_path, base, handle, rows, events=events, epochs=120, batch_size=4, learning_rate=1e-2)
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    assert losses[0] > 4.0
    assert losses[-1] < 0.05
    assert base_digest(base) == before
    assert result.steps == len(losses) == 240
    assert result.epochs == 120
    tokens, trained = sum(map(len, rows)), sum(row.trained_tokens for row in rows)
    assert (result.trained_tokens, result.context_tokens) == (120 * trained, 120 * (tokens - trained))


def plain_training(base, handle, rows, config):
    """The same run written out plainly: whole logits, one row at a time, PyTorch's own AdamW; returns the losses."""
    order, losses = RowOrder(len(rows), config), []
    optimizer = torch.optim.AdamW(handle.parameters(), lr=config.learning_rate, weight_decay=0.0)
    for step in range(order.steps):
        batch = [rows[index] for index in order.rows_of(step)]
        nll, count = 0.0, sum(row.trained_tokens for row in batch)
        for row in batch:
            ids = torch.tensor(row.input_ids)
            logits = base.model(input_ids=ids[None]).logits[0]
            each = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
            nll = nll + each[torch.tensor(row.trained[1:])].sum()
        optimizer.zero_grad()
        (nll / count).backward()
        torch.nn.utils.clip_grad_norm_(list(handle.parameters()), config.clip_norm)
        optimizer.step()
        losses.append(float(nll.detach() / count))
    return losses


def test_micro_batches_of_any_size_give_the_plain_runs_losses_and_weights(tmp_path):
    """In float64, and with 10 rows in steps of 4, so that the last step of each epoch is a partial one.

    Micro-batches agree to float64's last digits. With the plain run it is float32's, in which a Llama takes its norms
    whatever its weights are in.
    """
    rows = tiny.make_rows(10, seed=5)
    settings = {
        "epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0,
        "clip_norm": 0.5,
    }  # fmt: skip
    plain = tiny.make_base(dtype=torch.float64)
    plain_handle = tiny.attach(plain, dropout=0.0)
    expected = plain_training(plain, plain_handle, rows, TrainConfig(**settings))

    runs = []
    for tokens in (1, 25, 100_000):
        base, events = tiny.make_base(dtype=torch.float64), []
        handle = tiny.attach(base, dropout=0.0)
        go(
            tmp_path / str(tokens),
            base,
            handle,
            rows,
            events=events,
            tokens_per_micro_batch=tokens,
            **settings,
        )
        losses = [event.loss for event in events if isinstance(event, StepEvent)]
        assert losses == pytest.approx(expected, rel=1e-6)
        runs.append((losses, adapter_tensors(handle)))

    first, whole = runs[0], runs[-1]
    for losses, weights in runs[1:]:
        assert losses == pytest.approx(first[0], rel=1e-12)
        for name, value in weights.items():
            torch.testing.assert_close(value, first[1][name], rtol=0, atol=1e-12, msg=name)
    for (name, theirs), ours in zip(plain_handle.named_parameters(), whole[1].values(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_same_seed_same_bits_and_another_seed_other_bits(tmp_path):
    digests = []
    for index, seed in enumerate((1, 1, 2)):
        torch.randn(index * 7 + 1)  # the caller's generator is no part of a run
        _, handle = tiny.run(tmp_path / str(index), config={"seed": seed})
        digests.append(tiny.digest(handle))
    assert digests[0] == digests[1] != digests[2]


def test_the_callers_generator_threads_and_modes_are_as_before(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    modes = [module.training for module in base.model.modules()]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    go(tmp_path, base, handle, tiny.make_rows(4), epochs=1, threads=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert [module.training for module in base.model.modules()] == modes


def test_the_adapter_drops_out_while_training_and_not_while_evaluating(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base, dropout=0.5)
    seen = []

    def evaluate():
        seen.append([adapter.training for adapter in handle.adapters.values()])
        seen.append([torch.is_grad_enabled()])
        return {"nll_per_token": 1.0}

    def tell(event):
        if isinstance(event, StepEvent):
            assert all(adapter.training for adapter in handle.adapters.values())
            assert not base.model.training

    config = TrainConfig(epochs=1, batch_size=2, threads=1)
    train(base, handle, tiny.make_rows(4), [], config, run_dir=tmp_path, on_event=tell, evaluate=evaluate)
    assert seen
    assert not any(flag for flags in seen for flag in flags)


def test_early_stopping_keeps_the_best_adapter(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    scores = iter([5.0, 4.0, 3.0, 3.5, 3.25, 3.0, 1.0])
    copies, events = [], []

    def evaluate():
        copies.append(adapter_tensors(handle))
        return {"nll_per_token": next(scores), "accuracy": 0.5}

    result = go(
        tmp_path, base, handle, tiny.make_rows(8), events=events, evaluate=evaluate, epochs=9, batch_size=2,
        eval_every_steps=2, patience=3,
    )  # fmt: skip
    assert result.stopped_early
    assert (result.best_step, result.steps) == (4, 10)
    assert digest_of_tensors(adapter_tensors(handle)) == digest_of_tensors(copies[2])
    assert [e.best for e in events if isinstance(e, EvalEvent)] == [False, True, True, False, False, False]
    assert [entry["step"] for entry in result.history] == [0, 2, 4, 6, 8, 10]
    assert result.history[0]["metrics"] == {"nll_per_token": 5.0, "accuracy": 0.5}


def test_an_adapter_worse_than_the_base_is_kept_and_said(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    scores, events = iter([1.0, 2.0, 3.0, 4.0, 5.0]), []
    result = go(
        tmp_path, base, handle, tiny.make_rows(4), events=events, epochs=2, batch_size=2, patience=None,
        evaluate=lambda: {"nll_per_token": next(scores)},
    )  # fmt: skip
    assert result.best_step == 1
    notices = [event.message for event in events if isinstance(event, NoticeEvent)]
    assert any("no adapter is better than the base" in text for text in notices)


def test_without_heldout_rows_the_last_adapter_is_kept_and_said(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    events = []
    result = go(tmp_path, base, handle, tiny.make_rows(4), events=events, epochs=2)
    assert (result.best_step, result.history) == (2, ())
    assert any("no held-out rows" in event.message for event in events if isinstance(event, NoticeEvent))


def test_own_evaluation_is_the_mean_over_all_heldout_tokens(tmp_path):
    base = tiny.make_base(dtype=torch.float64)
    handle = tiny.attach(base)
    heldout, events = tiny.make_rows(6, seed=9), []
    total = 0.0
    for row in heldout:
        ids = torch.tensor(row.input_ids)
        with torch.no_grad():
            each = F.cross_entropy(base.model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total += float(each[torch.tensor(row.trained[1:])].sum())
    go(tmp_path, base, handle, tiny.make_rows(4), heldout, events=events, epochs=1)
    first = next(event for event in events if isinstance(event, EvalEvent))
    assert first.step == 0
    assert first.metrics["nll_per_token"] == pytest.approx(
        total / sum(r.trained_tokens for r in heldout), rel=1e-6
    )


def test_events_tell_the_whole_run(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    rows, events = tiny.make_rows(5), []
    go(
        tmp_path,
        base,
        handle,
        rows,
        tiny.make_rows(2),
        events=events,
        epochs=2,
        batch_size=2,
        learning_rate=0.01,
    )
    start = events[0]
    assert isinstance(start, StartEvent)
    assert (start.of_steps, start.rows, start.heldout_rows, start.path) == (6, 5, 2, "packed")
    assert start.trainable_parameters == handle.trainable_parameters
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event.epoch for event in steps] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]
    assert sum(event.tokens for event in steps) == 2 * sum(map(len, rows))
    assert steps[-1].eta_seconds == 0
    assert all(event.tokens_per_second > 0 and event.grad_norm > 0 and event.lr > 0 for event in steps)
    assert [event.seconds for event in steps] == sorted(event.seconds for event in steps)


def test_the_methods_own_learning_rate_is_taken(tmp_path):
    base, events = tiny.make_base(), []
    handle = tiny.attach(base)
    go(tmp_path, base, handle, tiny.make_rows(4), events=events, epochs=4)
    assert events[0].learning_rate == handle.method.learning_rate
    assert max(e.lr for e in events if isinstance(e, StepEvent)) == handle.method.learning_rate


def test_a_methods_hooks_run_at_every_update(tmp_path, monkeypatch):
    base, events, updates = tiny.make_base(), [], []
    handle = tiny.attach(base)
    before = {name: p.detach().clone() for name, p in handle.named_parameters()}

    def after_update(_, adapters, *, step, of_steps):
        there = all(p.grad is not None for adapter in adapters.values() for p in adapter.parameters())
        updates.append((step, of_steps, there))

    monkeypatch.setattr(LoRA, "penalty", lambda _, adapters: 1e6 * sum(a.A.sum() for a in adapters.values()))
    monkeypatch.setattr(LoRA, "rate_of", lambda _, parameter: {"A": 0.0}.get(parameter, 1.0))
    monkeypatch.setattr(LoRA, "after_update", after_update)
    go(tmp_path, base, handle, tiny.make_rows(10), events=events, epochs=2, clip_norm=None)
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert updates == [(event.step, len(steps), True) for event in steps]
    assert all(event.grad_norm > 1e6 for event in steps), "the penalty's gradient is part of the step's"
    assert all(event.loss < 100 for event in steps), "the loss that is told is that of the data"
    moved = {name for name, p in handle.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith(".B")}, "a rate of 0 moves nothing"


def test_rows_without_a_trained_token_are_left_out_and_said(tmp_path):
    base, events = tiny.make_base(), []
    handle = tiny.attach(base)
    rows = tiny.make_rows(5)
    silent = [type(row)(row.input_ids, (False,) * len(row), row.row) for row in tiny.make_rows(3, seed=8)]
    go(tmp_path / "some", base, handle, [*rows, *silent], events=events, epochs=1)
    assert any("3 rows have no token to train on" in e.message for e in events if isinstance(e, NoticeEvent))
    with pytest.raises(DataError, match="no row has a token to train on"):
        go(tmp_path / "none", base, handle, silent)


def test_a_base_in_bfloat16_is_trained_with_an_adapter_in_float32(tmp_path):
    base = tiny.make_base(dtype=torch.bfloat16)
    handle = tiny.attach(base)
    events = []
    go(tmp_path, base, handle, tiny.make_rows(8), events=events, epochs=10, learning_rate=1e-2)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    assert losses[-1] < losses[0] - 0.5
    assert events[0].dtype == "bfloat16"


# --------------------------------------------------------------------------------------- what stops a run, and when


def stopped(folder, base, handle, rows, error=TrainingError, **settings):
    """Run into an error; returns it and the adapter before and after."""
    with pytest.raises(error) as caught:
        go(folder, base, handle, rows, **settings)
    return caught.value


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    rows = [row for row in tiny.make_rows(40) if 7 not in row.input_ids][:9]
    poisoned = type(rows[0])(
        (5, 7, 11, 13), (False, True, True, True), type(rows[0].row)("rows.jsonl", 77, 76)
    )
    with torch.no_grad():
        base.model.get_input_embeddings().weight[7] = math.nan
    before = tiny.digest(handle)
    error = stopped(
        tmp_path, base, handle, [*rows, poisoned], batch_size=10, tokens_per_micro_batch=1, epochs=1,
    )  # fmt: skip
    assert "step 1" in error.message
    assert error.where["rows"] == "rows.jsonl:77"
    assert tiny.digest(handle) == before
    assert error.exit_code == 1


def test_a_gradient_that_is_not_finite_stops_before_the_update_and_names_the_tensor(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    rows, digests = tiny.make_rows(4), []
    name, parameter = list(handle.named_parameters())[3]
    parameter.register_hook(lambda gradient: gradient * (math.inf if len(digests) == 2 else 1.0))

    with pytest.raises(TrainingError, match="gradient is not finite in step 3") as caught:
        train(
            base, handle, rows, [], TrainConfig(epochs=5, batch_size=4, threads=1), run_dir=tmp_path,
            on_event=lambda event: digests.append(tiny.digest(handle)) if isinstance(event, StepEvent) else None,
        )  # fmt: skip
    assert caught.value.where["tensor"] == name
    assert set(caught.value.where["rows"].split(", ")) == {str(row.row) for row in rows}
    assert tiny.digest(handle) == digests[-1]


def test_an_adapter_that_is_no_longer_finite_is_never_saved(tmp_path, monkeypatch):
    base = tiny.make_base()
    handle = tiny.attach(base)
    name, parameter = list(handle.named_parameters())[2]
    step = torch.optim.AdamW.step

    def poisoned(self, *args):
        step(self, *args)
        parameter.data[0] = math.inf if self.state[parameter]["step"] == 3 else parameter.data[0]

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    error = stopped(tmp_path, base, handle, tiny.make_rows(4), epochs=9, save_every_steps=1)
    assert "no longer finite after step 3" in error.message
    assert error.where["tensor"] == name
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_an_evaluation_that_is_not_finite_or_gives_no_nll_stops_the_run(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    rows = tiny.make_rows(4)
    error = stopped(tmp_path, base, handle, rows, evaluate=lambda: {"nll_per_token": math.nan})
    assert "evaluation after step 0 is not finite" in error.message
    error = stopped(tmp_path, base, handle, rows, evaluate=lambda: {"loss": 1.0})
    assert "returned no 'nll_per_token'" in error.message


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e30])
def test_divergence_is_found_within_twenty_steps(tmp_path, rate):
    """On a base that knows its rows by heart, as a pretrained one knows its language."""
    base, rows, events = tiny.make_base(), tiny.make_rows(8), []
    learned = tiny.attach(base, rank=16, dropout=0.0)
    go(tmp_path / "1", base, learned, rows, epochs=100, batch_size=8, learning_rate=5e-3)
    learned.merge()
    handle = tiny.addenda.attach(base.model, tiny.addenda.LoRA(rank=4), name="second")
    error = stopped(
        tmp_path / "2", base, handle, rows, events=events, batch_size=4, epochs=20, learning_rate=rate
    )  # fmt: skip
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    assert losses[0] < 0.1
    assert len(losses) <= 20
    # Which number runs over first, a loss or a gradient, is the processor's affair.
    assert any(text in error.message for text in ("training diverges", "the loss is nan", "is not finite"))
    assert "train.learning_rate" in error.hint


def test_an_adapter_that_receives_no_gradient_is_an_error_that_names_its_layer(tmp_path):
    base = tiny.make_base()
    base.model.model.layers[1].forgotten = torch.nn.Linear(64, 64)

    def probe(model):
        return (
            model(**model.dummy_inputs).logits.sum()
            + model.model.layers[1].forgotten(torch.ones(1, 64)).sum()
        )

    method = tiny.addenda.LoRA(rank=2)
    handle = tiny.addenda.attach(base.model, method, targets=["q_proj", "forgotten"], probe=probe)
    before = tiny.digest(handle)
    error = stopped(tmp_path, base, handle, tiny.make_rows(4))
    assert "1 of 3 adapters received no gradient in step 1" in error.message
    assert error.where["layers"] == "model.layers.1.forgotten"
    assert tiny.digest(handle) == before


def test_a_run_in_which_no_weight_moved_is_an_error(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    for parameter in handle.parameters():  # zeros would move by any step
        torch.nn.init.normal_(parameter)
    error = stopped(tmp_path, base, handle, tiny.make_rows(4), epochs=1, learning_rate=1e-30)
    assert "no weight of the adapter moved" in error.message


def test_an_adapter_that_cannot_train_is_refused_before_anything_runs(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    handle.disable()
    assert "is disabled" in stopped(tmp_path, base, handle, tiny.make_rows(4)).message
    handle.enable()
    handle.merge()
    assert "is merged" in stopped(tmp_path, base, handle, tiny.make_rows(4)).message
    handle.unmerge()
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    assert "no parameter" in stopped(tmp_path, base, handle, tiny.make_rows(4)).message


def test_too_little_memory_names_settings_that_help(tmp_path, monkeypatch):
    base = tiny.make_base()
    handle = tiny.attach(base)

    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000 bytes")

    monkeypatch.setattr("addenda.train.loop.packed_loss", full)
    error = stopped(tmp_path, base, handle, tiny.make_rows(4), error=OutOfMemory, tokens_per_micro_batch=64)
    assert error.where["asked for"] == "8,000 bytes"
    assert "train.tokens_per_micro_batch=32 (now 64)" in error.hint
    assert "data.max_tokens=" in error.hint
    assert "method.rank=2 (now 4)" in error.hint


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    tiny.run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run") as caught:
        tiny.run(tmp_path)
    assert "--resume" in caught.value.hint
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_heldout_nll_does_not_depend_on_how_rows_are_packed():
    from addenda.bases.packed import PackedModel

    packed = PackedModel(tiny.make_base(dtype=torch.float64).model)
    rows = tiny.make_rows(9)
    values = [heldout_nll(packed, rows, tokens=tokens)["nll_per_token"] for tokens in (1, 30, 10**6)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-12)


def test_a_run_that_cannot_fit_ends_before_its_first_step_with_the_ledger_and_what_to_set(tmp_path):
    base = tiny.make_base()
    handle = tiny.attach(base)
    events = []
    with pytest.raises(OutOfMemory) as caught:
        go(tmp_path, base, handle, tiny.make_rows(4), epochs=1, memory_gib=0.05, events=events)
    assert caught.value.exit_code == 5
    for item in ("present", "trained", "activations", "scores", "overhead"):
        assert item in caught.value.where["needed"]
    assert "train.memory_gib=" in caught.value.hint
    assert not [event for event in events if isinstance(event, StepEvent)]


@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_that_run_again_change_no_bit_of_the_adapter(tmp_path, monkeypatch, blocks):
    def trained(name):
        base = tiny.make_base()
        handle = tiny.attach(base)
        go(tmp_path / name, base, handle, tiny.make_rows(6), epochs=2, batch_size=3, seed=3)
        return digest_of_tensors(adapter_tensors(handle))

    plain = trained("plain")
    monkeypatch.setattr(Session, "recompute", lambda self, tokens: min(blocks, self.memory.blocks))
    assert trained("again") == plain


def test_kernels_off_learns_the_same_within_rounding(tmp_path):
    def losses(kernels):
        base = tiny.make_base()
        handle, events = tiny.attach(base, dropout=0.0), []
        go(
            tmp_path / kernels,
            base,
            handle,
            tiny.make_rows(6),
            epochs=3,
            batch_size=3,
            kernels=kernels,
            events=events,
        )
        (started,) = [event for event in events if isinstance(event, StartEvent)]
        return started.machine, [event.loss for event in events if isinstance(event, StepEvent)]

    (said, plain), (_, fast) = losses("off"), losses("auto")
    assert "no compiled kernels (switched off)" in said
    assert fast == pytest.approx(plain, rel=1e-4)
