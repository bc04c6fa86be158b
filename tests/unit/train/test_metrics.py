from __future__ import annotations

import json

import pytest

from addenda.train.events import EvalEvent, NoticeEvent, ResumeEvent, StartEvent, StepEvent
from addenda.train.metrics import MetricsLog, read_metrics


def start(step=0, *, resumed=False):
    return StartEvent(step, resumed, 9, 1, 3, 0, 5, 1e-3, 8, "1 thread", "100 MiB", "float32", "packed", "")


def stepped(step):
    return StepEvent(step, 9, step / 9, 1.5, 1e-3, 0.1, 10, 5, 100.0, 1.0, 2.0)


def steps_in(path):
    return [line["step"] for line in read_metrics(path) if line["event"] == "step"]


def test_every_event_is_one_line_that_is_there_at_once(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    events = [start(), stepped(1), EvalEvent(1, 0.1, {"nll_per_token": 2.5}, best=True, seconds=1.0)]
    for count, event in enumerate(events, 1):
        log(event)
        assert len(read_metrics(log.path)) == count
    assert read_metrics(log.path)[2] == {
        "event": "eval", "step": 1, "epoch": 0.1, "metrics": {"nll_per_token": 2.5}, "best": True, "seconds": 1.0
    }  # fmt: skip


def test_resuming_drops_the_steps_that_are_run_again(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for event in [start(), *map(stepped, range(1, 8))]:
        log(event)
    again = MetricsLog(log.path)
    for event in [ResumeEvent(4, "step-000004", ()), start(4, resumed=True), *map(stepped, range(5, 10))]:
        again(event)
    assert steps_in(log.path) == list(range(1, 10))


def test_resuming_before_the_first_step_keeps_the_evaluation_of_the_base(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for event in [start(), EvalEvent(0, 0.0, {"nll_per_token": 3.0}, best=False, seconds=1.0), stepped(1)]:
        log(event)
    for event in [ResumeEvent(0, "step-000000", ()), start(0, resumed=True), stepped(1)]:
        log(event)
    assert [line["event"] for line in read_metrics(log.path)].count("eval") == 1
    assert steps_in(log.path) == [1]


def test_a_run_that_is_not_resumed_begins_an_empty_file(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for event in [start(), stepped(1), start(), NoticeEvent(0, "grüße"), stepped(1)]:
        log(event)
    assert [line["event"] for line in read_metrics(log.path)] == ["start", "notice", "step"]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_cut_short_by_a_crash_is_left_out_and_then_removed(tmp_path, cut):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for event in [start(), stepped(1), stepped(2)]:
        log(event)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-cut])
    assert steps_in(log.path) == [1]
    log(ResumeEvent(1, "step-000001", ()))
    log(stepped(2))
    assert steps_in(log.path) == [1, 2]
    assert all(json.loads(line) for line in log.path.read_text().splitlines())
